"""Where the module of each capability lies: carved out of a model, or grown beside it; and the cut.

A model with its modules is kept as safetensors, from which any subset of them can be served.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from excise.core.config import SIGNED, Config
from excise.core.errors import UserError, nearest
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.names import parameters_by_name
from excise.routing import JOINT, Groups, Part, What, count_units, delete, grow, reinit, zero
from excise.routing.surgery import put_tensor, refresh

Shared = Literal["embed", "head", "head_bias", "norms", "final_norm", "attention"]
"""Parts that forget tokens may write beside their module."""

How = Literal["delete", "zero", "reinit"]
"""How a module is cut off: taken out, emptied, or drawn anew."""


class Module(Config):
    """How large the module of one capability is, and where it lies."""

    width: float = Field(default=0.1, gt=0, le=8)
    """MLP neurons of a module, as a share of a block's; in a mixture of experts, one expert."""
    heads: int = Field(default=0, ge=0)
    """Query heads of a module in each of its blocks."""
    blocks: Annotated[tuple[int, ...], SIGNED] = ()
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
        blocks: Blocks that have them, negative from the last; empty for all.
        lr: Their learning rate, as a multiple of the schedule's.
    """

    parts: Mapping[str, tuple[Part, ...]]
    grown: bool
    blocks: tuple[int, ...] = ()
    lr: float = 1.0

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
    parts: dict[str, list[Part]] = {f"module_{i + 1}": [] for i in range(count)}
    for what, sizes in _sizes(model, module).items():
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
            for i, of_module in enumerate(parts.values()):
                start = first[block] + i * size
                of_module.append(Part(at=what, blocks=(block,), units=(start, start + size)))
    placed = {name: tuple(of_module) for name, of_module in parts.items()}
    return Placed(placed, module.grow, module.blocks, module.lr)


def _sizes(model: nn.Module, module: Module) -> dict[What, dict[int, int]]:
    """Return units of one module by kind and block."""
    sizes: dict[What, dict[int, int]] = {}
    for block in blocks_of(model, module.blocks):
        if mlp_kind(model, block) == "experts":
            sizes.setdefault("experts", {})[block] = 1
        else:
            width = max(1, round(module.width * count_units(model, block)))
            sizes.setdefault("mlp", {})[block] = width
        if module.heads:
            sizes.setdefault("heads", {})[block] = module.heads
    return sizes


def blocks_of(model: nn.Module, blocks: Sequence[int]) -> list[int]:
    """Return blocks in order, each once.

    Args:
        model: A causal model.
        blocks: Numbers of blocks, negative from the last; empty for all.
    """
    count = anatomy(model).num_blocks
    return sorted({block % count for block in blocks or range(count)})


def mlp_kind(model: nn.Module, block: int) -> Literal["mlp", "experts"]:
    """Return what a block's MLP is made of: neurons, or experts."""
    return "mlp" if anatomy(model).experts[block] is None else "experts"


def own_units(model: nn.Module, blocks: Sequence[int]) -> tuple[Part, ...]:
    """Return the neurons or experts that blocks have, before any is grown.

    Args:
        model: A causal model.
        blocks: Blocks, negative from the last; empty for all.
    """
    parts = []
    for block in blocks_of(model, blocks):
        at = mlp_kind(model, block)
        parts.append(Part(at=at, blocks=(block,), units=(0, count_units(model, block, at))))
    return tuple(parts)


def groups_of(placed: Placed, shared: Sequence[Shared] = (), *, joint_down: bool = False) -> Groups:
    """Return the groups of placed modules; the rest is the core.

    Args:
        placed: The modules.
        shared: What is `joint`: written by every label.
        joint_down: Whether the modules' down-projections are joint too.
    """
    parts: dict[str, tuple[Part, ...]] = dict(placed.parts)
    if shared:
        parts[JOINT] = tuple(Part(at=at) for at in shared)
    return Groups(parts=parts, joint_down=joint_down)


def check_cut(how: How, module: Module, what: str = "modules") -> None:
    """Refuse ways to cut that leave other shapes than the start's.

    Args:
        how: How modules are cut off.
        module: Says whether they are grown.
        what: What they are called.

    Raises:
        ValueError: If grown modules would stay, or carved ones be deleted.
    """
    if (how == "delete") != module.grow:
        raise ValueError(f"ablate: grown {what} are deleted, carved ones zeroed or drawn anew")


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


def save_before(model: nn.Module, placed: Placed, names: Sequence[str], path: Path) -> None:
    """Write a model with its modules as safetensors, all at once or not at all.

    Args:
        model: The model.
        placed: Its modules; which units they are is written into the file's header.
        names: The capability of each module, in order.
        path: The file.
    """
    parts = {
        g: [p.model_dump(mode="json") for p in of_module] for g, of_module in placed.parts.items()
    }
    modules = {"parts": parts, "grown": placed.grown, "capabilities": list(names)}
    tensors = {n: p.detach().cpu().contiguous() for n, p in parameters_by_name(model).items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"modules": json.dumps(modules, sort_keys=True)})
    os.replace(partial, path)


def serve(
    start: Checkpoint, before: Path, keep: Sequence[str] = (), *, how: How | None = None
) -> Any:
    """Return the model of one profile: the core and the modules that a user may have.

    Args:
        start: What the method started from.
        before: The file `before_ablation` among the files of the removal.
        keep: Capabilities whose modules stay; all others are cut off.
        how: How; by default grown modules are deleted and carved ones zeroed.

    Returns:
        A `transformers` model in evaluation mode. With modules of unlike widths left in its
        blocks it runs, but no configuration describes it.

    Raises:
        UserError: If a capability is unknown or the file is not such a file.
    """
    with safe_open(before, framework="pt") as file:
        header = file.metadata() or {}
        if "modules" not in header:
            raise UserError(f"{before} does not say which modules it has; name `before_ablation`")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if any(".lora_" in name for name in tensors):
        raise UserError(f"the modules in {before} are adapters; switch them with peft instead")
    modules = json.loads(header["modules"])
    parts = {
        name: tuple(map(Part.model_validate, of_module))
        for name, of_module in modules["parts"].items()
    }
    placed, names = Placed(parts, bool(modules["grown"])), modules["capabilities"]
    for name in keep:
        if name not in names:
            raise UserError(f"there is no capability '{name}' to keep; {nearest(name, names)}")
    model = start.load()
    for name, tensor in tensors.items():
        put_tensor(model, name, tensor)
    refresh(model)
    staying = [f"module_{names.index(name) + 1}" for name in keep]
    cut(model, placed, how or ("delete" if placed.grown else "zero"), 0, staying)
    return model.eval()
