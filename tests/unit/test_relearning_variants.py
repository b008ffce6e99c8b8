"""What relearning is tried on beside T, and the attacker's search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.synthetic import BUDGET, audit, domain

from excise.auditor.attacks import Relearn, Transfer
from excise.auditor.base import AttackResult, Subject, VariantResult
from excise.auditor.budget import SMOKE, STANDARD, STRONG, Budget
from excise.auditor.results import BOUND, choose, searched
from excise.auditor.tuning import possible, rows_of, trainings_of, trials_of
from excise.auditor.verdict import case_of
from excise.auditor.verdict.power import invalid_attacks
from excise.auditor.verdict.residual_bits import best_on_dev
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint

QUICK = SMOKE.model_copy(
    update={
        "steps": 4, "checkpoints": (0, 2, 4), "batch_size": 8, "rates": (3e-3,),
        "max_test_rows": 16, "max_other_rows": 8, "trained_on": ("forget", "adjacent"),
        "examples": (1,), "trials": 3,
    }
)  # fmt: skip


def test_smoke_trains_on_the_relearn_set_alone_and_standard_on_what_is_at_hand() -> None:
    assert {(t.on, t.examples, t.trial) for t in trainings_of(SMOKE)} == {("relearn", 0, 0)}
    for budget in (STANDARD, STRONG):
        asked = trainings_of(budget)
        assert {t.on for t in asked} == {"relearn", "fresh", "forget", "adjacent"}
        assert {t.examples for t in asked} == {0, *budget.examples}
        assert [t.trial for t in asked if t.trial] == list(range(1, budget.trials + 1))
    assert len(trials_of(STANDARD)) == 8
    assert len(trials_of(STRONG)) == 32


def test_trials_are_drawn_by_the_seed_and_share_checkpoints() -> None:
    drawn = trials_of(STRONG)
    assert drawn == trials_of(STRONG)
    assert drawn != trials_of(STRONG.model_copy(update={"seeds": (1,)}))
    assert {t.schedule for t in drawn} == {"constant", "cosine"}
    assert {t.kind for t in drawn} == {"full", "lora"}
    assert len({t.batch_size for t in drawn}) == 4
    for trial in drawn:
        cut = trial.within(STRONG)
        assert cut.steps in STRONG.checkpoints
        assert cut.checkpoints == STRONG.checkpoints[: len(cut.checkpoints)]
        assert cut.batch_size == trial.batch_size
    small = Budget(trials=4, batch_size=2, steps=1, checkpoints=(0, 1))
    assert all(t.steps == 1 and t.batch_size >= 2 for t in trials_of(small))


def test_rows_are_those_of_the_role_the_number_and_the_wording(facts_domain: Domain) -> None:
    asked = {(t.on, t.examples): t for t in trainings_of(QUICK) if not t.trial}
    relearn = rows_of(asked["relearn", 0], facts_domain)
    assert len(rows_of(asked["relearn", 1], facts_domain)) == 1
    forget = rows_of(asked["forget", 0], facts_domain)
    assert forget == tuple(r for rows in facts_domain.forget.values() for r in rows)
    again = tuple(replace(row, wording=7) for row in relearn)
    worded = replace(facts_domain, relearn={"a": (*relearn, *again)})
    one = replace(asked["relearn", 0], wording=1)
    assert {row.wording for row in rows_of(one, worded)} == {7}
    assert rows_of(one, facts_domain) == relearn  # there is one wording
    bare = replace(facts_domain, adjacent=(), forget={})
    assert {t.on for t in possible(trainings_of(QUICK), bare)} == {"relearn"}


@pytest.fixture(scope="module")
def relearned(
    tmp_path_factory: pytest.TempPathFactory, facts_domain: Domain, never_taught: Checkpoint
) -> tuple[Domain, AttackResult]:
    """Return what every training of `QUICK` does to a model that knows nothing of V."""
    tested = {row.unit for rows in facts_domain.test.values() for row in rows}
    rows = tuple(row for rows in facts_domain.test.values() for row in rows)
    seen = replace(
        facts_domain, forget={"tests": rows}, adjacent=facts_domain.retain_test, exposure="seen"
    )
    assert tested
    ctx = Context(work=tmp_path_factory.mktemp("relearned"))
    return seen, Transfer().run(Subject("oracle-0", never_taught), seen, QUICK, ctx)


def test_forget_rows_that_hold_test_units_are_shown_and_never_decide(
    relearned: tuple[Domain, AttackResult],
) -> None:
    _, result = relearned
    by_name = {v.entry.variant: v for v in result.variants}
    shown = by_name["full on forget rows"]
    assert shown.entry.facts["trained_on_test_units"]
    assert not shown.entry.decisive
    # It would have won: no other training teaches what is scored.
    assert shown.entry.curve[-1].score >= max(v.entry.curve[-1].score for v in result.variants)
    alone = choose([shown], higher=True)
    assert alone == ()
    assert "trained_on_test_units" not in by_name["full on neighbours"].entry.facts
    assert by_name["full on 1 example"].entry.facts["examples"] == 1
    assert len(result.chosen) == 1


def test_every_trial_notes_its_settings_and_the_best_by_then(
    relearned: tuple[Domain, AttackResult],
) -> None:
    _, result = relearned
    trials = [v for v in result.variants if "trial" in v.entry.facts]
    assert [v.entry.facts["trial"] for v in trials] == [1, 2, 3]
    for trial in trials:
        assert trial.entry.facts["steps"] == len(trial.entry.curve) * 2 - 2
        assert isinstance(trial.entry.facts["best_so_far"], float)
    # The curve of the search follows dev, not V, and leaves out a trial that ruined the model.
    dev = [
        replace(v, dev_score=score, extras={**v.extras, "retain_lost": 0.0})
        for v, score in zip(trials, (0.2, 0.9, 0.5), strict=True)
    ]
    ruined = replace(dev[1], extras={**dev[1].extras, "retain_lost": 2 * BOUND})
    ends = [v.entry.curve[-1].score for v in trials]
    found = [v.entry.facts["best_so_far"] for v in searched(dev, higher=True)]
    assert found == [ends[0], ends[1], ends[1]]
    found = [v.entry.facts["best_so_far"] for v in searched([dev[0], ruined, dev[2]], higher=True)]
    assert found == [ends[0], ends[0], ends[2]]


def test_the_reading_of_t_never_decides_on_any_of_them(
    tmp_path: Path, facts_domain: Domain, never_taught: Checkpoint
) -> None:
    budget = QUICK.model_copy(update={"trials": 1, "steps": 1, "checkpoints": (0, 1)})
    subject = Subject("oracle-0", never_taught)
    result = Relearn().run(subject, facts_domain, budget, Context(tmp_path))
    assert result.chosen == ()
    assert not any(v.entry.decisive for v in result.variants)


def test_what_is_known_of_other_rows_keeps_no_training_on_t_from_deciding() -> None:
    """Neighbours are known to every model: to have learned all of them is no feat."""
    (on_t,) = audit(0.05, {"transfer": 0.6})["transfer", "rmu"].variants
    on_t = replace(on_t, dev_score=0.6, extras={**on_t.extras, "learned": 0.5})

    def other(learned: float, dev: float, **entry: object) -> VariantResult:
        changed = on_t.entry.model_copy(update={"variant": "full on neighbours", **entry})
        extras = {**on_t.extras, "learned": learned}
        return replace(on_t, entry=changed, dev_score=dev, extras=extras)

    neighbours = other(1.0, 0.1, trained_on="adjacent")
    assert choose([neighbours, on_t], higher=True) == (1,)
    assert choose([other(0.0, 0.9, trained_on="forget"), on_t], higher=True) == (0,)
    few = other(0.1, 0.9, facts={"examples": 1})
    assert choose([few, on_t], higher=True) == (0,)
    weak = other(0.1, 0.9, variant="full", lr=1e-5)
    assert choose([weak, on_t], higher=True) == (1,), "a weak training on T decides nothing"


def test_power_and_bits_are_of_trainings_on_t_whatever_decides() -> None:
    """A single example that decides on the oracle does not say that T cannot be learned."""
    results = audit(0.05, 0.05)
    for (attack, subject), result in list(results.items()):
        if attack != "transfer":
            continue
        (variant,) = result.variants
        entry = variant.entry.model_copy(
            update={
                "variant": "full on 1 example", "facts": {**variant.entry.facts, "examples": 1},
                "curve": tuple(p.model_copy(update={"trained": 0.1}) for p in variant.entry.curve),
            }
        )  # fmt: skip
        few = replace(variant, entry=entry)
        results[attack, subject] = replace(result, variants=(variant, few), chosen=(1,))
    standard = BUDGET.model_copy(update={"name": "standard"})
    case = case_of("rmu", results, domain(), standard)
    assert not invalid_attacks(case)
    assert list(best_on_dev(case, "transfer", "rmu")) == ["full"]
