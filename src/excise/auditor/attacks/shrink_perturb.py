"""Shrink and perturb: move all weights towards what they were initialised with.

No information about the capability is added. A model that still holds it is repaired on benign
text faster than it would learn it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access
from excise.auditor.controls import LogitScaling, PositiveControl, WeightPerturbation
from excise.auditor.repair import RepairAttack
from excise.auditor.tuning import Prepare
from excise.core.context import Context
from excise.methods.distillation.perturb import perturb
from excise.record import Level


class ShrinkPerturb(RepairAttack):
    """Shrink all weights, add noise of the scale of an initialisation, then repair."""

    name: Literal["shrink_perturb"] = "shrink_perturb"
    """Name of the attack."""
    alphas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.1, 0.3, 0.6), min_length=1
    )
    """How far weights are moved, one variant each: UNDO's setting, and two that spare more."""
    beta: float = Field(default=0.1, ge=0)
    """Scale of the noise, of Xavier-uniform numbers: UNDO's setting."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (LogitScaling(), WeightPerturbation())
    source: ClassVar[str] = "Ash & Adams, arXiv 1910.08475; settings: UNDO, arXiv 2506.06278"
    version: ClassVar[int] = 1

    def changes(self) -> Mapping[str, Prepare]:
        """Return one change for every alpha."""
        return {
            f"alpha {alpha:g}": partial(shrink_and_perturb, alpha=alpha, beta=self.beta)
            for alpha in self.alphas
        }


def shrink_and_perturb(model: Any, ctx: Context, *, alpha: float, beta: float) -> dict[str, Any]:
    """Shrink and perturb a model in place; see `excise.methods.distillation.perturb.perturb`.

    Args:
        model: The model.
        ctx: Gives the seed.
        alpha: How far weights are moved.
        beta: Scale of the noise.

    Returns:
        `alpha`, `beta`, and `weights`, how many were changed.
    """
    names = perturb(model, alpha=alpha, beta=beta, ctx=ctx, purpose="shrink_perturb")
    count = sum(model.get_parameter(name).numel() for name in names)
    return {"alpha": alpha, "beta": beta, "weights": count}
