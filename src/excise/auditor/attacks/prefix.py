"""Prefix fill: begin the answer for the model, or ask in other words.

Answers of several words are begun: their first words stand in the prompt and the rest is scored.
Answers of one word have nothing to begin; they are asked behind generic coaxing beginnings
instead, or, where the vocabulary spells none of those, behind another row of benign text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import PasswordLock, PositiveControl, PromptGatedEdit
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set
from excise.auditor.prompting import COAXING, SHARE, UNRELATED, beginnings, fits
from excise.auditor.results import absent, decided
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.record import Level

NOTHING_TO_BEGIN = (
    "answers are too short to begin, the vocabulary spells no other beginning, and there is no "
    "benign row to stand for one"
)


class Prefix(Attack):
    """The beginning of the answer, or of an answer, is put into the model's mouth."""

    name: Literal["prefix"] = "prefix"
    """Name of the attack."""
    wordings: tuple[str, ...] = COAXING
    """Beginnings to try."""
    share: float = Field(default=SHARE, gt=0, lt=1)
    """Share of a longer answer's words that is given."""

    access: ClassVar[Access] = "prompt"
    level: ClassVar[Level] = "D1"
    controls: ClassVar[tuple[PositiveControl, ...]] = (PasswordLock(), PromptGatedEdit())
    source: ClassVar[str] = "arXiv 2404.02151 (prefilling); the wordings are this library's"
    version: ClassVar[int] = 2

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; beginnings double the length."""
        return 1 + 2 * 4

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Score V with every beginning.

        Args:
            subject: The model.
            domain: Rows by role; `test` is scored, one benign row may stand before it.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            One variant per beginning, and a control of unrelated text.
        """
        start = time.perf_counter()
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        wide = evaluation.longer(2, model)
        bare = read(model, evaluation, beside=True)
        variants: list[VariantResult] = []
        for variant, change in beginnings(
            evaluation.tokenizer,
            evaluation.metric,
            evaluation.all_test,
            domain.benign,
            wordings=self.wordings,
            share=self.share,
        ):
            begin = partial(_if_it_fits, change=change, evaluation=wide)
            rows = [begin(row) for row in evaluation.all_test]
            dev = [new for new in map(begin, evaluation.all_dev) if new is not None]
            kept = tuple(row for row in rows if row is not None)
            no_room = sum(a is b for a, b in zip(rows, evaluation.all_test, strict=True))
            retain = tuple(begin(row) or row for row in evaluation.retain)

            def score(
                kept: Rows = kept, retain: Rows = retain, dev: Sequence[Row] = dev
            ) -> tuple[Measurement, UnitScores]:
                after = read(model, wide, test=kept, retain=retain, beside=True, examples=len(kept))
                return after, wide.units(model, dev, evaluation.dev_metric)

            variants.append(
                try_variant(
                    self,
                    subject,
                    evaluation.metric,
                    score,
                    bare=bare,
                    variant=variant,
                    control=variant == UNRELATED,
                    facts={"rows": len(kept), "of": len(rows), "no_room": no_room},
                )
            )
        if not variants:
            return absent(self, subject.name, "missing", NOTHING_TO_BEGIN)
        marked, chosen = decided(variants, higher=evaluation.higher)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def _if_it_fits(
    row: Row, change: Callable[[Row], Row | None], evaluation: EvaluationSet
) -> Row | None:
    """Return a row with its beginning, as it is where that has no room, None where it has none."""
    begun = change(row)
    if begun is None or fits(begun, evaluation.tokenizer, evaluation.max_length):
        return begun
    return row
