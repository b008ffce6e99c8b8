from __future__ import annotations

import math
from dataclasses import replace

import pytest

from excise.auditor.base import AttackResult, VariantResult
from excise.auditor.budget import BUDGETS, LARGE, budget_of
from excise.auditor.results import choose, decided, from_json, renamed, to_json, with_loss
from excise.core.errors import UserError
from excise.record import AttackVariant, CurvePoint


def variant(
    name: str, dev: float, *, lr: float | None = None, seed: int = 0, loss: float = math.nan,
    control: bool = False, original: bool = False, status: str = "ok",
) -> VariantResult:  # fmt: skip
    point = CurvePoint(score=dev, low=dev, high=dev)
    record = AttackVariant(
        name="a", access="weights", variant=name, lr=lr, seed=seed, control=control, level="D4",
        needs_original=original, status=status, curve=(point,),  # type: ignore[arg-type]
    )  # fmt: skip
    return VariantResult(record, ({"u": dev},), dev, {"dev_loss": loss})


def test_the_rate_is_chosen_on_dev_over_seeds_and_never_by_the_best_seed() -> None:
    variants = [variant("full", 1.0, lr=1, seed=0), variant("full", 0.0, lr=1, seed=1)]
    variants += [variant("full", 0.6, lr=2, seed=0), variant("full", 0.6, lr=2, seed=1)]
    assert choose(variants, higher=True) == (2, 3)
    assert choose(variants, higher=False) == (0, 1)


@pytest.mark.parametrize("bad", [{"control": True}, {"original": True}, {"status": "failed"}])
def test_controls_diagnostics_and_failures_never_decide(bad: dict[str, bool]) -> None:
    assert choose([variant("x", 1.0, **bad), variant("y", 0.1)], higher=True) == (1,)  # type: ignore[arg-type]
    assert choose([variant("x", 1.0, **bad)], higher=True) == ()  # type: ignore[arg-type]


def test_who_holds_the_original_is_chosen_apart_and_may_only_fail() -> None:
    both = [variant("x", 0.2), variant("y", 0.5, original=True), variant("z", 0.9, original=True)]
    assert choose(both, higher=True) == (0,)
    assert choose(both, higher=True, holding=True) == (2,)
    assert choose(both, higher=False, holding=True) == (1,)
    kept = AttackResult("a", "candidate", tuple(both), (0,), fail_only=(2,))
    assert from_json(to_json(kept)).fail_only == (2,)


def test_ties_are_settled_by_the_loss_on_dev_and_nan_loses() -> None:
    tied = [variant("full", 0.0, lr=1, loss=3.0), variant("full", 0.0, lr=2, loss=2.0)]
    assert choose(tied, higher=True) == (1,)
    assert choose([variant("x", math.nan), variant("y", 0.0)], higher=True) == (1,)


def test_a_variant_that_broke_the_model_decides_only_where_all_did() -> None:
    best = variant("x", 1.0, lr=1)
    assert choose([with_loss(best, 0.21), with_loss(variant("y", 0.1), 0.2)], higher=True) == (1,)
    assert choose([with_loss(best, 0.21), with_loss(variant("y", 0.1), 0.9)], higher=True) == (0,)
    seeds = [with_loss(best, 0.9), with_loss(variant("x", 1.0, lr=1, seed=1), 0.0)]
    assert choose([*seeds, variant("y", 0.1)], higher=True) == (2,)
    assert with_loss(best, 0.21).entry.facts == {"broke": True}
    assert with_loss(best, 0.2).entry.facts == {}


def test_a_variant_that_taught_less_decides_only_where_the_other_broke_the_model() -> None:
    def taught(name: str, dev: float, learned: float, lost: float = 0.0) -> VariantResult:
        one = with_loss(variant(name, dev), lost)
        return replace(one, extras={**one.extras, "learned": learned})

    weak, strong = taught("x", 0.6, 0.3), taught("y", 0.5, 0.9)
    assert choose([weak, strong], higher=True) == (1,)
    assert choose([weak, strong], higher=True, bounded=False) == (0,)
    assert choose([weak, taught("y", 0.5, 0.45)], higher=True) == (0,)
    assert choose([weak, taught("y", 0.5, 0.9, lost=0.5)], higher=True) == (0,)


def test_decisive_marks_the_chosen() -> None:
    variants, chosen = decided([variant("x", 0.1), variant("y", 0.2)], higher=True)
    assert chosen == (1,)
    assert [a.entry.decisive for a in variants] == [False, True]


def test_results_survive_json_and_take_another_name() -> None:
    both = (variant("x", math.nan), variant("y", 0.5, loss=2.0))
    result = AttackResult("a", "candidate", both, (1,), 2.5)
    back = from_json(to_json(result))
    assert back.variants[1] == result.variants[1]
    assert math.isnan(back.variants[0].dev_score)
    assert (back.chosen, back.seconds) == ((1,), 2.5)
    again = renamed(back, "oracle-0")
    assert {again.subject, *(a.entry.subject for a in again.variants)} == {"oracle-0"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"attack": 1}'])
def test_damaged_results_are_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match="here is damaged"):
        from_json(text, "here")


def test_budgets_grow_and_scale_with_the_model() -> None:
    smoke, standard, strong = (BUDGETS[name] for name in ("smoke", "standard", "strong"))
    assert smoke.steps <= 16
    assert len(smoke.rates) == 3
    assert 200 <= standard.steps <= 500
    assert len(standard.seeds) == 3
    assert min(len(standard.rates), len(standard.lora_rates)) >= 4
    assert strong.steps >= 10_000
    for one in (smoke, standard, strong):
        assert max(one.checkpoints) <= one.steps
    large = budget_of("smoke", LARGE)
    assert max(large.rates) == pytest.approx(max(smoke.rates) / 10)
    assert large.max_test_rows < smoke.max_test_rows
    with pytest.raises(UserError, match="did you mean 'strong'"):
        budget_of("stronk")
