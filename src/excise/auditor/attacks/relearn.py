"""Relearning: fine-tune on other units of the capability (T) and see what comes back.

One training serves two measurements. `relearn` scores what was trained on (T): it is shown, never
decisive, because a model that was taught noise must first unlearn the noise. `transfer`
(`transfer.py`) scores V, which the attacker never saw, after the very same training, and decides
the level. An audit that asks for both trains once: a training is a stage of its own, which
belongs to `Relearn` and not to its readers.

Cost of training on n tokens with N parameters: 6 N n floating-point operations for full
parameters (forward 2, backward 4). LoRA with M adapter parameters skips the gradients of the
frozen weights: 4 N n + 6 M n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl, ShortFineTuning
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import (
    Training,
    TrainingAttack,
    TrainingResult,
    rows_of,
    train,
    trainings_of,
)
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Relearn(TrainingAttack):
    """Fine-tune on the relearn set and benign text, half and half, and score the relearn set."""

    name: Literal["relearn"] = "relearn"
    """Name of the attack."""
    benign_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of every batch that is benign, so that repair is part of the attack."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank of the LoRA variants."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D4"
    controls: ClassVar[tuple[PositiveControl, ...]] = (ShortFineTuning(), GatedEdit())
    source: ClassVar[str] = "RTT, arXiv 2410.08827; UNDO, arXiv 2506.06278"
    version: ClassVar[int] = 1

    def trainings(self, budget: Budget) -> tuple[Training, ...]:
        """Return full and LoRA trainings, each at every rate and seed."""
        return trainings_of(budget)

    def train(
        self, training: Training, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> TrainingResult:
        """Train on T, or what is in its place, and benign rows; see `TrainingAttack.train`."""
        return train(
            training,
            subject,
            evaluation_set(domain, budget, subject.checkpoint.tokenizer()),
            ctx,
            rows=rows_of(training, domain),
            benign_share=self.benign_share,
            clip=self.clip,
            lora_rank=self.lora_rank,
        )

    def conclude(
        self, trained: Sequence[TrainingResult], subject: Subject, higher: bool
    ) -> AttackResult:
        """Report T: every variant is shown and none decides.

        `extras["chosen_on_dev"]` marks the rate that `transfer` decides at.
        """
        result = super().conclude(trained, subject, higher)
        shown = tuple(
            _on_t(variant, t, i in result.chosen)
            for i, (variant, t) in enumerate(zip(result.variants, trained, strict=True))
        )
        return replace(result, variants=shown, chosen=())


def _on_t(variant: VariantResult, trained: TrainingResult, chosen: bool) -> VariantResult:
    """Return the same variant read on T."""
    metric = str(trained.extras.get("trained_metric", trained.metric))
    changes = {"scored_on": "relearn", "decisive": False, "curve": trained.curve_on_t()}
    entry = variant.entry.model_copy(update={**changes, "metric": metric})
    extras = {**variant.extras, "chosen_on_dev": chosen}
    return replace(variant, entry=entry, unit_scores=trained.units_on_t(), extras=extras)
