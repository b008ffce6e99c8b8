"""Norms whose weights receive gradients weighted by token, without a second forward pass.

Shape legend: N tokens (or images), D width, B images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from excise.routing.ops import scale_channels
from excise.routing.weights import Piece, nothing, rows_sum, scaled, trivial

Pieces = Sequence[Piece]
Ctx = Any


class _LayerNorm(torch.autograd.Function):
    """Layer norm with weighted gradients of weight and bias."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        pieces: tuple[Pieces, Pieces],
    ) -> Tensor:
        """Compute like the plain layer."""
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias, ctx.pieces = bias, pieces
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, delta: Tensor) -> Any:
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


def routed_layer_norm(x: Tensor, module: nn.LayerNorm, weight: Pieces, bias: Pieces) -> Tensor:
    """Apply a layer norm over the last dimension with weighted gradients of its weights.

    Args:
        x: Inputs; all dimensions but the last are tokens.
        module: The norm.
        weight: Token weights by slice of the weight.
        bias: Token weights by slice of the bias.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    out: Tensor = _LayerNorm.apply(x, module.weight, module.bias, module.eps, (weight, bias))
    return out


class _BatchNorm(torch.autograd.Function):
    """Batch norm with weighted gradients of weight and bias."""

    @staticmethod
    def forward(
        ctx: Ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        state: tuple[Tensor | None, Tensor | None, bool, float, float],
        pieces: tuple[Pieces, Pieces],
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
    def backward(ctx: Ctx, delta: Tensor) -> Any:
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
            part = delta if trivial(of_weight) else scale_channels(delta, of_weight)
            dw = back(part, [False, True, False])[1]
        if ctx.needs_input_grad[2] and not nothing(of_bias):
            db = rows_sum(delta.flatten(2).sum(2) if delta.dim() > 2 else delta, of_bias)
        return dx, dw, db, None, None


def routed_batch_norm(
    x: Tensor, module: nn.BatchNorm1d | nn.BatchNorm2d, weight: Pieces, bias: Pieces
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
    kept = not module.training or module.track_running_stats
    mean, var = (module.running_mean, module.running_var) if kept else (None, None)
    state = (mean, var, training, momentum, module.eps)
    out: Tensor = _BatchNorm.apply(x, module.weight, module.bias, state, (weight, bias))
    return out


class _Spread(torch.autograd.Function):
    """A vector of weights laid over tokens, whose gradient is summed with token weights."""

    @staticmethod
    def forward(
        ctx: Ctx, weight: Tensor, lead: tuple[int, ...], count: int, pieces: Pieces
    ) -> Tensor:
        """Return a view."""
        ctx.plan = (count, pieces)
        return weight.expand(*lead, *weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx, delta: Tensor) -> Any:
        """Sum over what lies within a token, then over tokens with their weights."""
        count, pieces = ctx.plan
        if nothing(pieces):
            return None, None, None, None
        inner = delta.reshape(count, -1, delta.shape[-1])
        flat = inner[:, 0] if inner.shape[1] == 1 else inner.sum(1)
        return rows_sum(flat, pieces), None, None, None


def spread(weight_D: Tensor, lead: tuple[int, ...], count: int, pieces: Pieces) -> Tensor:
    """Return a weight vector laid over tokens, for norms that multiply by it.

    Args:
        weight_D: The weights.
        lead: Shape of the input but its last dimension; tokens first.
        count: Number of tokens.
        pieces: Token weights by slice.
    """
    out: Tensor = _Spread.apply(weight_D, lead, count, pieces)
    return out
