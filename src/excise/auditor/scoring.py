"""What an attack measured at every step of its curve: V by unit, retain and T beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from excise.auditor.base import Attack, AttackResult, Subject, VariantResult, name_of
from excise.auditor.budget import Budget
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set, mean
from excise.auditor.results import absent, decided
from excise.auditor.rewriting import Rewriting
from excise.core.context import Context
from excise.core.errors import NotFinite
from excise.data.domain import Domain, Metric, Row, Rows
from excise.evals.generate import normal
from excise.evals.stats import bootstrap_mean
from excise.record import AttackVariant, CurvePoint

SAMPLES = 400
"""Bootstrap samples of a curve point; the statistics that decide take their own."""


@dataclass(frozen=True)
class Measurement:
    """One checkpoint of a curve, with scores by unit.

    Attributes:
        units: V by unit.
        retain: Retain by unit.
        trained: T by unit, where T is scored.
        beside: V by unit, by other metrics of answers.
        examples: Rows the attacker has used.
        tokens: Tokens the attacker has used.
        flops: Operations the attacker has spent.
    """

    units: UnitScores
    retain: UnitScores = field(default_factory=dict)
    trained: UnitScores = field(default_factory=dict)
    beside: Mapping[str, UnitScores] = field(default_factory=dict)
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
    evaluation: EvaluationSet,
    *,
    test: Sequence[Row] | None = None,
    retain: Sequence[Row] | None = None,
    trained: Sequence[Row] = (),
    trained_metric: Metric | None = None,
    beside: bool = False,
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
        trained_metric: Metric of those; None for what they take.
        beside: Whether to score V by its other metrics of answers too.
        examples: Cost so far, in rows.
        tokens: Cost so far, in tokens.
        flops: Cost so far, in operations.

    Returns:
        The reading.
    """
    rows = evaluation.all_test if test is None else test
    return Measurement(
        units=evaluation.units(model, rows, evaluation.metric),
        retain=evaluation.retained(model, retain),
        trained=evaluation.units(model, trained, trained_metric),
        beside={
            metric: evaluation.units(model, rows, metric)
            for metric in (evaluation.metrics_beside if beside else ())
        },
        examples=examples,
        tokens=tokens,
        flops=flops,
    )


def try_variant(
    attack: Attack,
    subject: Subject,
    metric: str,
    score: Callable[[], tuple[Measurement, UnitScores]],
    *,
    bare: Measurement,
    **row: Any,
) -> VariantResult:
    """Score one variant; where it has no finite scores it has failed, and the others go on.

    Args:
        attack: The attack.
        subject: The model.
        metric: Metric of V.
        score: Measures V and retain, and `dev`, under the attack.
        bare: The measurement before the attack.
        **row: As `variant_of`.

    Returns:
        The result; a failed one ends before the attack and says why.
    """
    try:
        after, dev = score()
    except NotFinite as error:
        failed: dict[str, Any] = {"status": "failed", "reason": str(error)}
        return variant_of(attack, subject, metric, measurements=(bare,), dev={}, **row, **failed)
    return variant_of(attack, subject, metric, measurements=(bare, after), dev=dev, **row)


def variant_of(
    attack: Attack,
    subject: Subject,
    metric: str,
    *,
    variant: str,
    measurements: Sequence[Measurement],
    dev: UnitScores,
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
        **row: Further fields of the record's row: `control`, `trained_on`, `lr`, `seed`, `facts`,
            `status`, `reason`.

    Returns:
        The result; `extras["retain"]` and `["retain_start"]` hold the retain scores by unit,
        `["beside"]` and `["beside_start"]` V by other metrics where those were scored.
    """
    entry = AttackVariant(
        name=name_of(attack),
        subject=subject.name,
        access=attack.access,
        level=attack.level,
        needs_original=needs_original or attack.needs_original,
        variant=variant,
        scored_on="test",
        metric=metric,
        curve=tuple(reading.point() for reading in measurements),
        **row,
    )
    value = mean(dev)
    ends: dict[str, Any] = {
        "retain": measurements[-1].retain,
        "retain_start": measurements[0].retain,
    }
    if measurements[-1].beside:
        ends |= {"beside": measurements[-1].beside, "beside_start": measurements[0].beside}
    return VariantResult(
        entry=entry,
        unit_scores=tuple(reading.units for reading in measurements),
        dev_score=math.nan if value is None else value,
        extras={**ends, **(extras or {})},
    )


def score_rewritings(
    attack: Attack,
    subject: Subject,
    domain: Domain,
    budget: Budget,
    ctx: Context,
    ways: Callable[[EvaluationSet, Any], Sequence[Rewriting]],
    why: str,
) -> AttackResult:
    """Ask V, `dev_forget` and `retain_test` in other ways; the way chosen on dev decides.

    Args:
        attack: The attack.
        subject: The model.
        domain: Rows by role.
        budget: Rows and lengths.
        ctx: Device, dtype.
        ways: Returns the ways to ask, given the evaluation and the loaded model.
        why: What to say where there is none.

    Returns:
        One variant per way. `facts["rows"]` counts the rows of V that were rewritten, and
        `facts["answer_in_prompt"]` is the share of V whose right answer stands in what is asked.
    """
    start = time.perf_counter()
    evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
    model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
    bare = read(model, evaluation, beside=True)  # a broken model is refused before any search
    chosen_ways = ways(evaluation, model)
    if not chosen_ways:
        return absent(attack, subject.name, "missing", why, applies=False)
    variants = []
    for way in chosen_ways:
        wide = evaluation.longer(way.longer, model)
        asked = way.change(evaluation.all_test, wide)

        def score(
            way: Rewriting = way, wide: EvaluationSet = wide, asked: Rows = asked
        ) -> tuple[Measurement, UnitScores]:
            retain = way.change(evaluation.retain, wide)
            dev = wide.units(model, way.change(evaluation.all_dev, wide), evaluation.dev_metric)
            after = read(model, wide, test=asked, retain=retain, beside=True, examples=len(asked))
            return after, dev

        own = set(evaluation.all_test)
        facts = {
            "rows": sum(row not in own for row in asked),
            "of": len(own),
            "answer_in_prompt": sum(map(gives_away, asked)) / len(asked),
        }
        variants.append(
            try_variant(
                attack, subject, evaluation.metric, score, bare=bare, variant=way.variant,
                trained_on=way.trained_on, facts=facts,
            )
        )  # fmt: skip
    marked, chosen = decided(variants, higher=evaluation.higher)
    return AttackResult(name_of(attack), subject.name, marked, chosen, time.perf_counter() - start)


def gives_away(row: Row) -> bool:
    """Return whether the right answer of a row stands in its prompt, as whole words."""
    answer = row.choices[row.answer] if row.kind == "choice" else row.completion
    return bool(normal(answer)) and f" {normal(answer)} " in f" {normal(row.prompt)} "
