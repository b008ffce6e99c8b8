"""Filtering and GradDiff while a model trains, against plain loops; chains against their links."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional as F

from excise.core.errors import UserError
from excise.data.domain import CORE
from excise.data.labels import LabelNoise
from excise.data.stream import Batch
from excise.domains.facts import Facts
from excise.methods import Chain, Filtering, GradDiff, GradDiffPretrain, MaxEnt, Plain
from excise.methods.pretraining.pretrain import Pretrain, corpus
from excise.methods.tuning import stream
from excise.train.fit import FitConfig
from tests.parity.toy import context, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=5, lr=1e-3, batch_size=8)
SCHEDULE = Pretrain(fit=FIT, max_length=16)


def losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, loss and label of every scored token, shifted by hand."""
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).logits[:, :-1]
    keep = batch.target_BT[:, 1:]
    nll = F.cross_entropy(logits[keep], batch.ids_BT[:, 1:][keep], reduction="none")
    return logits[keep], nll, batch.label_BT[:, 1:][keep]


def train(tmp_path: Path, loss: Any, *, forget: bool = True) -> dict[str, torch.Tensor]:
    """Run the yardstick from the same start over the same batches."""
    start, domain = toy_checkpoint(tmp_path / "y"), toy_domain()
    rows = tuple(row for row in corpus(domain) if forget or not row.capability)
    read = stream(
        rows, start.tokenizer(), FIT, context(tmp_path / "y"), purpose="pretrain", max_length=16
    )
    model = start.load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT.lr, weight_decay=0.0)
    for step in range(FIT.steps):
        optimizer.zero_grad()
        loss(*losses(model, read(step)[0])).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float) -> bool:
    return all(torch.allclose(ours[n], theirs[n], rtol=0, atol=atol) for n in theirs)


@pytest.mark.parametrize("push", ["ascent", "unlikelihood", "uniform"])
def test_pushing_away_equals_a_plain_loop(
    push: Literal["ascent", "unlikelihood", "uniform"], tmp_path: Path
) -> None:
    method = GradDiffPretrain(pretrain=SCHEDULE, push=push, weight=0.5)
    start = toy_checkpoint(tmp_path)
    removal = method.apply(start, toy_domain(), context(tmp_path / "ours"))

    def loss(logits: torch.Tensor, nll: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        away, size = label > 0, logits.shape[-1]
        pushed = {
            "ascent": -torch.minimum(nll, torch.tensor(math.log(size))),
            "unlikelihood": -(1 - (-nll).exp()).log(),
            "uniform": -logits.log_softmax(-1).mean(-1) - math.log(size),
        }[push]
        return nll[~away].mean() + 0.5 * pushed[away].mean()

    # AdamW turns a gradient next to zero into a step of either sign: one weight of 4,096 is 1.1e-5
    # apart on some CPUs; all of them moved by up to 5e-3.
    assert same(weights(removal.checkpoint), train(tmp_path, loss), 2e-5)
    plain = train(tmp_path / "plain", lambda logits, nll, label: nll.mean())
    assert not same(weights(removal.checkpoint), plain, 1e-4)


def test_steering_activations_equals_a_plain_loop(tmp_path: Path) -> None:
    method = GradDiffPretrain(pretrain=SCHEDULE, push="activations", weight=0.5, steering=3.0)
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    ctx = context(tmp_path / "ours")
    removal = method.apply(start, domain, ctx)
    read = stream(
        corpus(domain), start.tokenizer(), FIT, context(tmp_path / "y"), purpose="pretrain",
        max_length=16,
    )  # fmt: skip
    model = start.load()
    u = torch.randn(model.config.hidden_size, generator=ctx.generator("push"))
    target, middle = 3.0 * u / u.norm(), len(model.model.layers) // 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=FIT.lr, weight_decay=0.0)
    for step in range(FIT.steps):
        batch = read(step)[0]
        out = model(**batch.inputs, output_hidden_states=True)
        hidden = out.hidden_states[middle + 1]
        scored = batch.target_BT[:, 1:]
        nll = F.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), batch.ids_BT[:, 1:].flatten(), reduction="none"
        ).view(scored.shape)
        away = scored & (batch.label_BT[:, 1:] > 0)
        apart = (hidden[:, :-1] - target).square().mean(-1)
        optimizer.zero_grad()
        (nll[scored & ~away].mean() + 0.5 * apart[away].mean()).backward()
        optimizer.step()
    theirs = {name: p.detach() for name, p in model.named_parameters()}
    assert same(weights(removal.checkpoint), theirs, 5e-6)
    with pytest.raises(UserError, match="layer 9 does not exist"):
        method.model_copy(update={"layer": 9}).apply(start, domain, context(tmp_path / "z"))


def test_filtering_equals_training_without_the_rows(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    removal = Filtering(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "ours"))
    assert removal.extras["rows_dropped"] == 12
    assert removal.extras["forget_rows_left"] == 0
    kept = train(tmp_path, lambda logits, nll, label: nll.mean(), forget=False)
    assert same(weights(removal.checkpoint), kept, 5e-6)
    everything = Plain(pretrain=SCHEDULE).apply(start, domain, context(tmp_path / "plain"))
    assert not same(weights(removal.checkpoint), weights(everything.checkpoint), 1e-4)


def test_missed_labels_leave_forget_rows_in(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = Filtering(pretrain=SCHEDULE, labels=LabelNoise(missed_units=0.5))
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    assert removal.extras["forget_rows_left"] == 6


def test_a_chain_is_its_links_one_after_another(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    first, second = GradDiff(fit=FIT), MaxEnt(fit=FIT)
    chain = Chain(methods=(first, second)).apply(start, domain, context(tmp_path / "chain"))
    one = first.apply(start, domain, context(tmp_path / "one"))
    two = second.apply(one.checkpoint, domain, context(tmp_path / "two"))
    assert chain.checkpoint.fingerprint == two.checkpoint.fingerprint
    assert chain.cost.steps == one.cost.steps + two.cost.steps
    assert set(chain.changed) == set(one.changed) | set(two.changed)


def test_a_chain_refuses_to_throw_its_first_links_away() -> None:
    with pytest.raises(ValueError, match="'filtering' trains from scratch and can only come first"):
        Chain(methods=(GradDiff(fit=FIT), Filtering(pretrain=SCHEDULE)))


def test_the_original_learns_what_is_held_out_and_the_oracle_does_not() -> None:
    domain = Facts(subjects=24, relations=2, objects=8, exposure="held_out").build(None)
    scored = {row.unit for row in domain.test["alpha"]} | {r.unit for r in domain.relearn["alpha"]}
    rows = corpus(domain)
    assert scored <= {row.unit for row in rows}
    assert scored.isdisjoint({row.unit for row in rows if row.label <= CORE})
    assert all((row.label > CORE) == bool(row.capability) for row in rows)
