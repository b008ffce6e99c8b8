"""What every attack scores, the same for every subject: V by unit, retain and dev beside it.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from excise.auditor.base import Attack, Budget, Subject, VariantResult
from excise.auditor.batching import Memo
from excise.data.domain import Domain, Metric, Row, Rows
from excise.data.subsample import subsample
from excise.evals.score import direction_of, measure
from excise.evals.stats import bootstrap_mean
from excise.record import AttackVariant, CurvePoint, Estimate

SAMPLES = 400
"""Bootstrap samples of a curve point; the statistics that decide draw their own."""

Units = dict[str, float]
"""Score by unit."""


@dataclass(frozen=True)
class EvaluationSet:
    """The rows that are scored, cut to the budget.

    Attributes:
        domain: Where they come from.
        budget: What they were cut to.
        tokenizer: The subject's tokenizer.
        test: V by capability.
        dev: `dev_forget` by capability, for choices.
        retain: `retain_test`.
        trained: T, as it is shown beside V.
        fresh_train: First half of `fresh`, by unit.
        fresh_test: Second half.
        max_length: Tokens per row.
    """

    domain: Domain
    budget: Budget
    tokenizer: Any
    test: Mapping[str, Rows]
    dev: Mapping[str, Rows]
    retain: Rows
    trained: Rows
    fresh_train: Rows
    fresh_test: Rows
    max_length: int

    @property
    def metric(self) -> Metric:
        """Headline metric of the forget side."""
        return self.domain.metrics[0]

    @property
    def trained_metric(self) -> Metric:
        """Metric of T: the headline one where every row of T takes it, else the token loss."""
        return self.metric if all(fits(r, self.metric) for r in self.trained) else "text_loss"

    @property
    def higher(self) -> bool:
        """Whether a higher score means more knowledge."""
        return more_is_known(self.domain)

    @property
    def all_test(self) -> Rows:
        """V of all capabilities."""
        return tuple(row for rows in self.test.values() for row in rows)

    @property
    def all_dev(self) -> Rows:
        """Dev of all capabilities."""
        return tuple(row for rows in self.dev.values() for row in rows)

    def longer(self, factor: int) -> EvaluationSet:
        """Return the set with room for prompts `factor` times as long."""
        limit = getattr(self.tokenizer, "model_max_length", 0) or 0
        limit = limit if 0 < limit < 1 << 20 else 4096
        return replace(self, max_length=max(self.max_length, min(limit, self.max_length * factor)))

    def units(self, model: Any, rows: Sequence[Row], metric: Metric | None = None) -> Units:
        """Return the headline score of `rows` by unit; nothing for no rows."""
        if not rows:
            return {}
        scores = measure(
            model, self.tokenizer, rows, metric or self.metric, max_length=self.max_length
        )
        return {unit: float(value) for unit, value in scores.by_unit().items()}

    def retained(self, model: Any, rows: Sequence[Row] | None = None) -> Units:
        """Return the retain score by unit."""
        chosen = self.retain if rows is None else rows
        return self.units(model, chosen, self.domain.retain_metrics[0])


def fits(row: Row, metric: Metric) -> bool:
    """Return whether a row can be scored by a metric: a plain text has no choices to pick from."""
    if metric == "multiple_choice":
        return len(row.choices) > 1 and row.answer >= 0
    return metric == "text_loss" or row.kind in ("completion", "choice")


def more_is_known(domain: Domain) -> bool:
    """Return whether a higher score on the headline metric means more knowledge."""
    return direction_of(domain.metrics[0]) == "higher"


def evaluation_set(domain: Domain, budget: Budget, tokenizer: Any) -> EvaluationSet:
    """Cut what is scored to the budget.

    Args:
        domain: Rows by role.
        budget: Rows at most.
        tokenizer: The subject's tokenizer.

    Returns:
        The set; equal for all subjects of one audit.
    """
    share = max(1, budget.max_test_rows // max(len(domain.test), 1))
    other = max(1, budget.max_other_rows // max(len(domain.test), 1))
    units = list(dict.fromkeys(row.unit for row in domain.fresh))
    first = set(units[: len(units) // 2])
    trained = tuple(row for rows in domain.relearn.values() for row in rows)
    fresh = {
        half: tuple(row for row in domain.fresh if (row.unit in first) == half)
        for half in (True, False)
    }
    return EvaluationSet(
        domain=domain,
        budget=budget,
        tokenizer=Memo(tokenizer),
        test={name: subsample(rows, share, by="row") for name, rows in domain.test.items()},
        dev={name: subsample(rows, other, by="row") for name, rows in domain.dev_forget.items()},
        retain=subsample(domain.retain_test, budget.max_other_rows, by="row"),
        trained=subsample(trained, budget.max_other_rows, by="row"),
        fresh_train=fresh[True],
        fresh_test=subsample(fresh[False], budget.max_other_rows, by="row"),
        max_length=budget.max_length,
    )


@dataclass(frozen=True)
class Measurement:
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
        units = self.units if of is None else of
        nothing = Estimate(math.nan, math.nan, math.nan)
        score = bootstrap_mean(units, samples=SAMPLES) if units else nothing
        return CurvePoint(
            examples=self.examples,
            tokens=self.tokens,
            flops=self.flops,
            score=score.value,
            low=score.low,
            high=score.high,
            retain=mean(self.retain),
            trained=mean(self.trained),
        )


def mean(units: Mapping[str, float]) -> float | None:
    """Return the mean over units, None for none."""
    return sum(units.values()) / len(units) if units else None


def read(
    model: Any,
    evaluation: EvaluationSet,
    *,
    test: Sequence[Row] | None = None,
    retain: Sequence[Row] | None = None,
    trained: Sequence[Row] = (),
    trained_metric: Metric | None = None,
    examples: int = 0,
    tokens: int = 0,
    flops: float = 0.0,
) -> Measurement:
    """Score V and retain.

    Args:
        model: The model, as attacked.
        evaluation: What to score.
        test: Rows in place of V, of the same units.
        retain: Rows in place of `retain_test`.
        trained: Rows of T to score too.
        trained_metric: Metric of those; None for that of V.
        examples: Cost so far, in rows.
        tokens: Cost so far, in tokens.
        flops: Cost so far, in operations.

    Returns:
        The measurement.
    """
    return Measurement(
        units=evaluation.units(model, evaluation.all_test if test is None else test),
        retain=evaluation.retained(model, retain),
        trained=evaluation.units(model, trained, trained_metric),
        examples=examples,
        tokens=tokens,
        flops=flops,
    )


def variant_of(
    attack: Attack,
    subject: Subject,
    metric: str,
    *,
    variant: str,
    measurements: Sequence[Measurement],
    dev: Units,
    extras: Mapping[str, Any] | None = None,
    needs_original: bool = False,
    **row: Any,
) -> VariantResult:
    """Put the result of one variant together.

    Args:
        attack: The attack.
        subject: The model.
        metric: Metric of V.
        variant: Name of the variant.
        measurements: Checkpoints, cheapest first; the first before the attack.
        dev: Dev score by unit at the end.
        extras: What the statistics need beside.
        needs_original: Whether this variant holds the original.
        **row: Further fields of the record's entry: `control`, `trained_on`, `lr`, `seed`, `facts`,
            `status`, `reason`.

    Returns:
        The result; `extras["retain"]` and `["retain_start"]` hold the retain scores by unit.
    """
    entry = AttackVariant(
        name=str(getattr(attack, "name", type(attack).__name__)),
        subject=subject.name,
        access=attack.access,
        level=attack.level,
        needs_original=needs_original or attack.needs_original,
        variant=variant,
        scored_on="test",
        metric=metric,
        curve=tuple(measurement.point() for measurement in measurements),
        **row,
    )
    value = mean(dev)
    ends = {"retain": measurements[-1].retain, "retain_start": measurements[0].retain}
    return VariantResult(
        entry=entry,
        unit_scores=tuple(measurement.units for measurement in measurements),
        dev_score=math.nan if value is None else value,
        extras={**ends, **(extras or {})},
    )
