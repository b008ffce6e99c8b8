"""Groups: named slices of a model's weights, and where their activations are.

A group (`core`, `joint`, `module_1`, ...) owns slices of parameters: the gradient of a token is
written into the groups that its label may write. It also has *places*: the input columns of the
matrix that reads its neurons or heads, or the outputs of a module, where forward masks and weights
of the edges that leave its activations act.

`Part` and `Groups` are what a user writes; a `GroupMap` is what `resolve` makes of them for one
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from excise.core.config import SIGNED, Config
from excise.models.names import parameters_by_name
from excise.train.optim import Slice

JOINT = "joint"
"""The group that every label may write in most recipes."""


class Part(Config):
    """A slice of a model."""

    at: Literal[
        "mlp",
        "heads",
        "experts",
        "embed",
        "head",
        "head_bias",
        "norms",
        "final_norm",
        "attention",
        "parameters",
        "outputs",
    ]
    """What is sliced: neurons of MLPs, query heads, experts; or whole embeddings, output matrix
    (or its bias alone), norms (or the last alone), attentions; or parameters or outputs of modules
    by name."""
    blocks: Annotated[tuple[int, ...], SIGNED] = ()
    """Which blocks, negative from the last; empty means every block."""
    units: tuple[int, int] | None = None
    """Start and stop among neurons, query heads, experts, output channels, or rows of named
    parameters; missing means all."""
    names: tuple[str, ...] = ()
    """For `parameters` patterns of parameter names, for `outputs` of module paths."""

    def words(self) -> str:
        """Return the part in a few words, for messages and tables."""
        where = f" of blocks {', '.join(map(str, self.blocks))}" if self.blocks else ""
        names = f" {', '.join(self.names)}" if self.names else ""
        units = f" {self.units[0]}:{self.units[1]}" if self.units is not None else ""
        return f"{self.at}{names}{units}{where}"


class Groups(Config):
    """Which slices belong together; what nothing names belongs to `leftovers`."""

    parts: dict[str, tuple[Part, ...]] = Field(default_factory=dict)
    """Parts of each group by its name."""
    leftovers: str = "core"
    """Group of everything that no part names (norms, biases, head ...)."""
    joint_down: bool = False
    """Whether the down-projections of modules' neurons belong to `joint` instead."""

    @property
    def names(self) -> tuple[str, ...]:
        """All groups: `leftovers` first, then in the order of `parts`."""
        extra = (JOINT,) if self.joint_down else ()
        return tuple(dict.fromkeys((self.leftovers, *self.parts, *extra)))


@dataclass(frozen=True)
class Owned:
    """A slice of one parameter and its group.

    Attributes:
        group: Name of the group.
        dim: Dimension that is sliced; None for the whole parameter.
        start: First entry along `dim`.
        stop: Entry after the last.
    """

    group: str
    dim: int | None
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this slice in a tensor of the parameter's shape."""
        if self.dim is None:
            return tensor
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Place:
    """Where activations of a group can be masked.

    Attributes:
        path: Canonical path of the module.
        side: Its input columns, its output channels, or the experts it weighs.
        group: Name of the group.
        start: First column.
        stop: Column after the last; None for the last one.
    """

    path: str
    side: Literal["input", "output", "experts"]
    group: str
    start: int
    stop: int | None


@dataclass(frozen=True)
class GroupMap:
    """Who owns what in one model.

    Attributes:
        names: Names of all groups; their order is that of the columns of `Routes`.
        leftovers: The group of what no part names.
        owners: For every parameter by canonical name its slices; together they cover it once.
        places: Where masks of activations act.
        shapes: Shape of every parameter.
        notes: What a reader of the table must know (tied tensors, shared key heads).
    """

    names: tuple[str, ...]
    leftovers: str
    owners: Mapping[str, tuple[Owned, ...]]
    places: tuple[Place, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def entries(self, name: str, owned: Owned) -> int:
        """Return the number of entries of one slice of the parameter `name`."""
        count = 1
        for dim, size in enumerate(self.shapes[name]):
            count *= owned.stop - owned.start if dim == owned.dim else size
        return count

    def sizes(self) -> dict[str, int]:
        """Return the number of entries by group."""
        sizes = dict.fromkeys(self.names, 0)
        for name, slices in self.owners.items():
            for owned in slices:
                sizes[owned.group] += self.entries(name, owned)
        return sizes

    def table(self) -> list[dict[str, Any]]:
        """Return rows for printing and the record: group, tensors, slice, blocks, entries.

        Tensors of equal name in several blocks share a row; `{}` stands for the block. Leftovers
        are named like everything else.
        """
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for name, slices in self.owners.items():
            pattern, block = _pattern(name)
            for o in slices:
                span = "all" if o.dim is None else f"{o.start}:{o.stop} of dim {o.dim}"
                row = rows.setdefault(
                    (o.group, pattern, span),
                    {"group": o.group, "tensor": pattern, "slice": span, "blocks": []},
                )
                row["entries"] = row.get("entries", 0) + self.entries(name, o)
                if block is not None and block not in row["blocks"]:
                    row["blocks"].append(block)
        order = {name: i for i, name in enumerate(self.names)}
        return sorted(rows.values(), key=lambda row: order[row["group"]])

    def slices(self, model: nn.Module) -> dict[str, list[nn.Parameter | Slice]]:
        """Return what `fit` trains by group: parameters that require gradients, or slices of them.

        Args:
            model: The model the map was made for.
        """
        named = parameters_by_name(model)
        trained: dict[str, list[nn.Parameter | Slice]] = {name: [] for name in self.names}
        for name, slices in self.owners.items():
            param = named[name]
            for o in slices if param.requires_grad else ():
                whole = o.dim is None
                trained[o.group].append(param if whole else Slice(param, o.dim, o.start, o.stop))
        return {name: pieces for name, pieces in trained.items() if pieces}


def _pattern(name: str) -> tuple[str, int | None]:
    """Return a name with its block's number taken out, and the number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return name, None
    return ".".join([*parts[:at], "{}", *parts[at + 1 :]]), int(parts[at])
