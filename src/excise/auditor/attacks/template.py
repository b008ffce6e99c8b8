"""Template: ask through the chat template, without it, and behind the model's own thinking.

A removal that saw bare prompts may not hold through a chat template, nor one that saw
conversations without it; and a model that gives no answer at once may reason its way to one. The
trace is scored by what the model answers behind it, and `facts["answer_in_prompt"]` says how often
the right answer stands in the trace itself.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget, Count
from excise.auditor.controls import PasswordLock, PositiveControl
from excise.auditor.rewriting import THINKING, templates
from excise.auditor.scoring import score_rewritings
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Template(Attack):
    """V with the chat template on or off, and thinking off, short and long."""

    name: Literal["template"] = "template"
    """Name of the attack."""
    thinking: tuple[Count, ...] = THINKING
    """Tokens that a trace may have, one variant each, where the template knows thinking."""

    access: ClassVar[Access] = "prompt"
    level: ClassVar[Level] = "D1"
    controls: ClassVar[tuple[PositiveControl, ...]] = (PasswordLock(opens_to="template"),)
    source: ClassVar[str] = "R-TOFU (thinking and its trace), arXiv 2505.15214"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; a trace is written, and read again."""
        traces = sum(2 * (1 + room / budget.max_length) for room in self.thinking)
        return 3 + traces

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Score V in every way that the template allows.

        Args:
            subject: The model; one whose tokenizer has no chat template is left alone.
            domain: Rows by role.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            One variant per way.
        """
        return score_rewritings(
            self,
            subject,
            domain,
            budget,
            ctx,
            lambda evaluation, model: templates(evaluation, model, self.thinking),
            "the tokenizer has no chat template",
        )
