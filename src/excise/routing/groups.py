"""Named groups of a model's weights, as slices of tensors, and where their activations are.

A group (`core`, `joint`, `module_1`, ...) owns slices of parameters: gradients of a token are
written into the groups its label may write. It also has *places*: the input columns of the
matrix that reads its neurons or heads, or the outputs of a module, where forward masks and
weights of the edges that leave its activations act.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from torch import nn

from excise.core.config import Config, ConfigError
from excise.models.names import parameters_by_name
from excise.train.optim import Slice

if TYPE_CHECKING:
    from excise.routing.body import Body, Claim

JOINT = "joint"
"""The group that every label may write in most recipes."""


class Part(Config):
    """A slice of a model."""

    at: Literal[
        "mlp", "heads", "experts", "embed", "head", "norms", "attention", "parameters", "outputs"
    ]
    """What is sliced: neurons of MLPs, query heads, experts; or whole embeddings, output matrix,
    norms, attentions; or parameters or outputs of modules by name."""
    blocks: tuple[int, ...] = ()
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
        """Return the number of entries of one slice."""
        shape = self.shapes[name]
        count = 1
        for dim, size in enumerate(shape):
            count *= owned.stop - owned.start if dim == owned.dim else size
        return count

    def sizes(self) -> dict[str, int]:
        """Return the number of entries by group."""
        sizes = dict.fromkeys(self.names, 0)
        for name, owned in self.owners.items():
            for one in owned:
                sizes[one.group] += self.entries(name, one)
        return sizes

    def table(self) -> list[dict[str, Any]]:
        """Return rows for printing and the record: group, tensors, slice, blocks, entries.

        Tensors of equal name in several blocks share a row; `{}` stands for the block. Leftovers
        are named like everything else.
        """
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        for name, owned in self.owners.items():
            pattern, block = _pattern(name)
            for one in owned:
                span = "all" if one.dim is None else f"{one.start}:{one.stop} of dim {one.dim}"
                row = rows.setdefault(
                    (one.group, pattern, span),
                    {"group": one.group, "tensor": pattern, "slice": span, "blocks": []},
                )
                row["entries"] = row.get("entries", 0) + self.entries(name, one)
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
        made: dict[str, list[nn.Parameter | Slice]] = {name: [] for name in self.names}
        for name, owned in self.owners.items():
            param = named[name]
            if not param.requires_grad:
                continue
            for one in owned:
                whole = one.dim is None
                piece = param if whole else Slice(param, one.dim or 0, one.start, one.stop)
                made[one.group].append(piece)
        return {name: pieces for name, pieces in made.items() if pieces}


def _pattern(name: str) -> tuple[str, int | None]:
    """Return a name with its block's number taken out, and the number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return name, None
    return ".".join([*parts[:at], "{}", *parts[at + 1 :]]), int(parts[at])


def resolve(model: nn.Module, groups: Groups) -> GroupMap:
    """Find who owns which slice of which parameter.

    Units a to b of an MLP own rows a to b of up and gate (with biases) and columns a to b of
    down. A query head owns its rows of q and columns of o; a key-value head belongs to a group
    when all its query heads do, else to the leftovers.

    Args:
        model: The model, wrapped or not.
        groups: The groups.

    Returns:
        The map.

    Raises:
        ConfigError: With every problem found: slices that overlap or lie beyond a tensor, parts
            that the model lacks, a tied tensor in two groups, a family whose MLP is not found.
    """
    found, problems = find_map(model, groups)
    if problems:
        raise ConfigError(problems, "groups")
    assert found is not None
    return found


def find_map(model: nn.Module, groups: Groups) -> tuple[GroupMap | None, list[str]]:
    """Return the map, or None and every problem found."""
    from excise.routing.body import Body
    from excise.routing.claims import claim

    problems: list[str] = []
    body = Body(model)
    claims: list[Claim] = []
    places: list[Place] = []
    for group, parts in groups.parts.items():
        for i, part in enumerate(parts):
            at = f"parts.{group}[{i}]"
            got = claim(body, groups, group, part, problems, at)
            claims += got[0]
            places += got[1]
    by_name: dict[str, list[Claim]] = {name: [] for name in body.parameters}
    for one in claims:
        by_name[one.parameter].append(one)
    owners = {
        name: _owners(name, tuple(param.shape), by_name[name], groups.leftovers, body, problems)
        for name, param in body.parameters.items()
    }
    places = _complete(places, groups.leftovers, body, problems)
    if problems:
        return None, list(dict.fromkeys(problems))
    shapes = {name: tuple(p.shape) for name, p in body.parameters.items()}
    tied = [
        f"{name} is also {', '.join(others)}: one tensor, in group '{owners[name][0].group}'"
        for name, others in body.tied.items()
    ]
    notes = tuple(dict.fromkeys([*tied, *body.notes]))
    return GroupMap(groups.names, groups.leftovers, owners, tuple(places), shapes, notes), []


def _owners(
    name: str,
    shape: tuple[int, ...],
    mine: Sequence[Claim],
    leftovers: str,
    body: Body,
    problems: list[str],
) -> tuple[Owned, ...]:
    """Return the slices of one parameter, gaps filled by the leftovers."""
    tied = body.tied
    if not mine:
        return (Owned(leftovers, None, 0, 0),)
    wholes = {c.group: c for c in mine if c.dim is None}
    if wholes and len({c.group for c in mine}) == 1:
        return (Owned(mine[0].group, None, 0, 0),)
    dims = {c.dim for c in mine if c.dim is not None}
    if wholes or len(dims) > 1:
        one = mine[0]
        other = next((c for c in mine if c.group != one.group), mine[-1])
        problems.append(_clash(name, one, other, tied))
        return ()
    dim = dims.pop()
    assert dim is not None
    ordered = sorted(mine, key=lambda c: (c.start, c.stop))
    owned: list[Owned] = []
    at = 0
    before: Claim | None = None
    for c in ordered:
        if before is not None and c.start < at and c.group != before.group:
            problems.append(_clash(name, before, c, tied))
        if c.start > at:
            owned.append(Owned(leftovers, dim, at, c.start))
        if c.stop > at:
            owned.append(Owned(c.group, dim, max(at, c.start), c.stop))
            at, before = c.stop, c
    if at < shape[dim]:
        owned.append(Owned(leftovers, dim, at, shape[dim]))
    return _merged(owned, shape[dim])


def _merged(owned: Sequence[Owned], size: int) -> tuple[Owned, ...]:
    """Join neighbours of one group; a single slice is the whole parameter."""
    out: list[Owned] = []
    for one in owned:
        if out and out[-1].group == one.group and out[-1].stop == one.start:
            out[-1] = Owned(one.group, one.dim, out[-1].start, one.stop)
        else:
            out.append(one)
    if len(out) == 1 and (out[0].start, out[0].stop) == (0, size):
        return (Owned(out[0].group, None, 0, 0),)
    return tuple(out)


def _clash(name: str, a: Claim, b: Claim, tied: Mapping[str, tuple[str, ...]]) -> str:
    """Return the problem of two claims on the same entries."""
    if name in tied and a.words != b.words:
        return (
            f"{b.at}: {b.words} is the same tensor as {a.words} of group '{a.group}' (tied "
            f"embeddings); put both into one group"
        )
    return (
        f"{b.at}: {b.words} of group '{b.group}' overlaps {a.words} of group '{a.group}'; every "
        "entry belongs to one group"
    )


def _complete(
    places: Sequence[Place], leftovers: str, body: Body, problems: list[str]
) -> list[Place]:
    """Give the leftovers what remains where some group has a place; refuse overlapping outputs."""
    done: list[Place] = []
    for path, side in dict.fromkeys((p.path, p.side) for p in places):
        mine = sorted(
            {p for p in places if (p.path, p.side) == (path, side)}, key=lambda p: p.start
        )
        at: int | None = 0
        for p in mine:
            if at is None or p.start < at:
                if side == "output":
                    problems.append(
                        f"outputs of {path}: channels from {p.start} of group '{p.group}' overlap "
                        "another part; every channel belongs to one group"
                    )
                break
            if p.start > at:
                done.append(Place(path, side, leftovers, at, p.start))
            done.append(p)
            at = p.stop
        else:
            if at is not None and at != body.width(path, side):
                done.append(Place(path, side, leftovers, at, None))
    return done
