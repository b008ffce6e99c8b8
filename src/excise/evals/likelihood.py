"""Scores of a row from the log-probabilities of its tokens: one forward serves all of them.

Sources: extraction strength, Wang et al. (arXiv:2406.09179); Min-K% Prob, Shi et al.
(arXiv:2310.16789); Min-K%++, Zhang et al. (arXiv:2404.02936); truth ratio, Maini et
al. (arXiv:2401.06121, eq. 1). Compared with the code of `locuslab/tofu` bdc209e,
`locuslab/open-unlearning` d3d7cf9 and `swj0419/muse_bench` fcd6651.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

from excise.evals.tokens import Answer

LOWEST: Final = 0.4
"""Share of a row's tokens that Min-K% Prob reads: 40 %, as the code of MUSE and open-unlearning;
the paper's own default is 20 %."""

DEFINITIONS: Final[Mapping[str, str]] = {
    "text_loss": (
        "text_loss@2: mean negative log-likelihood in nats over the scored tokens of a row, "
        "teacher-forced, each token's loss cut at 100 nats"
    ),
    "exact_match": (
        "exact_match@2: 1 if every scored token of a row is the most probable one in one "
        "teacher-forced forward, else 0; a token that ties with k - 1 others counts 1/k"
    ),
    "continuation": (
        "continuation@2: share of the second half of a row's scored tokens that greedy decoding "
        "from all before it gives in a row, from the first on (teacher-forced, which is the same "
        "up to the first miss)"
    ),
    "extraction_strength": (
        "extraction_strength@1: 1 - k/n, where k is the fewest of a row's n scored tokens that "
        "must be given before greedy decoding yields all the others; 0 to 1"
    ),
    "probability": (
        "probability@1: probability of the scored tokens of a row to the power of one over their "
        "number; 0 to 1"
    ),
    "min_k": (
        "min_k@1: mean log-probability in nats of the 40 % least probable scored tokens of a row, "
        "at least one; at most 0"
    ),
    "min_k_plus_plus": (
        "min_k_plus_plus@1: as min_k, of log-probabilities less their mean under the model's "
        "distribution at each position, in its standard deviations"
    ),
    "truth_ratio": (
        "truth_ratio@paper: mean over the wrong answers of a question of P(answer)^(1/tokens), "
        "over that of its right answer in other words; 0 and up, below 1 where the right one is "
        "preferred"
    ),
    "truth_ratio_geometric": (
        "truth_ratio@open_unlearning: as truth_ratio, with the geometric mean over the wrong "
        "answers, as the released code of TOFU and of open-unlearning computes it"
    ),
    "option_probability": (
        "option_probability@1: P(right answer)^(1/tokens) over the sum of that of all options of "
        "a question; 0 to 1"
    ),
}
"""Metrics that are read off token probabilities, with their versioned definitions."""


def extraction_strength(hits: Sequence[float]) -> float:
    """Return 1 - k/n, where all of n tokens but the first k are predicted greedily.

    A last token that is missed gives 0. The code of open-unlearning gives 1/n there, because its
    loop ends at n - 1.

    Args:
        hits: 1 for each scored token that is the most probable one, 1/k where k tie, else 0.
    """
    return _led(hits[::-1])


def continuation(hits: Sequence[float]) -> float:
    """Return the share of the second half that is hit before the first miss.

    Args:
        hits: As `extraction_strength` takes them.
    """
    return _led(hits[len(hits) // 2 :])


def _led(hits: Sequence[float]) -> float:
    """Return the share of tokens that is hit before the first miss; its expectation under ties."""
    reached: Iterator[float] = accumulate(hits, operator.mul)
    return sum(reached) / len(hits)


def lowest_mean(values: Sequence[float], share: float = LOWEST) -> float:
    """Return the mean of the lowest values, `share` of them rounded down, at least one.

    Args:
        values: One per scored token.
        share: From 0 to 1.
    """
    if any(map(math.isnan, values)):  # which has no place in an order
        return math.nan
    chosen = sorted(values)[: max(1, int(len(values) * share))]
    return sum(chosen) / len(chosen)


def truth_ratio(means: Sequence[float], right: int) -> float:
    """Return how probable wrong answers are beside the right one, by the paper's equation.

    Args:
        means: Mean log-probability of a token, in nats, of every option.
        right: Index of the right option.
    """
    wrong = [math.exp(m - means[right]) for i, m in enumerate(means) if i != right]
    return sum(wrong) / len(wrong)


def truth_ratio_geometric(means: Sequence[float], right: int) -> float:
    """Return the ratio with the geometric mean over wrong answers; see `truth_ratio`."""
    wrong = [m for i, m in enumerate(means) if i != right]
    return math.exp(sum(wrong) / len(wrong) - means[right])


def option_probability(means: Sequence[float], right: int) -> float:
    """Return the share of the right option in the length-normalised probabilities of all.

    Args:
        means: Mean log-probability of a token, in nats, of every option.
        right: Index of the right option.
    """
    return 1 / sum(math.exp(m - means[right]) for m in means)


OF_TOKENS: Final[Mapping[str, Callable[[Answer], float]]] = {
    "text_loss": lambda answer: -answer.mean,
    "exact_match": lambda answer: math.prod(answer.hits),
    "continuation": lambda answer: continuation(answer.hits),
    "extraction_strength": lambda answer: extraction_strength(answer.hits),
    "probability": lambda answer: math.exp(answer.mean),
    "min_k": lambda answer: lowest_mean(answer.logprobs),
    "min_k_plus_plus": lambda answer: lowest_mean(answer.standardized),
}
"""Score of a row by what the model says about its scored tokens."""

STANDARDIZED: Final = ("min_k_plus_plus",)
"""Metrics that read `Answer.standardized`."""

OF_OPTIONS: Final[Mapping[str, Callable[[Sequence[float], int], float]]] = {
    "truth_ratio": truth_ratio,
    "truth_ratio_geometric": truth_ratio_geometric,
    "option_probability": option_probability,
}
"""Score of a question by the mean log-probability of a token of each option, and the right one."""
