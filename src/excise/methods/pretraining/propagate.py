"""Propagate, then filter: one labelled occurrence of a unit labels all the others.

What an imperfect labeller has seen once is known wherever it recurs, if one can tell that it
recurs. Missed occurrences are repaired this way; missed units are not, unless the group (the
subject, author or source) is known and one of its units is labelled. A false alarm spreads too.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise, forget_score, propagated
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    dropped,
    labelled_corpus,
    pretrain,
    quality_of_labels,
    schedule,
)
from excise.models.checkpoint import Checkpoint


class Propagate(Method):
    """One labelled occurrence of a unit labels all its rows; drop them, train on the rest."""

    name: Literal["propagate"] = "propagate"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    by: Literal["unit", "group"] = "unit"
    """What shares a label: rows of one unit, or of one group (author, entity, source)."""
    at_least: int = Field(default=1, ge=1)
    """Labelled rows that it takes; more make single false alarms harmless."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Learning from labeled and unlabeled data with label propagation",
        "CMU-CALD-02-107",
        "with an edge between rows of one unit and no others; then filtering (arXiv:2508.06601)",
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on the rows that propagation leaves without a forget label."""
        config = schedule(self.pretrain, self.name)
        rows = labelled_corpus(domain, self.labels, ctx)
        spread = propagated(rows, by=self.by, at_least=self.at_least)
        remaining = tuple(row for row in spread if forget_score(row) <= 0.5)
        before, after = quality_of_labels(rows), quality_of_labels(spread)
        facts = {
            **dropped(spread, remaining),
            "labels_before_after": {name: [before[name], after[name]] for name in before},
        }
        return pretrain(start, remaining, config, ctx, stage=self.name, extras=facts)
