"""GradDiff: ascend on forget, descend on retain.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch
from excise.losses import nll
from excise.methods.base import Method, Paper, Removal
from excise.methods.tuning import forget_and_retain, tune
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA
from excise.train.fit import FitConfig, Term


class GradDiff(Method):
    """Minimise -NLL(forget) + alpha NLL(retain)."""

    name: Literal["grad_diff"] = "grad_diff"
    alpha: float = 1.0
    """Weight of the retain loss."""
    fit: FitConfig = FitConfig(steps=100, lr=6e-5, batch_size=8, clip=1.0)
    """Steps, rows per step of each role, learning rate."""
    modules: tuple[str, ...] = ()
    """Modules to train, by name; empty for all."""
    max_length: int = 512
    """Tokens per row."""
    lora: LoRA | None = None
    """Train an adapter instead."""

    version: ClassVar[int] = 1
    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning (GradDiff: Liu et al. 2022, Maini et al. 2024)",
        "arXiv:2506.06278",
        "L = -CE(forget) + a CE(retain)",
        "AddieFoote/distillation-robustify-unlearning",
        {
            "fit": "language setting: 100 steps, lr 6e-5 chosen of 1e-5..8e-5",
            "alpha": "language: 1",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by descending on the difference of the two losses."""
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer = start.tokenizer()
        batches = forget_and_retain(domain, tokenizer, self.fit, ctx, max_length=self.max_length)

        def loss(model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
            forget, retain = micro["forget"], micro["retain"]
            forget_sum, forget_count = nll(model(**forget.inputs).logits, forget)
            retain_sum, retain_count = nll(model(**retain.inputs).logits, retain)
            return {
                "forget": Term(forget_sum, forget_count, -1.0),
                "retain": Term(retain_sum, retain_count, self.alpha),
            }

        return tune(
            start,
            model,
            batches,
            loss,
            self.fit,
            ctx,
            stage=self.name,
            modules=self.modules,
            lora=self.lora,
        )
