"""Growing a model by units, heads or experts, taking them out again, emptying them.

Every function works in place. Which entries of which tensors belong to a unit is what `resolve`
says of groups, so that fused and transposed layouts are known in one place. Where all blocks have
one width afterwards the configuration says so, and the model can be saved and loaded as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from excise.core.config import ConfigError
from excise.core.errors import UserError
from excise.models.anatomy import Anatomy, anatomy
from excise.models.names import modules_by_name, parameters_by_name
from excise.routing.body import Body
from excise.routing.claims import claim
from excise.routing.groups import Groups, Part
from excise.routing.measures import (
    What,
    count_units,
    experts_per_token,
    head_size,
    heads_together,
    refresh,
)

Ranges = dict[str, list[tuple[int, int, int]]]
"""By parameter: (dimension, start, stop), in order."""

STD = 0.02
"""Deviation of new entries of a matrix whose own entries are all alike."""


def grow(
    model: nn.Module,
    per_block: Mapping[int, int] | int,
    seed: int,
    what: What = "mlp",
    *,
    silent: bool = False,
) -> tuple[Part, ...]:
    """Add units behind those a model has; the old ones keep their bits.

    New entries are drawn with the deviation of the tensor they join, from a generator of the
    seed and the tensor's name.

    Args:
        model: A causal model; changed in place.
        per_block: Units to add by block, or to every block. Heads count query heads and come in
            whole groups that share keys and values; experts bring their row of the router.
        seed: Seed of the new entries.
        what: MLP neurons, heads or experts.
        silent: Whether what leads out of the new units starts at zero, so that the model
            computes what it computed before (but for experts, which the router may prefer).

    Returns:
        The added units, one part per block.

    Raises:
        UserError: If a block does not exist, has no such unit, or cannot grow by that many.
    """
    found, named = anatomy(model), modules_by_name(model)
    added: list[Part] = []
    work: list[tuple[Ranges, int, set[str]]] = []
    for block, count in _per_block(per_block, found.num_blocks).items():
        had = count_units(model, block, what)
        step = heads_together(named[found.attention[block]]) if what == "heads" else 1
        if count % step:
            raise UserError(
                f"block {block}: {count} heads are no multiple of the {step} that share keys and "
                "values; grow whole groups"
            )
        last = Part(at=what, blocks=(block,), units=(had - step, had))
        out = {found.mlp_down[block], found.attention_out[block]}
        work.append((ranges_of(model, [last]), count // step, out | {f"{p}.weight" for p in out}))
        added.append(Part(at=what, blocks=(block,), units=(had, had + count)))
    for ranges, times, leads_out in work:
        for name, spans in ranges.items():
            _widen(model, name, spans, times, seed, silent and name in leads_out)
    refresh(model)
    return tuple(added)


def delete(model: nn.Module, parts: Iterable[Part]) -> None:
    """Take units out of a model: it becomes one that never had them.

    Args:
        model: A causal model; changed in place.
        parts: MLP neurons, experts, or query heads in whole groups that share keys and values.

    Raises:
        UserError: If a part is of another kind, would leave a block empty, or splits a group.
    """
    chosen = tuple(parts)
    for part in chosen:
        if part.at not in ("mlp", "heads", "experts"):
            raise UserError(
                f"a part at '{part.at}' cannot be deleted, only zeroed; name mlp, heads or experts"
            )
    ranges = ranges_of(model, chosen)
    _check_rest(model, chosen)
    named = parameters_by_name(model)
    for name, spans in ranges.items():
        dim = spans[0][0]
        keep = torch.ones(named[name].shape[dim], dtype=torch.bool)
        for _, start, stop in spans:
            keep[start:stop] = False
        index = keep.nonzero().flatten().to(named[name].device)
        put_tensor(model, name, named[name].detach().index_select(dim, index))
    refresh(model)


@torch.no_grad()
def zero(model: nn.Module, parts: Iterable[Part]) -> None:
    """Set every entry of the parts to zero; dead units stay dead under training.

    Args:
        model: A causal model; changed in place.
        parts: Which entries.
    """
    named = parameters_by_name(model)
    for name, spans in ranges_of(model, tuple(parts)).items():
        for dim, start, stop in spans:
            named[name].narrow(dim, start, stop - start).zero_()


@torch.no_grad()
def reinit(model: nn.Module, parts: Iterable[Part], seed: int) -> None:
    """Draw every entry of the parts anew, with the deviation of the rest of its tensor.

    An attacker then has capacity to train, which zeroed units do not give.

    Args:
        model: A causal model; changed in place.
        parts: Which entries.
        seed: Seed of the draw.
    """
    named = parameters_by_name(model)
    for name, spans in ranges_of(model, tuple(parts)).items():
        tensor = named[name]
        rest = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
        for dim, start, stop in spans:
            rest.narrow(dim, start, stop - start).fill_(False)
        std = _deviation(tensor[rest] if bool(rest.any()) else tensor, bias=tensor.dim() == 1)
        generator = _generator(seed, name)
        for dim, start, stop in spans:
            at = tensor.narrow(dim, start, stop - start)
            at.copy_(torch.randn(at.shape, generator=generator) * std)


def ranges_of(model: nn.Module, parts: Sequence[Part]) -> Ranges:
    """Return which entries of which parameters the parts own.

    Args:
        model: A causal model.
        parts: What to look up; an expert brings its row of the router.

    Returns:
        Ranges by canonical parameter name; a parameter owned whole is one range of dimension 0.

    Raises:
        ConfigError: With everything that is wrong with the parts.
    """
    body, problems = Body(model), list[str]()
    spans: dict[str, set[tuple[int, int, int]]] = {}
    for i, part in enumerate(parts):
        claims, _ = claim(body, Groups(), "chosen", part, problems, f"parts[{i}]")
        for c in claims:
            whole = (0, 0, int(body.parameters[c.parameter].shape[0]))
            span = whole if c.dim is None else (c.dim, c.start, c.stop)
            spans.setdefault(c.parameter, set()).add(span)
        if part.at == "experts" and not problems:
            for name, span in _router_rows(body, part):
                spans.setdefault(name, set()).add(span)
    if problems:
        raise ConfigError(problems, "parts")
    return {name: sorted(found) for name, found in spans.items()}


def _router_rows(body: Body, part: Part) -> list[tuple[str, tuple[int, int, int]]]:
    """Return the rows of the routers that send tokens to the experts of a part."""
    found = body.anatomy
    rows = []
    for block in part.blocks or range(found.num_blocks):
        experts = found.experts[block]
        assert experts is not None, "claims refuse dense blocks"
        owner = experts.down[0].parameter.rpartition(".")[0]
        for name in body.below(found.mlp[block]):
            shape = body.parameters[name].shape
            if not name.startswith(f"{owner}.") and shape[0] == experts.count and len(shape) < 3:
                rows.append((name, (0, *(part.units or (0, experts.count)))))
    return rows


def _per_block(per_block: Mapping[int, int] | int, blocks: int) -> dict[int, int]:
    """Return the count of every block that grows, in order."""
    if isinstance(per_block, int):
        per_block = dict.fromkeys(range(blocks), per_block)
    for block, count in per_block.items():
        if not 0 <= block < blocks:
            raise UserError(f"there is no block {block}; the model has {blocks}, counted from 0")
        if count < 1:
            raise UserError(f"block {block} cannot grow by {count}; add at least one")
    return dict(sorted(per_block.items()))


def _check_rest(model: nn.Module, parts: Sequence[Part]) -> None:
    """Refuse to split groups of heads, and to leave a block with too few units of a kind."""
    found, named = anatomy(model), modules_by_name(model)
    gone: dict[tuple[int, What], set[int]] = {}
    for part in parts:
        what: What = part.at  # type: ignore[assignment]
        for block in part.blocks or range(found.num_blocks):
            at = block % found.num_blocks
            start, stop = part.units or (0, count_units(model, at, what))
            gone.setdefault((at, what), set()).update(range(start, stop))
    for (block, what), units in gone.items():
        left = count_units(model, block, what) - len(units)
        least = experts_per_token(named[found.mlp[block]]) if what == "experts" else 1
        if left < least:
            raise UserError(
                f"block {block} would be left with {left} of its {what} and needs {least}; zero "
                "them instead"
            )
        if what == "heads":
            _check_heads(named[found.attention[block]], found, block, units)


def _check_heads(attention: nn.Module, found: Anatomy, block: int, units: set[int]) -> None:
    """Refuse heads that cannot leave alone."""
    step = heads_together(attention)
    if any(set(range(u - u % step, u - u % step + step)) - units for u in units):
        raise UserError(
            f"block {block}: the heads named share keys and values with others; delete heads in "
            f"groups of {step}, or zero them"
        )
    weight = getattr(getattr(attention, "q_norm", None), "weight", None)
    if weight is not None and weight.numel() != head_size(attention):
        raise UserError(
            f"block {block} normalises all heads together, so none can be deleted; zero them"
        )
    if found.family == "phi3":
        raise UserError("phi3 reads the number of heads from its configuration; zero them instead")


def _widen(
    model: nn.Module,
    name: str,
    spans: Sequence[tuple[int, int, int]],
    times: int,
    seed: int,
    silent: bool,
) -> None:
    """Insert behind each span `times` times as many fresh entries as it holds."""
    tensor = parameters_by_name(model)[name].detach()
    std = 0.0 if silent else _deviation(tensor, bias=tensor.dim() == 1)
    generator = _generator(seed, name)
    pieces, at, dim = [], 0, spans[0][0]
    for _, start, stop in spans:
        shape = list(tensor.shape)
        shape[dim] = times * (stop - start)
        fresh = torch.randn(shape, generator=generator) * std
        pieces += [tensor.narrow(dim, at, stop - at), fresh.to(tensor)]
        at = stop
    pieces.append(tensor.narrow(dim, at, tensor.shape[dim] - at))
    put_tensor(model, name, torch.cat(pieces, dim))


def _deviation(tensor: Tensor, *, bias: bool) -> float:
    """Return the deviation of a tensor's entries; of a matrix of equal ones `STD`."""
    std = float(tensor.float().std(correction=0)) if tensor.numel() else 0.0
    return std if std or bias else STD


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def put_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor, which may have another shape, in a parameter's place.

    Args:
        model: Changed in place; call `refresh` when all are put.
        name: Canonical name of the parameter.
        value: What is put there.
    """
    path, _, leaf = name.rpartition(".")
    owner = modules_by_name(model)[path]
    old = owner.get_parameter(leaf)
    setattr(owner, leaf, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
