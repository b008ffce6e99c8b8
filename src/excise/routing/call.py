"""Any other module: its values once, its weights' gradients from a second, detached call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as tree

from excise.core.errors import UserError
from excise.routing.weights import Piece, Weight

Ctx = Any
Owners = Mapping[str, tuple[int | None, Sequence[Piece]]]
"""By a module's own parameter: the dimension that is sliced (None for the whole), weights."""


@contextmanager
def instead(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module read other tensors in place of its own parameters while the block runs."""
    try:
        module.__dict__.update(values)
        yield
    finally:
        for name in values:
            module.__dict__.pop(name, None)


@contextmanager
def detached(module: nn.Module) -> Iterator[None]:
    """Let a module read its own parameters as constants while the block runs."""
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    with instead(module, own):
        yield


class _Only(torch.autograd.Function):
    """A parameter of which only some slices receive a gradient."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, dim: int, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Return the parameter."""
        ctx.plan = (dim, spans)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, delta: Tensor) -> Any:
        """Keep the slices, zero the rest."""
        dim, spans = ctx.plan
        out = torch.zeros_like(delta)
        for start, stop in spans:
            out.narrow(dim, start, stop - start).copy_(delta.narrow(dim, start, stop - start))
        return out, None, None


class _Join(torch.autograd.Function):
    """One value computed several times: each computation gets its own share of the gradient."""

    @staticmethod
    def forward(ctx: Ctx, weights: Sequence[Tensor], *same: Tensor) -> Tensor:
        """Return the first."""
        ctx.weights = weights
        return same[0].view_as(same[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, delta: Tensor) -> Any:
        """Give the first the gradient as it is, each other one the weighted gradient."""
        parts = [delta * w.to(delta.dtype) for w in ctx.weights]
        return None, delta, *parts


def _along(weight: Weight, like: Tensor, who: str) -> Tensor:
    """Return token weights in the shape that broadcasts against an output."""
    values, count = weight.values_N, 1
    for used, size in enumerate(like.shape, 1):
        count *= size
        if count == len(values):
            return values.view(*like.shape[:used], *(1,) * (like.dim() - used))
    raise UserError(
        f"an output of {who} has shape {tuple(like.shape)}, which does not begin with the "
        f"{len(values)} tokens whose labels were given; let every label write that group"
    )


def routed_call(
    module: nn.Module,
    forward: Callable[..., Any],
    owners: Owners,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
    who: str = "a module",
) -> Any:
    """Call a module so that its own parameters receive gradients weighted by token.

    The first call has detached parameters (but those that every token writes) and carries the
    input's gradient; for each distinct weight a further one, with detached inputs, carries the
    parameters'. Both begin at the same state of the random generators. The weight of a token
    multiplies the gradient that comes back to its own output.

    Args:
        module: The module.
        forward: Its forward.
        owners: Weights of its own parameters.
        args: Arguments.
        kwargs: Keyword arguments.
        alone: A context in which the parameters of modules inside are constants.
        who: The module's name for messages.

    Returns:
        What the module returns, bit-equal.
    """
    groups: dict[int, tuple[Weight | None, dict[str, list[tuple[int, int]]]]] = {}
    for name, (_, pieces) in owners.items():
        for start, stop, weight in pieces:
            if weight is None or not weight.zero:
                group = groups.setdefault(id(weight), (weight, {}))
                group[1].setdefault(name, []).append((start, stop))
    live = groups.pop(id(None), (None, {}))[1]
    random = _random_state(args) if groups else []
    with instead(module, _values(module, owners, live)):
        first = forward(*args, **kwargs)
    if not groups or not torch.is_grad_enabled():
        return first
    flat, spec = tree.tree_flatten(first)
    others = []
    frozen_args, frozen_kwargs = tree.tree_map_only(
        Tensor, torch.detach, (tuple(args), dict(kwargs))
    )
    after = _random_state(args)
    for weight, spans in groups.values():
        _set_random(random)
        with alone(), instead(module, _values(module, owners, spans)):
            again = tree.tree_leaves(forward(*frozen_args, **frozen_kwargs))
        others.append((weight, again))
    _set_random(after)
    for i, value in enumerate(flat):
        if isinstance(value, Tensor) and value.is_floating_point():
            same = [(w, out[i]) for w, out in others if out[i].requires_grad]
            if same:
                weights = [_along(w, value, who) for w, _ in same if w is not None]
                flat[i] = _Join.apply(weights, value, *(out for _, out in same))
    return tree.tree_unflatten(flat, spec)


def _values(
    module: nn.Module, owners: Owners, live: Mapping[str, list[tuple[int, int]]]
) -> dict[str, Tensor]:
    """Return what a call reads instead of its parameters: live slices, constants elsewhere."""
    values: dict[str, Tensor] = {}
    for name, (dim, pieces) in owners.items():
        param = module.get_parameter(name)
        if name not in live:
            values[name] = param.detach()
        elif dim is not None and len(live[name]) < len(pieces):
            values[name] = _Only.apply(param, dim, live[name])
        else:
            values[name] = param
    return values


def _random_state(args: Sequence[Any]) -> list[tuple[torch.device, Tensor]]:
    """Return the states of the generators a module may draw from."""
    states = [(torch.device("cpu"), torch.get_rng_state())]
    device = next((a.device for a in args if isinstance(a, Tensor)), states[0][0])
    if device.type == "cuda":
        states.append((device, torch.cuda.get_rng_state(device)))
    return states


def _set_random(states: Sequence[tuple[torch.device, Tensor]]) -> None:
    """Put generators back to earlier states."""
    for device, state in states:
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
