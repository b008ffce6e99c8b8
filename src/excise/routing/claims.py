"""What a part of a model is, tensor by tensor: the claims from which a map of groups is made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from excise.core.errors import UserError
from excise.models.anatomy import Experts
from excise.models.names import match_modules, select
from excise.routing.body import Asked, Body, Claim, Span, channels, conv1d
from excise.routing.groups import JOINT, Groups, Part, Place


def claim(
    body: Body, groups: Groups, group: str, part: Part, problems: list[str], at: str
) -> tuple[list[Claim], list[Place]]:
    """Return what one part claims and where its activations are, noting problems.

    Args:
        body: The model.
        groups: All groups.
        group: Whose part it is.
        part: The part.
        problems: Receives what is wrong.
        at: Where in the configuration the part stands.
    """
    asked = Asked(body, groups, group, part, at, problems)
    if (part.at in ("parameters", "outputs")) != bool(part.names):
        asked.refuse(f"'{part.at}' " + ("takes no names" if part.names else "needs names"))
        return [], []
    try:
        if part.at == "parameters":
            _named(asked)
        elif part.at == "outputs":
            _outputs(asked)
        elif part.at in ("embed", "head"):
            _ends(asked)
        else:
            _in_blocks(asked)
    except UserError as error:
        asked.refuse(str(error))
    return asked.claims, asked.places


def _in_blocks(asked: Asked) -> None:
    """Claim a part of every block that is asked for."""
    count = asked.body.anatomy.num_blocks
    beyond = [b for b in asked.part.blocks if not -count <= b < count]
    if beyond:
        asked.refuse(f"there is no block {beyond[0]} among {count}")
        return
    for block in dict.fromkeys(b % count for b in asked.part.blocks or range(count)):
        if asked.part.at == "mlp":
            _mlp(asked, block)
        elif asked.part.at == "experts":
            _experts(asked, block)
        elif asked.part.at == "heads":
            _heads(asked, block)
        elif asked.part.at == "attention":
            path = asked.body.anatomy.attention[block]
            for name in asked.body.below(path):
                asked.take(name)
            asked.put(asked.body.anatomy.attention_out[block], "input", 0, None)
        else:
            _norms(asked, asked.body.anatomy.blocks[block] + ".")
    if asked.part.at == "norms" and not asked.part.blocks:
        _norms(asked, asked.body.anatomy.final_norm)


def _norms(asked: Asked, start: str) -> None:
    """Claim the weights of every norm whose path begins with `start`."""
    for path, module in asked.body.modules.items():
        if path.startswith(start) and "norm" in type(module).__name__.lower():
            for name, _ in module.named_parameters(recurse=False):
                asked.take(f"{path}.{name}")


def _rows(asked: Asked, path: str, spans: Iterable[tuple[int, int]]) -> None:
    """Claim outputs of a linear layer, with their biases."""
    dim = 1 if conv1d(asked.body.modules[path]) else 0
    for start, stop in spans:
        asked.take(f"{path}.weight", (dim, start, stop))
        asked.take(f"{path}.bias", (0, start, stop))


def _columns(asked: Asked, path: str, start: int, stop: int, group: str = "") -> None:
    """Claim inputs of a linear layer."""
    dim = 0 if conv1d(asked.body.modules[path]) else 1
    asked.take(f"{path}.weight", (dim, start, stop), group=group)


def _mlp(asked: Asked, block: int) -> None:
    """Claim neurons: rows of up and gate, columns of down; or a whole MLP."""
    body = asked.body.anatomy
    if body.experts[block] is not None:
        if asked.part.units is not None:
            asked.refuse(f"block {block} has experts; use at: experts, or the mlp without units")
            return
        for name in asked.body.below(body.mlp[block]):
            asked.take(name)
        asked.put(body.mlp[block], "output", 0, None)
        return
    down, up, gate = body.mlp_down[block], body.mlp_up[block], body.mlp_gate[block]
    matrix = asked.body.parameters[asked.body.first[f"{down}.weight"]]
    inside = int(matrix.shape[0 if conv1d(asked.body.modules[down]) else 1])
    units = asked.units(inside, f"neurons of the MLP of block {block}")
    if units is None:
        return
    fused = bool(gate) and gate == up
    both = [units, (inside + units[0], inside + units[1])] if fused else [units]
    for path in dict.fromkeys(p for p in (gate, up) if p):
        _rows(asked, path, both)
    elsewhere = asked.groups.joint_down and asked.group not in (JOINT, asked.groups.leftovers)
    _columns(asked, down, *units, group=JOINT if elsewhere else "")
    if asked.part.units is None:
        asked.take(f"{down}.bias")
    asked.put(down, "input", *units)


def _experts(asked: Asked, block: int) -> None:
    """Claim experts: slices of the first dimension of fused parameters."""
    experts: Experts | None = asked.body.anatomy.experts[block]
    if experts is None:
        asked.refuse(f"block {block} has no experts; use at: mlp")
        return
    units = asked.units(experts.count, f"experts of block {block}")
    if experts.down[0].index is None:
        asked.refuse(f"the experts of block {block} are modules, not slices of one tensor")
    elif units is not None:
        path = experts.down[0].parameter.rpartition(".")[0]
        for name in asked.body.below(path):
            if asked.body.parameters[name].shape[0] == experts.count:
                asked.take(name, (0, *units))
        asked.put(path, "experts", *units)


def _heads(asked: Asked, block: int) -> None:
    """Claim query heads: rows of q, columns of o, and key-value heads that they alone use."""
    body, config = asked.body, asked.body.config
    attention, out = body.anatomy.attention[block], body.anatomy.attention_out[block]
    matrix = body.parameters[body.first[f"{out}.weight"]]
    inside = int(matrix.shape[0 if conv1d(body.modules[out]) else 1])
    size, per = _head_sizes(body.modules[attention], config, inside)
    if not size:
        asked.refuse("the model's configuration does not say how many attention heads it has")
        return
    heads, shared = inside // size, inside // size // per
    units = asked.units(heads, f"query heads of block {block}")
    if units is None:
        return
    start, stop = units
    keys = (-(-start // per), stop // per)  # only heads all of whose queries are in the group
    if keys[0] * per != start or keys[1] * per != stop:
        body.notes.append(
            f"group '{asked.group}': key-value heads that query heads {start}:{stop} share with "
            f"others belong to '{asked.groups.leftovers}'"
        )
    found = _query_layout(asked, attention, (heads, shared, size), units, keys)
    if not found:
        asked.refuse(f"the query, key and value projections of {attention} were not found")
        return
    _columns(asked, out, start * size, stop * size)
    if asked.part.units is None:
        asked.take(f"{out}.bias")
    asked.put(out, "input", start * size, stop * size)


def _head_sizes(attention: nn.Module, config: Any, inside: int) -> tuple[int, int]:
    """Return a head's width and how many share a key; blocks may differ in their number."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    said = [getattr(attention, name, None) for name in ("head_dim", "head_size")]
    size = next((s for s in said if isinstance(s, int)), inside // heads if heads else 0)
    per = getattr(attention, "num_key_value_groups", heads // shared if shared else 1)
    return size, int(per)


def _query_layout(
    asked: Asked,
    attention: str,
    counts: tuple[int, int, int],
    units: tuple[int, int],
    keys: tuple[int, int],
) -> bool:
    """Claim rows of query, key and value projections, apart or fused; say whether there are any."""
    heads, shared, size = counts
    modules = asked.body.modules
    query = (units[0] * size, units[1] * size)
    key = [(keys[0] * size, keys[1] * size)] if keys[0] < keys[1] else []
    if f"{attention}.q_proj" in modules:
        _rows(asked, f"{attention}.q_proj", [query])
        for name in ("k_proj", "v_proj"):
            _rows(asked, f"{attention}.{name}", key)
        return True
    if f"{attention}.query_key_value" in modules:  # per head: query, key, value
        _rows(asked, f"{attention}.query_key_value", [(3 * query[0], 3 * query[1])])
        return heads == shared
    for name in ("qkv_proj", "c_attn"):  # all queries, then all keys, then all values
        if f"{attention}.{name}" in modules:
            ends = (heads * size, (heads + shared) * size)
            moved = [(end + a, end + b) for end in ends for a, b in key]
            _rows(asked, f"{attention}.{name}", [query, *moved])
            return True
    return False


def _ends(asked: Asked) -> None:
    """Claim the embeddings (tokens and positions), or the output matrix."""
    body = asked.body.anatomy
    if asked.part.blocks or asked.part.units is not None:
        asked.refuse(f"'{asked.part.at}' takes neither blocks nor units; name `parameters` instead")
        return
    if asked.part.at == "head":
        asked.take(f"{body.head}.weight")
        asked.take(f"{body.head}.bias")
        return
    blocks = tuple(f"{path}." for path in body.blocks)
    for path, module in asked.body.modules.items():
        if path == body.embed or (isinstance(module, nn.Embedding) and not path.startswith(blocks)):
            asked.take(f"{path}.weight")


def _named(asked: Asked) -> None:
    """Claim parameters by name, or their rows; an adapter's outputs are its place."""
    for name in select(asked.body.model, asked.part.names):
        span: tuple[Span, ...] = ()
        if asked.part.units is not None:
            units = asked.units(int(asked.body.parameters[name].shape[0]), f"rows of {name}")
            if units is None:
                continue
            span = ((0, *units),)
        asked.take(name, *span)
        path = name.rpartition(".")[0]
        if re.search(r"(^|\.)lora_B\.[^.]+$", path) and not span:
            asked.put(path, "output", 0, None)


def _outputs(asked: Asked) -> None:
    """Name output channels of modules; nothing is owned."""
    start, stop = asked.part.units or (0, None)
    for path in match_modules(asked.body.model, asked.part.names):
        width = channels(asked.body.modules[path])
        if start < 0 or (stop is not None and (stop <= start or stop > (width or stop))):
            asked.refuse(f"units {start}:{stop} do not lie within the {width} outputs of {path}")
        asked.put(path, "output", start, stop)
