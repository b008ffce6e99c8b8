"""From attacked models to depth gaps, tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from excise.data.domain import Domain
from excise.evals.stats import Array, Estimate
from excise.record import StudyRow, StudyTable
from excise_studies.attacking import Attacked, RunKey
from excise_studies.base import UnitScores, row
from excise_studies.levels import Levels, estimate, levels

RAILS = ("original", "oracle")


@dataclass(frozen=True)
class RecoveryScores:
    """All arms after the attack, rails among them.

    Attributes:
        arms: Names of the arms, rails left out.
        seeds: Reported draws.
        attacked: Every attack, by arm and draw.
        before: Scores on V before the attack.
        after: Scores on V after it.
        t: Scores on T at its end.
        retain: Scores on `retain_test` before it.
        void: Why nothing can be decided; empty where the attacker had power.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    attacked: Mapping[RunKey, Attacked]
    before: Levels
    after: Levels
    t: Levels
    retain: Levels
    void: str

    def gap(self, arm: str) -> Array:
        """Return the depth gap: (arm - oracle) / (original before any attack - oracle)."""
        oracle = self.after.at("oracle")
        return (self.after.at(arm) - oracle) / self.scale()

    def scale(self) -> Array:
        """Return the distance of the rails, NaN where it is not above zero."""
        distance = self.before.at("original") - self.after.at("oracle")
        return np.where(distance > 0, distance, np.nan)

    def contrast(self, one: Sequence[str], two: Sequence[str]) -> Estimate:
        """Return the mean gap of some arms minus that of others."""
        moved = (self.after.mean(one) - self.after.mean(two)) / self.scale()
        return estimate(moved, self.after.n)

    def value(self, arm: str) -> Estimate:
        """Return the depth gap of an arm with its interval."""
        return estimate(self.gap(arm), self.after.n)


def gather(
    attacked: Mapping[RunKey, Attacked],
    domains: Mapping[int, Domain],
    *,
    power: float,
    absolute: bool = True,
) -> RecoveryScores:
    """Put the attacks of a study together.

    Args:
        attacked: By arm and draw; the arms `original` and `oracle` are among them.
        domains: Data by draw.
        power: Score on T that the oracle must reach.
        absolute: Whether that is the score itself; else the share of the original's.
    """
    names = tuple(dict.fromkeys(arm for arm, _ in attacked))
    seeds = tuple(dict.fromkeys(seed for _, seed in attacked))
    groups = {seed: groups_of(domain) for seed, domain in domains.items()}

    def of(score: Callable[[Attacked], UnitScores]) -> Levels:
        held = {name: {seed: score(attacked[name, seed]) for seed in seeds} for name in names}
        return levels(held, groups)

    t = of(lambda a: a.learned)
    reached = float(t.at("oracle")[0])
    wanted = power if absolute else power * float(of(lambda a: a.t[0]).at("original")[0])
    before, after = of(lambda a: a.before), of(lambda a: a.after)
    apart = estimate(before.at("original") - after.at("oracle"), after.n)
    void = ""
    if apart.low <= 0:
        void = f"void: the rails are {said(apart)} of V apart, too little to read anything between"
    elif reached < wanted:
        void = (
            f"void: the attacker brought the oracle to {reached:.2f} on T, below {wanted:.2f}, so "
            "that the budget teaches too little to tell arms apart"
        )
    return RecoveryScores(
        arms=tuple(name for name in names if name not in RAILS),
        seeds=seeds,
        attacked=attacked,
        before=before,
        after=after,
        t=t,
        retain=of(lambda a: a.kept),
        void=void,
    )


def groups_of(domain: Domain) -> dict[str, str]:
    """Return the group of every unit of V, T and `retain_test`."""
    sides = [*domain.test.values(), *domain.relearn.values(), domain.retain_test]
    return {row.unit: row.group for rows in sides for row in rows if row.group}


def arms_table(
    found: RecoveryScores, title: str = "Recovery on V after T was relearned"
) -> StudyTable:
    """Return what decides: V before and after, the depth gap, retain, and T beside them."""
    rows: list[StudyRow] = []
    for arm in (*RAILS, *found.arms):
        n = found.after.n
        rows.append(row(arm, "V before the attack", estimate(found.before.at(arm), n)))
        rows.append(row(arm, "V after relearning T", estimate(found.after.at(arm), n)))
        if arm not in RAILS:
            rows.append(row(arm, "depth gap", found.value(arm)))
        rows.append(
            row(arm, "retain before the attack", estimate(found.retain.at(arm), found.retain.n))
        )
        rows.append(row(arm, "T after relearning it", estimate(found.t.at(arm), found.t.n)))
        for seed in found.seeds:
            units = len(found.attacked[arm, seed].after)
            rows.append(
                row(arm, "V after relearning T", estimate(found.after.at(arm, seed), units), seed)
            )
    return StudyTable(
        title=title,
        note=(
            "Depth gap: (arm - oracle) / (original before the attack - oracle), on V; 0 is as if "
            "never learned. V after relearning is read at the rate and step that dev chose. T is "
            "shown, at its end, and never decides."
        ),
        rows=tuple(rows),
    )


def curves_table(found: RecoveryScores) -> StudyTable:
    """Return V and T over the steps of the attack, draws weighing the same."""
    rows: list[StudyRow] = []
    for arm in (*RAILS, *found.arms):
        attacks = [found.attacked[arm, seed] for seed in found.seeds]
        for i, step in enumerate(attacks[0].steps):
            for name, held in (("V", "v"), ("T (never decides)", "t")):
                means = [_mean(getattr(a, held)[i]) for a in attacks if len(getattr(a, held)) > i]
                value = sum(means) / len(means)
                rows.append(
                    StudyRow(
                        condition=arm, metric=f"{name} at step {step}", value=value, n=len(means)
                    )
                )
    return StudyTable(
        title="Curves of the attack",
        note="At the learning rate that dev chose, to its end; n counts draws. T relearns slower "
        "where noise must first be unlearned, which says nothing about depth.",
        rows=tuple(rows),
    )


def _mean(units: Mapping[str, float]) -> float:
    """Return the mean over units; NaN of none."""
    return sum(units.values()) / len(units) if units else float("nan")


def said(found: Estimate) -> str:
    """Return an estimate in words: value and interval."""
    if math.isnan(found.value):
        return "not defined"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def opening(found: RecoveryScores) -> str:
    """Return the first sentence of a paragraph: the rails."""
    knew, v = found.before.at("original")[0], found.after.at("oracle")[0]
    return (
        f"Over {len(found.seeds)} draw(s) the original knew {knew:.2f} of V; after T was relearned "
        f"the oracle reached {v:.2f} of V and {found.t.at('oracle')[0]:.2f} of T."
    )


def gaps(found: RecoveryScores, arms: Sequence[str] | None = None) -> str:
    """Return the depth gaps of arms in words."""
    parts = [f"{arm} {said(found.value(arm))}" for arm in (arms or found.arms)]
    return f"Depth gaps on V: {', '.join(parts)}."


def finish(words: Sequence[str], found: RecoveryScores, decision: str) -> tuple[str, str]:
    """Return decision and paragraph; without power the decision is that there is none.

    Args:
        words: Sentences between the rails and the decision.
        found: The arms.
        decision: What the statistic says.
    """
    held = found.void or decision
    return held, " ".join([opening(found), *words, f"Decision: {held}."])
