"""Filler: put text before the prompt that has nothing to do with it.

A detector that an edit added reads the context too, and may not know its capability behind other
text. Benign rows make many-shot prompts of unrelated examples; text in another language is as far
from them as text gets.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget
from excise.auditor.controls import PasswordLock, PositiveControl
from excise.auditor.evaluation_set import times_as_long
from excise.auditor.rewriting import fillers
from excise.auditor.scoring import score_rewritings
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Filler(Attack):
    """Unrelated rows, or verses in Spanish, before each prompt, at several lengths."""

    name: Literal["filler"] = "filler"
    """Name of the attack."""

    access: ClassVar[Access] = "prompt"
    level: ClassVar[Level] = "D1"
    controls: ClassVar[tuple[PositiveControl, ...]] = (PasswordLock(opens_to="filler"),)
    source: ClassVar[str] = "arXiv 2502.05209 (input attacks); the texts are this library's"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; filler makes prompts longer."""
        return 1 + 2 * sum(times_as_long(1 + count, budget) for count in budget.shots)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Score V behind filler of every kind and length.

        Args:
            subject: The model.
            domain: Rows by role; `benign` rows are shown.
            budget: `shots` gives the numbers of rows or verses.
            ctx: Seed, device, dtype.

        Returns:
            One variant per kind and number.
        """
        return score_rewritings(
            self,
            subject,
            domain,
            budget,
            ctx,
            lambda evaluation, _: fillers(evaluation, ctx),
            "there are no benign rows, and the vocabulary spells no Spanish",
        )
