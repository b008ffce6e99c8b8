"""From attacked models to depth gaps, tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from excise.data.domain import Domain
from excise.evals.replicates import Contrast, Decision, SeedEstimate
from excise.evals.stats import Array, Estimate
from excise.record import StudyRow, StudyTable
from excise_studies.attacking import Attacked, RunKey
from excise_studies.base import ScoreByUnit, row
from excise_studies.levels import Levels, estimate, estimate_of_seed, levels

REFERENCES = ("original", "oracle")

RECOVERY = "Recovery on the held-out test set after relearning"
"""Title of the table of what relearning brings back."""


@dataclass(frozen=True)
class RecoveryScores:
    """All conditions after the attack, reference models among them.

    Attributes:
        conditions: Names of the conditions, reference models left out.
        seeds: Reported seeds.
        attacked: Every attack, by condition and seed.
        before: Scores on the held-out test set before the attack.
        after: Scores on the held-out test set after it.
        t: Scores on the relearn set at the same step.
        retain: Scores on `retain_test` before it.
        distance: Original before the attack minus oracle after it, on the held-out test set.
        invalid: Why nothing can be decided; empty where the attacker had power.
        absolute: Whether scores are answers that are right, of which all may be; else text by its
            loss, where what counts is the share of the original's.
        weak: By condition the seeds in which relearning did not teach it the relearn set.
    """

    conditions: tuple[str, ...]
    seeds: tuple[int, ...]
    attacked: Mapping[RunKey, Attacked]
    before: Levels
    after: Levels
    t: Levels
    retain: Levels
    distance: Estimate
    invalid: str
    absolute: bool = True
    weak: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def kept(self, condition: str) -> Array:
        """Return a condition's score on retain, as a share of the original's where text is read."""
        score = self.retain.at(condition)
        return score if self.absolute else score / self.retain.at("original")

    def gap(self, condition: str) -> Array:
        """Return the depth gap: (condition - oracle) / (original before any attack - oracle)."""
        oracle = self.after.at("oracle")
        return (self.after.at(condition) - oracle) / self.scale()

    def scale(self) -> Array:
        """Return the distance of the reference models, NaN where it is not above zero."""
        distance = self.before.at("original") - self.after.at("oracle")
        return np.where(distance > 0, distance, np.nan)

    def apart(self, first: Array, second: Array) -> SeedEstimate:
        """Return the difference of two depth gaps with its interval; it knows both sides.

        Args:
            first: A depth gap, or a mean of several, in the layout of `levels`.
            second: Another.
        """
        sides = (float(first[0]), float(second[0]))
        return replace(estimate(first - second, self.after), sides=sides)

    def contrast(self, first: Sequence[str], second: Sequence[str]) -> SeedEstimate:
        """Return the mean depth gap of some conditions minus that of others, with its interval.

        Args:
            first: Names of conditions.
            second: Names of others.
        """
        return self.apart(
            np.mean([self.gap(name) for name in first], axis=0),
            np.mean([self.gap(name) for name in second], axis=0),
        )

    def value(self, condition: str) -> SeedEstimate:
        """Return the depth gap of a condition with its interval."""
        return estimate(self.gap(condition), self.after)


def gather(
    attacked: Mapping[RunKey, Attacked],
    domains: Mapping[int, Domain],
    *,
    power: float,
    absolute: bool = True,
) -> RecoveryScores:
    """Put the attacks of a study together.

    Args:
        attacked: By condition and seed; the conditions `original` and `oracle` are among them.
        domains: Data by seed.
        power: Score on the relearn set that the oracle must reach.
        absolute: Whether that is the score itself; else the share of the original's.
    """
    names = tuple(dict.fromkeys(condition for condition, _ in attacked))
    seeds = tuple(dict.fromkeys(seed for _, seed in attacked))
    groups = {seed: groups_of(domain) for seed, domain in domains.items()}

    def of(score: Callable[[Attacked], ScoreByUnit]) -> Levels:
        scores = {name: {seed: score(attacked[name, seed]) for seed in seeds} for name in names}
        return levels(scores, groups)

    t = of(lambda a: a.learned)
    reached = float(t.at("oracle")[0])
    threshold = power if absolute else power * float(of(lambda a: a.t[0]).at("original")[0])
    weak: dict[str, tuple[int, ...]] = {}
    for (condition, seed), attack in attacked.items():
        if not attack.taught and condition not in REFERENCES:
            weak[condition] = (*weak.get(condition, ()), seed)
    before, after = of(lambda a: a.before), of(lambda a: a.after)
    apart = before.at("original") - after.at("oracle")
    distance: Estimate = estimate(apart, after)
    if len(seeds) == 1:  # the gap is defined by units alone, whatever is left undecided over seeds
        first = before.at("original", seeds[0]) - after.at("oracle", seeds[0])
        distance = estimate_of_seed(first, after, seeds[0])
    invalid = ""
    if not distance.low > 0:
        invalid = (
            f"invalid: the reference models lie {said(distance)} apart on the held-out test set, "
            "too little to measure anything between them"
        )
    elif reached < threshold:
        invalid = (
            f"invalid: the attacker brought the oracle to {reached:.2f} on the relearn set, below "
            f"{threshold:.2f}, so that the budget teaches too little to tell conditions apart"
        )
    return RecoveryScores(
        conditions=tuple(name for name in names if name not in REFERENCES),
        seeds=seeds,
        attacked=attacked,
        before=before,
        after=after,
        t=t,
        retain=of(lambda a: a.retained),
        distance=distance,
        invalid=invalid,
        absolute=absolute,
        weak=weak,
    )


def groups_of(domain: Domain) -> dict[str, str]:
    """Return the group of every unit of the held-out and relearn sets and of `retain_test`."""
    sides = [*domain.test.values(), *domain.relearn.values(), domain.retain_test]
    return {row.unit: row.group for rows in sides for row in rows if row.group}


def recovery_table(recovery: RecoveryScores, title: str = RECOVERY) -> StudyTable:
    """Return what decides: scores before and after, depth gap, retain; the relearn set beside."""
    rows: list[StudyRow] = []
    for condition in (*REFERENCES, *recovery.conditions):
        rows.append(
            row(
                condition,
                "held-out test set before the attack",
                estimate(recovery.before.at(condition), recovery.before),
            )
        )
        rows.append(
            row(
                condition,
                "held-out test set after relearning",
                estimate(recovery.after.at(condition), recovery.after),
            )
        )
        if condition not in REFERENCES:
            rows.append(row(condition, "depth gap", recovery.value(condition)))
        rows.append(
            row(
                condition,
                "retain before the attack",
                estimate(recovery.retain.at(condition), recovery.retain),
            )
        )
        rows.append(
            row(
                condition,
                "relearn set after relearning",
                estimate(recovery.t.at(condition), recovery.t),
            )
        )
        for seed in recovery.seeds:
            rows.append(
                row(
                    condition,
                    "held-out test set after relearning",
                    estimate_of_seed(recovery.after.at(condition, seed), recovery.after, seed),
                    seed,
                )
            )
    return StudyTable(
        title=title,
        note=(
            "Depth gap: (condition - oracle) / (original before the attack - oracle), on the "
            "held-out test set; 0 is as if never learned. Both sets are scored at the rate and "
            "step that dev chose, among those that taught the relearn set, which never decides."
        ),
        rows=tuple(rows),
    )


def curves_table(recovery: RecoveryScores) -> StudyTable:
    """Return both sets over the steps of the attack, seeds weighing the same."""
    rows: list[StudyRow] = []
    for condition in (*REFERENCES, *recovery.conditions):
        attacks = [recovery.attacked[condition, seed] for seed in recovery.seeds]
        for i, step in enumerate(attacks[0].steps):
            for name, curve in (("held-out test set", "v"), ("relearn set (never decides)", "t")):
                means = [_mean(getattr(a, curve)[i]) for a in attacks if len(getattr(a, curve)) > i]
                value = sum(means) / len(means)
                rows.append(
                    StudyRow(
                        condition=condition,
                        metric=f"{name} at step {step}",
                        value=value,
                        n=len(means),
                    )
                )
    return StudyTable(
        title="Curves of the attack",
        note=(
            "At the learning rate that dev chose, to its end; n counts seeds. The relearn set is "
            "learned more slowly where noise must first be unlearned, which says nothing about "
            "depth."
        ),
        rows=tuple(rows),
    )


def _mean(units: Mapping[str, float]) -> float:
    """Return the mean over units; NaN of none."""
    return sum(units.values()) / len(units) if units else float("nan")


def said(value: Estimate) -> str:
    """Return an estimate in words: value and, where it has one, interval."""
    if math.isnan(value.value):
        return "not defined"
    if math.isnan(value.low):
        return f"{value.value:.2f}"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def listed(estimates: Mapping[str, Estimate]) -> str:
    """Return named estimates in words, one after the other."""
    return ", ".join(f"{name} {said(value)}" for name, value in estimates.items())


def opening(recovery: RecoveryScores) -> str:
    """Return the first sentence of a paragraph: what the reference models know."""
    knew, v = recovery.before.at("original")[0], recovery.after.at("oracle")[0]
    return (
        f"Over {len(recovery.seeds)} seed(s) the original knew {knew:.2f} of the held-out test "
        f"set; after relearning the oracle reached {v:.2f} of it and "
        f"{recovery.t.at('oracle')[0]:.2f} of the relearn set."
    )


def gaps(recovery: RecoveryScores, conditions: Sequence[str] | None = None) -> str:
    """Return the depth gaps of conditions in words."""
    parts = [
        f"{condition} {said(recovery.value(condition))}"
        for condition in (conditions or recovery.conditions)
    ]
    return f"Depth gaps on the held-out test set: {', '.join(parts)}."


def attacks_without_power(recovery: RecoveryScores) -> str:
    """Return what relearning failed to teach, in a sentence; empty where it taught every model."""
    if not recovery.weak:
        return ""
    parts = [
        f"{name} ({recovery.t.at(name)[0]:.2f} of it; seed(s) {', '.join(map(str, seeds))})"
        for name, seeds in recovery.weak.items()
    ]
    return (
        f"Relearning did not teach its set to {', '.join(parts)}: what came back there is a lower "
        "bound."
    )


def finish(
    words: Sequence[str], recovery: RecoveryScores, decision: Decision
) -> tuple[Decision, str]:
    """Return decision and paragraph; without power the decision is that there is none.

    Args:
        words: Sentences between the reference models and the decision; empty ones are left out.
        recovery: The conditions.
        decision: What the statistic says.
    """
    if recovery.invalid:
        distance = Contrast("The distance of the reference models", recovery.distance, (0.0,))
        decision = Decision(recovery.invalid, (distance,) if distance.open else ())
    parts = [opening(recovery), *words, attacks_without_power(recovery)]
    return decision, " ".join([*(p for p in parts if p), f"Decision: {decision.text}."])
