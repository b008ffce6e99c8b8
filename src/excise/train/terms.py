"""What goes into a training run and what comes out of each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from excise.core.config import Config
from excise.train.optim import OptimizerName, schedule_share


@dataclass(frozen=True)
class Term:
    """One named part of a loss.

    Attributes:
        sum: Differentiable scalar sum over what is scored in this micro-batch.
        count: How much that was; the sums of a step are divided by the sum of the counts.
        weight: Factor of the mean in the total; negative to ascend.
    """

    sum: Tensor
    count: float
    weight: float = 1.0


class FitConfig(Config):
    """How to train."""

    steps: int = Field(default=100, ge=0)
    """Optimizer steps."""
    lr: float = Field(default=1e-4, ge=0)
    """Learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per step over all processes."""
    micro_size: int = Field(default=0, ge=0)
    """Rows per micro-batch of one process at most; 0 for one micro-batch."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after warm-up."""
    min_lr: float = Field(default=0.0, ge=0, le=1)
    """Share of the learning rate at the end of the schedule."""
    optimizer: OptimizerName = "adamw"
    """`hf_adamw` is the AdamW of transformers up to 4.50, which published RMU used."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: float | None = None
    """Adam's epsilon; empty for 1e-8, or 1e-6 with `hf_adamw`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of every trained parameter."""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of the gradient over all stepped parameters; 0 for no clipping."""
    master: Literal["float32", "model"] = "float32"
    """Precision in which half-precision weights are kept while they train."""
    save_every: int = Field(default=0, ge=0)
    """Steps between states on disk; 0 for about one a minute."""
    log_every: int = Field(default=10, ge=1)
    """Steps between progress events."""

    @property
    def epsilon(self) -> float:
        """Adam's epsilon with its default filled in."""
        if self.eps is not None:
            return self.eps
        return 1e-6 if self.optimizer == "hf_adamw" else 1e-8

    def rate_at(self, step: int, lr: float | None = None) -> float:
        """Return the learning rate of `step` (from 0), for `lr` in place of the field."""
        share = schedule_share(
            step, self.steps, warmup=self.warmup, schedule=self.schedule, min_lr=self.min_lr
        )
        return (self.lr if lr is None else lr) * share


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all processes.

    Attributes:
        step: Number of the step, from 0.
        loss: Weighted sum of the terms.
        terms: Mean of every term, without its weight; a term that counted nothing is left out.
        lr: Learning rate.
        grad_norm: Norm of the gradient over all stepped parameters, before clipping.
        tokens: Real tokens read in this step.
        seconds: Wall-clock time of the step.
        replayed: True for steps done before an interruption: the weights are already beyond.
    """

    step: int
    loss: float
    terms: dict[str, float]
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    replayed: bool = False
