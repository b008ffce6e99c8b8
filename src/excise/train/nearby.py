"""Gradients at other points than the weights; sharpness-aware unlearning takes one.

    g   =  gradient of the forget loss at theta
    g'  =  gradient of the forget loss at theta + rho g / |g|
    r   =  gradient of everything else at theta
    the optimizer steps theta along g' + r

Source:
    Fan et al. 2025, "Towards LLM unlearning resilient to relearning attacks", arXiv 2502.05374;
    OPTML-Group/Unlearn-Smooth@fc655ba (MIT), WMDP/src/unlearn/base.py, `SAMTrainer`. There the
    perturbation is added to bfloat16 weights and taken away again, and both round; here the
    weights come back to the bit, and half precision is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.train.fit import Losses, Passes


def sharpness_aware(
    radius: float, role: str = "forget"
) -> Callable[[Passes[Mapping[str, Batch]]], Losses]:
    """Return a gradient for `fit` whose loss takes micro-batches that hold only some roles.

    Args:
        radius: rho, the length of the step towards the worst point.
        role: Whose loss is taken there; all other roles are read at the weights themselves.
    """

    def gradient(passes: Passes[Mapping[str, Batch]]) -> Losses:
        forget = [{role: micro[role]} for micro in passes.micros]
        rest = [{r: b for r, b in micro.items() if r != role} for micro in passes.micros]
        passes.backward(forget)
        ascent = passes.take()
        norm = norm_of(ascent)
        with passes.elsewhere():
            if norm > 0:
                move(passes, [(ascent, radius / norm)])
            del ascent
            losses = passes.backward(forget)
        moved = passes.take()
        losses += passes.backward(rest)
        put(passes, moved)
        return losses

    return gradient


def refuse_half(model: nn.Module, parameters: Iterable[nn.Parameter], what: str) -> None:
    """Refuse weights in which a small move would be rounded away.

    Args:
        model: Told apart in the sentence by its number of parameters.
        parameters: What is moved.
        what: The setting that moves them.

    Raises:
        UserError: If one of them is in half precision.
    """
    half = {p.dtype for p in parameters} & {torch.float16, torch.bfloat16}
    if half:
        count = sum(p.numel() for p in model.parameters())
        raise UserError(
            f"{what} moves {count:,} weights by so little that {str(half.pop())[6:]} would round "
            "it away; run it with --dtype float32, or train an adapter"
        )


def norm_of(gradients: Iterable[Tensor | None]) -> float:
    """Return the norm of all gradients together."""
    norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@torch.no_grad()
def move(passes: Passes[Any], steps: Iterable[tuple[Iterable[Tensor | None], float]]) -> None:
    """Move the weights along directions, each of them times its factor."""
    for direction, factor in steps:
        for weight, part in zip(passes.weights, direction, strict=True):
            if part is not None:
                weight.add_(part, alpha=factor)
    passes.publish()


@torch.no_grad()
def plus(
    total: Sequence[Tensor | None], gradients: Sequence[Tensor | None], factor: float = 1.0
) -> list[Tensor | None]:
    """Return a sum of gradients and others times a factor, in the memory of the first.

    Args:
        total: One gradient for each weight; None for none.
        gradients: What is added; where there was none it is taken as it is.
        factor: What it is multiplied by.
    """
    sums: list[Tensor | None] = []
    for old, new in zip(total, gradients, strict=True):
        if old is None or new is None:
            sums.append(old if new is None else new.mul_(factor))
        else:
            sums.append(old.add_(new, alpha=factor))
    return sums


def put(passes: Passes[Any], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to those that the weights have."""
    sums = plus([weight.grad for weight in passes.weights], gradients)
    for weight, gradient in zip(passes.weights, sums, strict=True):
        weight.grad = gradient
