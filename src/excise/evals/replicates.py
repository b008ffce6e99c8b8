"""Statistics over replicates: seeds, and inside them groups and units; what they decide, and when.

A replicate is a seed: its data, its models and every removal change with it. What two seeds share
tells nothing of a third, so intervals are over seeds (Student's t, as many degrees of freedom as
seeds less one), however many units each seed has; `tests/unit/test_replicates.py` simulates their
coverage. All studies take their intervals, decisions and looks from here. numpy alone.

Shape legend: K seeds, S bootstrap samples of units, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, mean, stdev
from typing import Literal

import numpy as np

from excise.evals.stats import Array, interval, student, student_quantile
from excise.record import Estimate

ERROR = 0.05
"""Two-sided error rate of a printed interval, and of all decisions of a study together."""

MOST = 50
"""Seeds beyond which a design is said to be too weak for its question."""

MarginVerdict = Literal["above", "below", "equal", "floor", "ceiling", "undecided"]


@dataclass(frozen=True)
class SeedEstimate(Estimate):
    """An estimate whose interval is over seeds.

    Attributes:
        freedom: Degrees of freedom of Student's t, seeds less one; 0 where that is not what the
            interval is made of.
        sides: The two values of which this is the difference, on a scale where 0 is the floor and 1
            the ceiling; empty where there is no such scale.
    """

    freedom: int = 0
    sides: tuple[float, ...] = ()


def over_replicates(
    value: float, left_out: Array, inside: Array, *, groups: int, n: int, error: float = ERROR
) -> SeedEstimate:
    """Return an estimate over seeds, of any smooth function of their means.

    Of the delete-one jackknife over seeds with Student's t, and of the interval of groups and units
    with the seeds as they are (`stats.interval`), the end that lies farther out counts. For a mean
    the first is mean +- t * sd / sqrt(K), whose sd already holds the noise of units inside a seed;
    the second keeps three seeds that agree by chance from looking certain.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 11.

    Args:
        value: Of all seeds.
        left_out: The same without one seed each, [K].
        inside: The same with groups of units resampled inside every seed, [S].
        groups: Independent groups (or units) of all seeds together.
        n: What the record says it rests on.
        error: One minus the coverage.

    Returns:
        The estimate; of one seed, or where a part is NaN, it has no interval.
    """
    count = len(left_out)
    if count < 2 or math.isnan(value) or np.isnan(left_out).any():
        return SeedEstimate(value, math.nan, math.nan, n, coverage=1 - error)
    spread = math.sqrt((count - 1) / count * float(np.square(left_out - left_out.mean()).sum()))
    half = student_quantile(1 - error / 2, count - 1) * spread
    low, high = value - half, value + half
    usable = inside[~np.isnan(inside)]
    if len(usable):
        lower, upper = interval(usable, value, groups, 1 - error)
        low, high = min(low, lower), max(high, upper)
    return SeedEstimate(value, low, high, n, coverage=1 - error, freedom=count - 1)


def over_seeds(values: Sequence[float]) -> SeedEstimate:
    """Return a mean over seeds with its 95 % interval (Student's t); of one seed it has none.

    Args:
        values: One value a seed.
    """
    if not values:
        return SeedEstimate(math.nan, math.nan, math.nan, 0)
    middle, n = mean(values), len(values)
    if n < 2:
        return SeedEstimate(middle, math.nan, math.nan, n)
    half = student_quantile(1 - ERROR / 2, n - 1) * stdev(values) / math.sqrt(n)
    return SeedEstimate(middle, middle - half, middle + half, n, freedom=n - 1)


def p_value(estimate: SeedEstimate) -> float:
    """Return the two-sided p-value of an estimate over seeds against zero; 1 without an interval.

    Args:
        estimate: With a 95 % interval.
    """
    if not estimate.freedom or math.isnan(estimate.low):
        return 1.0
    half = estimate.value - estimate.low if estimate.value > 0 else estimate.high - estimate.value
    if half <= 0:
        return 0.0 if estimate.value else 1.0
    t = abs(estimate.value) * student_quantile(1 - ERROR / 2, estimate.freedom) / half
    return 2 * (1 - student(t, estimate.freedom))


# -- correlations over pairs -----------------------------------------------------------------------


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


def correlation(first: Array, second: Array, *, error: float = ERROR) -> SeedEstimate:
    """Return the rank correlation over pairs with its interval; the pairs are the replicates.

    Seeds are averaged before: more of them make single pairs surer, and say nothing of other pairs.
    Fisher's z with the variance of ranks; resampling so few pairs repeats some of them and covers
    less, as a test simulates.

    Source: Bonett and Wright (2000), Psychometrika 65, equation 6, for the variance.

    Args:
        first: One value a pair, [P].
        second: Another, [P].
        error: One minus the coverage.

    Returns:
        The estimate, n the number of pairs; of fewer than five it has no interval.
    """
    value, n = float(spearman(first, second)), len(first)
    if n < 5 or math.isnan(value):
        return SeedEstimate(value, math.nan, math.nan, n, coverage=1 - error)
    z = math.atanh(max(-1 + 1 / n**2, min(1 - 1 / n**2, value)))
    half = NormalDist().inv_cdf(1 - error / 2) * math.sqrt((1 + value**2 / 2) / (n - 3))
    low, high = min(value, math.tanh(z - half)), max(value, math.tanh(z + half))
    return SeedEstimate(value, low, high, n, coverage=1 - error)


# -- decisions -------------------------------------------------------------------------------------


def end_of(value: Estimate, margin: float) -> Literal["floor", "ceiling"] | None:
    """Return the end of the scale at which both sides of a difference lie; None where they do not.

    Args:
        value: The difference; one that does not know its sides is at no end.
        margin: How near to an end counts as there.
    """
    sides = value.sides if isinstance(value, SeedEstimate) else ()
    if sides and max(sides) < margin:
        return "floor"
    if sides and min(sides) > 1 - margin:
        return "ceiling"
    return None


@dataclass(frozen=True)
class Contrast:
    """One comparison that a decision rests on.

    Attributes:
        name: What is compared.
        value: The estimate.
        thresholds: Values that the interval must not hold for a decision, ascending: (-m, m) where
            a difference is above, below or within a margin, (m,) where only one side is asked.
        error: Two-sided error rate it may spend: of several contrasts each has its share
            (Bonferroni), and so has each look at growing numbers of seeds.
        replicates: What is counted, seeds or pairs.
    """

    name: str
    value: Estimate
    thresholds: tuple[float, ...]
    error: float = ERROR
    replicates: str = "seeds"

    @property
    def deciding(self) -> Estimate:
        """Return the estimate with the interval that decides, of coverage 1 - error."""
        value = self.value
        freedom = value.freedom if isinstance(value, SeedEstimate) else 0
        if not freedom or math.isclose(self.error, 1 - value.coverage):
            return value
        wider = student_quantile(1 - self.error / 2, freedom) / student_quantile(
            (1 + value.coverage) / 2, freedom
        )
        return replace(
            value,
            low=value.value - wider * (value.value - value.low),
            high=value.value + wider * (value.high - value.value),
            coverage=1 - self.error,
        )

    def above(self, threshold: float) -> bool:
        """Return whether the whole interval lies above a value."""
        return self.deciding.low > threshold

    def below(self, threshold: float) -> bool:
        """Return whether the whole interval lies below a value."""
        return self.deciding.high < threshold

    @property
    def verdict(self) -> MarginVerdict:
        """Return where the interval lies.

        `equal` of two sides that both lie at an end of their scale is no finding, since nothing
        could have told them apart: it is called `floor` or `ceiling`.
        """
        first, last = self.thresholds[0], self.thresholds[-1]
        if self.above(last):
            return "above"
        if self.below(first):
            return "below"
        if not (self.above(first) and self.below(last)):
            return "undecided"
        return end_of(self.value, last) or "equal"

    @property
    def open(self) -> bool:
        """Return whether more seeds could decide it."""
        return self.verdict == "undecided"

    def say(self, words: Mapping[str, str]) -> str:
        """Return the words of the verdict; those of an end of the scale are the same everywhere.

        Args:
            words: By verdict; `floor` and `ceiling` need none.
        """
        verdict = self.verdict
        if verdict in ("floor", "ceiling"):
            near = f"{self.thresholds[-1]:g} of the {verdict} of their scale"
            return f"at the {verdict}: both sides lie within {near}, so nothing tells them apart"
        return words[verdict]

    def needed(self) -> int | None:
        """Return how many seeds would decide it, if value and spread stayed as they are.

        Returns:
            The number; None where none would, because the value lies on a threshold or has no
            interval.
        """
        value = self.value
        freedom = value.freedom if isinstance(value, SeedEstimate) else 0
        distance = min(abs(value.value - threshold) for threshold in self.thresholds)
        half = max(value.value - value.low, value.high - value.value)
        if not freedom or math.isnan(half) or distance <= 0:
            return None
        spread = half * math.sqrt(freedom + 1) / student_quantile((1 + value.coverage) / 2, freedom)
        for count in range(freedom + 2, MOST + 1):
            t = student_quantile(1 - self.error / 2, count - 1)
            if t * spread / math.sqrt(count) < distance:
                return count
        t = student_quantile(1 - self.error / 2, MOST)
        return max(MOST + 1, math.ceil((t * spread / distance) ** 2))

    def missing(self) -> str:
        """Return in a sentence what would decide an open contrast."""
        if self.replicates != "seeds":
            return (
                f"{self.name} is undecided over {self.value.n} {self.replicates}: more "
                f"{self.replicates} would decide it, more seeds would not."
            )
        if math.isnan(self.value.low):
            return (
                f"{self.name} has no interval over seeds, so nothing is decided: give at least "
                "three seeds (--seeds 3) on which it is defined."
            )
        count = self.needed()
        if count is None:
            return f"{self.name} lies on its margin: no number of seeds would decide it."
        if count > MOST:
            return (
                f"{self.name} is undecided and would take about {count:,} seeds, more than {MOST}: "
                "at this size the study cannot answer its question and is to be redesigned or "
                "retired."
            )
        return f"{self.name} is undecided and would take about {count} seeds."


def contrasts(
    values: Mapping[str, Estimate], thresholds: tuple[float, ...], error: float
) -> dict[str, Contrast]:
    """Return several contrasts of one decision, each with its share of the error (Bonferroni).

    Args:
        values: Estimates by name.
        thresholds: Of each.
        error: Of all together.
    """
    share = error / max(1, len(values))
    return {name: Contrast(name, value, thresholds, share) for name, value in values.items()}


@dataclass(frozen=True)
class Decision:
    """What a study's statistic says, and the contrasts it rests on.

    Attributes:
        text: In words.
        contrasts: All that decide; empty where no interval does.
    """

    text: str
    contrasts: tuple[Contrast, ...] = ()

    @property
    def open(self) -> bool:
        """Return whether a contrast is undecided."""
        return any(contrast.open for contrast in self.contrasts)


# -- looks -----------------------------------------------------------------------------------------


def looks(most: int, *, first: int = 3) -> tuple[int, ...]:
    """Return the numbers of seeds at which a growing study is looked at, each half as many again.

    Args:
        most: The largest number.
        first: The smallest.
    """
    out = [min(first, most)]
    while out[-1] < most:
        out.append(min(most, math.ceil(1.5 * out[-1])))
    return tuple(out)


def spending(at: Sequence[int], error: float = ERROR) -> tuple[float, ...]:
    """Return the error each look may spend: the seeds that are new to it, over all.

    The shares add up to the error, so that by Bonferroni's inequality all looks together are wrong
    no more often, however they hang together. Fewest seeds get least, as spending functions do.

    Source: Lan and DeMets (1983), Biometrika 70, for spending in proportion to information.

    Args:
        at: Numbers of seeds, ascending.
        error: Of all looks together.
    """
    return tuple(error * (now - before) / at[-1] for before, now in zip((0, *at), at, strict=False))
