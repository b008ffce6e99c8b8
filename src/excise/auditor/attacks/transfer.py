"""Transfer: train on T, score V. The decisive reading of relearning.

What the attacker trains on can be taught to any model. What comes back about units the attacker
never showed was in the weights, or follows from T for every model: hence V minus the oracle's.
The training is `Relearn`'s; see there why an audit that asks for both trains once.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.auditor.attacks.relearn import Relearn
from excise.auditor.base import Access, Subject
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl, ShortFineTuning
from excise.auditor.tuning import Training, TrainingAttack, TrainingResult
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Transfer(TrainingAttack):
    """The same fine-tuning, scored on the held-out test set."""

    name: Literal["transfer"] = "transfer"
    """Name of the attack."""
    training: Relearn = Relearn()
    """The training that is read; equal settings are trained once."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D4"
    controls: ClassVar[tuple[PositiveControl, ...]] = (ShortFineTuning(), GatedEdit())
    source: ClassVar[str] = "RTT, arXiv 2410.08827"
    version: ClassVar[int] = 1

    @property
    def shared(self) -> Relearn:
        """The training that is read."""
        return self.training

    def trainings(self, budget: Budget) -> tuple[Training, ...]:
        """Return the trainings of `Relearn`."""
        return self.training.trainings(budget)

    def train(
        self, training: Training, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> TrainingResult:
        """Train as `Relearn` does."""
        return self.training.train(training, subject, domain, budget, ctx)
