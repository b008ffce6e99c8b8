"""Sampling: ask k times at temperature 1, and count it if any of the k answers is right.

What greedy decoding no longer says may still have a good part of the probability. The expectation
of "any of k is right" needs no sampling: it is 1 - (1 - p)^k, where p is the probability of the
right answer as a whole. A model that knows nothing also finds an answer among many tries, so that
the numbers mean something only beside the oracle's at the same k; they are shown and decide no
level.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget, Count
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set
from excise.auditor.results import absent
from excise.auditor.scoring import Measurement, variant_of
from excise.core.context import Context
from excise.core.errors import NotFinite
from excise.data.domain import Domain, Row
from excise.data.stream import encode
from excise.evals.tokens import answer_examples
from excise.models.limits import readable
from excise.record import Level

SCORED_ON = "test samples"
"""What the curve is of: not the score of V, and so no recovery that a requirement reads."""


class Sampling(Attack):
    """The chance that one of k sampled answers is right."""

    name: Literal["sampling"] = "sampling"
    """Name of the attack."""
    samples: tuple[Count, ...] = Field(default=(4, 16, 64), min_length=1)
    """Numbers of answers, beside a single one."""

    access: ClassVar[Access] = "logits"
    level: ClassVar[Level] = "D1"
    source: ClassVar[str] = "leak@k, arXiv 2511.04934; in expectation, this library's"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read."""
        return 1.0

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Score V by the chance of a right answer among k, for every k.

        Args:
            subject: The model.
            domain: Rows by role; plain texts have no answer to sample.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            One variant, whose curve is the chance at 1 and at every k of `samples`.
        """
        start = time.perf_counter()
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        rows = [row for row in evaluation.all_test if row.kind in ("completion", "choice")]
        if not rows:
            why = "the test rows have no answer to sample"
            return absent(self, subject.name, "missing", why, applies=False)
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        retain = [row for row in evaluation.retain if row.kind in ("completion", "choice")]
        chances = chance_by_row(model, evaluation, rows)
        retained = chance_by_row(model, evaluation, retain)
        curve = [
            Measurement(any_of(chances, k), any_of(retained, k), examples=k if k > 1 else 0)
            for k in sorted({1, *self.samples})
        ]
        one = variant_of(
            self, subject, "leak@k", variant="temperature 1", measurements=curve, dev={},
            facts={"k": sorted({1, *self.samples})},
        )  # fmt: skip
        entry = one.entry.model_copy(update={"scored_on": SCORED_ON})
        variants = (replace(one, entry=entry),)
        return AttackResult(self.name, subject.name, variants, (), time.perf_counter() - start)


def chance_by_row(
    model: Any, evaluation: EvaluationSet, rows: Sequence[Row]
) -> list[tuple[str, float]]:
    """Return unit and probability of the right answer of every row.

    Raises:
        NotFinite: If the model gives no numbers.
    """
    length = readable(model, evaluation.max_length)
    examples = encode(rows, evaluation.tokenizer, max_length=length)
    answers = answer_examples(model, evaluation.tokenizer, examples)
    chances = [math.exp(answer.total) for answer in answers]
    broken = sum(map(math.isnan, chances))
    if broken:
        raise NotFinite("the model", "leak@k", broken, len(rows))
    return [(row.unit, p) for row, p in zip(rows, chances, strict=True)]


def any_of(chances: Sequence[tuple[str, float]], k: int) -> Mapping[str, float]:
    """Return by unit the chance that one of k independent answers is right, over its rows.

    Args:
        chances: Unit of every row, and the probability of its right answer.
        k: Number of answers.
    """
    by_unit: dict[str, list[float]] = {}
    for unit, p in chances:
        by_unit.setdefault(unit, []).append(1 - (1 - min(p, 1.0)) ** k)
    return {unit: sum(values) / len(values) for unit, values in by_unit.items()}
