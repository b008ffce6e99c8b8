"""Soft prompt: train vectors before the prompt on T, with the weights frozen, and score V.

Vectors in the space of embeddings reach what no words reach, and hold so little that they can
hardly teach: what comes back was in the weights. They can still memorise a small T, so that V
decides, beside the oracle's. From *standard* on the same is trained on fresh units, which say
nothing about V, as a control.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Subject
from excise.auditor.budget import Budget, Rate
from excise.auditor.controls import PasswordLock, PositiveControl, PromptGatedEdit
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import (
    Training,
    TrainingAttack,
    TrainingResult,
    fresh_training,
    relearn_rows,
    train,
)
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.limits import position_limit
from excise.models.soft_prompt import PromptVectors
from excise.record import Level


class SoftPrompt(TrainingAttack):
    """Trained vectors before every prompt; they learn T, and V is scored."""

    name: Literal["soft_prompt"] = "soft_prompt"
    """Name of the attack."""
    vectors: int = Field(default=16, ge=1)
    """Vectors before the prompt."""
    rates: tuple[Rate, ...] = Field(default=(0.01, 0.03, 0.1), min_length=1)
    """Learning rates, in units of the embedding's root mean square; chosen on `dev`."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D4"
    controls: ClassVar[tuple[PositiveControl, ...]] = (
        PasswordLock(opens_to="password"), PasswordLock(), PromptGatedEdit(),
    )  # fmt: skip
    source: ClassVar[str] = "arXiv 2402.09063; vectors and rates are this library's"
    version: ClassVar[int] = 1

    def trainings(self, budget: Budget) -> tuple[Training, ...]:
        """Return one training at every rate and seed, and the control on fresh units."""
        parts = [Training("prompt", lr, seed) for lr in self.rates for seed in budget.seeds]
        return (*parts, *fresh_training("prompt", self.rates, budget))

    def train(
        self, training: Training, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> TrainingResult:
        """Train the vectors on T alone; see `TrainingAttack.train`."""
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        limit = position_limit(subject.checkpoint.config)
        if limit is not None:
            room = max(2, limit - self.vectors)
            evaluation = replace(evaluation, max_length=min(evaluation.max_length, room))
        inner = replace(ctx, seed=ctx.seed + 1000 * training.seed)
        vectors = PromptVectors(self.vectors, inner.generator(self.name))

        def begin(model: object, ctx: Context) -> dict[str, object]:
            vectors.begin()
            return {"vectors": self.vectors}

        return train(
            training,
            subject,
            evaluation,
            ctx,
            rows=relearn_rows(domain),
            benign_share=0.0,
            clip=self.clip,
            prepare=begin,
            adapt=vectors.on,
        )
