"""Relearning: fine-tune on other units of the capability (T) and see what comes back.

One training serves two measurements. `relearn` scores what was trained on (T): it is shown, never
decisive, because a model that was taught noise must first unlearn the noise. `transfer`
(`transfer.py`) scores V, which the attacker never saw, after the very same training, and decides
the level. An audit that asks for both trains once: the training is a part (`Relearn.parts`,
`Relearn.train_part`) with a stage of its own, whose key names the training and not its reader.

Cost of training on n tokens with N parameters: 6 N n floating-point operations for full
parameters (forward 2, backward 4). LoRA with M adapter parameters skips the gradients of the
frozen weights: 4 N n + 6 M n.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Attack, AttackResult, Budget, Subject, VariantResult
from excise.auditor.results import decided
from excise.auditor.scoring import evaluation_set, more_is_known
from excise.auditor.tuning import Part, Trained, parts_of, train
from excise.core.context import Context
from excise.data.domain import Domain
from excise.record import Level


class Relearn(Attack):
    """Fine-tune on T and benign text, half and half; the curve shows T itself."""

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
    source: ClassVar[str] = "RTT, arXiv 2410.08827; UNDO, arXiv 2506.06278"
    version: ClassVar[int] = 1

    def parts(self, budget: Budget) -> tuple[Part, ...]:
        """Return the trainings of a budget: full and LoRA, each at every rate and seed."""
        return parts_of(budget)

    def train_part(
        self, part: Part, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> Trained:
        """Run one training and score it on the way.

        Args:
            part: Which training.
            subject: The model.
            domain: Rows by role; trains on `relearn` and `benign`.
            budget: Steps, batch size, checkpoints.
            ctx: Device, dtype, seed.

        Returns:
            What was read at every checkpoint, on T and on V.
        """
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        rows = tuple(row for rows in domain.relearn.values() for row in rows)
        return train(
            part,
            subject,
            evaluation,
            ctx,
            rows=rows,
            benign_share=self.benign_share,
            clip=self.clip,
            lora_rank=self.lora_rank,
        )

    def read_parts(
        self, trained: Sequence[Trained], subject: Subject, budget: Budget, higher: bool
    ) -> AttackResult:
        """Report T: every variant is shown and none decides.

        Args:
            trained: What `train_part` returned, for every part.
            subject: The model.
            budget: The budget.
            higher: Whether a higher score means more knowledge.

        Returns:
            One variant per training; `chosen` is empty, `extras["chosen_on_dev"]` marks the rate
            that `transfer` decides at.
        """
        variants, chosen = decided([variant_on_v(self, t, subject) for t in trained], higher=higher)
        shown = tuple(
            _on_t(variant, t, i in chosen)
            for i, (variant, t) in enumerate(zip(variants, trained, strict=True))
        )
        return AttackResult(self.name, subject.name, shown, (), sum(t.seconds for t in trained))

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Train every part and report T; see `read_parts`."""
        start = time.perf_counter()
        trained = [self.train_part(p, subject, domain, budget, ctx) for p in self.parts(budget)]
        result = self.read_parts(trained, subject, budget, more_is_known(domain))
        return replace(result, seconds=time.perf_counter() - start)


def variant_on_v(attack: Attack, trained: Trained, subject: Subject) -> VariantResult:
    """Return the variant whose curve is V, with T beside it."""
    return trained.variant(attack, subject, trained_on="relearn")


def _on_t(variant: VariantResult, trained: Trained, chosen: bool) -> VariantResult:
    """Return the same variant read on T."""
    metric = trained.metric
    if trained.part.on != "fresh":
        metric = str(trained.extras.get("trained_metric", metric))
    changes = {"scored_on": "relearn", "decisive": False, "curve": trained.curve_on_t()}
    record = variant.entry.model_copy(update={**changes, "metric": metric})
    extras = {**variant.extras, "chosen_on_dev": chosen}
    return replace(variant, entry=record, unit_scores=trained.units_on_t(), extras=extras)
