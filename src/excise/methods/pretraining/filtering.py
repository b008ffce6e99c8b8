"""Data filtering: rows labelled as a capability are dropped before training.

A row is a document: where parts of it have labels of their own its label is that of the capability
that most of it is given, and all of it goes (`token_filter` takes the parts alone).
With true labels and every forget unit dropped this is the oracle that audits read against; with
the labels one really has, it is the baseline that every training-time method must beat.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import UNLABELED, Domain
from excise.data.labels import LabelNoise, forget_score
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    dropped,
    labelled_corpus,
    pretrain,
    schedule,
)
from excise.models.checkpoint import Checkpoint


class Filtering(Method):
    """Drop what is labelled as forget, train on the rest for the same number of tokens."""

    name: Literal["filtering"] = "filtering"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    drop_above: float = Field(default=0.5, ge=0, lt=1)
    """A row is dropped where labels say with more than this probability that it is forget."""
    unlabeled: Literal["keep", "drop"] = "keep"
    """Whether rows that nobody has looked at are read."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Deep Ignorance: filtering pretraining data builds tamper-resistant safeguards",
        "arXiv:2508.06601",
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on the rows that carry no forget label."""
        config = schedule(self.pretrain, self.name)
        rows = labelled_corpus(domain, self.labels, ctx)
        remaining = tuple(
            row
            for row in rows
            if forget_score(row) <= self.drop_above
            and (self.unlabeled == "keep" or row.label != UNLABELED)
        )
        if not remaining:
            raise UserError(
                "filtering drops every row; set 'filtering.unlabeled' to 'keep' or raise "
                "'filtering.drop_above'"
            )
        return pretrain(
            start, remaining, config, ctx, stage=self.name, extras=dropped(rows, remaining)
        )
