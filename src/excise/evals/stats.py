"""Statistics by unit, never by token. numpy alone; equal seeds give equal intervals.

Shape legend: S bootstrap samples, U units or clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from excise.core.errors import UserError
from excise.record import Estimate as Estimate

Array = NDArray[np.float64]

SAMPLES = 2000
"""Bootstrap samples."""


def _matrix(
    values: Sequence[Mapping[str, float]],
    units: Sequence[str],
    groups: Mapping[str, str] | None,
) -> tuple[Array, Array]:
    """Return sums (one row per cluster, one column per mapping) and cluster sizes."""
    clusters: dict[str, int] = {}
    index = []
    for unit in units:
        group = (groups or {}).get(unit)
        key = f"g:{group}" if group else f"u:{unit}"
        index.append(clusters.setdefault(key, len(clusters)))
    sums = np.zeros((len(clusters), len(values)))
    table = np.array([[v[unit] for v in values] for unit in units], dtype=np.float64)
    np.add.at(sums, index, table)
    sizes = np.bincount(index, minlength=len(clusters)).astype(np.float64)
    return sums, sizes


def resampled_means(
    values: Sequence[Mapping[str, float]],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> tuple[Array, Float[np.ndarray, "S M"]]:
    """Resample common units jointly and return the mean of every mapping.

    Args:
        values: M mappings of unit to score; only common units count.
        samples: S.
        seed: Seed of the draws.
        groups: Group of each unit; where given, whole groups are drawn.

    Returns:
        The M means of the data, and S x M resampled means.

    Raises:
        UserError: If the mappings share no unit.
    """
    units = [u for u in values[0] if all(u in v for v in values[1:])]
    if not units:
        raise UserError("these scores share no unit to compare; score the same test rows for each")
    sums, sizes = _matrix(values, units, groups)
    count = len(sizes)
    generator = np.random.default_rng(seed)
    chunk = max(1, (1 << 22) // count)
    out = np.empty((samples, len(values)))
    for at in range(0, samples, chunk):
        end = min(samples, at + chunk)
        weight = generator.multinomial(count, np.full(count, 1 / count), size=end - at)
        out[at:end] = (weight @ sums) / (weight @ sizes)[:, None]
    return sums.sum(0) / sizes.sum(), out


def quantiles(draws: Array, level: float) -> tuple[float, float]:
    """Return the two ends of the central interval of `level`."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_mean(
    values: Mapping[str, float],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
    groups: Mapping[str, str] | None = None,
) -> Estimate:
    """Return the mean over units with its percentile bootstrap interval.

    Scores that are all 0 or all 1 have no spread to resample: their interval is Wilson's.

    Args:
        values: Score by unit.
        samples: Bootstrap samples.
        seed: Seed of the draws.
        level: Coverage.
        groups: Group of each unit; where given, whole groups are drawn.

    Raises:
        UserError: If there is no unit.
    """
    if not values:
        raise UserError("there is no unit to average; check the split")
    mean, draws = resampled_means([values], samples=samples, seed=seed, groups=groups)
    count = len({(groups or {}).get(u) or f"u:{u}" for u in values})
    value = float(mean[0])
    if len(set(values.values())) == 1 and value in (0.0, 1.0):
        low, high = wilson(round(value * count), count, level=level)
        return Estimate(value, low, high, count, level)
    low, high = quantiles(draws[:, 0], level)
    return Estimate(value, min(low, value), max(high, value), count, level)


def bootstrap(
    values: Mapping[str, float], samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Return (mean, low, high) of the 95 % interval; see `bootstrap_mean`."""
    found = bootstrap_mean(values, samples=samples, seed=seed)
    return found.value, found.low, found.high


def bootstrap_difference(
    one: Mapping[str, float],
    two: Mapping[str, float],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
    groups: Mapping[str, str] | None = None,
) -> Estimate:
    """Return mean(one) - mean(two) over common units, resampled in pairs."""
    means, draws = resampled_means([one, two], samples=samples, seed=seed, groups=groups)
    low, high = quantiles(draws[:, 0] - draws[:, 1], level)
    units = [u for u in one if u in two]
    count = len({(groups or {}).get(u) or f"u:{u}" for u in units})
    return Estimate(float(means[0] - means[1]), low, high, count, level)


def tost(draws: Array, margin: float) -> float:
    """Return the larger p-value of two one-sided bootstrap tests against -margin and +margin.

    Args:
        draws: Bootstrap draws of a difference.
        margin: Equivalence margin, positive.

    Returns:
        p; below 0.05 the 90 % interval lies within the margin.
    """
    count = len(draws)
    below = (np.count_nonzero(draws <= -margin) + 1) / (count + 1)
    above = (np.count_nonzero(draws >= margin) + 1) / (count + 1)
    return float(max(below, above))


def mcnemar(one: Mapping[str, float], two: Mapping[str, float]) -> float:
    """Return the exact two-sided McNemar p-value of paired right and wrong answers.

    Args:
        one: 0 or 1 by unit (above one half counts as right).
        two: The same for the other model; common units count.
    """
    units = [u for u in one if u in two]
    wins = sum(one[u] > 0.5 >= two[u] for u in units)
    losses = sum(two[u] > 0.5 >= one[u] for u in units)
    count = wins + losses
    if not count:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1)) / 2**count
    return min(1.0, 2.0 * float(tail))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the given order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        out[i] = largest
    return out


def _normal_quantile(p: float) -> float:
    """Return the standard normal quantile, by bisection on the error function."""
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def wilson(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927).

    Args:
        successes: Number of successes.
        n: Number of trials, at least one.
        level: Coverage.
    """
    z = _normal_quantile((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)
