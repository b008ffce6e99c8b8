"""Task vector: learn the forget text better, then walk as far in the other direction.

    theta_f = theta_0, trained by AdamW on NLL(forget)
    for every trained tensor:
        theta = theta_0 - scale (theta_f - theta_0)

No retain text is read: what stays is left to `scale`. theta_0 is read from disk one tensor at a
time, so that one model is in memory. With an adapter the difference is the adapter, which is
negated instead.

Source:
    Ilharco et al. 2023, arXiv:2212.04089, section 3 (forgetting via negation), as baseline of MUSE;
    of adapters: Zhang et al. 2023, arXiv:2306.14870.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.methods.base import Paper, PostHoc, Removal
from excise.methods.tuning import (
    Progress,
    finish,
    nlls,
    role_batches,
    role_counts,
    run_fit,
    state_dir,
    tuned,
)
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA
from excise.models.names import Names, is_adapter
from excise.train.fit import FitConfig, fit


class TaskVector(PostHoc):
    """Fine-tune on forget text and subtract the difference."""

    name: Literal["task_vector"] = "task_vector"
    scale: float = Field(default=1.0, gt=0)
    """Lambda: how often the difference is subtracted."""
    fit: FitConfig = FitConfig(steps=100, lr=1e-5, batch_size=32, schedule="cosine")
    """Steps, rows per step, learning rate of the fine-tuning."""
    modules: Names = ()
    """Modules to train, by name; empty for all."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row."""
    lora: LoRA | None = None
    """Fine-tune an adapter and negate it, instead of the weights."""

    needs: ClassVar[tuple[str, ...]] = ("forget",)
    refuses: ClassVar[Mapping[str, str]] = {
        "stop": "while it trains it learns the forget rows, and `dev` says nothing of what their "
        "difference will do; choose 'scale' instead",
        **dict.fromkeys(("sam", "drop_components"), "what it trains is subtracted as it is"),
    }
    paper: ClassVar[Paper] = Paper(
        "Editing models with task arithmetic",
        "arXiv:2212.04089 (of adapters: arXiv:2306.14870)",
        "section 3: theta_new = theta - lambda (theta_ft - theta)",
        "jaechan-repo/muse_bench@54719c5 (no licence file)",
        {
            "scale": "baselines/unlearn.py --alpha 1.0; scripts/unlearn_bbc.sh runs 5.0, and the "
            "paper chooses up to 1 on validation data",
            "fit": "baselines/baselines/finetune.py: torch's AdamW, cosine; unlearn_bbc.sh: lr "
            "1e-5, 8 x 4 rows, 10 epochs, which are steps here",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by subtracting what learning it would add."""
        domain, quality = self.given(domain, ctx)
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        batches = role_batches(
            domain, ("forget",), start.tokenizer(), self.fit, ctx, max_length=self.max_length
        )

        progress = Progress(ctx, self.name, self.fit.steps)
        with tuned(model, self.modules, self.lora, ctx) as (live, parameters):
            groups = {"trained": list(parameters.values())}
            steps = fit(
                live, batches, nlls, self.fit, ctx, groups=groups, counts=role_counts,
                state_dir=state_dir(ctx),
            )  # fmt: skip
            run_fit(steps, progress)
            negate(parameters, start, self.scale)
            return finish(start, live, parameters, progress, ctx, lora=self.lora, extras=quality)


@torch.no_grad()
def negate(parameters: Mapping[str, nn.Parameter], start: Checkpoint, scale: float) -> None:
    """Turn fine-tuned parameters into the start minus `scale` times their difference, in place.

    Args:
        parameters: What was trained, by name: weights of `start`, or an adapter on it.
        start: Where they started; it is read one tensor at a time.
        scale: How often the difference is subtracted.
    """
    for name, parameter in parameters.items():
        if not is_adapter(name):
            before = start.weights_of([name])[name].to(parameter)
            parameter.copy_(before - scale * (parameter - before))
        elif ".lora_B." in name:  # the difference is the product of two matrices
            parameter.mul_(-scale)
