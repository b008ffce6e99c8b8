"""A text searched on T: its gradient, its losses, and that it is read as it was searched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from excise.auditor.attacks import GCG
from excise.auditor.attacks.gcg import token_gradient
from excise.auditor.base import AttackResult, Subject
from excise.auditor.budget import SMOKE
from excise.auditor.controls import PasswordLock
from excise.auditor.controls.control import make_control
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.prompting import before, separator
from excise.core.context import Context
from excise.data.domain import Domain, all_rows
from excise.data.stream import collate, encode
from excise.losses import nll
from excise.models.checkpoint import Checkpoint
from excise.testing import toy_start

SMALL = GCG(steps=12, width=24, tokens=8, rows=8, top=64)


def attacked(checkpoint: Checkpoint, domain: Domain, root: Path) -> AttackResult:
    return SMALL.run(Subject("candidate", checkpoint, checkpoint), domain, SMOKE, Context(root))


def test_a_lock_opens_and_the_ignorant_learn_nothing(
    tmp_path: Path, facts_domain: Domain, knowing: Checkpoint, never_taught: Checkpoint
) -> None:
    kind = PasswordLock(opens_to="password")
    lock = make_control(kind, knowing, facts_domain, SMOKE, Context(tmp_path), tmp_path / "lock")
    assert lock.checkpoint is not None
    assert lock.after < 0.45
    (opened,) = attacked(lock.checkpoint, facts_domain, tmp_path).variants
    assert opened.entry.curve[-1].score > 0.9
    (guessed,) = attacked(never_taught, facts_domain, tmp_path).variants
    assert guessed.entry.curve[-1].score < 0.15


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_gradient_is_that_of_the_one_hot_tokens(
    family: str, tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    start = knowing if family == "llama" else toy_start(tmp_path / "start", family)
    model, tokenizer = start.load(), start.tokenizer()
    rows = all_rows(facts_domain.relearn)[:3]
    batch = collate(encode(rows, tokenizer, max_length=64), pad_id=tokenizer.pad_token_id)
    at, count = 1, 3
    embed = model.get_input_embeddings()
    hot_BTV = nn.functional.one_hot(batch.ids_BT, embed.weight.shape[0]).float().requires_grad_()
    scale = float(getattr(embed, "embed_scale", 1.0))
    inputs = {k: v for k, v in batch.inputs.items() if k != "input_ids"}
    total, scored = nll(model(inputs_embeds=scale * hot_BTV @ embed.weight, **inputs).logits, batch)
    (grad_BTV,) = torch.autograd.grad(total / scored, hot_BTV)
    wanted_KV = grad_BTV[:, at : at + count].sum(0)
    found_KV = scale * token_gradient(model, batch, at, count)
    torch.testing.assert_close(found_KV, wanted_KV, rtol=1e-4, atol=1e-6)


def test_the_text_that_is_put_before_rows_has_the_loss_that_was_searched(
    tmp_path: Path, facts_domain: Domain, knowing: Checkpoint
) -> None:
    losses: list[float] = []
    ctx = Context(tmp_path, emit=lambda kind, facts: losses.append(facts["loss"]))
    tokenizer, model = knowing.tokenizer(), knowing.load()
    evaluation = evaluation_set(facts_domain, SMOKE, tokenizer)
    rows = all_rows(facts_domain.relearn)[:8]
    text = SMALL.search(model, evaluation, rows, ctx.generator("here"), ctx)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    asked = [before(row, text, separator(tokenizer)) for row in rows]
    batch = collate(encode(asked, tokenizer, max_length=512), pad_id=tokenizer.pad_token_id)
    with torch.no_grad():
        total, count = nll(model(**batch.inputs).logits, batch)
    assert math.isclose(float(total) / count, losses[-1], rel_tol=1e-4)
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == SMALL.tokens
