"""Who owns which slice of which tensor: from the parts of groups to the map of one model.

Every part lays claims on slices of parameters; slices that overlap are refused, gaps belong to the
leftovers. How neurons, heads and experts lie in fused, transposed and grouped layouts is known
here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from excise.core.config import ConfigError
from excise.core.errors import UserError
from excise.models.anatomy import Anatomy, anatomy
from excise.models.names import (
    canonical,
    is_adapter,
    match_modules,
    modules_by_name,
    parameters_by_name,
    select,
    unwrap,
)
from excise.models.structure import sizes
from excise.routing.groups import JOINT, GroupMap, Groups, Owned, Part, Place

Slab = tuple[int | None, int, int]
"""Dimension (None for the whole parameter), start, stop."""

FUSED = ("query_key_value", "qkv_proj", "c_attn")
"""What attentions call a matrix that holds queries, keys and values."""


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
        ConfigError: With every problem: slices that overlap or lie beyond a tensor, parts that
            the model lacks, a tied tensor in two groups, a family whose MLP is not found.
    """
    map, problems = find_map(model, groups)
    if problems:
        raise ConfigError(problems, "groups")
    assert map is not None
    return map


def find_map(model: nn.Module, groups: Groups) -> tuple[GroupMap | None, list[str]]:
    """Return the map, or None and every problem; see `resolve`."""
    problems: list[str] = []
    index = ModelIndex(model)
    claims: dict[str, list[Claim]] = {name: [] for name in index.parameters}
    places: list[Place] = []
    for group, parts in groups.parts.items():
        for i, part in enumerate(parts):
            at = f"parts.{group}[{i}]"
            of_part, places_of_part = claim(index, groups, group, part, problems, at)
            places += places_of_part
            for c in of_part:
                claims[c.parameter].append(c)
    shapes = {name: tuple(param.shape) for name, param in index.parameters.items()}
    owners = {
        name: _owners(name, shape, claims[name], groups.leftovers, index.tied, problems)
        for name, shape in shapes.items()
    }
    places = _complete(places, groups.leftovers, index, problems)
    if problems:
        return None, list(dict.fromkeys(problems))
    tied = [
        f"{name} is also {', '.join(others)}: one tensor, in group '{owners[name][0].group}'"
        for name, others in index.tied.items()
    ]
    notes = tuple(dict.fromkeys([*tied, *index.notes]))
    return GroupMap(groups.names, groups.leftovers, owners, tuple(places), shapes, notes), []


@dataclass
class ModelIndex:
    """A model's modules and parameters by canonical name, looked up once.

    Attributes:
        model: The model, wrapped or not.
        notes: What a reader of the map must know.
        modules: Modules by name.
        parameters: Parameters by name; a tied one stands under its first name.
        first: The first name of every name of a parameter.
        tied: The further names of a parameter by its first.
        config: The configuration of the language model, where there is one.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        prefix, inner = unwrap(self.model)
        self.modules = modules_by_name(self.model)
        self.parameters = parameters_by_name(self.model)
        name_of = {id(p): name for name, p in self.parameters.items()}
        named = inner.named_parameters(remove_duplicate=False)
        self.first = {canonical(n, prefix): name_of[id(p)] for n, p in named}
        self.tied: dict[str, tuple[str, ...]] = {}
        for name, first in self.first.items():
            if name != first:
                self.tied[first] = (*self.tied.get(first, ()), name)
        config: Any = getattr(inner, "config", None)
        self.config: Any = (
            config.get_text_config() if hasattr(config, "get_text_config") else config
        )

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the parts of the model are; raises `UserError` where they are not found."""
        return anatomy(self.model)

    def below(self, path: str) -> list[str]:
        """Return the parameters in a module, adapters laid over it left out."""
        names = [n for n in self.first if n.startswith(f"{path}.") and not is_adapter(n)]
        return list(dict.fromkeys(self.first[n] for n in names))

    def heads_of(self, block: int) -> str:
        """Return the module that holds a block's projections and knows its heads.

        That is the attention, or where the attention is a wrapper (GPT-Neo's) the module in it
        which the output projection belongs to.
        """
        attention = self.anatomy.attention[block]
        path = self.anatomy.attention_out[block].rpartition(".")[0]
        while path.startswith(f"{attention}."):
            if any(f"{path}.{name}" in self.modules for name in ("q_proj", *FUSED)):
                return path
            path = path.rpartition(".")[0]
        return attention

    def num_inputs(self, path: str) -> int:
        """Return the number of inputs of a linear layer."""
        matrix = self.parameters[self.first[f"{path}.weight"]]
        return int(matrix.shape[0 if _transposed(self.modules[path]) else 1])

    def width(self, place: Place) -> int | None:
        """Return the number of columns at a place, None where the module does not say."""
        module = self.modules[place.path]
        if place.side == "experts":
            return next(int(p.shape[0]) for p in module.parameters(recurse=False))
        if place.side == "output":
            return _num_outputs(module)
        in_and_out = sizes(module)
        return in_and_out[0] if in_and_out else None


def _transposed(module: nn.Module) -> bool:
    """Return whether a layer stores (in, out), as `Conv1D` does."""
    return hasattr(getattr(module, "base_layer", module), "nf")


def _num_outputs(module: nn.Module) -> int | None:
    """Return the number of a module's output channels where it says so."""
    for name in ("out_features", "outchannels", "nf", "embedding_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


@dataclass(frozen=True)
class Claim:
    """One group's claim on a slice of a parameter.

    Attributes:
        parameter: Canonical name; of tied ones the first.
        group: The group.
        dim: Dimension that is sliced, None for the whole.
        start: First entry.
        stop: Entry after the last.
        at: Where in the configuration the part stands.
        words: The part in words.
    """

    parameter: str
    group: str
    dim: int | None
    start: int
    stop: int
    at: str
    words: str


def claim(
    index: ModelIndex, groups: Groups, group: str, part: Part, problems: list[str], at: str
) -> tuple[list[Claim], list[Place]]:
    """Return what one part claims and where its activations are, noting problems.

    Args:
        index: The model.
        groups: All groups.
        group: Whose part it is.
        part: The part.
        problems: Receives what is wrong.
        at: Where in the configuration the part stands.
    """
    asked = _Asked(index, groups, group, part, at, problems)
    if (part.at in ("parameters", "outputs")) != bool(part.names):
        asked.refuse(f"'{part.at}' " + ("takes no names" if part.names else "needs names"))
        return [], []
    try:
        if part.at == "parameters":
            _named(asked)
        elif part.at == "outputs":
            _outputs(asked)
        elif part.at in ("embed", "head", "head_bias", "final_norm"):
            _ends(asked)
        else:
            _in_blocks(asked)
    except UserError as error:
        asked.refuse(str(error))
    return asked.claims, asked.places


@dataclass
class _Asked:
    """One part of one group while its claims are collected."""

    index: ModelIndex
    groups: Groups
    group: str
    part: Part
    at: str
    problems: list[str]
    claims: list[Claim] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def take(self, name: str, *slabs: Slab, group: str = "") -> None:
        """Claim slabs of a parameter; a name the model lacks (a missing bias) is passed over."""
        if name in self.index.first:
            first, words = self.index.first[name], self.part.words()
            for dim, start, stop in slabs or ((None, 0, 0),):
                self.claims.append(
                    Claim(first, group or self.group, dim, start, stop, self.at, words)
                )

    def rows(self, path: str, spans: Iterable[tuple[int, int]]) -> None:
        """Claim outputs of a linear layer, with their biases."""
        dim = 1 if _transposed(self.index.modules[path]) else 0
        for start, stop in spans:
            self.take(f"{path}.weight", (dim, start, stop))
            self.take(f"{path}.bias", (0, start, stop))

    def columns(self, path: str, start: int, stop: int, group: str = "") -> None:
        """Claim inputs of a linear layer; of a part without units its bias too."""
        dim = 0 if _transposed(self.index.modules[path]) else 1
        self.take(f"{path}.weight", (dim, start, stop), group=group)
        if self.part.units is None:
            self.take(f"{path}.bias")
        self.put(path, "input", start, stop)

    def put(
        self, path: str, side: Literal["input", "output", "experts"], start: int, stop: int | None
    ) -> None:
        """Add a place where the group's activations are masked."""
        self.places.append(Place(path, side, self.group, start, stop))

    def refuse(self, what: str) -> None:
        """Note a problem once."""
        text = f"{self.at}: {what}"
        if text not in self.problems:
            self.problems.append(text)

    def units(self, count: int, what: str) -> tuple[int, int] | None:
        """Return the range of units, or None after noting what is wrong with it."""
        start, stop = self.part.units or (0, count)
        if not 0 <= start < stop <= count:
            self.refuse(f"units {start}:{stop} do not lie within the {count} {what}")
            return None
        return start, stop


def _in_blocks(asked: _Asked) -> None:
    """Claim a part of every block that is asked for."""
    layout, part = asked.index.anatomy, asked.part
    beyond = [b for b in part.blocks if not -layout.num_blocks <= b < layout.num_blocks]
    if beyond:
        asked.refuse(f"there is no block {beyond[0]} among {layout.num_blocks}")
        return
    blocks = part.blocks or range(layout.num_blocks)
    for block in dict.fromkeys(b % layout.num_blocks for b in blocks):
        if part.at == "mlp":
            _mlp(asked, block)
        elif part.at == "experts":
            _experts(asked, block)
        elif part.at == "heads":
            _heads(asked, block)
        elif part.at == "attention":
            for name in asked.index.below(layout.attention[block]):
                asked.take(name)
            asked.put(layout.attention_out[block], "input", 0, None)
        else:
            _norms(asked, layout.blocks[block] + ".")
    if part.at == "norms" and not part.blocks:
        _norms(asked, layout.final_norm)


def _norms(asked: _Asked, start: str) -> None:
    """Claim the weights of every norm whose path begins with `start`."""
    for path, module in asked.index.modules.items():
        if path.startswith(start) and "norm" in type(module).__name__.lower():
            for name, _ in module.named_parameters(recurse=False):
                asked.take(f"{path}.{name}")


def _mlp(asked: _Asked, block: int) -> None:
    """Claim neurons: rows of up and gate, columns of down; or a whole MLP."""
    layout = asked.index.anatomy
    if layout.experts[block] is not None:
        if asked.part.units is not None:
            asked.refuse(f"block {block} has experts; use at: experts, or the mlp without units")
            return
        for name in asked.index.below(layout.mlp[block]):
            asked.take(name)
        asked.put(layout.mlp[block], "output", 0, None)
        return
    down, up, gate = layout.mlp_down[block], layout.mlp_up[block], layout.mlp_gate[block]
    width = asked.index.num_inputs(down)
    units = asked.units(width, f"neurons of the MLP of block {block}")
    if units is None:
        return
    fused = bool(gate) and gate == up
    both = [units, (width + units[0], width + units[1])] if fused else [units]
    for path in dict.fromkeys(p for p in (gate, up) if p):
        asked.rows(path, both)
    elsewhere = asked.groups.joint_down and asked.group not in (JOINT, asked.groups.leftovers)
    asked.columns(down, *units, group=JOINT if elsewhere else "")


def _experts(asked: _Asked, block: int) -> None:
    """Claim experts: slices of the first dimension of fused parameters."""
    experts = asked.index.anatomy.experts[block]
    if experts is None:
        asked.refuse(f"block {block} has no experts; use at: mlp")
        return
    units = asked.units(experts.count, f"experts of block {block}")
    if experts.down[0].index is None:
        asked.refuse(f"the experts of block {block} are modules, not slices of one tensor")
    elif units is not None:
        path = experts.down[0].parameter.rpartition(".")[0]
        for name in asked.index.below(path):
            if asked.index.parameters[name].shape[0] == experts.count:
                asked.take(name, (0, *units))
        asked.put(path, "experts", *units)


def _heads(asked: _Asked, block: int) -> None:
    """Claim query heads: rows of q, columns of o, and key-value heads that they alone use."""
    index = asked.index
    attention, out = index.heads_of(block), index.anatomy.attention_out[block]
    width = index.num_inputs(out)
    size, per_key = _head_sizes(index.modules[attention], index.config, width)
    if not size:
        asked.refuse("the model's configuration does not say how many attention heads it has")
        return
    heads, key_heads = width // size, width // size // per_key
    units = asked.units(heads, f"query heads of block {block}")
    if units is None:
        return
    start, stop = units
    keys = (-(-start // per_key), stop // per_key)  # heads all of whose queries are in the group
    if keys[0] * per_key != start or keys[1] * per_key != stop:
        index.notes.append(
            f"group '{asked.group}': key-value heads that query heads {start}:{stop} share with "
            f"others belong to '{asked.groups.leftovers}'"
        )
    if not _query_key_value(asked, attention, (heads, key_heads, size), units, keys):
        asked.refuse(f"the query, key and value projections of {attention} were not found")
        return
    asked.columns(out, start * size, stop * size)


def _head_sizes(attention: nn.Module, config: Any, width: int) -> tuple[int, int]:
    """Return a head's width and how many share a key; blocks may differ in their number."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    stated = [getattr(attention, name, None) for name in ("head_dim", "head_size")]
    size = next((s for s in stated if isinstance(s, int)), width // heads if heads else 0)
    per_key = getattr(attention, "num_key_value_groups", heads // key_heads if key_heads else 1)
    return size, int(per_key)


def _query_key_value(
    asked: _Asked,
    attention: str,
    counts: tuple[int, int, int],
    units: tuple[int, int],
    keys: tuple[int, int],
) -> bool:
    """Claim rows of query, key and value projections, apart or fused; say whether there are any."""
    heads, key_heads, size = counts
    modules = asked.index.modules
    query = (units[0] * size, units[1] * size)
    key = [(keys[0] * size, keys[1] * size)] if keys[0] < keys[1] else []
    if f"{attention}.q_proj" in modules:
        asked.rows(f"{attention}.q_proj", [query])
        for name in ("k_proj", "v_proj"):
            asked.rows(f"{attention}.{name}", key)
        return True
    if f"{attention}.query_key_value" in modules:  # per head: query, key, value
        asked.rows(f"{attention}.query_key_value", [(3 * query[0], 3 * query[1])])
        return heads == key_heads
    for name in FUSED[1:]:  # all queries, then all keys, then all values
        if f"{attention}.{name}" in modules:
            ends = (heads * size, (heads + key_heads) * size)
            moved = [(end + a, end + b) for end in ends for a, b in key]
            asked.rows(f"{attention}.{name}", [query, *moved])
            return True
    return False


def _ends(asked: _Asked) -> None:
    """Claim the embeddings (tokens and positions), the last norm, or the output matrix."""
    layout = asked.index.anatomy
    if asked.part.blocks or asked.part.units is not None:
        asked.refuse(f"'{asked.part.at}' takes neither blocks nor units; name `parameters` instead")
        return
    if asked.part.at == "final_norm":
        if layout.final_norm:
            _norms(asked, layout.final_norm)
        return
    if asked.part.at in ("head", "head_bias"):
        if asked.part.at == "head":
            asked.take(f"{layout.head}.weight")
        asked.take(f"{layout.head}.bias")
        return
    blocks = tuple(f"{path}." for path in layout.blocks)
    for path, module in asked.index.modules.items():
        outside = isinstance(module, nn.Embedding) and not path.startswith(blocks)
        if path == layout.embed or outside:
            asked.take(f"{path}.weight")


def _named(asked: _Asked) -> None:
    """Claim parameters by name, or their rows; an adapter's outputs are its place."""
    for name in select(asked.index.model, asked.part.names):
        slabs: tuple[Slab, ...] = ()
        if asked.part.units is not None:
            rows = int(asked.index.parameters[name].shape[0])
            units = asked.units(rows, f"rows of {name}")
            if units is None:
                continue
            slabs = ((0, *units),)
        asked.take(name, *slabs)
        path = name.rpartition(".")[0]
        if re.search(r"(^|\.)lora_B\.[^.]+$", path) and not slabs:
            asked.put(path, "output", 0, None)


def _outputs(asked: _Asked) -> None:
    """Name output channels of modules; nothing is owned."""
    start, stop = asked.part.units or (0, None)
    for path in match_modules(asked.index.model, asked.part.names):
        width = _num_outputs(asked.index.modules[path])
        if start < 0 or (stop is not None and (stop <= start or stop > (width or stop))):
            asked.refuse(f"units {start}:{stop} do not lie within the {width} outputs of {path}")
        asked.put(path, "output", start, stop)


def _owners(
    name: str,
    shape: tuple[int, ...],
    claims: Sequence[Claim],
    leftovers: str,
    tied: Mapping[str, tuple[str, ...]],
    problems: list[str],
) -> tuple[Owned, ...]:
    """Return the slices of one parameter, gaps filled by the leftovers."""
    if not claims:
        return (Owned(leftovers, None, 0, 0),)
    first, whole = claims[0], any(c.dim is None for c in claims)
    if whole and len({c.group for c in claims}) == 1:
        return (Owned(first.group, None, 0, 0),)
    dims = {c.dim for c in claims if c.dim is not None}
    if whole or len(dims) > 1:
        other = next((c for c in claims if c.group != first.group), claims[-1])
        problems.append(_clash(name, first, other, tied))
        return ()
    dim = dims.pop()
    slices: list[Owned] = []
    at = 0
    before: Claim | None = None
    for c in sorted(claims, key=lambda c: (c.start, c.stop)):
        if before is not None and c.start < at and c.group != before.group:
            problems.append(_clash(name, before, c, tied))
        if c.start > at:
            slices.append(Owned(leftovers, dim, at, c.start))
        if c.stop > at:
            slices.append(Owned(c.group, dim, max(at, c.start), c.stop))
            at, before = c.stop, c
    if at < shape[dim]:
        slices.append(Owned(leftovers, dim, at, shape[dim]))
    return _merged(slices, shape[dim])


def _merged(slices: Sequence[Owned], size: int) -> tuple[Owned, ...]:
    """Join neighbours of one group; a single slice is the whole parameter."""
    merged: list[Owned] = []
    for o in slices:
        if merged and merged[-1].group == o.group and merged[-1].stop == o.start:
            merged[-1] = Owned(o.group, o.dim, merged[-1].start, o.stop)
        else:
            merged.append(o)
    if len(merged) == 1 and (merged[0].start, merged[0].stop) == (0, size):
        return (Owned(merged[0].group, None, 0, 0),)
    return tuple(merged)


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
    places: Sequence[Place], leftovers: str, index: ModelIndex, problems: list[str]
) -> list[Place]:
    """Give the leftovers what remains where some group has a place; refuse overlapping outputs."""
    complete: list[Place] = []
    for path, side in dict.fromkeys((p.path, p.side) for p in places):
        here = {p for p in places if (p.path, p.side) == (path, side)}
        at: int | None = 0
        for p in sorted(here, key=lambda p: p.start):
            if at is None or p.start < at:
                if side == "output":
                    problems.append(
                        f"outputs of {path}: channels from {p.start} of group '{p.group}' overlap "
                        "another part; every channel belongs to one group"
                    )
                break
            if p.start > at:
                complete.append(Place(path, side, leftovers, at, p.start))
            complete.append(p)
            at = p.stop
        else:
            if at is not None and at != index.width(p):
                complete.append(Place(path, side, leftovers, at, None))
    return complete
