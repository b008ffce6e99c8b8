"""Tokens of one side (forget or retain text), gathered from chunks, and their means by unit.

Shape legend: L blocks, N tokens, U units, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from excise.data.domain import Row
from excise.diagnose.activations import Chunk, norms
from excise.diagnose.junk import Junk, along, rank
from excise.diagnose.splice import Tally
from excise.diagnose.token_kl import token_kl
from excise.record import Estimate

Values = NDArray[np.float64]

SAMPLES = 300
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Side:
    """Everything that was read at the tokens of one side.

    Attributes:
        by: Numbers by block and token: `original`, `edited` and `change` are norms; `along`,
            `along_edited` and `along_original` lie along the junk direction; `cosine`.
        kl_N: KL(edited || original), NaN where the row ends.
        answer_N: Whether a scored token is predicted.
        unit_N: Number of each token's unit.
        row_N: Row of each token.
        position_N: Its place in the row.
        tally: Sums for the splice.
        answers: The same where a scored token is predicted.
    """

    by: Mapping[str, Float[NDArray[np.float64], "L N"]]
    kl_N: Float[NDArray[np.float64], " N"]
    answer_N: Bool[NDArray[np.bool_], " N"]
    unit_N: Int[NDArray[np.int64], " N"]
    row_N: Int[NDArray[np.int64], " N"]
    position_N: Int[NDArray[np.int64], " N"]
    tally: Tally
    answers: Tally

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.unit_N.max()) + 1

    @property
    def predicts_N(self) -> Bool[NDArray[np.bool_], " N"]:
        """Whether the row goes on after a token."""
        return np.isfinite(self.kl_N)


def gather(
    chunks: Iterable[Chunk],
    rows: Sequence[Row],
    junk: Junk,
    noise: Mapping[str, Float[Tensor, " V"]],
    stride: int,
) -> Side:
    """Read every number of a side in one pass over its chunks.

    Args:
        chunks: The rows as both models read them.
        rows: The rows.
        junk: Directions, fitted on other rows.
        noise: Noise of the splice, fitted on other rows.
        stride: One of how many tokens is mixed.
    """
    tally, answers = Tally(stride), Tally(answers_only=True)
    by: dict[str, list[Tensor]] = {}
    flat: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        seen = along(chunk, junk.direction_LD)
        found = {
            "original": norms(chunk.original_LND),
            "edited": norms(chunk.edited_LND),
            "change": seen.change_LN,
            "along": seen.along_LN,
            "cosine": seen.cosine_LN,
            "along_edited": seen.edited_LN,
            "along_original": seen.original_LN,
        }
        for name, value in found.items():
            by.setdefault(name, []).append(value.double().cpu())
        kl_N = token_kl(chunk.edited_NV, chunk.original_NV).double()
        kl_N[~chunk.predicts_N] = torch.nan
        single = {"kl": kl_N, "answer": chunk.answer_N}
        single |= {"row": chunk.row_N, "position": chunk.position_N}
        for name, value in single.items():
            flat.setdefault(name, []).append(value.cpu())
        tally.add(chunk, noise)
        answers.add(chunk, noise)
    one = {name: torch.cat(parts).numpy() for name, parts in flat.items()}
    numbers: dict[str, int] = {}
    unit_N = [numbers.setdefault(rows[i].unit, len(numbers)) for i in one["row"].tolist()]
    return Side(
        {name: torch.cat(parts, 1).numpy() for name, parts in by.items()},
        one["kl"],
        one["answer"],
        np.array(unit_N, dtype=np.int64),
        one["row"],
        one["position"],
        tally,
        answers,
    )


def weights(units: int, seed: int) -> Float[NDArray[np.float64], "S U"]:
    """Return how often each unit is drawn in each bootstrap sample."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(units, np.full(units, 1 / units), size=SAMPLES)
    return drawn.astype(np.float64)


def mean_by_unit(value_N: Values, unit_N: NDArray[np.int64], units: int) -> Estimate:
    """Return the mean over units of a number of tokens, with its interval.

    Args:
        value_N: A number per token.
        unit_N: Unit of each token.
        units: Number of units; those without a token are left out.
    """
    if not len(value_N):
        return Estimate(value=0.0, low=0.0, high=0.0)
    count_U = np.bincount(unit_N, minlength=units)
    here_U = count_U > 0
    mean_U = np.bincount(unit_N, value_N, units)[here_U] / count_U[here_U]
    means_S = weights(len(mean_U), 0) @ mean_U / len(mean_U)
    return measured(float(mean_U.mean()), means_S)


def measured(value: float, draws_S: Values) -> Estimate:
    """Return a value with the interval of its bootstrap draws."""
    low, high = np.quantile(draws_S, [0.025, 0.975])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def auc_by_unit(high_N: Values, forget: Side, low_M: Values, retain: Side) -> Estimate:
    """Return how well a number tells forget tokens from retain tokens, with its interval.

    Args:
        high_N: A number per token of the forget side; NaN leaves a token out.
        forget: The forget side.
        low_M: The same of the retain side.
        retain: The retain side.
    """
    good_N, good_M = np.isfinite(high_N), np.isfinite(low_M)
    ranking = rank(high_N[good_N], low_M[good_M])
    one_N, two_M = forget.unit_N[good_N], retain.unit_N[good_M]
    draws = [
        ranking.auc(a_U[one_N], b_U[two_M])
        for a_U, b_U in zip(weights(forget.units, 1), weights(retain.units, 2), strict=True)
    ]
    return measured(ranking.auc(), np.array(draws))


def auc_of(high_N: Values, low_M: Values) -> float:
    """Return how well a number tells two classes of tokens apart; NaN leaves a token out."""
    return rank(high_N[np.isfinite(high_N)], low_M[np.isfinite(low_M)]).auc()
