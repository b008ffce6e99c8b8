from __future__ import annotations

import math

import numpy as np
import pytest

from excise.core.errors import UserError
from excise.evals.stats import (
    bootstrap_difference,
    bootstrap_mean,
    holm,
    interval,
    mcnemar,
    quantiles,
    resampled_means,
    small_sample,
    student,
    student_quantile,
    wilson,
)


def units(values: list[float]) -> dict[str, float]:
    return {f"u{i}": v for i, v in enumerate(values)}


def test_bootstrap_is_deterministic_and_close_to_normal_theory() -> None:
    values = np.random.default_rng(0).normal(2, 1, 400).tolist()
    found = bootstrap_mean(units(values), seed=1)
    assert found == bootstrap_mean(units(values), seed=1)
    assert found != bootstrap_mean(units(values), seed=2)
    error = 1.96 * np.std(values) / math.sqrt(400)
    assert found.half == pytest.approx(error, rel=0.1)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(300):
        found = bootstrap_mean(units(rng.normal(0, 1, 40).tolist()), samples=400, seed=i)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 300 <= 0.985


def test_groups_widen_what_is_not_independent() -> None:
    rng = np.random.default_rng(2)
    values = units([v for v in rng.normal(0, 1, 30) for _ in range(10)])
    groups = {f"u{i}": f"g{i // 10}" for i in range(300)}
    alone = bootstrap_mean(values)
    grouped = bootstrap_mean(values, groups=groups)
    assert grouped.n == 30
    assert grouped.half > 2 * alone.half


def test_perfect_scores_are_not_certain() -> None:
    found = bootstrap_mean(units([1.0] * 10))
    assert found.low == pytest.approx(wilson(10, 10)[0])
    assert 0.6 < found.low < 0.8


def test_pairs_are_narrower_than_the_same_scores_apart() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 1, 200)
    one, two = units((base + 0.1).tolist()), units(base.tolist())
    found = bootstrap_difference(one, two)
    assert found.value == pytest.approx(0.1)
    assert found.half < 1e-6
    with pytest.raises(UserError, match="share no unit"):
        bootstrap_difference({"a": 1.0}, {"b": 1.0})


def test_common_units_alone_count() -> None:
    means, samples = resampled_means([{"a": 1.0, "b": 3.0}, {"b": 1.0, "c": 9.0}], samples=10)
    assert means.tolist() == [3.0, 1.0]
    assert samples.shape == (10, 2)


def test_mcnemar_is_the_binomial_tail() -> None:
    one = units([1.0] * 8 + [0.0] * 2 + [1.0] * 5)
    two = units([0.0] * 8 + [1.0] * 2 + [1.0] * 5)
    tail = sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(one, two) == pytest.approx(2 * tail)
    assert mcnemar(one, one) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_wilson_by_hand() -> None:
    low, high = wilson(8, 10)
    assert [low, high] == pytest.approx([0.4902, 0.9433], abs=1e-3)


def test_students_t_by_the_tables() -> None:
    for p, freedom, value in (
        (0.95, 1, 6.3138),
        (0.95, 2, 2.9200),
        (0.975, 7, 2.3646),
        (0.95, 10, 1.8125),
        (0.975, 30, 2.0423),
        (0.95, 499, 1.6479),
    ):
        assert student_quantile(p, freedom) == pytest.approx(value, abs=2e-4)
        assert student(value, freedom) == pytest.approx(p, abs=2e-5)
        assert student(-value, freedom) == pytest.approx(1 - p, abs=2e-5)


@pytest.mark.parametrize("count", [8, 12, 20])
def test_at_the_margin_an_equivalence_passes_in_one_case_of_twenty(count: int) -> None:
    """Groups of answers whose true gap is the margin itself; passing there is an error."""
    rng = np.random.default_rng(count)
    oracle, original, margin, cases = 0.05, 0.98, 0.1, 600

    def groups_of(share: float) -> np.ndarray:
        """Return the mean of eight answers of every group; answers of a group are alike."""
        own = rng.beta(share * 4, (1 - share) * 4, size=count)
        right: np.ndarray = rng.random((count, 8)) < own[:, None]
        return np.asarray(right.mean(1))

    passed = plain = 0
    for _ in range(cases):
        ours = groups_of(oracle + margin * (original - oracle))
        low, top = groups_of(oracle), groups_of(original)
        weight = rng.multinomial(count, np.full(count, 1 / count), size=600) / count
        samples = (weight @ (ours - low)) / (weight @ (top - low))
        value = float((ours - low).mean() / (top - low).mean())
        ends = interval(samples, value, count, 0.9)
        passed += -margin < ends[0] and ends[1] < margin
        short = quantiles(samples, 0.9)
        plain += -margin < short[0] and short[1] < margin
    assert passed / cases < 0.07
    assert plain > 1.3 * passed  # the plain percentile interval passes more


def test_p_values_of_few_clusters_are_larger() -> None:
    assert small_sample(0.01, 8) == pytest.approx(student(-2.3263 * math.sqrt(7 / 8), 7), abs=1e-5)
    assert small_sample(0.5, 8) == pytest.approx(0.5)
    assert small_sample(0.01, 1000) == 0.01
