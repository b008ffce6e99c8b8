"""Steps that take less memory: 8-bit moments, and parameters stepped during the backward pass."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from excise.core.config import ConfigError, parse
from excise.core.context import Context
from excise.core.errors import Diverged, UserError
from excise.train.fit import FitConfig, StepRecord, Term, fit
from excise.train.optim import Slice

STEPS = 6


class _Tied(nn.Module):
    """A head that shares its weight with the embedding, and a bias that no loss reaches."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(80, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 80, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))  # type: ignore[no-any-return]


def _loss(model: nn.Module, step: int) -> dict[str, Term]:
    ids = torch.randint(0, 80, (32,), generator=torch.Generator().manual_seed(step))
    logits = model(ids).float()
    total = nn.functional.cross_entropy(logits, ids.roll(1), reduction="sum")
    return {"nll": Term(total, 32.0), "size": Term(logits.square().sum(), 32.0, 0.01)}


def trained(
    change: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    stop: int = STEPS,
) -> tuple[nn.Module, list[StepRecord]]:
    """Train for some steps; a run that stops early leaves its state."""
    model = _Tied(dtype)
    settings = {"steps": STEPS, "lr": 1e-2, "weight_decay": 0.1, "warmup": 2, "save_every": 1}
    config = FitConfig.model_validate(settings | dict(change))
    ctx = Context(Path("unused"), seed=3)
    records = []
    steps = fit(model, lambda s: [s], _loss, config, ctx, state_dir=folder)
    for record in steps:
        records.append(record)
        if record.step + 1 == stop:
            break
    steps.close()
    return model, records


def same(one: nn.Module, two: nn.Module) -> bool:
    """Return whether two models have the same bits."""
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "hf_adamw", "sgd"])
def test_steps_in_the_backward_pass_are_the_plain_ones_to_the_bit(
    optimizer: str, dtype: torch.dtype
) -> None:
    plain, inside = (
        trained({"optimizer": optimizer, "in_backward": on}, dtype) for on in (False, True)
    )
    assert same(plain[0], inside[0])
    assert not same(plain[0], _Tied(dtype))
    for a, b in zip(plain[1], inside[1], strict=True):
        assert (a.loss, a.terms, a.grad_norm, a.lr) == (b.loss, b.terms, b.grad_norm, b.lr)


def test_one_gradient_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = []
    step = torch.optim.AdamW.step

    def count(self: torch.optim.AdamW, *args: Any) -> Any:
        alive.append(sum(p.grad is not None for p in self.param_groups[0]["params"]))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", count)
    trained({"in_backward": True, "steps": 1}, stop=1)
    assert alive == [1, 1, 1]  # bias, matrix, and the tied weight once
    alive.clear()
    trained({"steps": 1}, stop=1)
    assert alive == [3]


def test_a_run_with_steps_in_the_backward_pass_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, _ = trained({"in_backward": True})
    trained({"in_backward": True}, folder=tmp_path, stop=3)
    resumed, records = trained({"in_backward": True}, folder=tmp_path)
    assert [record.replayed for record in records] == [True] * 3 + [False] * 3
    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clip": 1.0}, "set clip to 0"),
        ({"micro_size": 4}, "set micro_size to 0"),
        ({"optimizer": "schedule_free"}, "take adamw"),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(change: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(FitConfig, {"in_backward": True, **change}, {})


def test_what_changes_or_cuts_the_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = _Tied(torch.float32), FitConfig(steps=1, in_backward=True)
    ctx = Context(Path("unused"))

    def run(micros: int = 1, **options: Any) -> None:
        list(fit(model, lambda s: [s] * micros, _loss, config, ctx, **options))

    for options in (
        {"change": lambda grad, seed: grad},
        {"gradient": lambda passes: passes.backward(passes.micros)},
        {"writes": lambda micro: ["all"]},
    ):
        with pytest.raises(UserError, match=r"before a step's gradient is whole"):
            run(**options)
    monkeypatch.setattr("excise.train.fit.check_processes", lambda ctx: None)
    for fsdp in (False, True):
        several = Context(Path("unused"), world=2, fsdp=fsdp)
        with pytest.raises(UserError, match=r"before a step's gradient is whole"):
            list(fit(model, lambda s: [s], _loss, config, several))
    with pytest.raises(UserError, match="one micro-batch"):
        run(micros=2)
    with pytest.raises(UserError, match="whole parameters, not slices"):
        run(groups={"half": [Slice(model.unused, 0, 0, 2)]})


def test_8_bit_moments_of_a_model_that_is_cut_are_refused() -> None:
    config = FitConfig(steps=1, optimizer="adamw_8bit")
    cut = Context(Path("unused"), fsdp=True)
    with pytest.raises(UserError, match="scaled by blocks"):
        list(fit(_Tied(torch.float32), lambda s: [s], _loss, config, cut))


def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    model = _Tied(torch.float32)
    config = FitConfig(steps=1, in_backward=True)

    def loss(net: nn.Module, step: int) -> dict[str, Term]:
        return {"nll": Term(net(torch.tensor([step])).sum() * float("inf"), 1.0)}

    with pytest.raises(Diverged, match=r"term 'nll' .* weights before this step are kept"):
        list(fit(model, lambda s: [s], loss, config, Context(Path("unused"))))
    assert same(model, _Tied(torch.float32))


def test_without_its_package_the_8_bit_optimizer_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'excise\[bitsandbytes\]'"):
        trained({"optimizer": "adamw_8bit"})
