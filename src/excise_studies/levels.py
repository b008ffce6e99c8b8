"""How much the arms of a study know, and with what certainty: draws and, inside them, units.

A sample takes draws with repetition and, inside each, whole groups of units, the same for all
arms, so that contrasts between arms keep their pairing.

Shape legend: S samples, A arms, G groups of one draw.
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
    """Mean scores of arms.

    Attributes:
        arms: Names.
        values: (1 + S) x A: of the data, then of the samples; draws weigh the same.
        by_draw: The same of each draw alone.
        n: Units they rest on.
    """

    arms: tuple[str, ...]
    values: Array
    by_draw: Mapping[int, Array]
    n: int

    def at(self, arm: str, seed: int | None = None) -> Array:
        """Return an arm's mean: of the data, then of the samples.

        Args:
            arm: Its name.
            seed: One draw; None for all.
        """
        held = self.values if seed is None else self.by_draw[seed]
        column: Array = held[:, self.arms.index(arm)]
        return column

    def mean(self, arms: Sequence[str]) -> Array:
        """Return the mean of several arms."""
        found: Array = np.mean([self.at(arm) for arm in arms], axis=0)
        return found


def levels(
    scores: Mapping[str, Mapping[int, Mapping[str, float]]],
    groups: Mapping[int, Mapping[str, str]],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Levels:
    """Resample draws and units of all arms jointly.

    Args:
        scores: Score by arm, draw and unit; every arm has every draw, and units that not all arms
            of a draw have are left out.
        groups: Group of units by draw; units without one stand alone.
        samples: S.
        seed: Seed of the samples.

    Raises:
        UserError: If the arms of a draw share no unit.
    """
    arms = tuple(scores)
    draws = list(scores[arms[0]])
    by_draw: dict[int, Array] = {}
    count = 0
    for at, draw in enumerate(draws):
        table = [scores[arm][draw] for arm in arms]
        units = [u for u in table[0] if all(u in other for other in table)]
        if not units:
            raise UserError(
                f"the arms of draw {draw} share no unit to compare; score the same rows"
            )
        count += len(units)
        generator = np.random.default_rng([seed, at])
        by_draw[draw] = _sampled(table, units, groups.get(draw, {}), samples, generator)
    generator = np.random.default_rng([seed, len(draws)])
    picked = generator.integers(len(draws), size=(samples, len(draws)))
    stacked = np.stack([by_draw[d] for d in draws])
    moved = stacked[picked, np.arange(1, samples + 1)[:, None]].mean(1)
    values = np.concatenate([stacked[:, 0].mean(0)[None], moved])
    return Levels(arms, values, by_draw, count)


def _sampled(
    table: Sequence[Mapping[str, float]],
    units: Sequence[str],
    groups: Mapping[str, str],
    samples: int,
    generator: np.random.Generator,
) -> Array:
    """Return (1 + S) x A means of one draw, whole groups resampled."""
    index: dict[str, int] = {}
    at = [index.setdefault(groups.get(u) or f"unit {u}", len(index)) for u in units]
    sums_GA = np.zeros((len(index), len(table)))
    np.add.at(sums_GA, at, np.array([[held[u] for held in table] for u in units]))
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
    value, drawn = float(values[0]), values[1:][~np.isnan(values[1:])]
    if np.isnan(value) or not len(drawn):
        return Estimate(value, float("nan"), float("nan"), n)
    low, high = quantiles(drawn, 0.95)
    return Estimate(value, min(low, value), max(high, value), n)


def verdict(found: Estimate, margin: float) -> MarginVerdict:
    """Return where an interval lies: beyond a margin, within both, or neither."""
    if found.low > margin:
        return "above"
    if found.high < -margin:
        return "below"
    if found.low > -margin and found.high < margin:
        return "equal"
    return "undecided"


def ranks(values: Array) -> Array:
    """Return ranks along the last axis, from 0; equal values share theirs."""
    below = (values[..., :, None] > values[..., None, :] + 1e-12).sum(-1)
    equal = (np.abs(values[..., :, None] - values[..., None, :]) <= 1e-12).sum(-1)
    found: Array = below + (equal - 1) / 2
    return found


def spearman(one: Array, two: Array) -> Array:
    """Return the rank correlation along the last axis; NaN where a side has no spread.

    Args:
        one: (..., items).
        two: The same shape.
    """
    a, b = ranks(one), ranks(two)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(scale > 0, (a * b).sum(-1) / scale, np.nan)
    return found
