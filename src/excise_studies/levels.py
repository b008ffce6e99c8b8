"""How much the conditions of a study know, and with what certainty: seeds and, inside them, units.

Values that a study computes with lie in one layout, so that any function of them has an interval
(`excise.evals.replicates`): of all seeds, then without one seed each, then with whole groups of
units resampled inside every seed, the same for all conditions, so that contrasts between conditions
keep their pairing.

Shape legend: K seeds, S samples, A conditions, G groups of one seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from excise.core.errors import UserError
from excise.evals.replicates import SeedEstimate, over_replicates
from excise.evals.stats import Array, Estimate, interval

SAMPLES = 1000
"""Bootstrap samples."""


@dataclass(frozen=True)
class Levels:
    """Mean scores of conditions.

    Attributes:
        conditions: Names.
        values: (1 + K + S) x A: of the data, without one seed each, then of the samples; seeds
            weigh the same.
        by_seed: (1 + S) x A of each seed alone: of the data, then of the samples.
        n: Units they rest on.
        groups: Independent groups (or units) by seed.
    """

    conditions: tuple[str, ...]
    values: Array
    by_seed: Mapping[int, Array]
    n: int
    groups: Mapping[int, int]

    def at(self, condition: str, seed: int | None = None) -> Array:
        """Return a condition's mean: of the data, (without one seed each,) then of the samples.

        Args:
            condition: Its name.
            seed: One seed; None for all.
        """
        values = self.values if seed is None else self.by_seed[seed]
        column: Array = values[:, self.conditions.index(condition)]
        return column

    def mean(self, conditions: Sequence[str]) -> Array:
        """Return the mean of several conditions."""
        means: Array = np.mean([self.at(condition) for condition in conditions], axis=0)
        return means


def levels(
    scores: Mapping[str, Mapping[int, Mapping[str, float]]],
    groups: Mapping[int, Mapping[str, str]],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Levels:
    """Average scores over units and seeds, in the layout above.

    Args:
        scores: Score by condition, seed and unit; every condition has every seed, and units that
            not all conditions of a seed have are left out.
        groups: Group of units by seed; units without one stand alone.
        samples: S.
        seed: Seed of the samples.

    Raises:
        UserError: If the conditions of a seed share no unit.
    """
    conditions = tuple(scores)
    replicates = list(scores[conditions[0]])
    by_seed: dict[int, Array] = {}
    independent: dict[int, int] = {}
    count = 0
    for at, replicate in enumerate(replicates):
        table = [scores[condition][replicate] for condition in conditions]
        units = [u for u in table[0] if all(u in other for other in table)]
        if not units:
            raise UserError(
                f"the conditions of seed {replicate} share no unit to compare; score the same rows"
            )
        count += len(units)
        generator = np.random.default_rng([seed, at])
        grouped = groups.get(replicate, {})
        by_seed[replicate] = _sampled(table, units, grouped, samples, generator)
        independent[replicate] = len({grouped.get(u) or f"unit {u}" for u in units})
    return Levels(conditions, of_seeds(by_seed), by_seed, count, independent)


def of_seeds(by_seed: Mapping[int, Array]) -> Array:
    """Return the mean over seeds in the layout above.

    Args:
        by_seed: (1 + S, ...) by seed: of the data, then of the samples.

    Returns:
        (1 + K + S, ...); of one seed the part that leaves it out is NaN.
    """
    stacked = np.stack(list(by_seed.values()))
    means: Array = stacked.mean(0)
    count = len(stacked)
    if count < 2:
        left_out = np.full_like(stacked[:, 0], np.nan)
    else:
        left_out = (stacked[:, 0].sum(0) - stacked[:, 0]) / (count - 1)
    whole: Array = np.concatenate([means[:1], left_out, means[1:]])
    return whole


def _sampled(
    table: Sequence[Mapping[str, float]],
    units: Sequence[str],
    groups: Mapping[str, str],
    samples: int,
    generator: np.random.Generator,
) -> Array:
    """Return (1 + S) x A means of one seed, whole groups resampled."""
    index: dict[str, int] = {}
    at = [index.setdefault(groups.get(u) or f"unit {u}", len(index)) for u in units]
    sums_GA = np.zeros((len(index), len(table)))
    np.add.at(sums_GA, at, np.array([[scores[u] for scores in table] for u in units]))
    sizes_G = np.bincount(at, minlength=len(index)).astype(np.float64)
    size = len(index)
    weights = generator.multinomial(size, np.full(size, 1 / size), size=samples)
    weights = np.concatenate([np.ones((1, size)), weights])
    means: Array = (weights @ sums_GA) / (weights @ sizes_G)[:, None]
    return means


def estimate(values: Array, of: Levels, n: int | None = None) -> SeedEstimate:
    """Return the value of the data with its 95 % interval over seeds.

    Args:
        values: In the layout above; samples that are NaN are left out.
        of: The levels they were computed from, which know seeds and groups.
        n: What the record says they rest on; the units of the levels when missing.
    """
    count = len(of.by_seed)
    return over_replicates(
        float(values[0]),
        values[1 : 1 + count],
        values[1 + count :],
        groups=sum(of.groups.values()),
        n=of.n if n is None else n,
    )


def estimate_of_seed(values: Array, of: Levels, seed: int) -> Estimate:
    """Return the value of one seed with its 95 % interval over groups and units.

    It says nothing of other seeds.

    Args:
        values: Of the data, then of the samples of that seed.
        of: The levels they were computed from.
        seed: The seed.
    """
    value, sampled = float(values[0]), values[1:][~np.isnan(values[1:])]
    if np.isnan(value) or not len(sampled):
        return Estimate(value, float("nan"), float("nan"), of.groups[seed])
    return Estimate(value, *interval(sampled, value, of.groups[seed], 0.95), of.groups[seed])
