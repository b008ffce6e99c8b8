"""Scores of a whole set, from the scores of its rows: forget quality, PrivLeak, model utility.

They are computed where the benchmark sets that they read were scored (`Domain.benchmark`). Forget
quality and PrivLeak compare with an oracle, a model retrained without the forget set.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from math import comb
from typing import Final

from excise.record import Item, Score, ScoreDirection

Values = Mapping[tuple[str, str], Sequence[float]]
"""Scores of the rows of a model by (set, metric)."""

DEFINITIONS: Final[Mapping[str, str]] = {
    "forget_quality": (
        "forget_quality@1: p-value of the exact two-sample Kolmogorov-Smirnov test between the "
        "truth ratios of a model and those of the oracle, truth_ratio@open_unlearning as in the "
        "released code; 0 to 1, small where the two can be told apart; no interval"
    ),
    "privleak": (
        "privleak@muse: 100 (A - B) / B, where A is the share of pairs of a forget and a holdout "
        "text of which the holdout text has the higher min_k (ties half), and B that of the "
        "oracle; -100 is full memory, 0 is the oracle, above 0 is conspicuous absence; no interval"
    ),
    "model_utility": (
        "model_utility@1: harmonic mean of nine numbers from 0 to 1, of the retain set, real "
        "authors and world facts each: probability of the answer (beside its options for the last "
        "two), rouge_l, and mean of max(0, 1 - truth_ratio@open_unlearning) (TOFU); no interval"
    ),
}
"""Every score of a whole set, with its versioned definition."""

DIRECTION: Final[Mapping[str, ScoreDirection]] = {
    "forget_quality": "lower",
    "privleak": "lower",
    "model_utility": "higher",
}
"""Which way is more knowledge: of the forget set for the first two, of the rest for the last."""

FORGET_TRUTH: Final = "benchmark.forget_perturbed"
"""Set whose truth ratios forget quality compares."""

MEMBERS: Final = "benchmark.privleak_forget"
"""Texts of the forget set that PrivLeak compares."""

STRANGERS: Final = "benchmark.privleak_holdout"
"""Texts no model saw, beside those."""

RATIO: Final = "truth_ratio_geometric"
"""The truth ratio of the released code, which the published numbers come from."""

UTILITY: Final = (
    ("benchmark.retain", "probability"),
    ("benchmark.retain", "rouge_l"),
    ("benchmark.retain_perturbed", RATIO),
    ("benchmark.real_authors_perturbed", "option_probability"),
    ("benchmark.real_authors", "rouge_l"),
    ("benchmark.real_authors_perturbed", RATIO),
    ("benchmark.world_facts_perturbed", "option_probability"),
    ("benchmark.world_facts", "rouge_l"),
    ("benchmark.world_facts_perturbed", RATIO),
)
"""What the nine numbers of model utility are the means of."""


def ks_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the p-value of the two-sided two-sample Kolmogorov-Smirnov test, exactly.

    Of all ways to order the two samples, it is the share in which their empirical distributions
    lie at least as far apart (Hodges 1958), counted in whole numbers, so that small values keep
    their digits. Equal to `scipy.stats.ks_2samp(method="exact")`.

    Args:
        first: Values of one sample, at least one.
        second: Values of the other.
    """
    a, b = sorted(first), sorted(second)
    n, m = len(a), len(b)
    apart = max(abs(bisect_right(a, x) * m - bisect_right(b, x) * n) for x in (*a, *b))
    if not apart:
        return 1.0
    # Lattice paths from (0, 0) to (n, m) that never lie as far from the diagonal.
    near = [int(j * n < apart) for j in range(m + 1)]
    for j in range(1, m + 1):
        near[j] = near[j] and near[j - 1]
    for i in range(1, n + 1):
        near[0] = near[0] if i * m < apart else 0
        for j in range(1, m + 1):
            near[j] = near[j] + near[j - 1] if abs(i * m - j * n) < apart else 0
    total = comb(n + m, n)
    return (total - near[m]) / total


def auc(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the share of pairs in which the value of `second` is higher; ties count half.

    Args:
        first: Values of one sample, at least one.
        second: Values of the other.
    """
    ordered = sorted(first)
    above = sum(bisect_left(ordered, x) + bisect_right(ordered, x) for x in second)
    return above / (2 * len(first) * len(second))


def privleak(
    members: Sequence[float],
    strangers: Sequence[float],
    oracle_members: Sequence[float],
    oracle_strangers: Sequence[float],
) -> float | None:
    """Return PrivLeak in percent (Shi et al., MUSE, arXiv:2407.06460).

    `swj0419/muse_bench` fcd6651 labels the holdout set 1 (`forget_holdout_Min-40%`), so that full
    memory is -100; its published tables have that sign.

    Args:
        members: `min_k` of forget texts by the model.
        strangers: `min_k` of holdout texts by the model.
        oracle_members: `min_k` of forget texts by the oracle.
        oracle_strangers: `min_k` of holdout texts by the oracle.

    Returns:
        The number; None where the oracle's share is 0, which leaves nothing to divide by.
    """
    reference = auc(oracle_members, oracle_strangers)
    return 100 * (auc(members, strangers) - reference) / reference if reference else None


def model_utility(values: Values) -> float:
    """Return the harmonic mean of the nine numbers (Maini et al., TOFU, arXiv:2401.06121, 2.2.1).

    Args:
        values: Scores of the rows of all sets in `UTILITY`.

    Returns:
        From 0 to 1; 0 where any of the nine is 0.
    """
    parts = []
    for name, metric in UTILITY:
        scores = values[name, metric]
        if metric == RATIO:
            scores = [max(0.0, 1 - ratio) for ratio in scores]
        parts.append(sum(scores) / len(scores))
    return len(parts) / sum(1 / part for part in parts) if all(parts) else 0.0


def values_of(items: Sequence[Item]) -> dict[tuple[str, str], list[float]]:
    """Return the scores of rows by (set, metric)."""
    out: dict[tuple[str, str], list[float]] = {}
    for item in items:
        out.setdefault((item.set, item.metric), []).append(item.value)
    return out


def set_scores(
    items: Mapping[str, Sequence[Item]], oracle: str = ""
) -> tuple[tuple[Score, ...], tuple[str, ...]]:
    """Score every model on whole sets.

    Args:
        items: Scores of rows by model; at least one model.
        oracle: Name of the oracle among the models; empty where there is none.

    Returns:
        The scores, and a sentence for each one that is unknown.
    """
    by_model = {model: values_of(rows) for model, rows in items.items()}
    there = set.intersection(*({*values} for values in by_model.values()))
    asked = []
    if (FORGET_TRUTH, RATIO) in there:
        asked.append("forget_quality")
    if {(MEMBERS, "min_k"), (STRANGERS, "min_k")} <= there:
        asked.append("privleak")
    if there.issuperset(UTILITY):
        asked.append("model_utility")
    scores: list[Score] = []
    unknown: dict[str, None] = {}
    for name in asked:
        for model, values in by_model.items():
            value, why = _value(name, values, by_model.get(oracle))
            if value is None:
                unknown[f"{name} is unknown: {why}"] = None
                continue
            scores.append(Score(
                model=model, set="benchmark", metric=name, value=value, low=value, high=value,
                n=_count(name, values), direction=DIRECTION[name], definition=DEFINITIONS[name],
            ))  # fmt: skip
    return tuple(scores), tuple(unknown)


def _value(name: str, values: Values, reference: Values | None) -> tuple[float | None, str]:
    """Return one score, or why it is unknown."""
    if name == "model_utility":
        return model_utility(values), ""
    if reference is None:
        return None, "it compares with a model retrained without the forget set; give an --oracle"
    if name == "forget_quality":
        return ks_p_value(values[FORGET_TRUTH, RATIO], reference[FORGET_TRUTH, RATIO]), ""
    keys = (MEMBERS, "min_k"), (STRANGERS, "min_k")
    value = privleak(*(values[key] for key in keys), *(reference[key] for key in keys))
    return value, "the oracle finds every forget text more probable than every holdout text"


def _count(name: str, values: Values) -> int:
    """Return how many rows a score is of."""
    keys = {
        "forget_quality": ((FORGET_TRUTH, RATIO),),
        "privleak": ((MEMBERS, "min_k"), (STRANGERS, "min_k")),
        "model_utility": UTILITY,
    }[name]
    return sum(len(values[key]) for key in keys)
