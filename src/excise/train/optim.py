"""Optimizers as small objects over lists of tensors, with state that is easy to write down.

They step exactly like `torch.optim.AdamW` (single-tensor form), the `AdamW` that transformers
shipped until 4.50, and `torch.optim.SGD`; tests compare weights bit for bit. A tensor without a
gradient is not touched, not even by weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

OptimizerName = Literal["adamw", "hf_adamw", "sgd"]


@dataclass
class Optimizer:
    """The optimizer of one group of tensors.

    Attributes:
        name: Which rule.
        leaves: Tensors it steps: parameters, or their float32 masters.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled for both AdamWs, added to the gradient for SGD.
        steps: Steps each tensor has taken (a tensor without a gradient takes none).
        first: First moments, made when a tensor first steps.
        second: Second moments.
    """

    name: OptimizerName
    leaves: Sequence[Tensor]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    steps: list[int] = field(default_factory=list)
    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start every tensor at step 0."""
        self.steps = self.steps or [0] * len(self.leaves)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], lr: float) -> None:
        """Update every tensor that has a gradient.

        Args:
            grads: One gradient per tensor, or None.
            lr: Learning rate of this step.
        """
        for i, (leaf, grad) in enumerate(zip(self.leaves, grads, strict=True)):
            if grad is None:
                continue
            self.steps[i] += 1
            if self.name == "sgd":
                if self.weight_decay:
                    grad = grad.add(leaf, alpha=self.weight_decay)
                leaf.add_(grad, alpha=-lr)
                continue
            if i not in self.first:
                self.first[i] = torch.zeros_like(leaf)
                self.second[i] = torch.zeros_like(leaf)
            rule = _adamw if self.name == "adamw" else _hf_adamw
            rule(self, i, leaf, grad, lr)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments by name, for writing."""
        return {f"first/{i}": t for i, t in self.first.items()} | {
            f"second/{i}": t for i, t in self.second.items()
        }

    def restore(self, tensors: dict[str, Tensor], steps: Sequence[int]) -> None:
        """Take back what `tensors` and `steps` gave."""
        self.steps = list(steps)
        for name, tensor in tensors.items():
            kind, i = name.split("/")
            leaf = self.leaves[int(i)]
            moments = self.first if kind == "first" else self.second
            moments[int(i)] = tensor.to(device=leaf.device, dtype=leaf.dtype).clone()


def _adamw(state: Optimizer, i: int, leaf: Tensor, grad: Tensor, lr: float) -> None:
    """Step like `torch.optim.AdamW`: decay first, eps after the bias correction."""
    b1, b2 = state.betas
    first, second, t = state.first[i], state.second[i], state.steps[i]
    if state.weight_decay:
        leaf.mul_(1 - lr * state.weight_decay)
    first.lerp_(grad, 1 - b1)
    second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
    denominator = second.sqrt().div_((1 - b2**t) ** 0.5).add_(state.eps)
    leaf.addcdiv_(first, denominator, value=-(lr / (1 - b1**t)))


def _hf_adamw(state: Optimizer, i: int, leaf: Tensor, grad: Tensor, lr: float) -> None:
    """Step like transformers 4.38's AdamW: eps before the bias correction, decay last."""
    b1, b2 = state.betas
    first, second, t = state.first[i], state.second[i], state.steps[i]
    first.mul_(b1).add_(grad, alpha=1.0 - b1)
    second.mul_(b2).addcmul_(grad, grad, value=1.0 - b2)
    denominator = second.sqrt().add_(state.eps)
    size = lr * math.sqrt(1.0 - b2**t) / (1.0 - b1**t)
    leaf.addcdiv_(first, denominator, value=-size)
    if state.weight_decay:
        leaf.add_(leaf, alpha=-lr * state.weight_decay)


def schedule_share(
    step: int,
    steps: int,
    *,
    warmup: int,
    schedule: Literal["constant", "linear", "cosine"],
    min_lr: float,
) -> float:
    """Return the share of the learning rate used at `step`.

    Warm-up rises to the full rate at its last step, so that no step is wasted at rate 0; what
    follows falls from 1 towards `min_lr`, which it would reach at `steps`.

    Args:
        step: Step, from 0.
        steps: Steps in all.
        warmup: Steps of warm-up.
        schedule: Shape after warm-up.
        min_lr: Share reached at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return min_lr + (1 - min_lr) * (1 - progress)
    return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
