"""What a record does not show is said, and nothing is said that it does show."""

from __future__ import annotations

import pytest
from tests.report import parts, sample

from excise.record import AttackVariant, ModelRef, Record
from excise.report.limits import limits


def said(record: Record) -> str:
    """Return all limits as one text."""
    return " ".join(limits(record))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": (0,)}, "with one seed"),
        ({"sensitive": True}, "marked sensitive"),
        ({"attacks": ()}, "Nothing was attacked"),
        ({"models": (parts.model("original"),)}, "This audit had no oracle"),
        ({"models": (ModelRef(name="oracle-0"),)}, "come from 1 seed; three"),
        ({"data": {"exposure": "unknown"}}, "is unknown: no split"),
        ({"data": {"claim": "capability"}}, "The claim is about the capability"),
        ({"scores": ()}, "The retain set was not scored"),
    ],
)
def test_said_when_it_holds_and_only_then(change: dict[str, object], words: str) -> None:
    full = sample.full().model_copy(update={"seeds": (0, 1, 2)})
    assert words not in said(full)
    assert words in said(full.model_copy(update=change))


def test_invalid_missing_and_underpowered_are_named() -> None:
    text = said(sample.full())
    assert "prefix_fill k=8" in text
    assert "Required but not run: lens" in text
    assert "Too little power to decide: holds against prompts (rmu)" in text
    assert "no attacker used more than 8,192 tokens" in text


def test_what_has_nothing_to_do_is_no_lack() -> None:
    full = sample.full()

    def idle(attack: AttackVariant) -> AttackVariant:
        return attack.model_copy(update={"facts": {"applies": False}})

    kept = tuple(idle(a) if a.name == "lens" else a for a in full.attacks)
    text = said(full.model_copy(update={"attacks": kept}))
    assert "Required but not run" not in text
    assert "Left nothing to do by these rows or this model: lens." in text
    assert "Left nothing to do" not in said(full)


def test_suppressed_is_not_ignorant_and_not_called_broken() -> None:
    text = said(sample.many())
    assert "Suppressed is not ignorant: the forget loss of maxent is near" in text
    assert "roken" not in text
    assert "Suppressed" not in said(sample.full())
    record = sample.many()
    ignorant = tuple(
        s.model_copy(update={"value": 9.7, "low": 9.5, "high": 9.9}) if s.model == "original" else s
        for s in record.scores
        if s.metric == "text_loss"
    )
    assert "Suppressed" not in said(record.model_copy(update={"scores": ignorant}))


def test_original_at_chance_and_forced_choice() -> None:
    record = sample.full()
    low = tuple(
        s.model_copy(update={"low": 0.01, "value": 0.04, "metric": "multiple_choice"})
        for s in record.scores
        if s.metric == "exact_match"
    )
    text = said(record.model_copy(update={"scores": low}))
    assert "there was nothing to remove" in text
    assert "Only forced choice was scored" in text
    assert "nothing to remove" not in said(record)


def test_never_empty() -> None:
    assert limits(Record())
