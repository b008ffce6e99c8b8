"""Reference models: every forget score of a candidate lies between the oracle and the original.

    depth gap at budget k = (candidate(k) - oracle(k)) / (original(0) - oracle(0))

The oracle is retrained without the forget set, the original is the model before the removal; both
are attacked as the candidate is, with one budget and one rule of selection. 0 is the oracle and 1
the original, whichever way of the metric is more knowledge. Below zero is damage or suppression,
never credit. The quantity is excise's own; `docs/evidence.md` has the reasons.

Shape legend: S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from excise.auditor.base import ORIGINAL, AttackResult, Results, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.evaluation_set import UnitScores
from excise.auditor.results import choose
from excise.core.errors import UserError
from excise.evals.score import direction_of
from excise.evals.stats import (
    SAMPLES,
    Array,
    bootstrap_difference,
    bootstrap_mean,
    clusters,
    interval,
    resampled_means,
)
from excise.record import Estimate, ScoreDirection
from excise.record.measured import NOTHING, PROXY

RAN = ("ok", "invalid")
"""Statuses of a variant that ran to its end, whether or not its attack has power."""

Choice = Literal["bounded", "unbounded", "holding"]
"""Variants an attacker chooses among: those that leave the model whole, all, or those that hold the
original."""

COVERAGE = 0.9
"""Coverage of a depth gap's interval: two one-sided tests at 5 % each (Schuirmann 1987)."""


@dataclass(frozen=True)
class FreeScore:
    """A score beside the headline that costs nothing to take, of every model before any attack.

    Attributes:
        words: What a reader calls it.
        units: Score by model and unit.
        chance: Score of a model that knows nothing; None where unknown.
        no_power: Why it decides nothing, since the original has none of it either; empty where it
            counts.
    """

    words: str
    units: Mapping[str, UnitScores]
    chance: float | None = None
    no_power: str = ""


@dataclass(frozen=True)
class VerdictCase:
    """What a verdict about one candidate rests on.

    Attributes:
        model: Name of the candidate among the subjects.
        results: Results by attack and subject.
        budget: How hard the attacker tried.
        oracles: Names of the oracles among the subjects.
        metric: Metric of the held-out test set (V).
        direction: Which way is more knowledge.
        retain_direction: Which way is better on the retain set.
        dev_higher: Whether a higher score on `dev_forget` means more knowledge.
        chance: Score of a model that knows nothing; None where unknown.
        guess: Token loss of a uniform guess; None for another metric or an unknown vocabulary.
        groups: Group of each unit that has one.
        free: Scores beside the headline, before any attack; those with power count.
        invalid: Why an attack is invalid, by attack; those with power are missing.
        blind: Why an attack decides nothing, by attack: under it the original itself shows nothing.
        seed: Seed of all bootstraps.
    """

    model: str
    results: Results
    budget: Budget
    oracles: tuple[str, ...] = ()
    metric: str = "exact_match"
    direction: ScoreDirection = "higher"
    retain_direction: ScoreDirection = "higher"
    dev_higher: bool = True
    chance: float | None = None
    guess: float | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    free: tuple[FreeScore, ...] = ()
    invalid: Mapping[str, str] = field(default_factory=dict)
    blind: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def proxies(self) -> tuple[str, ...]:
        """Return the names of oracles that only stand in for one."""
        return tuple(name for name in self.oracles if name.startswith(PROXY))

    @property
    def nothing(self) -> str:
        """Say that the original knows nothing that could be removed; empty where it does."""
        chance = self.guess if self.chance is None else self.chance
        return nothing_to_remove(
            self.start(ORIGINAL), chance, self.direction, groups=self.groups, seed=self.seed
        )

    def result(self, attack: str, subject: str) -> AttackResult | None:
        """Return what an attack did to a subject; None where it did not run."""
        return self.results.get((attack, subject))

    def variants(self, attack: str, subject: str) -> tuple[VariantResult, ...]:
        """Return every variant of an attack on a subject; none where it did not run."""
        result = self.result(attack, subject)
        return result.variants if result else ()

    def attacks(self, subject: str | None = None) -> tuple[str, ...]:
        """Return the names of the attacks on a subject, by default the candidate, in order."""
        wanted = subject or self.model
        return tuple(attack for attack, name in self.results if name == wanted)

    def level(self, attack: str) -> str:
        """Return the depth level an attack belongs to, as its variants say."""
        for (name, _), result in self.results.items():
            if name == attack and result.variants:
                return result.variants[0].entry.level
        return ""

    def chosen(
        self, attack: str, subject: str, choice: Choice = "bounded"
    ) -> tuple[VariantResult, ...]:
        """Return the variants of an attack that decide on a subject: one per attacker seed.

        Args:
            attack: Name of the attack.
            subject: Name of the subject.
            choice: Among which variants; all but the first can only fail a level.
        """
        result = self.result(attack, subject)
        if result is None:
            return ()
        indices = result.fail_only if choice == "holding" else result.chosen
        if choice == "unbounded" and indices:
            indices = choose(result.variants, higher=self.higher(attack), bounded=False)
        deciding = [result.variants[i] for i in indices]
        return tuple(v for v in deciding if v.unit_scores and v.entry.status in RAN)

    def end(
        self, attack: str, subject: str, at: int = -1, choice: Choice = "bounded"
    ) -> list[UnitScores]:
        """Return V by unit at the end of an attack (or at checkpoint `at`), by attacker seed."""
        # An attacker who stopped before a checkpoint holds there what he had.
        return [
            variant.unit_scores[min(at, len(variant.unit_scores) - 1)]
            for variant in self.chosen(attack, subject, choice)
            if -len(variant.unit_scores) <= at
        ]

    def own_metric(self, attack: str) -> str:
        """Return the metric of an attack that scores V by another than the headline's, else ""."""
        entries = [variant.entry for variant in self.chosen(attack, self.model)]
        return next((e.metric for e in entries if e.metric not in ("", self.metric)), "")

    def higher(self, attack: str) -> bool:
        """Return whether a higher score on `dev` means more knowledge, as an attack scores it."""
        own = self.own_metric(attack)
        return direction_of(own) == "higher" if own else self.dev_higher

    def top(self, attack: str) -> UnitScores:
        """Return what the original scores in the metric of an attack.

        Before any attack; where the attack reads by a metric of its own, under it.
        """
        if self.own_metric(attack):
            return averaged(self.end(attack, ORIGINAL))
        return self.start(ORIGINAL)

    def start(self, subject: str) -> UnitScores:
        """Return V by unit and headline metric before any attack; empty where nobody scored it.

        Of all first checkpoints the one with most units is taken.
        """
        most: UnitScores = {}
        for attack in self.attacks(subject):
            for variant in self.variants(attack, subject):
                headline = variant.entry.metric in ("", self.metric)
                scored = variant.entry.scored_on == "test" and variant.unit_scores
                if headline and scored and len(variant.unit_scores[0]) > len(most):
                    most = variant.unit_scores[0]
        return most


def averaged(scores: Sequence[UnitScores]) -> UnitScores:
    """Return the mean by unit over mappings, of their common units."""
    if not scores:
        return {}
    common = [u for u in scores[0] if all(u in other for other in scores[1:])]
    return {u: sum(each[u] for each in scores) / len(scores) for u in common}


def mean(units: UnitScores) -> float:
    """Return the mean over units, NaN for none."""
    return sum(units.values()) / len(units) if units else float("nan")


@dataclass(frozen=True)
class Gap(Estimate):
    """A share of the distance between oracle and original; NaN where it cannot be computed.

    Attributes:
        samples: Bootstrap samples, S of them.
        invalid: Why it cannot be computed; empty for one that can.
    """

    coverage: float = COVERAGE
    samples: Array = field(repr=False, compare=False, default_factory=lambda: np.zeros(0))
    invalid: str = ""


def invalid_gap(reason: str, n: int = 0) -> Gap:
    """Return a gap that cannot be computed."""
    nan = float("nan")
    return Gap(nan, nan, nan, n, invalid=reason)


def seed_weights(generator: np.random.Generator, count: int, samples: int) -> Array:
    """Return S x `count` weights that resample seeds; a single seed always has the weight 1."""
    if count == 1:
        return np.ones((samples, 1))
    return generator.multinomial(count, np.full(count, 1 / count), size=samples) / count


def depth_gap(
    candidate: UnitScores | Sequence[UnitScores],
    oracles: Sequence[UnitScores],
    original: UnitScores,
    *,
    oracles_start: Sequence[UnitScores] | None = None,
    groups: Mapping[str, str] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    lower: str = "the oracle",
) -> Gap:
    """Return the depth gap with its 90 % interval.

    Units (or whole groups) are resampled jointly for all models, attacker seeds and oracle seeds
    beside them (`stats.interval`); oracles are averaged.

    Args:
        candidate: Score by unit after the attack, one mapping per attacker seed.
        oracles: The same for every oracle.
        original: The original's before any attack.
        oracles_start: The oracles' before any attack, in the same order; None takes `oracles`.
        groups: Group of each unit; groups are independent, units within need not be.
        samples: S.
        seed: Seed of the bootstrap.
        lower: What stands in the oracle's place is called, for the reason.

    Source:
        (candidate - oracle) / (original - oracle), this library's own: docs/evidence.md.

    Returns:
        The gap; invalid where oracle and original are closer than their 95 % interval.

    Raises:
        UserError: If there is no oracle or the models share no unit.
    """
    if not oracles:
        raise UserError("a depth gap needs an oracle; give one with --oracle")
    attacked = [candidate] if isinstance(candidate, Mapping) else list(candidate)
    start = list(oracles if oracles_start is None else oracles_start)
    if len(start) != len(oracles):
        raise UserError("every oracle needs its scores before and after the attack")
    maps = [*attacked, *oracles, *start, original]
    means, resampled = resampled_means(maps, samples=samples, seed=seed, groups=groups)
    a, o = len(attacked), len(oracles)
    generator = np.random.default_rng(seed + 1)
    by_attack = seed_weights(generator, a, samples)
    by_oracle = seed_weights(generator, o, samples)
    top = (resampled[:, :a] * by_attack).sum(1) - (resampled[:, a : a + o] * by_oracle).sum(1)
    bottom = resampled[:, -1] - (resampled[:, a + o : -1] * by_oracle).sum(1)
    difference = float(means[:a].mean() - means[a : a + o].mean())
    distance = float(means[-1] - means[a + o : -1].mean())
    common = [u for u in maps[0] if all(u in other for other in maps[1:])]
    n = len(set(clusters(common, groups)))
    low, high = interval(bottom, distance, n, 0.95)
    if not (low > 0 or high < 0):
        return invalid_gap(
            f"the original and {lower} are closer ({distance:.3g}) than their interval "
            f"[{low:.3g}, {high:.3g}], so nothing can be placed between them",
            n,
        )
    share = ratio_of(top, bottom, distance)
    value = difference / distance
    low, high = interval(share, value, n, COVERAGE)
    # Limits of the two scores are put together as independent ones are (MOVER: Zou and Donner 2008,
    # equation 4); the bootstrap knows that of the scores that differ.
    below, above = (part / abs(distance) for part in _open_share(attacked, oracles, n))
    low, high = value - math.hypot(value - low, below), value + math.hypot(high - value, above)
    return Gap(value, low, high, n, samples=share)


def ratio_of(top: Array, bottom: Array, distance: float) -> Array:
    """Divide samples; a denominator that crosses zero is held just on the side of its estimate."""
    sign = 1.0 if distance > 0 else -1.0
    return top / (sign * np.maximum(sign * bottom, 1e-6 * abs(distance)))


def _open_share(
    attacked: Sequence[UnitScores], oracles: Sequence[UnitScores], n: int
) -> tuple[float, float]:
    """Return by how much equal answers widen the difference, below and above.

    Scores that are all 0 (or all 1), or unit for unit the oracle's, have nothing to resample, and
    a bootstrap would call three zeros certain. n equal answers leave the share 1 - 0.05^(1/n) open
    on their other side (the one-sided exact binomial bound, Clopper and Pearson 1934).

    Args:
        attacked: The candidate's scores by unit, per attacker seed.
        oracles: The oracles'.
        n: Independent answers: units, or groups of them.
    """
    ours = {v for units in attacked for v in units.values()}
    theirs = {v for units in oracles for v in units.values()}
    left = 1 - 0.05 ** (1 / n)
    same = (ours | theirs) <= {0.0, 1.0} and all(
        o.get(u) == v for a in attacked for o in oracles for u, v in a.items()
    )
    below = same or theirs == {0.0} or ours == {1.0}
    above = same or ours == {0.0} or theirs == {1.0}
    return left * below, left * above


def knows_more(
    units: UnitScores,
    than: UnitScores,
    direction: ScoreDirection,
    *,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> bool:
    """Return whether scores show more knowledge than others, beyond their 95 % interval.

    Args:
        units: Scores by unit.
        than: What they are held against, paired by unit.
        direction: Which way is more knowledge.
        groups: Group of each unit.
        seed: Seed of the bootstrap.

    Raises:
        UserError: If they share no unit.
    """
    more = bootstrap_difference(units, than, groups=groups, seed=seed)
    return more.low > 0 if direction == "higher" else more.high < 0


def nothing_to_remove(
    original: UnitScores,
    chance: float | None,
    direction: ScoreDirection,
    *,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> str:
    """Say that the original is at chance, or nothing.

    Args:
        original: Its scores by unit before any attack; empty where nobody scored it.
        chance: Score of a model that knows nothing; None where unknown.
        direction: Which way is more knowledge.
        groups: Group of each unit.
        seed: Seed of the bootstrap.

    Returns:
        One sentence where the original's 95 % interval holds chance or lies on its wrong side.
    """
    if chance is None or not original:
        return ""
    score = bootstrap_mean(original, seed=seed, groups=groups)
    if score.low > chance if direction == "higher" else score.high < chance:
        return ""
    return (
        f"{NOTHING}: the original scores {score.value:.3g} "
        f"[{score.low:.3g}, {score.high:.3g}] where knowing nothing scores {chance:.3g}."
    )
