"""Token weights and the three sums they enter: of outer products, of rows, of columns.

Nothing is computed where all weights are 0, nothing extra where all are 1, and one elementwise
multiply of the smaller operand otherwise. Where many tokens weigh 0 their rows are left out.

Shape legend: N tokens (or images), P sliced side, Q other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SPARSE = 0.2
"""Share of tokens of weight 0 from which leaving their rows out is cheaper than a multiply."""
MANY = 8
"""Weights or pieces from which one multiply of the whole side is cheaper than one for each."""


@dataclass(frozen=True, eq=False)
class Weight:
    """How much each token weighs in one group's weights.

    Attributes:
        values_N: Weights.
        zero: Whether all are 0.
        rows: Tokens of weight other than 0, where they are few enough to be picked.
        binary: Whether every weight is 0 or 1.
    """

    values_N: Tensor
    zero: bool = False
    rows: Tensor | None = None
    binary: bool = False

    def to(self, device: torch.device) -> Weight:
        """Return the weight on `device`."""
        rows = None if self.rows is None else self.rows.to(device)
        return replace(self, values_N=self.values_N.to(device), rows=rows)


WeightedRange = tuple[int, int, Weight | None]
"""Start and stop along the sliced dimension, and the weight of the tokens; None for all ones."""
WeightedRanges = Sequence[WeightedRange]
"""WeightedRanges that together cover a dimension, in order."""


def weigh(values_N: Tensor) -> Weight | None:
    """Return token weights with what is worth knowing about them; None where all are 1.

    Args:
        values_N: Weights. On an accelerator this waits for them.
    """
    ones, nonzero = values_N == 1, values_N != 0
    counts = torch.stack([ones.sum(), nonzero.sum()]).tolist()
    if counts[0] == len(values_N):
        return None
    few = counts[1] <= (1 - SPARSE) * len(values_N)
    rows = nonzero.nonzero().squeeze(1) if few and counts[1] else None
    return Weight(values_N, counts[1] == 0, rows, counts[0] == counts[1])


def trivial(pieces: WeightedRanges) -> bool:
    """Return whether every weight is 1."""
    return all(weight is None for _, _, weight in pieces)


def nothing(pieces: WeightedRanges) -> bool:
    """Return whether every weight is 0."""
    return all(weight is not None and weight.zero for _, _, weight in pieces)


def column(weight: Weight, like: Tensor) -> Tensor:
    """Return a weight as a column [N, 1] in the dtype of what it multiplies."""
    return weight.values_N.to(like.dtype)[:, None]


def outer(a_NP: Tensor, b_NQ: Tensor, pieces: WeightedRanges, out_PQ: Tensor) -> None:
    """Write `sum_n w_n a_n b_n^T` into `out_PQ`, with the weights of each piece of P.

    Args:
        a_NP: The side that is sliced.
        b_NQ: The other side.
        pieces: Weights by slice of P; together they cover P.
        out_PQ: Receives the sums; may be a transposed view.
    """
    if len({id(w) for _, _, w in pieces if w is not None}) > MANY:
        torch.mm(scaled(a_NP, pieces).t(), b_NQ, out=out_PQ)
        return
    width: dict[int, int] = {}
    for start, stop, weight in pieces:
        width[id(weight)] = width.get(id(weight), 0) + stop - start
    ready: dict[int, Tensor] = {}
    for start, stop, weight in pieces:
        out, a = out_PQ[start:stop], a_NP[:, start:stop]
        if weight is None:
            torch.mm(a.t(), b_NQ, out=out)
        elif weight.zero:
            out.zero_()
        elif width[id(weight)] <= b_NQ.shape[1]:
            b = b_NQ
            if weight.rows is not None:
                if id(weight) not in ready:
                    ready[id(weight)] = b_NQ.index_select(0, weight.rows)
                b = ready[id(weight)]
            torch.mm(_weighted(a, weight).t(), b, out=out)
        else:
            if id(weight) not in ready:
                ready[id(weight)] = _weighted(b_NQ, weight)
            a = a if weight.rows is None else a.index_select(0, weight.rows)
            torch.mm(a.t(), ready[id(weight)], out=out)


def _weighted(x_NC: Tensor, weight: Weight) -> Tensor:
    """Return rows times their weights, rows of weight 0 left out where that is cheaper."""
    if weight.rows is None:
        return x_NC * column(weight, x_NC)
    picked = x_NC.index_select(0, weight.rows)
    if weight.binary:
        return picked
    return picked.mul_(weight.values_N[weight.rows].to(x_NC.dtype)[:, None])


def rows_sum(x_NP: Tensor, pieces: WeightedRanges) -> Tensor:
    """Return `sum_n w_n x_n`, [P], with the weights of each piece of P.

    Args:
        x_NP: Rows of the sum, one a token.
        pieces: Weights by slice of P; together they cover P.
    """
    if len(pieces) > MANY:
        return scaled(x_NP, pieces).sum(0)
    out = x_NP.new_empty(x_NP.shape[1])
    for start, stop, weight in pieces:
        x = x_NP[:, start:stop]
        if weight is None:
            out[start:stop] = x.sum(0)
        elif weight.zero:
            out[start:stop] = 0
        else:
            out[start:stop] = torch.mv(x.t(), weight.values_N.to(x.dtype))
    return out


def scaled(x_NP: Tensor, pieces: WeightedRanges) -> Tensor:
    """Return every column of a piece times the piece's weights, in a new tensor.

    Args:
        x_NP: One row a token.
        pieces: Weights by slice of P; together they cover P.
    """
    if len(pieces) > MANY:
        return x_NP * _laid_out(x_NP, pieces)
    out = torch.empty_like(x_NP)
    for start, stop, weight in pieces:
        if weight is None:
            out[:, start:stop] = x_NP[:, start:stop]
        elif weight.zero:
            out[:, start:stop] = 0
        else:
            torch.mul(x_NP[:, start:stop], column(weight, x_NP), out=out[:, start:stop])
    return out


def _laid_out(x_NP: Tensor, pieces: WeightedRanges) -> Tensor:
    """Return the weight of every token in every column, for pieces too many to go through."""
    ones_N = x_NP.new_ones(len(x_NP))
    weights_NK = torch.stack(
        [ones_N if w is None else w.values_N.to(x_NP.dtype) for _, _, w in pieces], 1
    )
    widths = torch.tensor([stop - start for start, stop, _ in pieces], device=x_NP.device)
    which_P = torch.repeat_interleave(widths, output_size=x_NP.shape[1])
    return weights_NK.index_select(1, which_P)


def times(a: WeightedRanges, b: WeightedRanges) -> list[WeightedRange]:
    """Return the product of two weights over the same slices.

    Args:
        a: Weights by slice.
        b: Weights of the same slices, in the same order.
    """
    product: list[WeightedRange] = []
    for (start, stop, x), (_, _, y) in zip(a, b, strict=True):
        if x is None or y is None:
            product.append((start, stop, x if y is None else y))
        else:
            product.append((start, stop, Weight(x.values_N * y.values_N, x.zero or y.zero)))
    return product
