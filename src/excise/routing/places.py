"""Masks of activations: what a token does not read, and edges that weigh what passes back.

Shape legend: N positions, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from excise.routing.groups import Place
from excise.routing.ops import scale_columns
from excise.routing.plan import Args, Forward, Kwargs, Plan, Span, State


def masked(plan: Plan, state: State, places: Sequence[Place], x: Tensor) -> Tensor:
    """Weigh columns of an activation in the forward pass and on the way back.

    Args:
        plan: The module.
        state: The weights in force.
        places: Slices of the last dimension.
        x: The activation.
    """
    width = x.shape[-1]
    spans: list[Span] = [
        (p.start, width if p.stop is None else p.stop, p.group) for p in places if p.start < width
    ]
    lead = x.numel() // width
    read = state.pieces("read", spans, lead, plan.path)
    edge = state.pieces("edge", spans, lead, plan.path) if torch.is_grad_enabled() else None
    return scale_columns(x, read, edge)


def outputs(plan: Plan, state: State, out: Any) -> Any:
    """Weigh channels of a module's output: the second dimension of images, else the last."""
    if isinstance(out, tuple | list):
        i = next(i for i, value in enumerate(out) if isinstance(value, Tensor))
        parts = [*out[:i], outputs(plan, state, out[i]), *out[i + 1 :]]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
    if isinstance(out, Mapping):
        key = next(k for k, v in out.items() if isinstance(v, Tensor))
        return type(out)(**{**out, key: outputs(plan, state, out[key])})
    if out.dim() == 4:
        moved = masked(plan, state, plan.outputs, out.movedim(1, -1))
        return moved.movedim(-1, 1)
    return masked(plan, state, plan.outputs, out)


def weighed(plan: Plan, state: State, inner: Forward, args: Args, kwargs: Kwargs) -> Any:
    """Call experts with the weights of those that a token does not read set to 0.

    The output is linear in the experts' weights, so edges that leave an expert are routed by a
    call with weighted weights whose value is replaced by the true one.
    """
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, index_NK, weight_NK = (given[name] for name in names)
    group_E = torch.zeros(
        max(p.stop or 0 for p in plan.experts) + 1, dtype=torch.long, device=x.device
    )
    for p in plan.experts:
        group_E[p.start : p.stop] = state.number(p.group)
    group_NK = group_E[index_NK.clamp(max=len(group_E) - 1)]
    read_NG, edge_NG = state.matrix("read"), state.matrix("edge")
    if read_NG is not None:
        weight_NK = weight_NK * read_NG.to(weight_NK.dtype).gather(1, group_NK)
    if edge_NG is None or not torch.is_grad_enabled():
        return inner(x, index_NK, weight_NK)
    with torch.no_grad():
        value = plan.forward(x, index_NK, weight_NK)
    edge_NK = edge_NG.to(weight_NK.dtype).gather(1, group_NK)
    routed: Tensor = _Value.apply(inner(x, index_NK, weight_NK * edge_NK), value)
    return routed


class _Value(torch.autograd.Function):
    """The gradient of one computation with the value of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        """Return the value."""
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> Any:
        """Pass the gradient on."""
        return delta, None
