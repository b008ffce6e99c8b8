"""What an attack measured at every step of its curve: V by unit, retain and T beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from excise.auditor.base import ArmResult, Attack, Subject
from excise.auditor.evaluation_set import Sheet, Units, mean
from excise.data.domain import Metric, Row
from excise.evals.stats import bootstrap_mean
from excise.record import AttackArm, CurvePoint

SAMPLES = 400
"""Bootstrap samples of a curve point; the statistics that decide draw their own."""


@dataclass(frozen=True)
class Reading:
    """One checkpoint of a curve, with scores by unit.

    Attributes:
        units: V by unit.
        retain: Retain by unit.
        trained: T by unit, where T is scored.
        examples: Rows the attacker has used.
        tokens: Tokens the attacker has used.
        flops: Operations the attacker has spent.
    """

    units: Units
    retain: Units = field(default_factory=dict)
    trained: Units = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    flops: float = 0.0

    def point(self, of: Mapping[str, float] | None = None) -> CurvePoint:
        """Return the record's point; `of` puts other scores than V into it."""
        low_mean_high = interval(self.units if of is None else of)
        return CurvePoint(
            examples=self.examples,
            tokens=self.tokens,
            flops=self.flops,
            score=low_mean_high[1],
            low=low_mean_high[0],
            high=low_mean_high[2],
            retain=mean(self.retain),
            trained=mean(self.trained),
        )


def interval(units: Mapping[str, float]) -> tuple[float, float, float]:
    """Return low, mean and high of the 95 % interval, bootstrapped by unit."""
    if not units:
        return math.nan, math.nan, math.nan
    value = bootstrap_mean(units, samples=SAMPLES)
    return value.low, value.value, value.high


def read(
    model: Any,
    sheet: Sheet,
    *,
    test: Sequence[Row] | None = None,
    retain: Sequence[Row] | None = None,
    trained: Sequence[Row] = (),
    trained_metric: Metric | None = None,
    examples: int = 0,
    tokens: int = 0,
    flops: float = 0.0,
) -> Reading:
    """Score V and retain.

    Args:
        model: The model, as attacked.
        sheet: What to score.
        test: Rows in place of V, of the same units.
        retain: Rows in place of `retain_test`.
        trained: Rows of T to score too.
        trained_metric: Metric of those; None for that of V.
        examples: Cost so far, in rows.
        tokens: Cost so far, in tokens.
        flops: Cost so far, in operations.

    Returns:
        The reading.
    """
    return Reading(
        units=sheet.units(model, sheet.all_test if test is None else test),
        retain=sheet.retained(model, retain),
        trained=sheet.units(model, trained, trained_metric),
        examples=examples,
        tokens=tokens,
        flops=flops,
    )


def arm_of(
    attack: Attack,
    subject: Subject,
    metric: str,
    *,
    variant: str,
    readings: Sequence[Reading],
    dev: Units,
    extras: Mapping[str, Any] | None = None,
    needs_original: bool = False,
    **row: Any,
) -> ArmResult:
    """Put an arm together.

    Args:
        attack: The attack.
        subject: The model.
        metric: Metric of V.
        variant: Name of the arm.
        readings: Checkpoints, cheapest first; the first before the attack.
        dev: Dev score by unit at the end.
        extras: What the statistics need beside.
        needs_original: Whether this arm holds the original.
        **row: Further fields of the record's row: `control`, `trained_on`, `lr`, `seed`, `facts`,
            `status`, `reason`.

    Returns:
        The arm; `extras["retain"]` and `["retain_start"]` hold the retain scores by unit.
    """
    arm = AttackArm(
        name=str(getattr(attack, "name", type(attack).__name__)),
        subject=subject.name,
        access=attack.access,
        rung=attack.rung,
        needs_original=needs_original or attack.needs_original,
        arm=variant,
        scored_on="test",
        metric=metric,
        curve=tuple(reading.point() for reading in readings),
        **row,
    )
    value = mean(dev)
    ends = {"retain": readings[-1].retain, "retain_start": readings[0].retain}
    return ArmResult(
        arm=arm,
        unit_scores=tuple(reading.units for reading in readings),
        dev_score=math.nan if value is None else value,
        extras={**ends, **(extras or {})},
    )
