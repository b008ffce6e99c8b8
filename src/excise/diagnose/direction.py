"""The junk direction: is what an edit adds to forget text one vector, and does harm switch it on?

The direction of a block is the mean of (edited - original) over the tokens of dev forget rows, the
first token left out, one direction per block. Everything else is read on other rows.

Shape legend: N tokens, L blocks, D width, P and M tokens of two classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from excise.diagnose.activations import Chunk, norms

SAMPLED = 512
"""Tokens whose changes are kept to see how many directions they spread over."""

TINY = 1e-12
"""Norms below this are taken for zero."""


@dataclass(frozen=True)
class Junk:
    """What an edit adds to forget text.

    Attributes:
        direction_LD: Unit vector of every block; zero where nothing changed.
        size_L: Norm of the mean change, as a share of the original's mean norm.
        share_L: Share of the squared change along the direction, on the rows it was fitted on.
        dimensions_L: Directions the change spreads over; 0 where nothing changed.
    """

    direction_LD: Float[Tensor, "L D"]
    size_L: Float[Tensor, " L"]
    share_L: Float[Tensor, " L"]
    dimensions_L: Float[Tensor, " L"]

    @property
    def peak(self) -> int:
        """Block after which the mean change is largest beside the original's norm."""
        return int(self.size_L.argmax())

    @property
    def clearest(self) -> int:
        """Block at which the change is nearest to one direction, where it is large.

        What one block adds is bent by the blocks above it. Large is a mean change of at least
        half the largest, beside the original's norm.
        """
        large_L = self.size_L >= 0.5 * self.size_L.max()
        return int(self.share_L.masked_fill(~large_L, -1).argmax())


def fit_junk(chunks: Iterable[Chunk]) -> Junk:
    """Fit the direction of every block.

    Args:
        chunks: Dev forget rows as both models read them.

    Returns:
        Directions by difference of means, their size and the spread around them.

    Source:
        Difference of means on the same questions: Lucki et al., arXiv 2409.18025; Arditi &
        Chughtai, lesswrong.com 2024-07-23.
    """
    total_LD: Tensor | None = None
    norm_L: Tensor | None = None
    count, sampled = 0, []
    room = SAMPLED
    for chunk in chunks:
        change_LND = chunk.change_LND
        sum_LD, sum_L = change_LND.sum(1), norms(chunk.original_LND).sum(1)
        total_LD = sum_LD if total_LD is None else total_LD + sum_LD
        norm_L = sum_L if norm_L is None else norm_L + sum_L
        count += change_LND.shape[1]
        if room > 0:
            # Every chunk gives some tokens, so that long rows are heard too.
            every = max(1, change_LND.shape[1] // max(room // 4, 1))
            sampled.append(change_LND[:, ::every][:, :room])
            room -= sampled[-1].shape[1]
    assert total_LD is not None
    assert norm_L is not None
    mean_LD = total_LD / count
    length_L = mean_LD.norm(dim=-1)
    direction_LD = mean_LD / length_L.clamp(min=TINY)[:, None]
    sampled_LND = torch.cat(sampled, 1)
    along_LN = torch.einsum("lnd,ld->ln", sampled_LND, direction_LD)
    squared_L = sampled_LND.double().square().sum((1, 2))
    return Junk(
        direction_LD,
        length_L / (norm_L / count).clamp(min=TINY),
        (along_LN.double().square().sum(1) / squared_L.clamp(min=TINY**2)).float(),
        torch.stack([spread(change_ND) for change_ND in sampled_LND]),
    )


def spread(change_ND: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Return how many directions changes spread over: exp of the entropy of their energy.

    The effective rank of Roy & Vetterli 2007, on shares of energy in place of singular values.

    Args:
        change_ND: Changes of tokens; their mean is not taken out.
    """
    change_ND = change_ND.double()
    small_XX = change_ND @ change_ND.T if len(change_ND) < change_ND.shape[1] else None
    gram_XX = change_ND.T @ change_ND if small_XX is None else small_XX
    energy_X = torch.linalg.eigvalsh(gram_XX).clamp(min=0)
    if float(energy_X.sum()) <= TINY**2:
        return torch.zeros((), device=change_ND.device)
    share_X = energy_X / energy_X.sum()
    count: Tensor = torch.special.entr(share_X).sum().exp()
    return count.float()


@dataclass(frozen=True)
class Along:
    """Tokens against the junk direction, by block.

    Attributes:
        change_LN: Norm of the change.
        along_LN: The change along the direction.
        cosine_LN: Its cosine with the direction; 0 where nothing changed.
        edited_LN: The edited model's residual stream along the direction.
        original_LN: The original's.
    """

    change_LN: Float[Tensor, "L N"]
    along_LN: Float[Tensor, "L N"]
    cosine_LN: Float[Tensor, "L N"]
    edited_LN: Float[Tensor, "L N"]
    original_LN: Float[Tensor, "L N"]


def along(chunk: Chunk, direction_LD: Float[Tensor, "L D"]) -> Along:
    """Read tokens against the direction of every block.

    Args:
        chunk: Both models' residual streams.
        direction_LD: Unit vectors.
    """
    change_LND = chunk.change_LND
    change_LN = norms(change_LND)

    def project(x_LND: Tensor) -> Tensor:
        return torch.einsum("lnd,ld->ln", x_LND, direction_LD)

    along_LN = project(change_LND)
    return Along(
        change_LN,
        along_LN,
        along_LN / change_LN.clamp(min=TINY),
        project(chunk.edited_LND),
        project(chunk.original_LND),
    )


Values = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Two classes of tokens in the order of a value, ready to be counted with weights.

    Attributes:
        place_P: Rank group of each token of the class that should lie higher.
        place_M: The same of the other class; equal values share a group.
        groups: Number of groups.
    """

    place_P: Int[NDArray[np.int64], " P"]
    place_M: Int[NDArray[np.int64], " M"]
    groups: int

    def auc(self, weight_P: Values | None = None, weight_M: Values | None = None) -> float:
        """Return the probability that a token of the first class lies higher; ties count half.

        Args:
            weight_P: Weight of each token of the first class; None for one each.
            weight_M: The same of the other.
        """
        high = np.bincount(self.place_P, weight_P, self.groups).astype(np.float64)
        low = np.bincount(self.place_M, weight_M, self.groups).astype(np.float64)
        total = high.sum() * low.sum()
        if total <= 0:
            return 0.5
        below = np.cumsum(low) - low / 2
        return float((high * below).sum() / total)


def rank(high_P: Values, low_M: Values) -> Ranking:
    """Order two classes of tokens by value.

    Args:
        high_P: Values of the class that should lie higher.
        low_M: Values of the other.
    """
    both = np.concatenate([high_P, low_M])
    kinds, place = np.unique(both, return_inverse=True)
    return Ranking(place[: len(high_P)], place[len(high_P) :], len(kinds))
