"""Transfer: train on T, score V. The decisive reading of relearning.

What the attacker trains on can be taught to any model. What comes back about units the attacker
never showed was in the weights, or follows from T for every model: hence V minus the oracle's.
The training is `Relearn`'s; see there why an audit that asks for both trains once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from excise.auditor.attacks.relearn import Relearn, variant_on_v
from excise.auditor.base import Access, Attack, AttackResult, Budget, Subject
from excise.auditor.results import decided
from excise.auditor.scoring import more_is_known
from excise.auditor.tuning import Part, Trained
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Transfer(Attack):
    """The relearning of T, read on V."""

    name: Literal["transfer"] = "transfer"
    """Name of the attack."""
    training: Relearn = Relearn()
    """The training that is read; equal settings are trained once."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D4"
    source: ClassVar[str] = "RTT, arXiv 2410.08827"
    version: ClassVar[int] = 1

    def parts(self, budget: Budget) -> tuple[Part, ...]:
        """Return the trainings of a budget; see `Relearn.parts`."""
        return self.training.parts(budget)

    def train_part(
        self, part: Part, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> Trained:
        """Run one training; see `Relearn.train_part`."""
        return self.training.train_part(part, subject, domain, budget, ctx)

    def read_parts(
        self, trained: Sequence[Trained], subject: Subject, budget: Budget, higher: bool
    ) -> AttackResult:
        """Report V, and let the rate chosen on `dev` decide.

        Args:
            trained: What `train_part` returned, for every part.
            subject: The model.
            budget: The budget.
            higher: Whether a higher score means more knowledge.

        Returns:
            One variant per training.
        """
        variants, chosen = decided([variant_on_v(self, t, subject) for t in trained], higher=higher)
        seconds = sum(t.seconds for t in trained)
        return AttackResult(self.name, subject.name, variants, chosen, seconds)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Train every part and report V; see `read_parts`."""
        start = time.perf_counter()
        trained = [self.train_part(p, subject, domain, budget, ctx) for p in self.parts(budget)]
        result = self.read_parts(trained, subject, budget, more_is_known(domain))
        return replace(result, seconds=time.perf_counter() - start)
