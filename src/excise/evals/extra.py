"""Scores beside the headline: refusal, free generation, calibrated choice, one's own.

A recipe lists them under `evaluate.scores`; each is a configuration, so third parties add theirs
by entry point (`excise.scores`) or from a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

from excise.core.config import Config
from excise.data.domain import Domain, Rows
from excise.data.subsample import subsample
from excise.evals.score import ItemScores, measure, score_of
from excise.record import Item, Score


class ExtraScore(Config, ABC):
    """A way to score rows. Subclasses declare `name: Literal["..."]` and implement `items`."""

    kind: ClassVar[str] = "score"
    on: Literal["test", "retain_test", "both"] = "both"
    """Which rows are scored."""
    max_rows: int = 64
    """Rows of each set at most."""

    @abstractmethod
    def items(self, model: Any, tokenizer: Any, rows: Rows, *, max_length: int) -> ItemScores:
        """Score every row.

        Args:
            model: A causal model in evaluation mode.
            tokenizer: Its tokenizer.
            rows: At least one.
            max_length: Tokens of a row at most.
        """


class RefusalRate(ExtraScore):
    """How often the model declines, apart from not knowing."""

    name: Literal["refusal"] = "refusal"

    def items(self, model: Any, tokenizer: Any, rows: Rows, *, max_length: int) -> ItemScores:
        """Return 1 for every row that was declined, 0 for an answer, right or wrong."""
        return measure(model, tokenizer, rows, self.name, max_length=max_length)


class Generate(ExtraScore):
    """Greedy free generation: does the answer contain what is expected."""

    name: Literal["generate"] = "generate"

    def items(self, model: Any, tokenizer: Any, rows: Rows, *, max_length: int) -> ItemScores:
        """Return 1 for every row whose continuation says the expected answer."""
        return measure(model, tokenizer, rows, self.name, max_length=max_length)


class CalibratedChoice(ExtraScore):
    """Multiple choice with the bias for a position taken out."""

    name: Literal["multiple_choice_calibrated"] = "multiple_choice_calibrated"

    def items(self, model: Any, tokenizer: Any, rows: Rows, *, max_length: int) -> ItemScores:
        """Return 1 for every question answered right after the mean of each position is taken."""
        return measure(model, tokenizer, rows, self.name, max_length=max_length)


AnyScore = RefusalRate | Generate | CalibratedChoice
"""Adding a score: its class and one line here."""

SCORES: Mapping[str, type[ExtraScore]] = {
    cls.model_fields["name"].default: cls for cls in get_args(AnyScore)
}
"""Built-in extra scores by name."""


def extra_scores(
    model: Any, tokenizer: Any, domain: Domain, extra: ExtraScore, *, max_length: int
) -> tuple[list[Score], list[Item]]:
    """Score the sets that an extra score asks for.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        domain: Rows by role.
        extra: The score.
        max_length: Tokens of a row at most.

    Returns:
        Scores with intervals, and one item per row; the model is called `model`.

    Raises:
        NotFinite: If a score is NaN or infinite.
    """
    sets: dict[str, Rows] = {}
    if extra.on != "retain_test":
        sets |= {f"test.{name}": rows for name, rows in domain.test.items()}
    if extra.on != "test":
        sets["retain_test"] = domain.retain_test
    scores: list[Score] = []
    items: list[Item] = []
    for on, every in sets.items():
        rows = subsample(every, extra.max_rows)
        if not rows:
            continue
        measured = extra.items(model, tokenizer, rows, max_length=max_length)
        # By its own name, whatever it is computed with: the headline's name is the headline's.
        measured = replace(measured, metric=str(getattr(extra, "name", measured.metric)))
        groups = {row.unit: row.group for row in rows if row.group}
        scores.append(score_of(measured.checked(), model="model", on=on, groups=groups))
        items += [
            Item(model="model", set=on, unit=unit, metric=measured.metric, value=value)
            for unit, value in measured.items
        ]
    return scores, items
