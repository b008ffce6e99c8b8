"""Where the module of each capability lies: carved out of a model, or grown beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import nn

from excise.core.config import Config
from excise.core.errors import UserError
from excise.models.anatomy import anatomy
from excise.routing.change import delete, grow, reinit, zero
from excise.routing.groups import JOINT, Groups, Part
from excise.routing.measures import What, count_units
from excise.routing.rules import Rule

Shared = Literal["embed", "head", "norms", "attention"]
"""Parts that forget tokens may write beside their module."""

How = Literal["delete", "zero", "reinit"]
"""How a module is cut off: taken out, emptied, or drawn anew."""


class Module(Config):
    """How large the module of one capability is, and where it lies."""

    width: float = Field(default=0.1, gt=0, le=8)
    """MLP neurons of a module, as a share of a block's; in a mixture of experts, one expert."""
    heads: int = Field(default=0, ge=0)
    """Query heads of a module in each of its blocks."""
    blocks: tuple[int, ...] = ()
    """Blocks that have the module, negative from the last; empty for all."""
    grow: bool = False
    """Whether modules are grown beside the model's own units, or carved out of them."""
    lr: float = Field(default=1.0, ge=0)
    """Learning rate of modules, as a multiple of the schedule's."""


@dataclass(frozen=True)
class Placed:
    """Modules in a model.

    Attributes:
        parts: Parts of each module by group, `module_1` for the first capability.
        grown: Whether they were grown: only then does deleting them give the start's shapes.
    """

    parts: Mapping[str, tuple[Part, ...]]
    grown: bool

    @property
    def every(self) -> tuple[Part, ...]:
        """The parts of all modules."""
        return tuple(part for parts in self.parts.values() for part in parts)


def place(
    model: nn.Module, module: Module, count: int, seed: int, *, silent: bool = False
) -> Placed:
    """Carve or grow `count` modules, the first one behind the last unit the core keeps.

    Args:
        model: A causal model; changed in place where modules are grown.
        module: Size and place of each.
        count: Number of modules.
        seed: Seed of grown entries.
        silent: Whether grown units lead nowhere at first.

    Returns:
        The modules.

    Raises:
        UserError: If the core would be left with nothing.
    """
    found = anatomy(model)
    blocks = sorted(
        {block % found.num_blocks for block in module.blocks or range(found.num_blocks)}
    )
    parts: dict[str, list[Part]] = {f"module_{i + 1}": [] for i in range(count)}
    for what, sizes in _sizes(model, module, blocks).items():
        first = {block: count_units(model, block, what) for block in sizes}
        if module.grow:
            added = {block: count * size for block, size in sizes.items()}
            grow(model, added, seed, what, silent=silent)
        else:
            first = {block: first[block] - count * size for block, size in sizes.items()}
        for block, size in sizes.items():
            if first[block] < 1:
                raise UserError(
                    f"{count} modules of {size} leave block {block} none of its {what}; lower "
                    "'module.width' and 'module.heads', or set 'module.grow'"
                )
            for i, own in enumerate(parts.values()):
                start = first[block] + i * size
                own.append(Part(at=what, blocks=(block,), units=(start, start + size)))
    return Placed({name: tuple(own) for name, own in parts.items()}, module.grow)


def _sizes(model: nn.Module, module: Module, blocks: Sequence[int]) -> dict[What, dict[int, int]]:
    """Return units of one module by kind and block."""
    experts = anatomy(model).experts
    sizes: dict[What, dict[int, int]] = {}
    for block in blocks:
        if experts[block] is not None:
            sizes.setdefault("experts", {})[block] = 1
        else:
            width = max(1, round(module.width * count_units(model, block)))
            sizes.setdefault("mlp", {})[block] = width
        if module.heads:
            sizes.setdefault("heads", {})[block] = module.heads
    return sizes


def groups_of(
    placed: Placed, shared: Sequence[Shared] = (), *, joint_down: bool = False, **more: Part
) -> Groups:
    """Return the groups of placed modules; the rest is the core.

    Args:
        placed: The modules.
        shared: What is `joint`: written by every label.
        joint_down: Whether the modules' down-projections are joint too.
        **more: Further groups of one part.
    """
    parts: dict[str, tuple[Part, ...]] = dict(placed.parts)
    parts.update({name: (part,) for name, part in more.items()})
    if shared:
        parts[JOINT] = tuple(Part(at=at) for at in shared)
    return Groups(parts=parts, joint_down=joint_down)


def alternatives(*drawn: tuple[float, Rule]) -> tuple[Rule, ...]:
    """Return rules with their probabilities; those that never happen are left out."""
    return tuple(rule.model_copy(update={"share": share}) for share, rule in drawn if share > 0)


def cut(model: nn.Module, placed: Placed, how: How, seed: int, keep: Sequence[str] = ()) -> None:
    """Cut modules off.

    Args:
        model: The model that has them; changed in place.
        placed: The modules.
        how: Delete, zero, or draw anew.
        seed: Seed of the draw.
        keep: Modules that stay.
    """
    gone = [part for name, parts in placed.parts.items() if name not in keep for part in parts]
    if not gone:
        return
    if how == "delete":
        delete(model, gone)
    elif how == "zero":
        zero(model, gone)
    else:
        reinit(model, gone, seed)
