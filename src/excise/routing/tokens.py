"""Token weights from how often a token occurs among forget and retain rows.

Source: Cloud et al. 2024, "Gradient Routing", arXiv:2410.04332, appendix C: a token's weight is
w = 1 - sigmoid(s (r - 1/r) + b) with r its frequency in forget over its frequency in retain.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from excise.core.config import Config


class TokenWeights(Config):
    """How much a token of a forget row counts as forget, by how typical of forget rows it is."""

    slope: float = 1.0
    """s: how fast the weight falls with the frequency ratio."""
    offset: float = -4.0
    """b: at -4 a token as frequent in both is routed by 2 %."""
    smooth_forget: float = Field(default=1.0, gt=0)
    """Added to every count among forget rows."""
    smooth_retain: float = Field(default=20.0, gt=0)
    """Added to every count among retain rows."""


def token_counts(texts: Iterable[Iterable[int]], vocab: int) -> Int[Tensor, "V"]:
    """Return how often each token id occurs.

    Args:
        texts: Token ids.
        vocab: Size of the vocabulary.
    """
    ids = [i for text in texts for i in text]
    return torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab)


def ordinary(
    forget_V: Int[Tensor, "V"], retain_V: Int[Tensor, "V"], config: TokenWeights
) -> Float[Tensor, "V"]:
    """Return w: 1 for tokens treated like any other, 0 for those that are wholly routed.

    Args:
        forget_V: Counts among forget rows.
        retain_V: Counts among retain rows.
        config: Slope, offset and smoothing.
    """
    forget = forget_V.double() + config.smooth_forget
    retain = retain_V.double() + config.smooth_retain
    ratio = (forget / forget.sum()) / (retain / retain.sum())
    return (1 - torch.sigmoid(config.slope * (ratio - 1 / ratio) + config.offset)).float()
