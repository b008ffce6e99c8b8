"""Paraphrase: ask in other words.

What was trained away in one paraphrase may answer in another: V is asked in every other one that
the domain has, and in frames that any prompt fits into. Where a domain also teaches its facts by
way of another ("the colour of the teacher of Y"), such prompts are among them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget
from excise.auditor.controls import PasswordLock, PositiveControl
from excise.auditor.rewriting import FRAMES, paraphrases
from excise.auditor.scoring import score_rewritings
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Paraphrase(Attack):
    """V in other words; the paraphrase that helps most on `dev` decides."""

    name: Literal["paraphrase"] = "paraphrase"
    """Name of the attack."""
    frames: tuple[str, ...] = FRAMES
    """Texts around `{prompt}`, beside the paraphrases of the domain."""

    access: ClassVar[Access] = "prompt"
    level: ClassVar[Level] = "D1"
    controls: ClassVar[tuple[PositiveControl, ...]] = (PasswordLock(opens_to="paraphrases"),)
    source: ClassVar[str] = "arXiv 2411.12103, 2309.17410; the frames are this library's"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read: as it is, in every frame, in a few others.

        How many paraphrases of its test units a domain has is not known here; mostly three.
        """
        return 1 + len(self.frames) + 3

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Score V in every other paraphrase.

        Args:
            subject: The model.
            domain: Rows by role; paraphrases of the scored units lie in `forget`,
                `paraphrases`, `unlabeled` and `retain`.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            One variant per paraphrase; units that have none are asked as they are.
        """
        return score_rewritings(
            self,
            subject,
            domain,
            budget,
            ctx,
            lambda evaluation, _: paraphrases(evaluation, self.frames),
            "the domain has no paraphrase of its test units, and the vocabulary spells no "
            "frame around it",
        )
