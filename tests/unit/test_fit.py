"""The loop: counts, groups, schedules, divergence, precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import Diverged, UserError
from excise.data.stream import Batch, Example, Stream, zip_streams
from excise.train.fit import FitConfig, StepRecord, Term, fit

CTX = Context(work=Path("unused"))
STEPS, ROWS = 6, 12


class _Net(nn.Module):
    """Two layers with names and types."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.b = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).tanh())
        return out


def _model(seed: int = 0) -> _Net:
    torch.manual_seed(seed)
    return _Net()


def _data() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, ROWS, 5, generator=g)
    y = torch.randn(STEPS, ROWS, 2, generator=g)
    # Very uneven counts, so that a mean of means is not the mean.
    mask = torch.rand(STEPS, ROWS, generator=g) < torch.linspace(0.05, 0.95, ROWS)
    mask[:, -1] = True
    return x, y, mask


Micro = tuple[int, Sequence[int]]


def _loss(model: nn.Module, micro: Micro) -> dict[str, Term]:
    (x, y, mask), (step, rows) = _data(), micro
    at = torch.tensor(rows)
    error = (model(x[step, at]) - y[step, at]).square().sum(-1)
    hit = mask[step, at]
    terms = {"hit": Term((error * hit).sum(), float(hit.sum()))}
    if (~hit).any():
        terms["miss"] = Term((error * ~hit).sum(), float((~hit).sum()), weight=-0.3)
    return terms


def _counts(micro: Micro) -> dict[str, float]:
    hit = _data()[2][micro[0], torch.tensor(micro[1])]
    return {"hit": float(hit.sum()), "miss": float((~hit).sum())}


def _run(sizes: Sequence[int], **options: Any) -> tuple[nn.Module, list[StepRecord]]:
    model = _model()

    def batches(step: int) -> list[Micro]:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [(step, range(e - n, e)) for e, n in zip(ends, sizes, strict=True)]

    config = FitConfig(steps=STEPS, lr=1e-2, optimizer="sgd")
    return model, list(fit(model, batches, _loss, config, CTX, **options))


def _same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", [None, _counts])
@pytest.mark.parametrize("sizes", [(6, 6), (1, 2, 9), (4, 4, 4)])
def test_micro_batches_equal_one_batch(sizes: tuple[int, ...], counts: Any) -> None:
    whole, records = _run((ROWS,))
    cut, cut_records = _run(sizes, counts=counts)
    _same(whole, cut, 1e-6)
    for a, b in zip(records, cut_records, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.terms == pytest.approx(b.terms, rel=1e-5)
        assert a.loss == pytest.approx(a.terms["hit"] - 0.3 * a.terms.get("miss", 0.0), rel=1e-6)


def test_a_mean_of_means_would_not_pass() -> None:
    whole, _ = _run((ROWS,))
    model = _model()

    def loss(m: nn.Module, micro: Micro) -> dict[str, Term]:
        return {k: Term(t.sum / max(t.count, 1), 1.0, t.weight) for k, t in _loss(m, micro).items()}

    config = FitConfig(steps=STEPS, lr=1e-2, optimizer="sgd")
    halves = (range(6), range(6, 12))
    list(fit(model, lambda step: [(step, rows) for rows in halves], loss, config, CTX))
    with pytest.raises(AssertionError):
        _same(whole, model, 1e-4)


def test_counts_that_the_loss_contradicts_are_refused() -> None:
    with pytest.raises(UserError, match="term 'hit' counted"):
        _run((6, 6), counts=lambda micro: {"hit": 3.0, "miss": 3.0})


def test_a_term_that_counts_nothing_is_left_out() -> None:
    model = _model()

    def loss(m: nn.Module, micro: int) -> dict[str, Term]:
        total = m(torch.ones(1, 5)).sum()
        return {"some": Term(total, 2.0), "none": Term(total * 0, 0.0)}

    (record,) = fit(model, lambda step: [step], loss, FitConfig(steps=1), CTX)
    assert list(record.terms) == ["some"]
    assert math.isfinite(record.loss)


def _simple(m: nn.Module, micro: Any) -> dict[str, Term]:
    return {"mse": Term(m(torch.ones(3, 5)).square().sum(), 6.0)}


def test_parameters_outside_the_groups_keep_their_bits() -> None:
    model, before = _model(), _model()
    model.b.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    groups = {"first": list(model.a.parameters())}
    config = FitConfig(steps=3, lr=0.1, weight_decay=0.5)
    list(fit(model, lambda step: [step], _simple, config, CTX, groups=groups))
    assert torch.equal(model.b.weight, before.b.weight)
    assert torch.equal(model.b.bias, before.b.bias)
    assert not torch.equal(model.a.weight, before.a.weight)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_group_without_gradient_is_frozen_for_that_step() -> None:
    """Neither weight decay nor momentum moves it, and its bias correction does not age."""
    model = _model()
    groups = {"a": list(model.a.parameters()), "b": list(model.b.parameters())}

    def loss(m: nn.Module, step: int) -> dict[str, Term]:
        if step == 1:
            return {"b": Term(model.b(torch.ones(1, 7)).square().sum(), 1.0)}
        return _simple(m, step)

    seen = []
    config = FitConfig(steps=3, lr=0.1, weight_decay=0.5)
    for _ in fit(model, lambda step: [step], loss, config, CTX, groups=groups):
        seen.append(model.a.weight.detach().clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_groups_have_rates_of_their_own() -> None:
    model, before = _model(), _model()
    groups = {"a": list(model.a.parameters()), "b": list(model.b.parameters())}
    config = FitConfig(steps=1, lr=1e-2)
    rates = {"b": 1e-1}
    list(fit(model, lambda step: [step], _simple, config, CTX, groups=groups, rates=rates))
    # Adam's first step has the size of the rate.
    assert float((model.a.bias - before.a.bias).detach().abs().max()) == pytest.approx(
        1e-2, rel=1e-3
    )
    assert float((model.b.bias - before.b.bias).detach().abs().max()) == pytest.approx(
        1e-1, rel=1e-3
    )


@pytest.mark.parametrize(
    ("groups", "rates", "match"),
    [
        (lambda m: {"a": []}, {}, "has no parameter"),
        (lambda m: {"a": list(m.a.parameters()), "b": [m.a.weight]}, {}, "share a parameter"),
        (lambda m: {"a": list(m.a.parameters())}, {"c": 1.0}, "rates name the group 'c'"),
    ],
)
def test_bad_groups_are_refused(groups: Any, rates: Mapping[str, float], match: str) -> None:
    model = _model()
    with pytest.raises(UserError, match=match):
        list(
            fit(model, lambda s: [s], _simple, FitConfig(), CTX, groups=groups(model), rates=rates)
        )


def test_several_processes_need_a_process_group() -> None:
    with pytest.raises(UserError, match="torchrun"):
        list(fit(_model(), lambda s: [s], _simple, FitConfig(), Context(work=Path("x"), world=2)))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step(where: str, tmp_path: Path) -> None:
    model = _model()
    good: list[Tensor] = []

    def loss(m: nn.Module, step: int) -> dict[str, Term]:
        x = m(torch.ones(3, 5)).square().sum()
        if step == 2:  # the root of zero has a finite value and no finite slope
            x = x * float("inf") if where == "loss" else x + (x - x.detach()).sqrt()
        return {"fine": Term(m(torch.ones(1, 5)).sum(), 1.0), "broken": Term(x, 1.0)}

    config = FitConfig(steps=5, lr=0.1)
    run = fit(model, lambda s: [s], loss, config, CTX, state_dir=tmp_path / "state")
    for _ in range(2):
        next(run)
        good = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(Diverged, match=r"broken.* step 2|step 2 .*broken"):
        next(run)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), good, strict=True))
    assert (tmp_path / "state" / "step-00000002").is_dir()
    other = _model(seed=9)
    with pytest.raises(Diverged):
        list(fit(other, lambda s: [s], loss, config, CTX, state_dir=tmp_path / "state"))
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), good, strict=True))


def test_float32_masters_move_weights_that_bfloat16_cannot() -> None:
    def moved(master: Any) -> float:
        model = nn.Linear(5, 2, bias=False).bfloat16()
        nn.init.constant_(model.weight, 1.0)
        config = FitConfig(steps=40, lr=1e-3, master=master)

        def loss(m: nn.Module, _: int) -> dict[str, Term]:
            return {"sum": Term(m(torch.ones(1, 5).bfloat16()).sum(), 1.0)}

        list(fit(model, lambda s: [s], loss, config, CTX))
        return float((model.weight.detach().float() - 1).abs().max())

    assert moved("model") == 0  # each step of 0.001 is below half the spacing beside 1
    assert moved("float32") == pytest.approx(0.04, rel=0.1)


def test_half_precision_gradients_accumulate_in_float32() -> None:
    """Many small micro-batches after a large one are not rounded away."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)

    def loss(m: nn.Module, size: float) -> dict[str, Term]:
        return {"sum": Term(m(torch.full((1, 1), size).bfloat16()).sum().float(), 1.0)}

    sizes = [256.0] + [0.5] * 64
    config = FitConfig(steps=1, lr=0.0)
    (record,) = fit(model, lambda s: sizes, loss, config, CTX, counts=lambda m: {"sum": 1.0})
    assert record.grad_norm == pytest.approx(sum(sizes) / len(sizes), rel=2e-3)


def test_schedules() -> None:
    def rates(**options: Any) -> list[float]:
        config = FitConfig(steps=8, lr=1.0, **options)
        return [config.rate_at(s) for s in range(8)]

    assert rates() == [1.0] * 8
    assert rates(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="linear") == pytest.approx([1 - s / 8 for s in range(8)])
    cosine = rates(schedule="cosine", min_lr=0.1, warmup=2)
    assert cosine[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert cosine[5] == pytest.approx(0.55)
    assert all(a > b > 0.1 for a, b in pairwise(cosine[2:]))


def test_randomness_is_a_function_of_seed_and_step_and_leaves_no_trace() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(0)
        last = nn.Linear(5, 2)
        model = nn.Sequential(nn.Dropout(0.5), last)
        torch.manual_seed(int(torch.randint(1000, (1,))) + seed)
        state = torch.get_rng_state()
        ctx = Context(work=Path("x"), seed=seed)
        list(fit(model, lambda s: [s], _simple, FitConfig(steps=3, lr=0.1), ctx))
        assert torch.equal(torch.get_rng_state(), state)
        return last.weight.detach()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_progress_is_told_now_and_then() -> None:
    told: list[Mapping[str, Any]] = []
    ctx = Context(
        work=Path("arm.partial"), emit=lambda kind, data: told.append({**data, "k": kind})
    )
    list(fit(_model(), lambda s: [s], _simple, FitConfig(steps=25, log_every=10), ctx))
    assert [t["step"] for t in told] == [10, 20, 25]
    assert told[0]["stage"] == "arm"
    assert set(told[0]["terms"]) == {"mse"}
    assert "tokens_per_second" not in told[0]  # it reads none


def test_progress_tells_tokens_per_second() -> None:
    told: list[Mapping[str, Any]] = []
    ctx = Context(work=Path("arm"), emit=lambda kind, data: told.append(data))
    batch = SimpleNamespace(num_tokens=30)
    config = FitConfig(steps=1)
    (record,) = fit(
        _model(), lambda s: [{"step": s, "rows": batch}], lambda m, x: _simple(m, x["step"]),
        config, ctx,
    )  # fmt: skip
    assert record.tokens == 30
    assert told[0]["tokens_per_second"] == 30 / record.seconds


def test_streams_of_several_roles_are_read_together() -> None:
    rows = [Example((1, i, 2), (False, True, True), 0, f"u{i}") for i in range(6)]
    forget = Stream(rows, batch_size=4, seed=0, pad_id=0, micro_size=2)
    retain = Stream(rows, batch_size=2, seed=1, pad_id=0, micro_size=1)
    batches = zip_streams({"forget": forget, "retain": retain})
    micros = batches(3)
    assert [m["forget"].units for m in micros] == [b.units for b in forget(3)]
    assert [m["retain"].units for m in micros] == [b.units for b in retain(3)]

    def loss(model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
        x = micro["forget"].ids_BT.float().mean() * model(torch.ones(1, 5)).sum()
        return {"x": Term(x, micro["forget"].num_targets)}

    (record,) = fit(_model(), batches, loss, FitConfig(steps=1), CTX)
    assert record.tokens == 6 * 3
    uneven = zip_streams({"forget": forget, "retain": Stream(rows, batch_size=2, seed=1, pad_id=0)})
    with pytest.raises(UserError, match="1 of 'retain'"):
        uneven(0)
