"""Label noise: exact rates, independence of order, and oracle labels that stay."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Row
from excise.data.labels import (
    Confidence,
    LabelNoise,
    forget_score,
    give_labels,
    label_quality,
    label_rows,
    miscalibration,
)


def make_rows(units: int = 40, wordings: int = 4) -> tuple[Row, ...]:
    rows = [
        Row(f"{name or 'core'}-{u}", prompt=f"{name} {u} {w}", completion=" x", group=f"g{u % 4}",
            capability=name, wording=w)
        for name in ("", "a", "b")
        for u in range(units)
        for w in range(wordings)
    ]  # fmt: skip
    return label_rows(rows, ("a", "b"))


def test_truth_is_numbered_in_the_given_order() -> None:
    rows = label_rows([Row("1", text="x"), Row("2", text="y", capability="b")], ("a", "b"))
    assert [row.label for row in rows] == [CORE, 2]


def test_unknown_capability_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cyber'"):
        label_rows([Row("u", text="x", capability="cybr")], ("cyber", "biology"))


def test_no_noise_changes_nothing() -> None:
    rows = make_rows()
    assert give_labels(rows, LabelNoise(), seed=3) == rows


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_missed_units_lose_all_their_rows(rate: float) -> None:
    quality = label_quality(give_labels(make_rows(), LabelNoise(missed_units=rate), seed=0))
    assert quality["units"] == pytest.approx(1 - rate)
    assert quality["occurrences"] == pytest.approx(1 - rate)


def test_missed_occurrences_leave_units_known() -> None:
    quality = label_quality(give_labels(make_rows(), LabelNoise(missed_occurrences=0.5), seed=0))
    assert quality["occurrences"] == pytest.approx(0.5)
    assert quality["units"] > 0.85


def test_false_alarms_hit_core_rows_only() -> None:
    rows = make_rows()
    told = give_labels(rows, LabelNoise(false_alarms=0.25), seed=0)
    quality = label_quality(told)
    assert quality["false_alarms"] == pytest.approx(0.25)
    assert quality["occurrences"] == 1.0
    assert {t.label for t in told if not t.capability} == {CORE, 1, 2}


def test_structured_misses_follow_wording_group_and_text() -> None:
    rows = make_rows()
    for noise, fits in (
        (LabelNoise(missed_wordings=(1, 3)), lambda r: r.wording in (1, 3)),
        (LabelNoise(missed_groups=("g2",)), lambda r: r.group == "g2"),
        (LabelNoise(missed_pattern=r" 1\d "), lambda r: 10 <= int(r.unit.split("-")[1]) < 20),
    ):
        told = give_labels(rows, noise, seed=0)
        wrong = {t for t in told if t.capability and t.label == CORE}
        assert wrong == {t for t in told if t.capability and fits(t)}
        assert wrong


def test_missed_as_unlabeled_and_unlabeled_stays() -> None:
    rows = make_rows()
    told = give_labels(rows, LabelNoise(missed_units=0.5, missed_as="unlabeled"), seed=0)
    assert {row.label for row in told if row.capability == "a"} == {1, UNLABELED}
    mix = (Row("u", text="x", capability="a", label=UNLABELED), *rows)
    assert give_labels(mix, LabelNoise(missed_units=1.0), seed=0)[0].label == UNLABELED


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_order_does_not_matter_and_truth_stays(
    random: object, seed: int, missed: float, alarms: float
) -> None:
    rows = list(make_rows(units=8, wordings=2))
    noise = LabelNoise(missed_units=missed, missed_occurrences=missed, false_alarms=alarms)
    told = give_labels(rows, noise, seed=seed)
    assert [t.capability for t in told] == [r.capability for r in rows]
    shuffled = rows[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(give_labels(shuffled, noise, seed=seed)) == set(told)


def test_seeds_differ() -> None:
    rows = make_rows()
    noise = LabelNoise(missed_units=0.5)
    assert give_labels(rows, noise, seed=0) != give_labels(rows, noise, seed=1)


def test_bad_noise_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        LabelNoise(missed_units=1.5)
    with pytest.raises(ValidationError, match="not a regular expression"):
        LabelNoise(missed_pattern="(")


def test_quality_of_nothing_is_nan() -> None:
    assert all(math.isnan(v) for v in label_quality(()).values())


def test_confidence_changes_no_label_and_is_calibrated() -> None:
    rows = make_rows(units=400)
    noise = LabelNoise(missed_occurrences=0.5, false_alarms=0.1)
    plain = give_labels(rows, noise, seed=0)
    told = give_labels(
        rows, noise.model_copy(update={"confidence": Confidence(concentration=2.0)}), seed=0
    )
    assert [r.label for r in told] == [r.label for r in plain]
    assert {r.confidence for r in plain} == {1.0}
    assert 0.0 < min(r.confidence for r in told) < 0.2
    assert miscalibration(told) < 0.03
    sure = noise.model_copy(update={"confidence": Confidence(concentration=2.0, overconfidence=4)})
    assert miscalibration(give_labels(rows, sure, seed=0)) > 0.07


def test_small_concentration_tells_misses_from_true_core() -> None:
    def gap(concentration: float) -> float:
        noise = LabelNoise(missed_units=0.5, confidence=Confidence(concentration=concentration))
        told = [r for r in give_labels(make_rows(), noise, seed=0) if r.label == CORE]
        missed = [forget_score(r) for r in told if r.capability]
        core = [forget_score(r) for r in told if not r.capability]
        return sum(missed) / len(missed) - sum(core) / len(core)

    assert gap(0.1) > 0.8
    assert abs(gap(1e4)) < 0.01


def test_labels_that_are_all_right_are_certain() -> None:
    told = give_labels(make_rows(), LabelNoise(missed_units=0.5, confidence=Confidence()), seed=0)
    assert {r.confidence for r in told if r.label > CORE} == {1.0}
    assert {forget_score(r) for r in told if r.label > CORE} == {1.0}
    assert forget_score(Row("u", text="x", label=UNLABELED)) == 0.0
    assert math.isnan(miscalibration(()))


def test_confidence_does_not_depend_on_order() -> None:
    rows = make_rows(units=8)
    noise = LabelNoise(missed_units=0.5, confidence=Confidence())
    assert set(give_labels(rows[::-1], noise, seed=2)) == set(give_labels(rows, noise, seed=2))


def test_bad_confidence_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Confidence(concentration=0)
