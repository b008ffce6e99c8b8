"""Taking the top principal components out of gradients of matrices before a step.

The gradient of a matrix is a sum of outer products over tokens, `sum_t g_t a_t'`, of what the
matrix is given (a) and the gradient of what it puts out (g). Its leading singular vectors are the
directions of both that most tokens share. What an edit changes along them is general, disturbs
everything else, and is what relearning restores first; without them it keeps to what the forget
set has of its own.

Shape legend: a gradient is [..., O, I], I inputs and O outputs or the other way round (GPT-2),
since both sides are treated alike; leading axes are experts. K components.

Source:
    arXiv 2606.17168 (RepSelect v2), from filyp/open-unlearning@5955f30 (MIT),
    src/trainer/unlearn/repselect_simple.py, `_collapse`. CIR (arXiv 2509.11816) takes both bases
    from activations and output gradients themselves; arXiv 2605.11685 (MCU) finds the same of
    dominant components and has no released code.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from excise.core.config import Config
from excise.core.errors import UserError
from excise.core.random_state import seeded

SPARE = 16
"""Directions looked at beyond those to drop, so that the randomised search finds the right ones.
What shrinks takes none, as released: the last direction found sets the scale."""


class Components(Config):
    """Which principal components of a gradient give way, and how far."""

    count: int = Field(default=512, ge=1)
    """Principal components of each matrix's gradient."""
    how: Literal["shrink", "drop"] = "shrink"
    """`shrink` divides each on either side by how far it exceeds the last; `drop` removes it."""


def without_top(
    gradient: Float[Tensor, "..."], components: Components, seed: int
) -> Float[Tensor, "..."]:
    """Return a gradient without its top principal components, or with them shrunk.

    With singular vectors u, v and values s of the top K components, both sides are multiplied:
    `G <- (1 - U (1 - f) U') G (1 - V (1 - f) V')`, where f = 0 to drop and f = s_K / s to shrink.
    Directions in which the gradient is zero but for rounding do not count among the K, so that the
    last of them is one that the data has. Vectors, such as gains of norms, are returned as they
    are, and so is what is not finite.

    Args:
        gradient: The gradient of one tensor.
        components: How many, and how.
        seed: Seed of the randomised decomposition; the global random state is left as it was.

    Raises:
        UserError: If the components to drop are all there are.
    """
    if gradient.dim() < 2 or not bool(gradient.isfinite().all()):
        return gradient
    sides = min(gradient.shape[-2:])
    if components.how == "drop" and components.count >= sides:
        raise UserError(
            f"{components.count} components are every direction of a matrix of shape "
            f"{tuple(gradient.shape)}, so nothing would be left to train; use fewer than {sides}"
        )
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    with seeded(seed, wide.device):
        looked_at = min(components.count + (SPARE if components.how == "drop" else 0), sides)
        found = torch.svd_lowrank(wide, q=looked_at)
    u_OK, s_K, v_IK = (part[..., : components.count] for part in found)
    real_K = s_K > s_K[..., :1] * max(gradient.shape[-2:]) * torch.finfo(wide.dtype).eps
    if components.how == "drop":
        given_K = real_K.to(wide.dtype)
    else:
        last = s_K.masked_fill(~real_K, torch.inf).amin(-1, keepdim=True)
        given_K = torch.where(real_K, 1 - last / s_K, 0)
    wide = wide - (wide @ v_IK * given_K.unsqueeze(-2)) @ v_IK.mT
    wide = wide - u_OK @ (u_OK.mT @ wide * given_K.unsqueeze(-1))
    return wide.to(gradient.dtype)
