"""Weights are changed at random, and a short benign fine-tuning repairs what that broke.

What returns was never gone: neither the change nor the benign text says anything about the
capability. The curve begins with two points that cost nothing, the model as it was and as it was
changed, so that a change that brings the capability back by itself shows too. Positive controls
say that change and repair together have power; nobody knows a hiding that random numbers undo.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from pydantic import Field

from excise.auditor.base import Subject
from excise.auditor.budget import Budget
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import Prepare, Training, TrainingAttack, TrainingResult, train
from excise.core.context import Context
from excise.data.domain import Domain


class RepairAttack(TrainingAttack):
    """Full-parameter fine-tuning on benign rows alone, from weights that were changed before.

    Subclasses say what is changed. Each change is repaired at one rate, the middle one of the
    budget's benign rates, because a change is no better known at another.
    """

    repair_steps: int = Field(default=64, ge=1)
    """Steps of the repair, or those of the budget where it has fewer: a quarter of those of benign
    fine-tuning at *standard*."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient."""

    @abstractmethod
    def changes(self) -> Mapping[str, Prepare]:
        """Return what is done to the weights, by the name of the variant."""

    def trainings(self, budget: Budget) -> tuple[Training, ...]:
        """Return one training for every change and seed."""
        rates = budget.benign_rates or budget.rates
        rate = rates[len(rates) // 2]
        return tuple(
            Training("full", rate, seed, "benign", start, self.repair_steps)
            for start in self.changes()
            for seed in budget.seeds
        )

    def train(
        self, training: Training, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> TrainingResult:
        """Change the weights and repair them on benign rows; see `TrainingAttack.train`."""
        return train(
            training,
            subject,
            evaluation_set(domain, budget, subject.checkpoint.tokenizer()),
            ctx,
            rows=(),
            benign_share=1.0,
            clip=self.clip,
            prepare=self.changes()[training.start],
        )
