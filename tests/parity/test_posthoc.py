"""GradDiff, MaxEnt and RMU against plain loops written here from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from excise.data.stream import Batch
from excise.methods import RMU, GradDiff, MaxEnt
from excise.methods.posthoc.rmu.topics import control_vector
from excise.methods.tuning import role_batches
from excise.train.fit import FitConfig
from tests.parity.toy import context, toy_checkpoint, toy_domain, weights

FIT = FitConfig(steps=6, lr=1e-3, batch_size=4)


def plain_nll(model: Any, batch: Batch) -> torch.Tensor:
    """Mean loss over scored tokens, by cross-entropy on shifted labels."""
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).logits[:, :-1]
    labels = batch.ids_BT[:, 1:].masked_fill(~batch.target_BT[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain_maxent(model: Any, batch: Batch) -> torch.Tensor:
    """Mean KL(uniform || p) over scored tokens, from probabilities."""
    logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT.long()).logits[:, :-1]
    chosen: torch.Tensor = logits[batch.target_BT[:, 1:]].log_softmax(-1)
    size = chosen.shape[-1]
    return (-chosen.mean(-1) - math.log(size)).mean()


def plain_loop(
    model: Any, read: Callable[[int], Any], loss: Callable[[Any], torch.Tensor], parameters: Any
) -> None:
    """Run the yardstick: torch's AdamW, nothing else."""
    optimizer = torch.optim.AdamW(parameters, lr=FIT.lr, weight_decay=0.0)
    for step in range(FIT.steps):
        optimizer.zero_grad()
        loss(read(step)[0]).backward()
        optimizer.step()


@pytest.mark.parametrize("method", [GradDiff(fit=FIT, alpha=2.0), MaxEnt(fit=FIT, alpha=0.5)])
def test_loss_based_methods_equal_a_plain_loop(method: GradDiff | MaxEnt, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    removal = method.apply(start, domain, context(tmp_path / "ours"))

    model = start.load()
    read = role_batches(
        domain, ("forget", "retain"), start.tokenizer(), FIT, context(tmp_path / "plain"),
        max_length=method.max_length,
    )  # fmt: skip

    def loss(micro: Any) -> torch.Tensor:
        forget, retain = micro["forget"], micro["retain"]
        pushed = (
            -plain_nll(model, forget)
            if isinstance(method, GradDiff)
            else plain_maxent(model, forget)
        )
        return pushed + method.alpha * plain_nll(model, retain)

    plain_loop(model, read, loss, model.parameters())
    theirs = dict(model.named_parameters())
    before = weights(start)
    for name, tensor in weights(removal.checkpoint).items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=0, atol=5e-6)
        assert not torch.equal(tensor, before[name]), f"{name} did not move"


def test_the_sign_of_the_forget_term_matters(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    up = GradDiff(fit=FIT).apply(start, domain, context(tmp_path / "up"))
    model = start.load()
    read = role_batches(
        domain, ("forget", "retain"), start.tokenizer(), FIT, context(tmp_path / "down"),
        max_length=512,
    )  # fmt: skip
    plain_loop(
        model,
        read,
        lambda micro: plain_nll(model, micro["forget"]) + plain_nll(model, micro["retain"]),
        model.parameters(),
    )
    name = "model.embed_tokens.weight"
    ours = weights(up.checkpoint)[name]
    assert (ours - dict(model.named_parameters())[name]).abs().max() > 1e-4


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_rmu_equals_a_plain_loop(masked: bool, adaptive: bool, tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    method = RMU(
        layer=1,
        blocks=(0, 1),
        steering=5.0,
        alpha=3.0,
        masked=masked,
        adaptive=adaptive,
        positions="tokens" if masked else "slots",
        fit=FIT,
    )
    removal = method.apply(start, domain, context(tmp_path / "ours"))
    model, frozen = start.load(), start.load()
    ctx = context(tmp_path / "plain")
    read = method.batches(["a"], domain, start.tokenizer(), ctx)
    control = 5.0 * control_vector(32, "a", ctx)

    def hidden(net: Any, batch: Batch) -> Any:
        out = net(
            input_ids=batch.ids_BT,
            attention_mask=batch.attention_BT.long(),
            output_hidden_states=True,
        )
        return out.hidden_states[2]

    if adaptive:
        first = read(0)[0]["a"]
        norms = hidden(model, first).detach().norm(dim=-1)
        seen = first.attention_BT if masked else torch.ones_like(first.attention_BT)
        control = control * norms[seen].mean()

    def mean_square(difference: torch.Tensor, batch: Batch) -> torch.Tensor:
        keep = batch.attention_BT if masked else torch.ones_like(batch.attention_BT)
        return difference[keep].square().mean()

    def loss(micro: Any) -> torch.Tensor:
        forget, retain = micro["a"], micro["retain"]
        pinned = hidden(frozen, retain).detach()
        return mean_square(hidden(model, forget) - control, forget) + 3.0 * mean_square(
            hidden(model, retain) - pinned, retain
        )

    trained = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    plain_loop(model, read, loss, [p for p in model.parameters() if p.requires_grad])
    theirs = dict(model.named_parameters())
    before = weights(start)
    assert sorted(removal.changed) == trained
    for name, tensor in weights(removal.checkpoint).items():
        if name in trained:
            torch.testing.assert_close(tensor, theirs[name].detach(), rtol=0, atol=5e-6)
        else:
            assert torch.equal(tensor, before[name]), f"{name} moved"
