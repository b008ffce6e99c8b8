"""What a release must meet: the grammar, every condition's three endings, exit codes, baselines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.report import sample

from excise.core.errors import UserError
from excise.record import AttackVariant, Record, save
from excise.record.measured import (
    change_of,
    failed_attacks,
    is_relearning,
    recoveries,
    score_of,
    worst_recovery,
)
from excise.record.requirements import (
    Outcome,
    check,
    exit_code,
    models_of,
    parse_requirement,
    regressions,
    told,
)


def one(record: Record, text: str, model: str = "rmu") -> Outcome:
    """Return what one condition came to."""
    (outcome,) = check(record, parse_requirement(text), (model,))
    return outcome


def attacks(record: Record, change: Callable[[AttackVariant], dict[str, Any]]) -> Record:
    """Return a record with fields of its attacks changed."""
    return record.model_copy(
        update={"attacks": tuple(a.model_copy(update=change(a)) for a in record.attacks)}
    )


@pytest.mark.parametrize(
    ("text", "kind", "bound", "tokens", "metric"),
    [
        ("D3", "level", 0.0, 0, ""),
        ("d0", "level", 0.0, 0, ""),
        ("recovery<=0.2@1M-tokens", "recovery", 0.2, 1_000_000, ""),
        ("recovery <= .2 @ 1.5k tokens", "recovery", 0.2, 1500, ""),
        ("recovery<=0.2@512-tokens", "recovery", 0.2, 512, ""),
        ("recovery<=0.2@2B-tokens", "recovery", 0.2, 2_000_000_000, ""),
        ("gap<=0.1", "gap", 0.1, 0, ""),
        ("bits<=5e-1", "bits", 0.5, 0, ""),
        ("retain>=-0.01", "retain", -0.01, 0, ""),
        ("retain[text_loss]>=-0.01", "retain", -0.01, 0, "text_loss"),
        ("adjacent>=-0.05", "adjacent", -0.05, 0, ""),
    ],
)
def test_a_condition_is_read(text: str, kind: str, bound: float, tokens: int, metric: str) -> None:
    (condition,) = parse_requirement(f" {text} ,")
    read = (condition.kind, condition.bound, condition.tokens, condition.metric)
    assert read == (kind, bound, tokens, metric)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" , ", "is empty"),
        ("D6", "'D6' is no condition"),
        ("recovry<=0.2@1M-tokens", "did you mean 'recovery'"),
        ("recovery<=0.2", "up to how many tokens"),
        ("recovery<=0.2@lots", "up to how many tokens"),
        ("recovery<=0.2@0-tokens", "up to how many tokens"),
        ("recovery>=0.2@1k-tokens", "bounded by <="),
        ("retain<=0.01", "bounded by >="),
        ("retain=0", "bounded by >="),
        ("bits<=nan", "'nan' is no number"),
        ("bits<=many", "'many' is no number"),
        ("gap<=0.1@1k-tokens", "only recovery"),
        ("gap[D4]<=0.1", "only retain and adjacent"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_requirement(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_published_fraction_is_that_of_the_curve() -> None:
    record = sample.full()
    seeds = [
        a
        for a in record.attacks
        if a.subject == "rmu" and is_relearning(a) and a.variant == "full" and a.decisive
    ]
    last = recoveries(record, seeds)[-1]
    # (attacked - unlearned) / (original - unlearned), by hand
    assert last.fraction.value == pytest.approx((0.83 - 0.09) / (0.97 - 0.09))
    assert last.tokens == 8192
    worst = worst_recovery(record, "rmu")
    assert worst is not None
    assert worst.attack == "relearn full at rate 0.001"


@pytest.mark.parametrize(
    ("text", "model", "status", "words"),
    [
        ("D5", "filtering", "met", "All levels up to as if never learned (D5)"),
        ("D0", "rmu", "met", "the behaviour is gone (D0)"),
        ("D1", "rmu", "inconclusive", "(D1): underpowered"),
        ("D3", "rmu", "missed", "(D2): failed"),
        ("recovery<=0.9@8k-tokens", "rmu", "met", "8,192"),
        ("recovery<=0.9@1M-tokens", "rmu", "inconclusive", "the largest used 8,192"),
        ("recovery<=0.2@1M-tokens", "rmu", "missed", "0.841 of what was removed"),
        ("recovery<=0.05@512-tokens", "rmu", "missed", "after 0 tokens under direction matched"),
        ("gap<=0.2", "filtering", "met", "depth gap"),
        ("gap<=0.5", "rmu", "missed", "(D4): depth gap 0.83"),
        ("gap<=0.08", "filtering", "inconclusive", "holds both sides"),
        ("bits<=0.5", "filtering", "met", "bits per unit"),
        ("bits<=0.05", "filtering", "inconclusive", "holds both sides"),
        ("bits<=1", "rmu", "missed", "2.31 [1.94, 2.66]"),
        ("retain>=-0.05", "rmu", "met", "-0.01"),
        ("retain>=-0.02", "rmu", "inconclusive", "over 160 units"),
        ("retain>=0.04", "rmu", "missed", "-0.01"),
        ("adjacent>=-0.01", "rmu", "missed", "-0.06"),
    ],
)
def test_a_condition_ends_as_the_record_says(
    text: str, model: str, status: str, words: str
) -> None:
    record = sample.full()
    if text.startswith("recovery<=0.9@8k"):
        text = "recovery<=0.9@8192-tokens"
    outcome = one(record, text, model)
    assert outcome.status == status, outcome
    assert words in outcome.reason


def test_without_an_oracle_low_levels_count_and_high_ones_cannot_be_passed() -> None:
    record = sample.no_oracle()
    (verdict,) = record.verdicts
    levels = tuple(
        r.model_copy(update={"status": "untested" if r.level in ("D4", "D5") else "pass"})
        for r in verdict.levels
    )
    record = record.model_copy(
        update={"verdicts": (verdict.model_copy(update={"levels": levels}),)}
    )
    assert one(record, "D3").status == "met"
    assert "compared with controls" in one(record, "D3").reason
    assert one(record, "D4").status == "inconclusive"
    assert one(record, "gap<=0.1").status == "inconclusive"
    assert one(record, "bits<=0.1").status == "inconclusive"
    assert one(record, "recovery<=0.2@8k-tokens").status == "missed"


def test_lower_is_better_retain_loss_counts_as_a_gain() -> None:
    record = sample.full()
    text = "text_loss"
    losses = [
        s.model_copy(update={"set": "retain_test", "value": v, "low": v, "high": v})
        for s, v in [
            (s, 2.0 if s.model == "original" else 1.5)
            for s in record.scores
            if s.metric == text and s.model in ("original", "rmu")
        ]
    ]
    record = record.model_copy(update={"scores": (*record.scores, *losses)})
    change = change_of(record, "rmu", "retain_test", text)
    assert change is not None
    assert change.value == pytest.approx(0.5)
    assert one(record, "retain[text_loss]>=0.4").status == "met"
    with pytest.raises(UserError, match="no retain score of that name; did you mean 'text_loss'"):
        one(record, "retain[text_los]>=0")


def test_capabilities_are_pooled_by_units() -> None:
    record = sample.full()
    first = next(s for s in record.scores if s.model == "rmu" and s.set == "test.facts")
    other = first.model_copy(update={"set": "test.names", "value": 0.5, "n": 40})
    record = record.model_copy(update={"scores": (*record.scores, other)})
    pooled = score_of(record, "rmu", "test")
    assert pooled is not None
    assert pooled.value == pytest.approx((first.value * 160 + 0.5 * 40) / 200)


def test_a_relearning_without_power_passes_nothing_and_still_convicts() -> None:
    invalid = attacks(
        sample.full(), lambda a: {"status": "invalid", "reason": "no power"} if a.lr else {}
    )
    assert one(invalid, "recovery<=0.3@8k-tokens", "filtering").status == "inconclusive"
    assert one(invalid, "recovery<=0.5@8k-tokens").status == "missed"


def test_nothing_removed_is_missed_and_nothing_to_remove_undecided() -> None:
    record = sample.full(("rmu",))
    verdict = record.verdicts[0].model_copy(update={"recovery": None})
    record = record.model_copy(update={"verdicts": (verdict,)})
    assert one(record, "recovery<=0.2@8k-tokens").status == "missed"
    chance = tuple(
        s.model_copy(update={"chance": 0.99}) if s.model == "original" else s for s in record.scores
    )
    at_chance = record.model_copy(update={"scores": chance})
    assert one(at_chance, "recovery<=0.2@8k-tokens").status == "inconclusive"


def test_controls_and_attackers_with_the_original_do_not_count() -> None:
    record = attacks(
        sample.full(("rmu",)),
        lambda a: {"needs_original": True} if a.name == "direction" else {},
    )
    outcome = one(record, "recovery<=0.1@256-tokens")
    assert "direction" not in outcome.reason


@pytest.mark.parametrize(
    ("text", "model", "code"),
    [
        ("D0, retain>=-0.05", "rmu", 0),
        ("D0, D1", "rmu", 4),
        ("D1, D2", "rmu", 3),
    ],
)
def test_exit_codes(text: str, model: str, code: int) -> None:
    record = sample.full()
    outcomes = check(record, parse_requirement(text), (model,))
    assert exit_code(record, outcomes, (model,)) == code


def test_an_attack_that_failed_never_ends_well() -> None:
    broken = attacks(
        sample.full(),
        lambda a: (
            {"status": "failed", "reason": "no rows", "curve": ()}
            if (a.name, a.subject) == ("quantize", "rmu")
            else {}
        ),
    )
    assert failed_attacks(broken) == ("quantize on rmu: no rows",)
    assert exit_code(broken, ()) == 1
    assert exit_code(broken, (), ("filtering",)) == 0
    assert "failed: quantize on rmu: no rows" in told(broken, ())
    # One rate that diverged is part of the attacker's search.
    diverged = attacks(sample.full(), lambda a: {"status": "failed"} if a.lr == 3e-3 else {})
    assert failed_attacks(diverged) == ()


def test_every_model_is_held_to_it_unless_some_are_named() -> None:
    record = sample.full()
    assert models_of(record) == ("filtering", "rmu")
    assert models_of(record, ("rmu",)) == ("rmu",)
    with pytest.raises(UserError, match="no model 'rmuu'; did you mean 'rmu'"):
        models_of(record, ("rmuu",))
    with pytest.raises(UserError, match="no edited model"):
        models_of(sample.minimal())


@pytest.mark.parametrize("make", sample.RECORDS.values(), ids=sample.RECORDS)
def test_every_kind_of_record_is_answered(make: Callable[[], Record]) -> None:
    record = make()
    every = parse_requirement(
        "D5, recovery<=0.2@4k-tokens, gap<=0.1, bits<=1, retain>=0, adjacent>=0"
    )
    for name in models_of(record) if record.method_runs else ():
        for outcome in check(record, every, (name,)):
            assert outcome.reason[:1].strip(), outcome
            assert "nan" not in outcome.reason


def test_a_record_is_no_worse_than_itself_and_worse_when_more_comes_back() -> None:
    record = sample.full()
    assert {o.status for o in regressions(record, record, ("filtering", "rmu"))} == {"met"}
    worse = sample.full()
    swapped = {"filtering": "rmu", "rmu": "filtering"}
    worse = worse.model_copy(
        update={
            "verdicts": tuple(
                v.model_copy(update={"model": swapped[v.model]}) for v in worse.verdicts
            ),
            "attacks": tuple(
                a.model_copy(update={"subject": swapped.get(a.subject, a.subject)})
                for a in worse.attacks
            ),
        }
    )
    outcomes = regressions(record, worse, ("filtering",))
    missed = {o.condition for o in outcomes if o.status == "missed"}
    assert missed >= {"no worse: recovery", "no worse: residual bits"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {**sample.full().data, "fingerprint": "f" * 64}}, "the data"),
        ({"data": {**sample.full().data, "exposure": "held_out"}}, "the exposure (seen and"),
        (
            {
                "scores": tuple(
                    s.model_copy(update={"definition": "exact_match@2"})
                    if s.metric == "exact_match"
                    else s
                    for s in sample.full().scores
                )
            },
            "the definition of the score exact_match (exact_match@1 and exact_match@2)",
        ),
        (
            {
                "verdicts": tuple(
                    v.model_copy(update={"budget": "standard"}) for v in sample.full().verdicts
                )
            },
            "the budget of the audit (smoke and standard)",
        ),
    ],
)
def test_unlike_is_not_compared_with_like(change: dict[str, Any], words: str) -> None:
    old = sample.full()
    with pytest.raises(UserError) as error:
        regressions(old, old.model_copy(update=change), ("rmu",))
    assert words in str(error.value)


def test_a_baseline_of_other_models_is_refused(tmp_path: Path) -> None:
    save(sample.full(), tmp_path)
    with pytest.raises(UserError, match="the baseline has no model 'maxent'"):
        regressions(sample.full(), sample.many(), ("maxent",))


def test_a_gate_counts_every_rate_and_a_table_the_chosen_one() -> None:
    record = sample.full()
    attacks = tuple(
        a.model_copy(update={"decisive": False}) if a.lr is not None else a for a in record.attacks
    )
    other = record.model_copy(update={"attacks": attacks})
    every, chosen = (worst_recovery(other, "rmu", chosen=c) for c in (False, True))
    assert every is not None
    assert every == worst_recovery(record, "rmu", chosen=False)
    assert chosen is None or chosen.fraction.value < every.fraction.value
