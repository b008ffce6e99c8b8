"""Noise: add random numbers to all weights. No information about the capability is added.

What hides by a fine balance of weights loses it before the rest of the model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from excise.auditor.base import Access
from excise.auditor.controls import LogitScaling, PositiveControl, WeightPerturbation
from excise.auditor.repair import RepairAttack
from excise.auditor.tuning import Prepare
from excise.core.context import Context
from excise.record import Level


class Noise(RepairAttack):
    """Add Gaussian noise in proportion to every tensor's root mean square, then repair."""

    name: Literal["noise"] = "noise"
    """Name of the attack."""
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.05, 0.1, 0.2), min_length=1
    )
    """Standard deviations of the noise as shares of a tensor's root mean square, one variant each.
    The tiny models of the tests keep what they know up to 0.2 and lose a third of it at 0.4."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (LogitScaling(), WeightPerturbation())
    source: ClassVar[str] = "Tice et al., arXiv 2412.01784; strengths and repair: this library's"
    version: ClassVar[int] = 1

    def changes(self) -> Mapping[str, Prepare]:
        """Return one change for every strength."""
        return {f"noise {s:g}": partial(add_noise, strength=s) for s in self.strengths}


@torch.no_grad()
def add_noise(model: Any, ctx: Context, *, strength: float) -> dict[str, Any]:
    """Add `strength * rms(w) * N(0, 1)` to every tensor in place.

    The noise of a tensor depends on the seed and the tensor's name alone.

    Args:
        model: The model.
        ctx: Gives the seed.
        strength: Standard deviation as a share of the root mean square.

    Returns:
        `strength`, and `weights`, how many were changed.
    """
    count = 0
    for name, parameter in model.named_parameters():
        wide = parameter.float()
        noise = torch.randn(parameter.shape, generator=ctx.generator(f"noise/{name}")).to(wide)
        parameter.copy_(wide + strength * wide.square().mean().sqrt() * noise)
        count += parameter.numel()
    return {"strength": strength, "weights": count}
