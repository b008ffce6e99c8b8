"""Statistics by unit, never by token. numpy alone; equal seeds give equal intervals.

Shape legend: M mappings of unit to score, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from excise.core.errors import UserError
from excise.record import Estimate as Estimate

Array = NDArray[np.float64]

SAMPLES = 2000
"""Bootstrap samples."""


def clusters(units: Sequence[str], groups: Mapping[str, str] | None) -> list[str]:
    """Return what each unit is resampled with: its group, or itself alone.

    Args:
        units: The units.
        groups: Group of each unit that has one; None for none.
    """
    return [f"g:{group}" if (group := (groups or {}).get(u)) else f"u:{u}" for u in units]


def _matrix(
    values: Sequence[Mapping[str, float]],
    units: Sequence[str],
    groups: Mapping[str, str] | None,
) -> tuple[Array, Array]:
    """Return sums (one row per cluster, one column per mapping) and cluster sizes."""
    numbers: dict[str, int] = {}
    index = [numbers.setdefault(name, len(numbers)) for name in clusters(units, groups)]
    sums = np.zeros((len(numbers), len(values)))
    table = np.array([[v[unit] for v in values] for unit in units], dtype=np.float64)
    np.add.at(sums, index, table)
    sizes = np.bincount(index, minlength=len(numbers)).astype(np.float64)
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
        seed: Seed of the bootstrap.
        groups: Group of each unit; where given, whole groups are resampled.

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


def quantiles(samples: Array, coverage: float) -> tuple[float, float]:
    """Return the two ends of the central interval that holds a share of the samples.

    Args:
        samples: Bootstrap samples, [S].
        coverage: The share, such as 0.95.
    """
    tail = (1 - coverage) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def student(t: float, freedom: int) -> float:
    """Return the cumulative distribution of Student's t for whole degrees of freedom.

    Abramowitz and Stegun (1964), equations 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = 1.0
    for k in range(2 + odd, freedom, 2):
        term *= (k - 1) / k * square
        total += term
    if odd:
        more = math.sin(angle) * math.cos(angle) * total if freedom > 1 else 0.0
        return 0.5 + (angle + more) / math.pi
    return 0.5 + math.sin(angle) * total / 2


def student_quantile(p: float, freedom: int) -> float:
    """Return the quantile of Student's t, by bisection; from 500 degrees on that of the normal."""
    if freedom >= 500:
        return NormalDist().inv_cdf(p)
    low, high = -1e4, 1e4
    while high - low > 1e-9 * max(1.0, abs(high)):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def interval(samples: Array, value: float, count: int, coverage: float) -> tuple[float, float]:
    """Return an interval from bootstrap samples of few independent clusters.

    The percentile interval is too short by sqrt((n - 1) / n), and by the normal in the place of
    Student's t: its tails are widened by both (the expanded percentile interval of Hesterberg,
    The American Statistician 69, 2015). Where scores pile up at 0 or 1 it is short on one side
    still, so the outer end of it and of the t interval counts. At the margin two one-sided tests
    then pass in about 5 % of cases from eight clusters on, as a test simulates.

    Args:
        samples: Bootstrap samples, [S].
        value: The estimate.
        count: Number of clusters that were resampled.
        coverage: Coverage, such as 0.9.
    """
    if count < 2:
        low, high = quantiles(samples, coverage)
        return min(low, value), max(high, value)
    inflation = math.sqrt(count / (count - 1))
    t = student_quantile((1 + coverage) / 2, count - 1)
    low, high = quantiles(samples, 2 * NormalDist().cdf(inflation * t) - 1)
    half = t * inflation * float(np.std(samples))
    return min(low, value - half), max(high, value + half)


def small_sample(p_value: float, count: int) -> float:
    """Return a one-sided bootstrap p-value as few clusters have it: by Student's t, widened."""
    if count < 2 or count > 500:
        return p_value
    z = NormalDist().inv_cdf(min(max(p_value, 1e-12), 1 - 1e-12))
    return student(z * math.sqrt((count - 1) / count), count - 1)


def bootstrap_mean(
    values: Mapping[str, float],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Estimate:
    """Return the mean over units with its 95 % bootstrap interval (`interval`).

    Scores that are all 0 or all 1 have no spread to resample: their interval is Wilson's.

    Args:
        values: Score by unit.
        samples: Bootstrap samples.
        seed: Seed of the bootstrap.
        groups: Group of each unit; where given, whole groups are resampled.

    Raises:
        UserError: If there is no unit.
    """
    if not values:
        raise UserError("there is no unit to average; check the split")
    mean, resampled = resampled_means([values], samples=samples, seed=seed, groups=groups)
    count = len(set(clusters(list(values), groups)))
    value = float(mean[0])
    if len(set(values.values())) == 1 and value in (0.0, 1.0):
        return Estimate(value, *wilson(round(value * count), count), count)
    return Estimate(value, *interval(resampled[:, 0], value, count, 0.95), count)


def bootstrap_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Estimate:
    """Return mean(first) - mean(second) over common units, resampled in pairs, 95 % interval.

    Args:
        first: Score by unit.
        second: The other scores.
        samples: Bootstrap samples.
        seed: Seed of the bootstrap.
        groups: Group of each unit; where given, whole groups are resampled.

    Raises:
        UserError: If the two share no unit.
    """
    means, resampled = resampled_means([first, second], samples=samples, seed=seed, groups=groups)
    value = float(means[0] - means[1])
    count = len(set(clusters([u for u in first if u in second], groups)))
    return Estimate(value, *interval(resampled[:, 0] - resampled[:, 1], value, count, 0.95), count)


def mcnemar(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Return the exact two-sided p-value of paired right and wrong answers (McNemar 1947).

    Args:
        first: 0 or 1 by unit (above one half counts as right).
        second: The same for the other model; common units count.
    """
    units = [u for u in first if u in second]
    wins = sum(first[u] > 0.5 >= second[u] for u in units)
    losses = sum(second[u] > 0.5 >= first[u] for u in units)
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


def wilson(successes: int, n: int, *, coverage: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927).

    Args:
        successes: Number of successes.
        n: Number of trials, at least one.
        coverage: Coverage of the interval.
    """
    z = NormalDist().inv_cdf((1 + coverage) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return 0.0 if successes == 0 else low, 1.0 if successes == n else high  # rounding apart
