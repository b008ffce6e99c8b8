"""The backward passes of gradient routing: true gradients for inputs, weighted ones for weights.

Values are bit-equal to those of the plain layers. Under parameter edges the input gradient is the
true one and only what is written into the weights is weighted, token by token; edges that leave
an activation weigh what passes back through it; a forward mask changes values and gradients.

Shape legend: N tokens (or images), I inputs, O outputs, B images, C channels, H and W image sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from excise.routing.weights import Piece, nothing, outer, rows_sum, scaled, times, trivial

Pieces = Sequence[Piece]
Ctx = Any
"""What `torch.autograd.Function` passes; its stubs are loose."""


class _Linear(torch.autograd.Function):
    """Affine map whose weight gradient is weighted by token."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sliced: tuple[Pieces, bool],
        bias_pieces: Pieces | None,
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
    def backward(ctx: Ctx, delta: Tensor) -> Any:
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
    write_out: Pieces | None = None,
    write_in: Pieces | None = None,
    write_bias: Pieces | None = None,
    read_in: Pieces | None = None,
    edge_in: Pieces | None = None,
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
        read_in: Weights of the inputs in the forward pass.
        edge_in: Weights of the gradient that passes back through the inputs.
        transposed: Whether the weight is stored as (in, out).

    Returns:
        The outputs, bit-equal to the plain layer's on the (read) inputs. A weight whose tokens
        all weigh 0 gets no gradient at all (None).

    Raises:
        ValueError: If both sides of the weight are sliced.
    """
    if write_out is not None and write_in is not None:
        raise ValueError("a weight is sliced along its outputs or its inputs, not both")
    x = scale_columns(x, read_in, edge_in)
    ins, outs = weight.shape if transposed else weight.shape[::-1]
    if write_in is not None:
        sliced: tuple[Pieces, bool] = (write_in, True)
    else:
        sliced = (write_out or ((0, outs, None),), False)
    if write_bias is None:
        write_bias = write_out or ((0, outs, None),)
    assert sliced[0][-1][1] == (ins if write_in is not None else outs), "slices must cover"
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    out: Tensor = _Linear.apply(x, weight, bias, sliced, write_bias, transposed)
    return out


class _Columns(torch.autograd.Function):
    """Weights of columns in the forward pass and on the way back."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, read: Pieces | None, back: Pieces) -> Tensor:
        """Return the read columns."""
        ctx.back = back
        if read is None:
            return x.view_as(x)
        return scaled(x.reshape(-1, x.shape[-1]), read).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, delta: Tensor) -> Any:
        """Weigh what passes back."""
        flat = delta.reshape(-1, delta.shape[-1])
        return scaled(flat, ctx.back).view(delta.shape), None, None


def scale_columns(x: Tensor, read: Pieces | None, edge: Pieces | None) -> Tensor:
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
        back: Pieces = times(read, edge)
    else:
        back = read if edge is None else edge  # type: ignore[assignment]
    out: Tensor = _Columns.apply(x, read, back)
    return out


def scale_grad(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x` as it is, with its gradient multiplied by `weight` on the way back.

    Args:
        x: Any tensor.
        weight: Broadcasts against `x`, such as [N, 1] or [B, 1, 1, 1].
    """
    out: Tensor = _Scale.apply(x, weight)
    return out


class _Scale(torch.autograd.Function):
    """The identity with a weighted gradient."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, weight: Tensor) -> Tensor:
        """Return the input."""
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, delta: Tensor) -> Any:
        """Weigh the gradient."""
        return delta * ctx.weight.to(delta.dtype), None


class _Conv2d(torch.autograd.Function):
    """Convolution whose weight gradient is weighted by image."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sliced: tuple[Pieces, bool],
        bias_pieces: Pieces,
        how: tuple[Any, ...],
    ) -> Tensor:
        """Compute like the plain layer."""
        ctx.save_for_backward(x, weight)
        ctx.plan = (sliced, bias_pieces, how)
        stride, padding, dilation, groups = how
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, delta: Tensor) -> Any:
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
                dw = conv(delta, scale_channels(x, pieces), [False, True, False])[1]
            elif want_w:
                dw = conv(scale_channels(delta, pieces), x, [False, True, False])[1]
        if ctx.needs_input_grad[2] and not nothing(bias_pieces):
            db = rows_sum(delta.sum((2, 3)), bias_pieces)
        return dx, dw, db, None, None, None


def scale_channels(x_BCHW: Tensor, pieces: Pieces) -> Tensor:
    """Return channels times the weights of each image, in a new tensor."""
    shape = x_BCHW.shape
    per_BC = torch.ones(shape[:2], dtype=x_BCHW.dtype, device=x_BCHW.device)
    return x_BCHW * scaled(per_BC, pieces).view(*shape[:2], *(1,) * (x_BCHW.dim() - 2))


def routed_conv2d(
    x: Float[Tensor, "B C H W"],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    write_out: Pieces | None = None,
    write_in: Pieces | None = None,
    write_bias: Pieces | None = None,
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
    """
    if write_out is not None and write_in is not None:
        raise ValueError("a weight is sliced along its outputs or its inputs, not both")
    whole: Pieces = ((0, weight.shape[0], None),)
    sliced = (write_in, True) if write_in is not None else (write_out or whole, False)
    write_bias = write_bias or write_out or whole
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    how = (list(stride), list(padding), list(dilation), groups)
    out: Tensor = _Conv2d.apply(x, weight, bias, sliced, write_bias, how)
    return out
