"""Prefix fill: begin the answer for the model, or ask in other words.

Answers of several words are begun: their first words stand in the prompt and the rest is scored.
Answers of one word have nothing to begin; they are asked behind generic coaxing beginnings
instead, or, where the vocabulary spells none of those, behind another row of benign text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Attack, AttackResult, Budget, Subject, VariantResult
from excise.auditor.prompting import COAXING, before, begun, separator, shown, spelled
from excise.auditor.results import decided
from excise.auditor.scoring import evaluation_set, read, variant_of
from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.record import Level

UNRELATED = "unrelated"
"""Name of the control: a benign row in front, where the coaxing wordings can be spelled."""


class Prefix(Attack):
    """The beginning of the answer, or of an answer, is put into the model's mouth."""

    name: Literal["prefix"] = "prefix"
    """Name of the attack."""
    wordings: tuple[str, ...] = COAXING
    """Beginnings to try."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of a longer answer's words that is given."""

    access: ClassVar[Access] = "prompt"
    level: ClassVar[Level] = "D1"
    source: ClassVar[str] = "arXiv 2404.02151 (prefilling); the wordings are this library's"
    version: ClassVar[int] = 1

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
        wide = evaluation.longer(2)
        bare = read(model, evaluation)
        results: list[VariantResult] = []
        for variant, change in variants(
            self, evaluation.tokenizer, evaluation.metric, evaluation.all_test, domain.benign
        ):
            rows = [change(row) for row in evaluation.all_test]
            dev = [new for new in map(change, evaluation.all_dev) if new is not None]
            kept = tuple(row for row in rows if row is not None)
            retain = tuple(change(row) or row for row in evaluation.retain)
            after = read(model, wide, test=kept, retain=retain, examples=len(kept))
            results.append(
                variant_of(
                    self,
                    subject,
                    evaluation.metric,
                    variant=variant,
                    measurements=(bare, after),
                    control=variant == UNRELATED,
                    dev=wide.units(model, dev),
                    facts={"rows": len(kept), "of": len(rows)},
                )
            )
        marked, chosen = decided(results, higher=evaluation.higher)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def variants(
    attack: Prefix, tokenizer: Any, metric: str, test: Sequence[Row], benign: Rows
) -> list[tuple[str, Callable[[Row], Row | None]]]:
    """Return the beginnings that fit a test set, by name.

    Args:
        attack: Wordings and share.
        tokenizer: Which wordings it can spell.
        metric: Headline metric.
        test: Rows that will be scored; they are begun only if at least half can be.
        benign: Where the stand-in of a closed vocabulary comes from.

    Returns:
        Names and functions that change a row, or return None where they cannot.
    """
    line = separator(tokenizer)
    made: list[tuple[str, Callable[[Row], Row | None]]] = []
    several = sum(begun(row, attack.share) is not None for row in test) * 2 >= len(test)
    if several and metric != "text_loss":  # a loss reads every token behind the true ones anyway
        made.append(("begun", lambda row: begun(row, attack.share)))
    plain = [text for text in attack.wordings if spelled(text, tokenizer)]
    for i, row in enumerate(benign[:2] if not plain else ()):
        made.append((f"benign-{i}", partial(before, context=shown(row), separator=line)))
    for text in plain:
        made.append((f"'{text}'", partial(_coaxed, text=text, line=line)))
    if plain and benign:
        made.append((UNRELATED, partial(before, context=shown(benign[0]), separator=line)))
    return made


def _coaxed(row: Row, text: str, line: str) -> Row:
    """Put `text` between the prompt and its answer, or before a plain text."""
    if row.kind in ("text", "chat") or not row.prompt:
        return before(row, text, line)
    return replace(row, prompt=f"{row.prompt.rstrip()}{line}{text}")
