"""Filtering of tokens against documents, routing and pushing: slowdowns by hand, a tiny run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError
from tests.parity.toy import toy_checkpoint
from tests.studies.tiny_setting import QUICK, ran_twice

from excise.data.domain import Domain, Row, Span
from excise.data.labels import Confidence, LabelNoise
from excise.domains.facts import FACTS_MAX_LENGTH, Facts
from excise.methods import Filtering, TokenFilter
from excise.methods.base import Method
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import Scratch
from excise_studies.base import Replicate
from excise_studies.levels import levels
from excise_studies.routing.setting import shorter
from excise_studies.routing.token_labels import (
    RIGHT,
    Slowdowns,
    TokenLabels,
    TokenLabelSetting,
    condition_name,
    decide,
    deciding,
    difference,
    drops_all,
    label_settings,
    slowdown_table,
    words,
)
from excise_studies.setting import ExperimentSetting

SEEDS = (1, 2, 3)
SHARES = (0.0625, 0.25, 1.0)
PLAIN = {shorter(0.0625): 4.0, shorter(0.25): 2.0, shorter(1.0): 0.0}
STUDY = TokenLabels(arms=("token_removal", "filtering"), shares=SHARES)


def outcome_of(
    mine: float, other: float, *, kept: Mapping[str, float] | None = None, oracle: float = 9.0
) -> Slowdowns:
    """Return both methods with so much loss on the held-out test set, at every deciding setting."""
    forget = {**PLAIN, "oracle": oracle, "original": 0.0}
    forget |= dict.fromkeys(deciding(STUDY, "token_removal"), mine)
    forget |= dict.fromkeys(deciding(STUDY, "filtering"), other)
    retain = dict.fromkeys(forget, 0.5)
    for name, rise in (kept or {}).items():
        retain |= dict.fromkeys(deciding(STUDY, name), 0.5 + rise)

    def of(losses: Mapping[str, float]) -> dict[str, dict[int, dict[str, float]]]:
        units = ("a", "b", "c")
        return {n: {s: dict.fromkeys(units, x) for s in SEEDS} for n, x in losses.items()}

    return Slowdowns(levels(of(forget), {}), levels(of(retain), {}), SHARES)


def test_slowdowns_by_hand() -> None:
    outcome = outcome_of(2.0, 1.0)
    mine, other = (deciding(STUDY, name)[0] for name in ("token_removal", "filtering"))
    assert outcome.slowdown(mine)[0] == pytest.approx(4)
    assert outcome.slowdown(other)[0] == pytest.approx(2)
    assert outcome.slowdown("oracle")[0] == pytest.approx(16)
    assert [outcome.bounded(n) for n in (mine, other, "oracle")] == [False, False, True]
    assert difference(STUDY, outcome, "filtering").value.value == pytest.approx(1)


@pytest.mark.parametrize(
    ("mine", "other", "kept", "said"),
    [
        (3.0, 0.5, {}, "token_removal slows more than filtering"),
        (0.5, 3.0, {}, "token_removal slows less than filtering"),
        (2.0, 2.2, {}, "token_removal slows alike within 2 times: filtering"),
        (9.0, 0.5, {}, "token_removal slows more than filtering"),
        (9.0, 3.9, {}, "undecided against filtering, where slowdowns are bounds"),
        (9.0, 9.0, {}, "undecided against filtering, where slowdowns are bounds"),
        (0.5, 9.0, {}, "token_removal slows less than filtering"),
        (3.0, 0.5, {"filtering": 0.2}, "filtering invalid and not compared: raises the loss"),
        (3.0, 0.5, {"token_removal": 0.2}, "invalid: token_removal raises the loss"),
    ],
)
def test_decisions(mine: float, other: float, kept: dict[str, float], said: str) -> None:
    outcome = outcome_of(mine, other, kept=kept)
    found = {"filtering": difference(STUDY, outcome, "filtering")}
    assert decide(STUDY, outcome, found).text.startswith(said)


def test_a_study_with_little_to_slow_is_invalid() -> None:
    outcome = outcome_of(3.0, 0.5, oracle=0.5)
    found = {"filtering": difference(STUDY, outcome, "filtering")}
    assert decide(STUDY, outcome, found).text.startswith("invalid: the oracle's slowdown is 1.4")


def test_settings_of_the_labels() -> None:
    study = STUDY.model_copy(update={"rates": (0.0, 0.4), "thresholds": (0.5, 0.1)})
    names = [str(labels) for labels in label_settings(study)]
    assert names == [
        "labels right", "40 % words missed", "40 % spans missed", "40 % false words",
        "40 % words missed, above 0.5", "40 % words missed, above 0.1",
        "40 % spans missed, above 0.5", "40 % spans missed, above 0.1",
    ]  # fmt: skip
    certain = Confidence()
    assert RIGHT.labels(certain) is None
    moved = TokenLabelSetting(0.4, "spans", 0.1)
    given = moved.labels(certain)
    assert given is not None
    assert (given.missed_spans, given.confidence) == (0.4, certain)
    unsure = TokenLabelSetting(0.4, "false words").labels(certain)
    assert unsure is not None
    assert (unsure.false_words, unsure.confidence) == (0.4, None)
    assert moved.method(TokenFilter()) == TokenFilter(filter_above=0.1)
    assert moved.method(Filtering()) == Filtering(drop_above=0.1)
    assert moved.method(study.methods["sgtm"]) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": ("token_remove",)}, "no method 'token_remove'.*token_removal"),
        ({"arms": ("filtering",)}, "'token_removal' is not among 'arms'"),
        ({"decide_at": 0.3}, "0.3 is no error of 'rates'"),
        ({"noise": ("words",)}, "'spans' is not among 'noise'"),
        ({"shares": (0.5, 0.25, 1.0)}, "ascending"),
    ],
)
def test_a_decision_about_what_is_not_run_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TokenLabels.model_validate(change)


class Pairs(Facts):
    """Facts of which some that stay stand in one text with one that is to be forgotten."""

    name: Literal["pairs"] = "pairs"  # type: ignore[assignment]

    def build(self, model: object = None) -> Domain:
        domain = super().build(model)
        forget = domain.forget["alpha"]
        both = [joined(a, b) for a, b in zip(domain.retain, forget, strict=False)]
        rest = domain.retain[len(both) :]
        return replace(domain, forget={"alpha": (*both, *forget[len(both) :])}, retain=rest)


def joined(core: Row, forget: Row) -> Row:
    """Return both facts in one text, the second to be forgotten."""
    a, b = (f"{row.prompt} {row.choices[row.answer]}" for row in (core, forget))
    span = Span(len(a) + 1, len(a) + 1 + len(b), forget.capability)
    return Row(forget.unit, text=f"{a} {b}", capability=forget.capability, spans=(span,))


def test_the_study_runs_through_and_resumes(tmp_path: Path) -> None:
    experiment = ExperimentSetting(
        domain=Pairs(subjects=24, relations=2, objects=8, wordings=2, forget_share=0.3),
        model=Scratch(width=32, blocks=1),
        pretrain=Pretrain(fit=QUICK, max_length=2 * FACTS_MAX_LENGTH),
    )
    study = TokenLabels(
        seeds=(1,),
        experiment=experiment,
        arms=("token_removal", "filtering", "sgtm"),
        rates=(0.4,),
        noise=("words",),
        missed=("words",),
        thresholds=(0.1,),
        shares=(0.7, 1.0),  # no slowdown is twice the compute
    )
    made = ran_twice(study, tmp_path)
    assert made.decision.startswith("invalid: the oracle's slowdown")
    table = next(table for table in made.tables if table.title == "Slowdown by labels")
    conditions = [row.condition for row in table.rows]
    assert [conditions.count(name) for name in study.arms] == [6, 6, 3]


def test_filtering_that_leaves_no_document_is_told_from_filtering_that_does(tmp_path: Path) -> None:
    domain = Facts(subjects=24, relations=2, objects=8, facts_per_text=2).build(None)
    model = toy_checkpoint(tmp_path)
    invented, few = LabelNoise(false_words=1.0), LabelNoise(false_words=0.01)

    def empties(method: Method, labels: LabelNoise | None) -> bool:
        return drops_all(method, labels, {1: Replicate(1, domain, model)})

    assert empties(Filtering(), invented)
    assert not empties(Filtering(), few)
    assert not empties(Filtering(), None)
    assert not empties(TokenFilter(), invented)


def test_what_did_not_run_is_left_out_of_words_and_table() -> None:
    study = STUDY.model_copy(update={"rates": (0.4,), "thresholds": ()})
    told = " ".join(words(study, outcome_of(9.0, 1.0)))
    assert "With 40 % words missed: token_removal" in told
    assert "invented" not in told
    assert {row.condition for row in slowdown_table(study, outcome_of(9.0, 1.0)).rows} == {
        "token_removal", "filtering"
    }  # fmt: skip


def test_bounds_are_named_in_the_table() -> None:
    study = STUDY.model_copy(update={"rates": (0.4,), "noise": STUDY.missed, "thresholds": ()})
    rows = slowdown_table(study, outcome_of(9.0, 1.0, kept={"filtering": 0.3})).rows
    told = {(row.condition, row.metric) for row in rows}
    assert ("token_removal", "slowdown, at least, 40 % words missed") in told
    assert ("filtering", "slowdown, 40 % words missed") in told
    assert ("filtering", "retain rise, lost, 40 % words missed") in told
    assert condition_name("a", RIGHT) == "a [labels right]"
