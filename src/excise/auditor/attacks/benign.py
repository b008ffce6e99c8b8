"""Benign fine-tuning: train on text that has nothing to do with the capability.

What returns here was never gone: no information about it was given. Repair looks the same in
the forget score, so the retain score stands beside it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Subject
from excise.auditor.budget import Budget
from excise.auditor.controls import LogitScaling, PositiveControl, WeightPerturbation
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import Training, TrainingAttack, TrainingResult, train
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Benign(TrainingAttack):
    """Full-parameter fine-tuning on the attacker's share of retain alone."""

    name: Literal["benign"] = "benign"
    """Name of the attack."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (LogitScaling(), WeightPerturbation())
    source: ClassVar[str] = "arXiv 2409.18025"
    version: ClassVar[int] = 1

    def trainings(self, budget: Budget) -> tuple[Training, ...]:
        """Return one training of all parameters for every rate and seed."""
        rates = budget.benign_rates or budget.rates
        return tuple(Training("full", lr, seed, "benign") for lr in rates for seed in budget.seeds)

    def train(
        self, training: Training, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> TrainingResult:
        """Train on benign rows alone; see `TrainingAttack.train`."""
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        return train(training, subject, evaluation, ctx, rows=(), benign_share=1.0, clip=self.clip)
