"""Intervals over seeds cover what they say, decisions err as rarely as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from excise.evals.replicates import (
    MOST,
    Contrast,
    Decision,
    SeedEstimate,
    contrasts,
    correlation,
    looks,
    over_replicates,
    over_seeds,
    p_value,
    spearman,
    spending,
)
from excise.evals.stats import Array, quantiles, student_quantile
from excise.record import Estimate

MARGIN = 0.3
GROUPS, UNITS, SAMPLES = 14, 4, 120


def simulate(
    generator: np.random.Generator, seeds: int, spread: float, *, ratio: bool, before: bool
) -> tuple[float, float]:
    """Return the interval of one simulated study, or that of the rule before.

    A study has `seeds` seeds of 14 groups of 4 units; the truth lies at the margin. Seeds vary by
    `spread`, groups by 0.1, units by 0.2, as the gaps of the studies here do; with `ratio` the
    mean is divided by another mean, about 0.6, as depth gaps are.
    """
    shift = generator.normal(0, spread, (seeds, 1)) + generator.normal(0, 0.1, (seeds, GROUPS))
    noise = generator.normal(0, 0.2 / math.sqrt(UNITS), (seeds, GROUPS))
    below = np.ones((seeds, GROUPS))
    if ratio:
        below = 0.6 + generator.normal(0, 0.08, (seeds, 1)) + generator.normal(0, 0.15, below.shape)
    above = MARGIN * (0.6 if ratio else 1.0) + shift + noise
    chosen = generator.multinomial(GROUPS, np.full(GROUPS, 1 / GROUPS), size=(seeds, SAMPLES))
    tops = (chosen * above[:, None]).sum(2) / GROUPS
    bottoms = (chosen * below[:, None]).sum(2) / GROUPS
    means = np.stack([above.mean(1), below.mean(1)])
    whole = means.mean(1)
    left_out = (means.sum(1)[:, None] - means) / (seeds - 1)
    if before:  # seeds with repetition and groups inside them, percentiles
        picked = generator.integers(seeds, size=(SAMPLES, seeds))
        at = np.arange(SAMPLES)[:, None]
        return quantiles(tops[picked, at].mean(1) / bottoms[picked, at].mean(1), 0.95)
    found = over_replicates(
        float(whole[0] / whole[1]),
        left_out[0] / left_out[1],
        tops.mean(0) / bottoms.mean(0),
        groups=seeds * GROUPS,
        n=seeds * GROUPS * UNITS,
    )
    return found.low, found.high


def covered(
    seeds: int, spread: float, *, ratio: bool, before: bool = False, times: int = 800
) -> float:
    """Return how often an interval holds the truth."""
    generator = np.random.default_rng([seeds, round(100 * spread), ratio])
    held = 0
    for _ in range(times):
        low, high = simulate(generator, seeds, spread, ratio=ratio, before=before)
        held += low <= MARGIN <= high
    return held / times


@pytest.mark.parametrize("ratio", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_over_seeds_cover_at_the_margin(seeds: int, spread: float, ratio: bool) -> None:
    assert covered(seeds, spread, ratio=ratio) >= 0.93


@pytest.mark.parametrize("spread", [0.1, 0.2])
def test_percentiles_of_three_seeds_cover_too_little(spread: float) -> None:
    """The rule that studies had before fails the same test where seeds vary more than units."""
    assert covered(3, spread, ratio=False, before=True) < 0.9


def test_an_interval_by_hand() -> None:
    values = np.array([1.0, 2.0, 3.0])
    left_out = (values.sum() - values) / 2
    found = over_replicates(2.0, left_out, np.full(9, 2.0), groups=9, n=30)
    assert (found.value, found.n, found.freedom) == (2.0, 30, 2)
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    mean = over_seeds(values.tolist())
    assert (mean.low, mean.high) == pytest.approx((found.low, found.high))
    # Three seeds that agree by chance are no surer than their units.
    alike = over_replicates(2.0, np.full(3, 2.0), np.linspace(1, 3, 99), groups=9, n=30)
    assert alike.low < 1.1
    assert alike.high > 2.9


def test_one_seed_has_no_interval_and_decides_nothing() -> None:
    one = over_replicates(0.9, np.array([math.nan]), np.linspace(0.8, 1.0, 99), groups=9, n=9)
    assert math.isnan(one.low)
    asked = Contrast("D", one, (-0.1, 0.1))
    assert (asked.verdict, asked.open, asked.needed()) == ("undecided", True, None)
    assert "at least three seeds" in asked.missing()
    assert math.isnan(over_seeds([1.0]).low)
    assert p_value(one) == 1
    undefined = over_replicates(0.5, np.array([0.5, math.nan]), np.zeros(0), groups=2, n=2)
    assert math.isnan(undefined.low), "a ratio that one seed alone defines"


def test_p_values_are_students() -> None:
    found = over_seeds([0.1, 0.2, 0.3])  # t = 0.2 / (0.1 / sqrt(3)) with two degrees of freedom
    assert p_value(found) == pytest.approx(0.0742, abs=1e-4)
    assert p_value(over_seeds([-0.1, -0.2, -0.3])) == pytest.approx(0.0742, abs=1e-4)


@pytest.mark.parametrize("pairs", [6, 8, 12])
@pytest.mark.parametrize("rho", [-0.3, -0.85])
def test_correlations_cover_over_pairs(pairs: int, rho: float) -> None:
    generator = np.random.default_rng([pairs, round(-100 * rho)])
    truth = 6 / math.pi * math.asin(rho / 2)
    times, held = 1000, 0
    for _ in range(times):
        found = generator.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=pairs)
        value = correlation(found[:, 0], found[:, 1])
        held += value.low <= truth <= value.high
    assert held / times >= 0.93


def test_few_pairs_have_no_interval() -> None:
    rising: Array = np.arange(4.0)
    assert correlation(rising, rising).value == 1
    assert math.isnan(correlation(rising, rising).low)
    asked = Contrast("rho", correlation(rising, rising), (0.5,), replicates="pairs")
    assert "more pairs would decide it, more seeds would not" in asked.missing()
    other = np.array([1.0, 0, 2, 3, 4, 5, 6, 7])
    wide = correlation(np.arange(8.0), other)
    assert wide.low < wide.value == float(spearman(np.arange(8.0), other))


# -- decisions -------------------------------------------------------------------------------------


def test_where_an_interval_lies() -> None:
    cases = {(0.2, 0.4): "above", (-0.4, -0.2): "below", (-0.05, 0.05): "equal"}
    for (low, high), said in cases.items():
        value = Estimate((low + high) / 2, low, high, 1)
        assert Contrast("D", value, (-0.1, 0.1)).verdict == said
    assert Contrast("D", Estimate(0.1, 0.0, 0.2, 1), (-0.1, 0.1)).verdict == "undecided"
    nan = math.nan
    assert Contrast("D", Estimate(nan, nan, nan, 1), (-0.1, 0.1)).verdict == "undecided"


@pytest.mark.parametrize(
    ("sides", "said"),
    [((0.02, 0.01), "floor"), ((0.99, 0.97), "ceiling"), ((0.5, 0.49), "equal"), ((), "equal")],
)
def test_the_ends_of_a_scale_are_never_the_same(sides: tuple[float, ...], said: str) -> None:
    value = SeedEstimate(0.01, -0.02, 0.04, 9, freedom=2, sides=sides)
    asked = Contrast("D", value, (-0.1, 0.1))
    assert asked.verdict == said
    assert not asked.open
    words = asked.say({"equal": "the same"})
    assert words.startswith("the same" if said == "equal" else f"at the {said}")


def test_contrasts_share_the_error() -> None:
    value = over_seeds([0.2, 0.25, 0.3, 0.35])
    alone = contrasts({"a": value}, (0.1,), 0.05)["a"]
    assert alone.deciding == value
    assert alone.above(0.1)
    shared = contrasts({name: value for name in "abcdef"}, (0.1,), 0.05)["a"]
    assert shared.error == pytest.approx(0.05 / 6)
    half = (value.high - value.low) / 2 / student_quantile(0.975, 3)
    wider = half * student_quantile(1 - 0.05 / 12, 3)
    assert shared.deciding.low == pytest.approx(value.value - wider)
    assert not shared.above(0.1)
    assert Decision("x", (shared,)).open
    assert not Decision("x").open


def test_how_many_seeds_would_do() -> None:
    asked = Contrast("D", over_seeds([0.0, 0.2, 0.4]), (0.1,))
    count = asked.needed()
    assert count is not None
    spread = 0.2
    for seeds, enough in ((count, True), (count - 1, False)):
        t = {17: 2.1199, 18: 2.1098, 19: 2.1009}[seeds]
        assert (t * spread / math.sqrt(seeds) < 0.1) == enough
    assert f"would take about {count} seeds" in asked.missing()
    near = Contrast("D", over_seeds([-0.1, 0.09, 0.3]), (0.1,))
    assert (near.needed() or 0) > MOST
    assert "redesigned or retired" in near.missing()
    on = Contrast("D", SeedEstimate(0.1, 0.0, 0.2, 9, freedom=2), (0.1,))
    assert on.needed() is None
    assert "no number of seeds" in on.missing()


# -- looks -----------------------------------------------------------------------------------------


def test_looks_and_what_they_spend() -> None:
    assert looks(12) == (3, 5, 8, 12)
    assert looks(3) == (3,)
    assert looks(4) == (3, 4)
    assert sum(spending((3, 5, 8, 12))) == pytest.approx(0.05)
    assert spending((3, 5, 8, 12))[0] == pytest.approx(0.05 * 3 / 12)


def first_call(values: Array, at: tuple[int, ...], errors: tuple[float, ...]) -> str:
    """Return what a study says that stops at the first look that decides."""
    for count, error in zip(at, errors, strict=True):
        asked = Contrast("D", over_seeds(values[:count].tolist()), (MARGIN,), error)
        if not asked.open:
            return asked.verdict
    return "undecided"


def test_looking_again_costs_no_error() -> None:
    """At the margin at most 5 % are called, of either side; without spending more are."""
    generator = np.random.default_rng(7)
    at = looks(20)
    wrong = careless = 0
    times = 1500
    for _ in range(times):
        values = generator.normal(MARGIN, 0.1, at[-1])
        wrong += first_call(values, at, spending(at)) != "undecided"
        careless += first_call(values, at, (0.05,) * len(at)) != "undecided"
    assert wrong / times <= 0.06
    assert careless / times > 0.09


def test_a_clear_effect_is_called_early() -> None:
    generator = np.random.default_rng(8)
    at = looks(20)
    said = [first_call(generator.normal(0.6, 0.1, 20), at, spending(at)) for _ in range(200)]
    assert said.count("above") >= 196
