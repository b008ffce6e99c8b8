"""How much the conditions of a study know, and with what certainty: seeds and, inside them, units.

A sample takes seeds with repetition and, inside each, whole groups of units, the same for all
conditions, so that contrasts between conditions keep their pairing.

Shape legend: S samples, A conditions, G groups of one seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from excise.core.errors import UserError
from excise.evals.stats import Array, Estimate, quantiles

SAMPLES = 1000
"""Bootstrap samples."""

MarginVerdict = Literal["above", "below", "equal", "undecided"]


@dataclass(frozen=True)
class Levels:
    """Mean scores of conditions.

    Attributes:
        conditions: Names.
        values: (1 + S) x A: of the data, then of the samples; seeds weigh the same.
        by_seed: The same of each seed alone.
        n: Units they rest on.
    """

    conditions: tuple[str, ...]
    values: Array
    by_seed: Mapping[int, Array]
    n: int

    def at(self, condition: str, seed: int | None = None) -> Array:
        """Return a condition's mean: of the data, then of the samples.

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
    """Resample seeds and units of all conditions jointly.

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
        by_seed[replicate] = _sampled(table, units, groups.get(replicate, {}), samples, generator)
    generator = np.random.default_rng([seed, len(replicates)])
    picked = generator.integers(len(replicates), size=(samples, len(replicates)))
    stacked = np.stack([by_seed[d] for d in replicates])
    moved = stacked[picked, np.arange(1, samples + 1)[:, None]].mean(1)
    values = np.concatenate([stacked[:, 0].mean(0)[None], moved])
    return Levels(conditions, values, by_seed, count)


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


def estimate(values: Array, n: int) -> Estimate:
    """Return the value of the data with the 95 % interval of the samples.

    Args:
        values: Of the data, then of the samples; samples that are NaN are left out.
        n: Units behind it.
    """
    value, sampled = float(values[0]), values[1:][~np.isnan(values[1:])]
    if np.isnan(value) or not len(sampled):
        return Estimate(value, float("nan"), float("nan"), n)
    low, high = quantiles(sampled, 0.95)
    return Estimate(value, min(low, value), max(high, value), n)


def verdict(value: Estimate, margin: float) -> MarginVerdict:
    """Return where an interval lies: beyond a margin, within both, or neither.

    Args:
        value: An estimate with its 95 % interval.
        margin: Half the width of what counts as no difference.

    Returns:
        `above` or `below` where the whole interval lies beyond the margin on that side, `equal`
        where it lies between -margin and margin, else `undecided`, as where it is NaN.
    """
    if value.low > margin:
        return "above"
    if value.high < -margin:
        return "below"
    if value.low > -margin and value.high < margin:
        return "equal"
    return "undecided"


def ranks(values: Array) -> Array:
    """Return ranks along the last axis, from 0; equal values share the mean of theirs.

    Args:
        values: (..., items).

    Returns:
        The same shape.
    """
    below = (values[..., :, None] > values[..., None, :] + 1e-12).sum(-1)
    equal = (np.abs(values[..., :, None] - values[..., None, :]) <= 1e-12).sum(-1)
    shared: Array = below + (equal - 1) / 2
    return shared


def spearman(first: Array, second: Array) -> Array:
    """Return the rank correlation along the last axis; NaN where a side has no spread.

    Args:
        first: (..., items).
        second: The same shape.
    """
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation: Array = np.where(scale > 0, (a * b).sum(-1) / scale, np.nan)
    return correlation
