"""Growing a model by units, heads or experts, taking them out again, emptying them.

Every function works in place. Which entries of which tensors belong to a unit is what `resolve`
says of groups, so that fused and transposed layouts are known in one place. Where all blocks have
one width afterwards the configuration says so, and the model can be saved and loaded as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from excise.core.config import ConfigError
from excise.core.errors import UserError
from excise.models.anatomy import Anatomy
from excise.models.names import modules_by_name, parameters_by_name
from excise.routing.groups import Groups, Part
from excise.routing.resolve import ModelIndex, claim

What = Literal["mlp", "heads", "experts"]
"""What can be grown and deleted: MLP neurons, query heads, experts."""

Ranges = dict[str, list[tuple[int, int, int]]]
"""By parameter: (dimension, start, stop), in order."""

STD = 0.02
"""Deviation of new entries of a matrix whose own entries are all alike."""


def count_units(model: nn.Module, block: int, what: What = "mlp") -> int:
    """Return how many MLP neurons, query heads or experts a block has.

    Args:
        model: A causal model; blocks may differ in width.
        block: Number of the block.
        what: What to count.

    Raises:
        UserError: If the block has no such thing.
    """
    return _count(ModelIndex(model), block, what)


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
    index = ModelIndex(model)
    layout = index.anatomy
    added: list[Part] = []
    work: list[tuple[Ranges, int, set[str]]] = []
    for block, count in _counts_by_block(per_block, layout.num_blocks).items():
        before = _count(index, block, what)
        step = _heads_together(index.modules[index.heads_of(block)]) if what == "heads" else 1
        if count % step:
            raise UserError(
                f"block {block}: {count} heads are no multiple of the {step} that share keys and "
                "values; grow whole groups"
            )
        last = Part(at=what, blocks=(block,), units=(before - step, before))
        out = {layout.mlp_down[block], layout.attention_out[block]}
        leads_out = out | {f"{path}.weight" for path in out}
        work.append((ranges_of(model, [last]), count // step, leads_out))
        added.append(Part(at=what, blocks=(block,), units=(before, before + count)))
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
    for entries in entries_of(model, tuple(parts)):
        entries.zero_()


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
    index, problems = ModelIndex(model), list[str]()
    spans: dict[str, set[tuple[int, int, int]]] = {}
    for i, part in enumerate(parts):
        claims, _ = claim(index, Groups(), "chosen", part, problems, f"parts[{i}]")
        for c in claims:
            whole = (0, 0, int(index.parameters[c.parameter].shape[0]))
            span = whole if c.dim is None else (c.dim, c.start, c.stop)
            spans.setdefault(c.parameter, set()).add(span)
        if part.at == "experts" and not problems:
            for name, span in _router_rows(index, part):
                spans.setdefault(name, set()).add(span)
    if problems:
        raise ConfigError(problems, "parts")
    return {name: sorted(of_name) for name, of_name in spans.items()}


def entries_of(model: nn.Module, parts: Sequence[Part]) -> list[Tensor]:
    """Return the entries that the parts own, as views of the model's parameters.

    Args:
        model: A causal model.
        parts: As `ranges_of`.
    """
    named = parameters_by_name(model)
    return [
        named[name].narrow(dim, start, stop - start)
        for name, spans in ranges_of(model, parts).items()
        for dim, start, stop in spans
    ]


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


def refresh(model: nn.Module) -> None:
    """Make modules and configuration say the sizes that their tensors have.

    Where blocks differ in width no configuration can say so, and it keeps what it said.

    Args:
        model: A causal model whose tensors have changed shape.
    """
    for module in modules_by_name(model).values():
        _set_sizes(module)
    index = ModelIndex(model)
    layout, config = index.anatomy, index.config
    blocks = range(layout.num_blocks)
    widths = [_count(index, block, "mlp") for block in blocks]
    for path, width in zip(layout.mlp, widths, strict=True):
        mlp: Any = index.modules[path]
        if isinstance(getattr(mlp, "intermediate_size", None), int):
            mlp.intermediate_size = width
    for block in blocks:
        attention: Any = index.modules[index.heads_of(block)]
        if all(isinstance(getattr(attention, n, None), int) for n in ("num_heads", "head_dim")):
            attention.num_heads = _count(index, block, "heads")
    if config is None:
        return
    if len(set(widths)) == 1:
        _set_width(config, widths[0])
    experts = {e.count if e is not None else 0 for e in layout.experts}
    if len(experts) == 1 and 0 not in experts:
        config.num_local_experts = experts.pop()
    if "head_dim" in config.to_dict():  # elsewhere heads follow from the width
        heads = {_count(index, block, "heads") for block in blocks}
        if len(heads) == 1:
            config.num_attention_heads = heads.pop()
            step = _heads_together(index.modules[index.heads_of(0)])
            config.num_key_value_heads = config.num_attention_heads // step


def _count(index: ModelIndex, block: int, what: What) -> int:
    """Return the number of units of a block; see `count_units`."""
    layout = index.anatomy
    experts = layout.experts[block]
    if what == "experts":
        if experts is None:
            raise UserError(f"block {block} has no experts; name a mixture of experts")
        return experts.count
    if what == "heads":
        width = index.num_inputs(layout.attention_out[block])
        return width // _head_size(index.modules[index.heads_of(block)])
    down = layout.mlp_down[block]
    if down in index.modules:
        return index.num_inputs(down)
    assert experts is not None, "a fused MLP is a mixture of experts"
    return int(index.parameters[down].shape[1 if experts.transposed else 2])


def _head_size(attention: nn.Module) -> int:
    """Return the width of one head.

    Raises:
        UserError: If the module does not say it.
    """
    for name in ("head_dim", "head_size"):
        size = getattr(attention, name, None)
        if isinstance(size, int):
            return size
    raise UserError(f"{type(attention).__name__} does not say how wide its heads are")


def _heads_together(attention: nn.Module) -> int:
    """Return how many query heads share keys and values."""
    return int(getattr(attention, "num_key_value_groups", 1))


def _experts_per_token(mlp: nn.Module) -> int:
    """Return how many experts each token is sent to."""
    counts = (getattr(module, "top_k", None) for module in mlp.modules())
    return next((count for count in counts if isinstance(count, int)), 1)


def _router_rows(index: ModelIndex, part: Part) -> list[tuple[str, tuple[int, int, int]]]:
    """Return the rows of the routers that send tokens to the experts of a part."""
    layout = index.anatomy
    rows = []
    for block in part.blocks or range(layout.num_blocks):
        experts = layout.experts[block]
        assert experts is not None, "claims refuse dense blocks"
        owner = experts.down[0].parameter.rpartition(".")[0]
        for name in index.below(layout.mlp[block]):
            shape = index.parameters[name].shape
            if not name.startswith(f"{owner}.") and shape[0] == experts.count and len(shape) < 3:
                rows.append((name, (0, *(part.units or (0, experts.count)))))
    return rows


def _counts_by_block(per_block: Mapping[int, int] | int, blocks: int) -> dict[int, int]:
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
    index = ModelIndex(model)
    layout = index.anatomy
    gone: dict[tuple[int, What], set[int]] = {}
    for part in parts:
        what: What = part.at  # type: ignore[assignment]
        for block in part.blocks or range(layout.num_blocks):
            at = block % layout.num_blocks
            start, stop = part.units or (0, _count(index, at, what))
            gone.setdefault((at, what), set()).update(range(start, stop))
    for (block, what), units in gone.items():
        left = _count(index, block, what) - len(units)
        least = _experts_per_token(index.modules[layout.mlp[block]]) if what == "experts" else 1
        if left < least:
            raise UserError(
                f"block {block} would be left with {left} of its {what} and needs {least}; zero "
                "them instead"
            )
        if what == "heads":
            _check_heads(index.modules[index.heads_of(block)], layout, block, units)


def _check_heads(attention: nn.Module, layout: Anatomy, block: int, units: set[int]) -> None:
    """Refuse heads that cannot leave alone."""
    step = _heads_together(attention)
    if any(set(range(u - u % step, u - u % step + step)) - units for u in units):
        raise UserError(
            f"block {block}: the heads named share keys and values with others; delete heads in "
            f"groups of {step}, or zero them"
        )
    weight = getattr(getattr(attention, "q_norm", None), "weight", None)
    if weight is not None and weight.numel() != _head_size(attention):
        raise UserError(
            f"block {block} normalises all heads together, so none can be deleted; zero them"
        )
    if layout.family == "phi3":
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
    """Return the generator of one tensor's new entries."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _set_sizes(module: Any) -> None:
    """Set the sizes that a module keeps beside its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(weight, Tensor) and isinstance(getattr(module, "nf", None), int):
        module.nx, module.nf = weight.shape
    if isinstance(getattr(module, "split_size", None), int) and hasattr(module, "c_attn"):
        module.split_size = module.c_attn.weight.shape[1] // 3
        module.num_heads = module.split_size // module.head_dim
    if isinstance(getattr(module, "num_experts", None), int):
        rows = getattr(module, "gate_up_proj", weight)
        if isinstance(rows, Tensor):
            module.num_experts = rows.shape[0]


def _set_width(config: Any, width: int) -> None:
    """Set the MLP's width in a configuration; GPT-2's may be empty for four times the model's."""
    if hasattr(config, "n_inner"):
        if config.n_inner is not None or width != 4 * config.n_embd:
            config.n_inner = width
    elif hasattr(config, "intermediate_size"):
        config.intermediate_size = width
