"""The backward passes of gradient routing: true gradients for inputs, weighted ones for weights.

Values are bit-equal to those of the plain layers. Under parameter edges the gradient of the input
is the true one and only what is written into the weights is weighted, token by token: for
y = x W + c and the gradient d at y, the gradient of W is sum_n w_n x_n^T d_n instead of
sum_n x_n^T d_n. Edges that leave an activation weigh what passes back through it. A forward mask
changes values and gradients.

Known layers have a backward pass of their own; any other module is called twice (`routed_call`).

Source: Cloud et al. 2024, "Gradient Routing", arXiv:2410.04332, section 3 (edge weights in general
and edges that leave activations); edges that leave parameters as in "Beyond data filtering",
arXiv:2512.05648, section 3, there for a whole batch of one label.

Shape legend: N tokens (or images), I inputs, O outputs, B images, C channels, H and W image sides,
D width of a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils import _pytree as tree

from excise.core.errors import UserError
from excise.core.random_state import random_states, set_random_states
from excise.routing.weights import (
    Weight,
    WeightedRanges,
    nothing,
    outer,
    rows_sum,
    scaled,
    times,
    trivial,
)

Saved = Any
"""What `torch.autograd.Function` passes from forward to backward; its stubs are loose."""


class _Linear(torch.autograd.Function):
    """Affine map whose weight gradient is weighted by token."""

    @staticmethod
    def forward(
        ctx: Saved,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sliced: tuple[WeightedRanges, bool],
        bias_pieces: WeightedRanges,
        transposed: bool,
    ) -> Tensor:
        """Compute like the plain layer; keep what it would keep."""
        ctx.save_for_backward(x, weight)
        ctx.plan = (sliced, bias_pieces, transposed)
        if not transposed:
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Return the true gradient of the input, weighted ones of weight and bias."""
        x, weight = ctx.saved_tensors
        (pieces, of_inputs), bias_pieces, transposed = ctx.plan
        d_NO = delta.reshape(-1, delta.shape[-1])
        x_NI = x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(d_NO, weight.t() if transposed else weight).view(x.shape)
        if ctx.needs_input_grad[1] and not nothing(pieces):
            dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
            out = dw.t() if transposed != of_inputs else dw  # sliced side first
            a, b = (x_NI, d_NO) if of_inputs else (d_NO, x_NI)
            outer(a, b, pieces, out)
        if ctx.needs_input_grad[2] and not nothing(bias_pieces):
            db = rows_sum(d_NO, bias_pieces)
        return dx, dw, db, None, None, None


def routed_linear(
    x: Float[Tensor, "*N I"],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    write_out: WeightedRanges | None = None,
    write_in: WeightedRanges | None = None,
    write_bias: WeightedRanges | None = None,
    transposed: bool = False,
) -> Float[Tensor, "*N O"]:
    """Apply a linear layer whose weights receive gradients weighted by token.

    Args:
        x: Inputs; all dimensions but the last are tokens.
        weight: [O, I], or [I, O] where `transposed`, as in `Conv1D`.
        bias: [O] or None.
        write_out: Token weights by slice of the outputs.
        write_in: Token weights by slice of the inputs; at most one of the two.
        write_bias: Token weights by slice of the bias; None takes `write_out`.
        transposed: Whether the weight is stored as (in, out).

    Returns:
        The outputs, bit-equal to the plain layer's. A weight whose tokens all weigh 0 gets no
        gradient at all (None).

    Raises:
        ValueError: If both sides of the weight are sliced.
    """
    ins, outs = weight.shape if transposed else weight.shape[::-1]
    sliced, write_bias = _sliced(outs, write_out, write_in, write_bias)
    assert sliced[0][-1][1] == (ins if sliced[1] else outs), "slices must cover"
    x, weight, bias = _autocast(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias, sliced, write_bias, transposed)
    return y


def _sliced(
    outs: int,
    write_out: WeightedRanges | None,
    write_in: WeightedRanges | None,
    write_bias: WeightedRanges | None,
) -> tuple[tuple[WeightedRanges, bool], WeightedRanges]:
    """Return pieces of a weight with whether they slice its inputs, and pieces of its bias."""
    if write_out is not None and write_in is not None:
        raise ValueError("a weight is sliced along its outputs or its inputs, not both")
    whole: WeightedRanges = ((0, outs, None),)
    sliced = (write_out or whole, False) if write_in is None else (write_in, True)
    return sliced, write_bias or write_out or whole


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands of a matrix product in the dtype that autocast gives it."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _Columns(torch.autograd.Function):
    """Weights of columns in the forward pass and on the way back."""

    @staticmethod
    def forward(ctx: Saved, x: Tensor, read: WeightedRanges | None, back: WeightedRanges) -> Tensor:
        """Return the read columns."""
        ctx.back = back
        if read is None:
            return x.view_as(x)
        return scaled(x.reshape(-1, x.shape[-1]), read).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Weigh what passes back."""
        flat = delta.reshape(-1, delta.shape[-1])
        return scaled(flat, ctx.back).view(delta.shape), None, None


def scale_columns(x: Tensor, read: WeightedRanges | None, edge: WeightedRanges | None) -> Tensor:
    """Weigh columns of an activation: in the forward pass (`read`), on the way back (`edge`).

    Args:
        x: Activation; all dimensions but the last are tokens.
        read: Weights of the values; the gradient is that of the masked function.
        edge: Weights of the gradient that leaves the activation; fractional or negative ones
            too. Where both are given they have the same slices.
    """
    read = None if read is None or trivial(read) else read
    edge = None if edge is None or trivial(edge) else edge
    if read is None and edge is None:
        return x
    if read is not None and edge is not None:
        back: WeightedRanges = times(read, edge)
    else:
        back = read if edge is None else edge  # type: ignore[assignment]
    y: Tensor = _Columns.apply(x, read, back)
    return y


class _Scale(torch.autograd.Function):
    """The identity with a weighted gradient."""

    @staticmethod
    def forward(ctx: Saved, x: Tensor, weight: Tensor) -> Tensor:
        """Return the input."""
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Weigh the gradient."""
        return delta * ctx.weight.to(delta.dtype), None


def scale_grad(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x` as it is, with its gradient multiplied by `weight` on the way back.

    Args:
        x: Any tensor.
        weight: Broadcasts against `x`, such as [N, 1] or [B, 1, 1, 1].
    """
    y: Tensor = _Scale.apply(x, weight)
    return y


class _Value(torch.autograd.Function):
    """The gradient of one computation with the value of another."""

    @staticmethod
    def forward(ctx: Saved, x: Tensor, value: Tensor) -> Tensor:
        """Return the value."""
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Pass the gradient on."""
        return delta, None


def with_value(x: Tensor, value: Tensor) -> Tensor:
    """Return `value`, whose gradient is that of `x`; both have one shape."""
    y: Tensor = _Value.apply(x, value)
    return y


class _Conv2d(torch.autograd.Function):
    """Convolution whose weight gradient is weighted by image."""

    @staticmethod
    def forward(
        ctx: Saved,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sliced: tuple[WeightedRanges, bool],
        bias_pieces: WeightedRanges,
        how: tuple[Any, ...],
    ) -> Tensor:
        """Compute like the plain layer."""
        ctx.save_for_backward(x, weight)
        ctx.plan = (sliced, bias_pieces, how)
        stride, padding, dilation, groups = how
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Return the true gradient of the input, weighted ones of weight and bias."""
        x, weight = ctx.saved_tensors
        (pieces, of_inputs), bias_pieces, (stride, padding, dilation, groups) = ctx.plan

        def conv(d: Tensor, x: Tensor, mask: list[bool]) -> Any:
            tail = (stride, padding, dilation, False, [0, 0], groups, mask)
            return torch.ops.aten.convolution_backward(d, x, weight, None, *tail)

        dx = dw = db = None
        want_w = ctx.needs_input_grad[1] and not nothing(pieces)
        if want_w and trivial(pieces):
            dx, dw, _ = conv(delta, x, [ctx.needs_input_grad[0], True, False])
        else:
            if ctx.needs_input_grad[0]:
                dx = conv(delta, x, [True, False, False])[0]
            if want_w and of_inputs:
                dw = conv(delta, _scale_channels(x, pieces), [False, True, False])[1]
            elif want_w:
                dw = conv(_scale_channels(delta, pieces), x, [False, True, False])[1]
        if ctx.needs_input_grad[2] and not nothing(bias_pieces):
            db = rows_sum(delta.sum((2, 3)), bias_pieces)
        return dx, dw, db, None, None, None


def _scale_channels(x_BCHW: Tensor, pieces: WeightedRanges) -> Tensor:
    """Return channels times the weights of each image, in a new tensor."""
    shape = x_BCHW.shape
    per_BC = torch.ones(shape[:2], dtype=x_BCHW.dtype, device=x_BCHW.device)
    return x_BCHW * scaled(per_BC, pieces).view(*shape[:2], *(1,) * (x_BCHW.dim() - 2))


def routed_conv2d(
    x: Float[Tensor, "B C H W"],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    write_out: WeightedRanges | None = None,
    write_in: WeightedRanges | None = None,
    write_bias: WeightedRanges | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Apply a convolution whose weights receive gradients weighted by image.

    Args:
        x: Images.
        weight: [out, in / groups, height, width].
        bias: [out] or None.
        write_out: Weights of images by slice of the output channels.
        write_in: The same by slice of the input channels; at most one of the two.
        write_bias: The same by slice of the bias; None takes `write_out`.
        stride: As `F.conv2d`.
        padding: As `F.conv2d`, as numbers.
        dilation: As `F.conv2d`.
        groups: As `F.conv2d`.

    Returns:
        The outputs, bit-equal to the plain layer's.

    Raises:
        ValueError: If both sides of the weight are sliced.
    """
    sliced, write_bias = _sliced(weight.shape[0], write_out, write_in, write_bias)
    x, weight, bias = _autocast(x, weight, bias)
    how = (list(stride), list(padding), list(dilation), groups)
    y: Tensor = _Conv2d.apply(x, weight, bias, sliced, write_bias, how)
    return y


class _LayerNorm(torch.autograd.Function):
    """Layer norm with weighted gradients of weight and bias."""

    @staticmethod
    def forward(
        ctx: Saved,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        pieces: tuple[WeightedRanges, WeightedRanges],
    ) -> Tensor:
        """Compute like the plain layer."""
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias, ctx.pieces = bias, pieces
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Return the true gradient of the input, weighted ones of weight and bias."""
        x, weight, mean, rstd = ctx.saved_tensors
        of_weight, of_bias = ctx.pieces
        delta = delta.contiguous()
        flat = delta.reshape(-1, delta.shape[-1])
        back = torch.ops.aten.native_layer_norm_backward
        rest = (weight.shape, mean, rstd, weight, ctx.bias)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = back(delta, x, *rest, [True, False, False])[0]
        if ctx.needs_input_grad[1] and not nothing(of_weight):
            part = delta if trivial(of_weight) else scaled(flat, of_weight).view(delta.shape)
            dw = back(part, x, *rest, [False, True, False])[1]
        if ctx.needs_input_grad[2] and not nothing(of_bias):
            db = rows_sum(flat, of_bias)
        return dx, dw, db, None, None


def routed_layer_norm(
    x: Tensor, module: nn.LayerNorm, weight: WeightedRanges, bias: WeightedRanges
) -> Tensor:
    """Apply a layer norm over the last dimension with weighted gradients of its weights.

    Args:
        x: Inputs; all dimensions but the last are tokens.
        module: The norm.
        weight: Token weights by slice of the weight.
        bias: Token weights by slice of the bias.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    y: Tensor = _LayerNorm.apply(x, module.weight, module.bias, module.eps, (weight, bias))
    return y


class _BatchNorm(torch.autograd.Function):
    """Batch norm with weighted gradients of weight and bias."""

    @staticmethod
    def forward(
        ctx: Saved,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        state: tuple[Tensor | None, Tensor | None, bool, float, float],
        pieces: tuple[WeightedRanges, WeightedRanges],
    ) -> Tensor:
        """Compute like the plain layer, running statistics included."""
        mean, var, training, momentum, eps = state
        y, save_mean, save_rstd = torch.native_batch_norm(
            x, weight, bias, mean, var, training, momentum, eps
        )
        ctx.save_for_backward(x, weight, save_mean, save_rstd)
        # In training the backward pass reads the saved statistics alone, which later calls keep.
        ctx.state = (None, None, True, eps) if training else (mean, var, False, eps)
        ctx.pieces = pieces
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Return the true gradient of the input, weighted ones of weight and bias."""
        x, weight, save_mean, save_rstd = ctx.saved_tensors
        mean, var, training, eps = ctx.state
        of_weight, of_bias = ctx.pieces

        def back(d: Tensor, mask: list[bool]) -> Any:
            return torch.ops.aten.native_batch_norm_backward(
                d.contiguous(), x, weight, mean, var, save_mean, save_rstd, training, eps, mask
            )

        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = back(delta, [True, False, False])[0]
        if ctx.needs_input_grad[1] and not nothing(of_weight):
            part = delta if trivial(of_weight) else _scale_channels(delta, of_weight)
            dw = back(part, [False, True, False])[1]
        if ctx.needs_input_grad[2] and not nothing(of_bias):
            db = rows_sum(delta.flatten(2).sum(2) if delta.dim() > 2 else delta, of_bias)
        return dx, dw, db, None, None


def routed_batch_norm(
    x: Tensor, module: nn.BatchNorm1d | nn.BatchNorm2d, weight: WeightedRanges, bias: WeightedRanges
) -> Tensor:
    """Apply a batch norm with weighted gradients of its weights.

    The statistics mix the images of a batch, so the weights act on each image's own term of the
    gradient.

    Args:
        x: [B, C, ...].
        module: The norm; its running statistics move as in the plain layer.
        weight: Weights of images by slice of the weight.
        bias: Weights of images by slice of the bias.
    """
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats:
        assert module.num_batches_tracked is not None
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    training = module.training or module.running_mean is None
    tracked = not module.training or module.track_running_stats
    mean, var = (module.running_mean, module.running_var) if tracked else (None, None)
    state = (mean, var, training, momentum, module.eps)
    y: Tensor = _BatchNorm.apply(x, module.weight, module.bias, state, (weight, bias))
    return y


class _Spread(torch.autograd.Function):
    """A vector of weights laid over tokens, whose gradient is summed with token weights."""

    @staticmethod
    def forward(
        ctx: Saved, weight: Tensor, lead: tuple[int, ...], count: int, pieces: WeightedRanges
    ) -> Tensor:
        """Return a view."""
        ctx.plan = (count, pieces)
        return weight.expand(*lead, *weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Sum over what lies within a token, then over tokens with their weights."""
        count, pieces = ctx.plan
        if nothing(pieces):
            return None, None, None, None
        inner = delta.reshape(count, -1, delta.shape[-1])
        flat = inner[:, 0] if inner.shape[1] == 1 else inner.sum(1)
        return rows_sum(flat, pieces), None, None, None


def spread(weight_D: Tensor, lead: tuple[int, ...], count: int, pieces: WeightedRanges) -> Tensor:
    """Return a weight vector laid over tokens, for norms that multiply by it.

    Args:
        weight_D: The weights.
        lead: Shape of the input but its last dimension; tokens first.
        count: Number of tokens.
        pieces: Token weights by slice.
    """
    y: Tensor = _Spread.apply(weight_D, lead, count, pieces)
    return y


# Any other module: its values once, its weights' gradients from further, detached calls.


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
    constants = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    with instead(module, constants):
        yield


class _Only(torch.autograd.Function):
    """A parameter of which only some slices receive a gradient."""

    @staticmethod
    def forward(ctx: Saved, x: Tensor, dim: int, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Return the parameter."""
        ctx.plan = (dim, spans)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Keep the slices, zero the rest."""
        dim, spans = ctx.plan
        dx = torch.zeros_like(delta)
        for start, stop in spans:
            dx.narrow(dim, start, stop - start).copy_(delta.narrow(dim, start, stop - start))
        return dx, None, None


class _Join(torch.autograd.Function):
    """One value computed several times: each computation gets its own share of the gradient."""

    @staticmethod
    def forward(ctx: Saved, weights: Sequence[Tensor], *same: Tensor) -> Tensor:
        """Return the first."""
        ctx.weights = weights
        return same[0].view_as(same[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Saved, delta: Tensor) -> Any:
        """Give the first the gradient as it is, each other one the weighted gradient."""
        parts = [delta * w.to(delta.dtype) for w in ctx.weights]
        return None, delta, *parts


Owners = Mapping[str, tuple[int | None, WeightedRanges]]
"""By a module's own parameter: the dimension that is sliced (None for the whole), weights."""


def routed_call(
    module: nn.Module,
    forward: Callable[..., Any],
    owners: Owners,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
    path: str = "a module",
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
        path: The module's name for messages.

    Returns:
        What the module returns, bit-equal.

    Raises:
        UserError: If an output does not begin with the tokens whose labels were given.
    """
    spans: dict[int, tuple[Weight | None, dict[str, list[tuple[int, int]]]]] = {}
    for name, (_, pieces) in owners.items():
        for start, stop, weight in pieces:
            if weight is None or not weight.zero:
                of_weight = spans.setdefault(id(weight), (weight, {}))[1]
                of_weight.setdefault(name, []).append((start, stop))
    live = spans.pop(id(None), (None, {}))[1]
    device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
    before = random_states(device) if spans else {}
    with instead(module, _values(module, owners, live)):
        first = forward(*args, **kwargs)
    if not spans or not torch.is_grad_enabled():
        return first
    flat, spec = tree.tree_flatten(first)
    repeats = []
    frozen_args, frozen_kwargs = tree.tree_map_only(
        Tensor, torch.detach, (tuple(args), dict(kwargs))
    )
    after = random_states(device)
    for weight, of_weight in spans.values():
        assert weight is not None
        set_random_states(before)
        with alone(), instead(module, _values(module, owners, of_weight)):
            repeats.append((weight, tree.tree_leaves(forward(*frozen_args, **frozen_kwargs))))
    set_random_states(after)
    for i, value in enumerate(flat):
        if isinstance(value, Tensor) and value.is_floating_point():
            same = [(w, leaves[i]) for w, leaves in repeats if leaves[i].requires_grad]
            if same:
                weights = [_along(weight, value, path) for weight, _ in same]
                flat[i] = _Join.apply(weights, value, *(leaf for _, leaf in same))
    return tree.tree_unflatten(flat, spec)


def _along(weight: Weight, like: Tensor, path: str) -> Tensor:
    """Return token weights in the shape that broadcasts against an output."""
    values_N, count = weight.values_N, 1
    for used, size in enumerate(like.shape, 1):
        count *= size
        if count == len(values_N):
            return values_N.view(*like.shape[:used], *(1,) * (like.dim() - used))
    raise UserError(
        f"an output of {path} has shape {tuple(like.shape)}, which does not begin with the "
        f"{len(values_N)} tokens whose labels were given; let every label write that group"
    )


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
