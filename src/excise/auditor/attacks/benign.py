"""Benign fine-tuning: train on text that has nothing to do with the capability.

What returns here was never gone: no information about it was given. Repair looks the same in
the forget score, so the retain score stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Attack, AttackResult, Budget, Subject
from excise.auditor.results import decided
from excise.auditor.scoring import evaluation_set, more_is_known
from excise.auditor.tuning import Part, Trained, train
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Benign(Attack):
    """Full-parameter fine-tuning on the attacker's share of retain alone."""

    name: Literal["benign"] = "benign"
    """Name of the attack."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    source: ClassVar[str] = "arXiv 2409.18025"
    version: ClassVar[int] = 1

    def parts(self, budget: Budget) -> tuple[Part, ...]:
        """Return the trainings of a budget: every rate and seed, all parameters."""
        rates = budget.benign_rates or budget.rates
        return tuple(Part("full", lr, seed) for lr in rates for seed in budget.seeds)

    def train_part(
        self, part: Part, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> Trained:
        """Run one training on benign rows; arguments as in `Relearn.train_part`."""
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        return train(part, subject, evaluation, ctx, rows=(), benign_share=1.0, clip=self.clip)

    def read_parts(
        self, trained: Sequence[Trained], subject: Subject, budget: Budget, higher: bool
    ) -> AttackResult:
        """Report V after benign training; the rate chosen on `dev` decides."""
        raw = [t.variant(self, subject, trained_on="benign") for t in trained]
        variants, chosen = decided(raw, higher=higher)
        seconds = sum(t.seconds for t in trained)
        return AttackResult(self.name, subject.name, variants, chosen, seconds)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Train every part and report V."""
        start = time.perf_counter()
        trained = [self.train_part(p, subject, domain, budget, ctx) for p in self.parts(budget)]
        result = self.read_parts(trained, subject, budget, more_is_known(domain))
        return replace(result, seconds=time.perf_counter() - start)
