"""Re-initialisation: give one kind of module the weights of an untrained one.

No information about the capability is added. An edit that lies in one kind of module goes with
it; what the others hold can answer again once the model is repaired.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from excise.auditor.base import Access
from excise.auditor.controls import LogitScaling, PositiveControl, WeightPerturbation
from excise.auditor.repair import RepairAttack
from excise.auditor.tuning import Prepare
from excise.core.context import Context
from excise.methods.distillation.perturb import initial_vectors
from excise.models.anatomy import backbone
from excise.record import Level

Part = Literal["norms", "head", "last_block", "attention", "mlp"]

INITIAL = 0.02
"""Standard deviation of a matrix that is not trained, where the configuration names none."""


class Reinit(RepairAttack):
    """Re-initialise one kind of module in the whole model, then repair."""

    name: Literal["reinit"] = "reinit"
    """Name of the attack."""
    parts: tuple[Part, ...] = Field(
        default=("norms", "head", "last_block", "attention", "mlp"), min_length=1
    )
    """Kinds of module, one variant each: all norms, the output matrix where it is not the token
    embedding, the last block, the attention of all blocks, and their other matrices (MLPs, experts,
    and the mixers of models without attention)."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (LogitScaling(), WeightPerturbation())
    source: ClassVar[str] = "this library's; initialisation: transformers"
    version: ClassVar[int] = 1

    def changes(self) -> Mapping[str, Prepare]:
        """Return one change for every part."""
        return {part.replace("_", " "): partial(reinitialise, part=part) for part in self.parts}


def names_of(model: Any, part: Part) -> tuple[str, ...]:
    """Return the parameters of one kind of module, each tied tensor once; () where it has none.

    Args:
        model: A causal model with a list of blocks.
        part: The kind; see `Reinit.parts`.
    """
    layout, named = backbone(model), dict(model.named_parameters())
    if part == "norms":
        return tuple(
            f"{path}.{name}"
            for path, module in model.named_modules()
            if not list(module.children()) and all(p.dim() <= 1 for p in module.parameters())
            for name, _ in module.named_parameters()
        )
    if part == "head":
        embedding = model.get_input_embeddings()
        own = embedding is None or model.get_output_embeddings().weight is not embedding.weight
        return tuple(n for n in named if own and n.startswith(f"{layout.head}."))
    if part == "last_block":
        return tuple(n for n in named if n.startswith(f"{layout.blocks[-1]}."))
    return tuple(
        name
        for name, parameter in named.items()
        if parameter.dim() > 1
        and any(name.startswith(f"{block}.") for block in layout.blocks)
        and _in_attention(name) == (part == "attention")
    )


def _in_attention(name: str) -> bool:
    """Return whether a parameter of a block lies in its attention, by the names families use."""
    return any("attn" in part or "attention" in part for part in name.split("."))


@torch.no_grad()
def reinitialise(model: Any, ctx: Context, *, part: Part) -> dict[str, Any]:
    """Re-initialise one kind of module in place.

    A matrix is drawn from a normal distribution of the standard deviation that the configuration
    names (`initializer_range`), 0.02 where it names none; a vector becomes what its family
    initialises it with.

    Args:
        model: The model.
        ctx: Gives the seed; the numbers of a tensor depend on it and on its name alone.
        part: The kind of module.

    Returns:
        `weights`, how many were re-initialised; 0 where the model has no such part of its own.
    """
    spread = float(getattr(model.config, "initializer_range", None) or INITIAL)
    initial, names = initial_vectors(model), names_of(model, part)
    for name in names:
        parameter: nn.Parameter = model.get_parameter(name)
        if parameter.dim() <= 1:
            parameter.copy_(initial[name])
            continue
        noise = torch.randn(parameter.shape, generator=ctx.generator(f"reinit/{name}"))
        parameter.copy_(spread * noise)
    return {"weights": sum(model.get_parameter(name).numel() for name in names)}
