"""UNDO against ten lines: the perturbation by its formula, the loop by a plain one on logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from excise.data.domain import UNLABELED, Domain
from excise.data.stream import Batch, Stream, encode
from excise.methods import GradDiff, MaxEnt, Undo
from excise.methods.distillation.corpora import WithoutForget, mix_of
from excise.methods.distillation.perturb import initial_vectors, perturb
from excise.methods.distillation.targets import (
    FromMixture,
    FromOriginal,
    HardLabels,
    Splice,
    Targets,
)
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig
from tests.parity.toy import context, toy_checkpoint, weights
from tests.parity.toy import toy_domain as plain_domain

FIT = FitConfig(steps=6, lr=1e-3, batch_size=8)
TEACHER = GradDiff(fit=FitConfig(steps=3, lr=1e-2, batch_size=8), max_length=16)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From log-probabilities of student, teacher and original, labels and ids to a mean loss."""


def toy_domain() -> Domain:
    domain = plain_domain()
    rows = (*domain.forget["a"], *domain.retain)
    return replace(domain, unlabeled=tuple(replace(row, label=UNLABELED) for row in rows))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo2"])
def test_shrink_and_perturb_is_the_formula(family: str, tmp_path: Path) -> None:
    start, ctx, alpha, beta = toy_checkpoint(tmp_path, family), context(tmp_path / "w"), 0.6, 0.3
    model: Any = start.load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    touched = perturb(model, alpha=alpha, beta=beta, ctx=ctx)
    assert set(touched) == set(before)
    for name, parameter in model.named_parameters():
        old = before[name]
        if old.dim() > 1:
            noise = torch.empty_like(old)
            torch.nn.init.xavier_uniform_(noise, generator=ctx.generator(f"perturb/{name}"))
            expected = (1 - alpha) * old + alpha * beta * noise
        else:
            one = 1.0 if name.endswith("weight") and family != "gemma2" else 0.0
            expected = (1 - alpha) * old + alpha * one
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox"])
def test_vectors_are_initialised_as_their_family_does(family: str, tmp_path: Path) -> None:
    fresh: Any = toy_checkpoint(tmp_path, family).load()
    named = dict(fresh.named_parameters())
    found = initial_vectors(fresh)
    assert set(found) == {name for name, p in named.items() if p.dim() <= 1}
    for name, value in found.items():
        assert torch.equal(value, named[name].detach()), name


def loop(
    tmp_path: Path, student: dict[str, Tensor], teacher: Checkpoint, loss: Loss, rows: Any
) -> dict[str, Tensor]:
    """Run the yardstick: AdamW on full logits, batch by batch."""
    start = toy_checkpoint(tmp_path / "y")
    tokenizer, ctx = start.tokenizer(), context(tmp_path / "y")
    examples = encode(rows, tokenizer, max_length=16)
    read = Stream(examples, 8, ctx.seed_for("order.distil"), tokenizer.pad_token_id)
    model, frozen, original = start.load().train(), teacher.load(), start.load()
    model.load_state_dict(student, strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT.lr, weight_decay=0.0)

    def said(net: Any, batch: Batch) -> Tensor:
        ids, mask = batch.ids_BT, batch.attention_BT.long()
        logits: Tensor = net(input_ids=ids, attention_mask=mask).logits
        return logits[:, :-1][batch.target_BT[:, 1:]].log_softmax(-1)

    for step in range(FIT.steps):
        batch = read(step)[0]
        keep = batch.target_BT[:, 1:]
        label, ids = batch.label_BT[:, 1:][keep], batch.ids_BT[:, 1:][keep]
        with torch.no_grad():
            t, o = said(frozen, batch), said(original, batch)
        optimizer.zero_grad()
        loss(said(model, batch), t, o, label, ids).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def forward(s: Tensor, t: Tensor, o: Tensor, label: Tensor, ids: Tensor) -> Tensor:
    return kl(t, s).mean()


def reverse(s: Tensor, t: Tensor, o: Tensor, label: Tensor, ids: Tensor) -> Tensor:
    return kl(s, t).mean()


def spliced(s: Tensor, t: Tensor, o: Tensor, label: Tensor, ids: Tensor) -> Tensor:
    uniform = torch.full_like(s, -math.log(s.shape[-1]))
    return torch.where(label > 0, kl(uniform, s), kl(o, s)).mean()


def skipped(s: Tensor, t: Tensor, o: Tensor, label: Tensor, ids: Tensor) -> Tensor:
    return kl(o, s)[label <= 0].mean()


def hard(s: Tensor, t: Tensor, o: Tensor, label: Tensor, ids: Tensor) -> Tensor:
    return F.nll_loss(s[label <= 0], ids[label <= 0])


def blended(s: Tensor, t: Tensor, o: Tensor, label: Tensor, ids: Tensor) -> Tensor:
    return kl((0.75 * t.exp() + 0.25 * o.exp()).log(), s).mean()


def unlearned(s: Tensor, t: Tensor, o: Tensor, label: Tensor, ids: Tensor) -> Tensor:
    return torch.where(label > 0, kl(t, s), kl(o, s)).mean()


@pytest.mark.parametrize(
    ("loss", "change"),
    [
        (forward, {}),
        (reverse, {"divergence": "reverse"}),
        (spliced, {"targets": Splice()}),
        (skipped, {"targets": Splice(harmful="skip")}),
        (unlearned, {"targets": Splice(harmful="unlearned")}),
        (hard, {"targets": HardLabels()}),
        (blended, {"targets": FromMixture(weights={"unlearned": 3.0, "original": 1.0})}),
        (lambda s, t, o, label, ids: kl(o, s).mean(), {"targets": FromOriginal()}),
    ],
    ids=["forward", "reverse", "splice", "skip", "unlearned", "hard", "mixture", "original"],
)
def test_distilling_equals_a_plain_loop(loss: Loss, change: Any, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = Undo(unlearn=TEACHER, fit=FIT, max_length=16, **change)
    ctx = context(tmp_path / "ours")
    ours = weights(method.apply(start, domain, ctx).checkpoint)
    teacher = TEACHER.apply(start, domain, context(tmp_path / "teacher")).checkpoint
    student: Any = teacher.load()
    perturb(student, alpha=0.6, beta=0.1, ctx=ctx, purpose="perturb/0")
    begun = {n: p.detach().clone() for n, p in student.named_parameters()}
    theirs = loop(tmp_path, begun, teacher, loss, mix_of(domain))
    moved = max(float((theirs[n] - begun[n]).abs().max()) for n in theirs)
    off = max(float((theirs[n] - ours[n]).abs().max()) for n in theirs)
    assert moved > 3e-3
    assert off < 2e-5


def test_without_forget_reads_no_forget_row(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = Undo(unlearn=TEACHER, fit=FIT, max_length=16, corpus=WithoutForget())
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    assert removal.extras["corpus"]["forget_rows"] == 0
    assert removal.extras["corpus"]["rows_dropped"] == 12
    teacher = TEACHER.apply(start, domain, context(tmp_path / "teacher")).checkpoint
    student: Any = teacher.load()
    perturb(student, alpha=0.6, beta=0.1, ctx=context(tmp_path / "ours"), purpose="perturb/0")
    begun = {n: p.detach().clone() for n, p in student.named_parameters()}
    rows = tuple(row for row in mix_of(domain) if not row.capability)
    theirs = loop(tmp_path, begun, teacher, forward, rows)
    ours = weights(removal.checkpoint)
    assert max(float((theirs[n] - ours[n]).abs().max()) for n in theirs) < 2e-5


def test_targets_cover_what_the_factorial_needs() -> None:
    made: list[Targets] = [
        Splice(benign=benign, harmful=harmful)
        for benign in ("original", "unlearned")
        for harmful in ("unlearned", "uniform", "skip", "shuffled")
    ]
    assert len({target.canonical() for target in made}) == 8
    assert Undo(unlearn=MaxEnt()).targets.name == "teacher"
