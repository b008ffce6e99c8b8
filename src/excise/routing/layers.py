"""How each kind of module takes part in routing: which backward pass its own weights get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from excise.routing.call import detached, instead, routed_call
from excise.routing.norms import routed_batch_norm, routed_layer_norm, spread
from excise.routing.ops import routed_conv2d, routed_linear, scale_grad
from excise.routing.places import masked, outputs, weighed
from excise.routing.plan import Args, Kwargs, Plan, State, first_input, with_input
from excise.routing.weights import Piece, nothing, trivial


def run(plan: Plan, state: State, args: Args, kwargs: Kwargs) -> Any:
    """Call a module that takes part in routing.

    Args:
        plan: The module.
        state: The weights in force.
        args: Arguments of its forward.
        kwargs: Keyword arguments.
    """
    plan.called = True
    if plan.inputs:
        x = first_input(args, kwargs)
        args, kwargs = with_input(args, kwargs, masked(plan, state, plan.inputs, x))

    def inner(*args: Any, **kwargs: Any) -> Any:
        return written(plan, state, args, kwargs)

    out = weighed(plan, state, inner, args, kwargs) if plan.experts else inner(*args, **kwargs)
    if plan.outputs:
        return outputs(plan, state, out)
    return out


def written(plan: Plan, state: State, args: Args, kwargs: Kwargs) -> Any:
    """Call a module so that its own weights receive gradients weighted by token."""
    own = {n: o for n, o in plan.own.items() if plan.module.get_parameter(n).requires_grad}
    if not own or not torch.is_grad_enabled():
        return plan.forward(*args, **kwargs)
    if state.muted:
        with detached(plan.module):
            return plan.forward(*args, **kwargs)
    x = first_input(args, kwargs)
    if plan.kind == "embedding":
        return _embedding(plan, state, x, args, kwargs)
    lead = _lead(plan, state, x)
    dims: dict[str, int | None] = {}
    pieces: dict[str, list[Piece]] = {}
    for name in plan.own:
        spans, dims[name] = plan.spans(name)
        pieces[name] = state.pieces("write", spans, lead, plan.path)
    if all(trivial(pieces[name]) for name in own):
        return plan.forward(*args, **kwargs)
    return _KINDS[plan.kind](plan, state, x, (pieces, dims, lead), args, kwargs)


def _lead(plan: Plan, state: State, x: Tensor) -> int:
    """Return the number of positions of an input."""
    if plan.kind in ("conv2d", "batch_norm"):
        return int(x.shape[0])
    if plan.kind == "any":
        return 0
    return x.numel() // x.shape[-1]


Weights = tuple[dict[str, list[Piece]], dict[str, int | None], int]
"""Token weights and sliced dimension by parameter, number of positions."""


def _linear(
    plan: Plan, state: State, x: Tensor, weights: Weights, args: Args, kwargs: Kwargs
) -> Tensor:
    pieces, dims, _ = weights
    transposed = plan.kind == "conv1d"
    bias: Any = plan.module.bias
    of_inputs = dims["weight"] == (0 if transposed else 1)
    whole = pieces["weight"]
    if dims["weight"] is None and transposed:
        whole = [(0, int(plan.module.get_parameter("weight").shape[1]), whole[0][2])]
    return routed_linear(
        x,
        plan.module.get_parameter("weight"),
        bias,
        write_out=None if of_inputs else whole,
        write_in=whole if of_inputs else None,
        write_bias=pieces.get("bias"),
        transposed=transposed,
    )


def _conv2d(
    plan: Plan, state: State, x: Tensor, weights: Weights, args: Args, kwargs: Kwargs
) -> Tensor:
    pieces, dims, _ = weights
    module: Any = plan.module
    of_inputs = dims["weight"] == 1
    return routed_conv2d(
        x,
        module.weight,
        module.bias,
        write_out=None if of_inputs else pieces["weight"],
        write_in=pieces["weight"] if of_inputs else None,
        write_bias=pieces.get("bias"),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def _layer_norm(
    plan: Plan, state: State, x: Tensor, weights: Weights, args: Args, kwargs: Kwargs
) -> Tensor:
    pieces = weights[0]
    module: Any = plan.module
    return routed_layer_norm(x, module, pieces["weight"], pieces.get("bias", pieces["weight"]))


def _batch_norm(
    plan: Plan, state: State, x: Tensor, weights: Weights, args: Args, kwargs: Kwargs
) -> Tensor:
    pieces = weights[0]
    module: Any = plan.module
    return routed_batch_norm(x, module, pieces["weight"], pieces["bias"])


def _spread(
    plan: Plan, state: State, x: Tensor, weights: Weights, args: Args, kwargs: Kwargs
) -> Any:
    # Token weights of an activation with heads repeat within a token: one per position is enough.
    pieces, _, lead = weights
    laid = spread(plan.module.get_parameter("weight"), tuple(x.shape[:-1]), lead, pieces["weight"])
    with instead(plan.module, {"weight": laid}):
        return plan.forward(*args, **kwargs)


def _any(plan: Plan, state: State, x: Tensor, weights: Weights, args: Args, kwargs: Kwargs) -> Any:
    pieces, dims, _ = weights
    owners = {name: (dims[name], pieces[name]) for name in pieces}
    alone = state.alone
    return routed_call(plan.module, plan.forward, owners, args, kwargs, alone=alone, who=plan.path)


_KINDS: Mapping[str, Callable[[Plan, State, Tensor, Weights, Args, Kwargs], Any]] = {
    "linear": _linear,
    "conv1d": _linear,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "spread": _spread,
    "any": _any,
}


def _embedding(plan: Plan, state: State, ids: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
    """Scatter gradients with token weights: the output has no other use than the weight."""
    spans, dim = plan.spans("weight")
    shape = state.shape
    if shape is not None and tuple(ids.shape) == (1, shape[1]) and shape[0] > 1:
        ids = ids.expand(shape)  # positions shared by all rows, whose tokens weigh differently
        args, kwargs = with_input(args, kwargs, ids)
    pieces = state.pieces("write", spans, ids.numel(), plan.path)
    if trivial(pieces):
        out: Tensor = plan.forward(*args, **kwargs)
        return out
    if nothing(pieces):
        with detached(plan.module):
            out = plan.forward(*args, **kwargs)
            return out
    values = [
        torch.ones(ids.numel(), device=ids.device) if w is None else w.values_N
        for _, _, w in pieces
    ]
    if dim is None:
        weight = values[0]
    else:
        ends = torch.tensor([stop for _, stop, _ in pieces], device=ids.device)
        which = torch.bucketize(ids.reshape(-1), ends, right=True)
        weight = torch.stack(values, 1).gather(1, which[:, None]).squeeze(1)
    return scale_grad(plan.forward(*args, **kwargs), weight.view(*ids.shape, 1))
