"""The gradient of one step: every term over its count in the whole batch.

Micro-batches are accumulated in the parameters, or in float32 for half-precision ones with
masters, and summed over processes at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.train.reduce import add_up, gather, sum_gradients
from excise.train.state import Group
from excise.train.terms import Term


def move(micro: Any, device: torch.device) -> Any:
    """Put a mapping's batches on `device`; anything else is the loss's own business."""
    if isinstance(micro, Mapping):
        return {k: b.to(device) if hasattr(b, "to") else b for k, b in micro.items()}
    return micro.to(device) if hasattr(micro, "to") else micro


def _tokens(micro: Any) -> int:
    """Count real tokens of a micro-batch."""
    batches = micro.values() if isinstance(micro, Mapping) else [micro]
    return sum(int(getattr(b, "num_tokens", 0)) for b in batches)


@dataclass
class Values:
    """What the forward and backward passes of one step gave, over all processes."""

    loss: float
    terms: dict[str, float]
    grads: list[list[Tensor | None]]
    tokens: int


def backward(
    model: nn.Module,
    micros: Sequence[Any],
    loss: Callable[[nn.Module, Any], Mapping[str, Term]],
    counts: Callable[[Any], Mapping[str, float]] | None,
    step: int,
    parts: Sequence[Group],
    ctx: Context,
    writes: Callable[[Any], Iterable[str]] | None = None,
) -> Values:
    """Accumulate the gradient of one step, each term over its count in the whole batch.

    Groups that no micro-batch of any process `writes` get no gradient.
    """
    devices = [ctx.device] if ctx.device.type == "cuda" else []
    seed = ctx.seed_for(f"fit/{step}/{ctx.rank}")
    told: list[Mapping[str, float]] | None = None
    if len(micros) > 1 or ctx.world > 1:
        told = [dict(counts(m)) for m in micros] if counts else []
        if counts is None:
            with torch.random.fork_rng(devices), torch.no_grad():
                _seed(seed, ctx.device)
                told = [{k: t.count for k, t in loss(model, m).items()} for m in micros]
    totals = None if told is None else add_up(gather(add_up([dict(t) for t in told]), ctx))
    weighted: dict[str, float] = {}
    plain: dict[str, float] = {}
    wide: Wide = {}
    with torch.random.fork_rng(devices), _widening(parts, wide):
        _seed(seed, ctx.device)
        for i, micro in enumerate(micros):
            terms = loss(model, micro)
            if told is not None:
                _check_counts(terms, told[i], step)
            _accumulate(terms, totals, weighted, plain)
            _collect(parts, wide)
    written: set[str] | None = None
    if writes is not None:
        mine = sorted({name for micro in micros for name in writes(micro)})
        written = {name for names in gather(mine, ctx) for name in names}
    return _reduce(parts, wide, weighted, plain, sum(_tokens(m) for m in micros), ctx, written)


def _seed(seed: int, device: torch.device) -> None:
    """Seed what draws on `device`; `torch.manual_seed` asks every backend, a sixth of a step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _check_counts(terms: Mapping[str, Term], told: Mapping[str, float], step: int) -> None:
    """Refuse counts that the loss contradicts: the gradient would be scaled wrongly."""
    real = {name: float(term.count) for name, term in terms.items()}
    for name in sorted(set(real) | set(told)):
        if not math.isclose(real.get(name, 0.0), told.get(name, 0.0), rel_tol=1e-9):
            raise UserError(
                f"at step {step} term '{name}' counted {real.get(name, 0.0):g} but `counts` had "
                f"said {told.get(name, 0.0):g}; they must agree"
            )


def _accumulate(
    terms: Mapping[str, Term],
    totals: Mapping[str, float] | None,
    weighted: dict[str, float],
    plain: dict[str, float],
) -> None:
    """Add one micro-batch's terms to the gradients and to the values."""
    total: Tensor | None = None
    for name, term in terms.items():
        count = float(term.count) if totals is None else totals[name]
        if count == 0:
            continue  # nothing was scored anywhere: the term has no mean
        mean = term.sum / count
        part = mean if term.weight == 1 else term.weight * mean
        total = part if total is None else total + part
        value = float(mean.detach())
        plain[name] = plain.get(name, 0.0) + value
        weighted[name] = weighted.get(name, 0.0) + term.weight * value
    if total is not None and total.requires_grad:
        total.backward()


Wide = dict[tuple[int, int], Tensor]
"""Float32 sums of half-precision gradients, by group and leaf."""


def _mastered(parts: Sequence[Group]) -> dict[nn.Parameter, list[tuple[int, int]]]:
    """Return by parameter the mastered leaves that are slices of it."""
    found: dict[nn.Parameter, list[tuple[int, int]]] = {}
    for g, group in enumerate(parts):
        for i, one in enumerate(group.slices):
            if group.mastered(i):
                found.setdefault(one.param, []).append((g, i))
    return found


def _move(
    param: nn.Parameter, parts: Sequence[Group], places: Sequence[tuple[int, int]], wide: Wide
) -> None:
    """Add a parameter's gradient to the sums, and free it."""
    if param.grad is None:
        return
    for g, i in places:
        part = parts[g].slices[i].of(param.grad)
        if (g, i) in wide:
            wide[g, i].add_(part)
        else:
            wide[g, i] = part.to(parts[g].leaves[i].dtype)
    param.grad = None


@contextmanager
def _widening(parts: Sequence[Group], wide: Wide) -> Iterator[None]:
    """Move every half-precision gradient as soon as it is whole, so that few exist at a time."""
    with ExitStack() as stack:
        for param, places in _mastered(parts).items():
            move = partial(_move, parts=parts, places=places, wide=wide)
            stack.callback(param.register_post_accumulate_grad_hook(move).remove)
        yield


def _collect(parts: Sequence[Group], wide: Wide) -> None:
    """Move what a loss wrote into `grad` by itself, past autograd's hooks."""
    for param, places in _mastered(parts).items():
        _move(param, parts, places, wide)


def _reduce(
    parts: Sequence[Group],
    wide: Mapping[tuple[int, int], Tensor],
    weighted: dict[str, float],
    plain: dict[str, float],
    tokens: int,
    ctx: Context,
    written: set[str] | None,
) -> Values:
    """Sum values and gradients over processes; groups that nothing wrote get none."""
    told = gather([weighted, plain, tokens], ctx)
    weighted = add_up([t[0] for t in told])
    plain = add_up([t[1] for t in told])
    local: list[list[Tensor | None]] = []
    for g, group in enumerate(parts):
        if written is not None and group.name not in written:
            local.append([None] * len(group.slices))
        else:
            local.append([_own(group, i, wide.get((g, i))) for i in range(len(group.slices))])
    flat = [grad for grads in local for grad in grads]
    summed = sum_gradients(flat, [leaf for g in parts for leaf in g.leaves], ctx)
    grads = []
    for group in parts:
        grads.append(summed[: len(group.slices)])
        summed = summed[len(group.slices) :]
    return Values(sum(weighted.values()), plain, grads, sum(t[2] for t in told))


def _own(group: Group, i: int, wide: Tensor | None) -> Tensor | None:
    """Return this process's gradient of one leaf."""
    one = group.slices[i]
    if group.mastered(i):
        return wide
    return None if one.param.grad is None else one.of(one.param.grad)
