"""Data filtering: rows labelled as a capability are dropped before training.

A row is a document: where parts of it have labels of their own its label is that of the capability
that most of it is given, and all of it goes (`token_filter` takes the parts alone).
With true labels and every forget unit dropped this is the oracle that audits read against; with
the labels one really has, it is the baseline that every training-time method must beat.

A text of several parts is dropped whole, and what else it says is the price; oracles, and
`drop: spans`, read it without its labelled parts instead.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row
from excise.data.labels import LabelNoise, forget_score
from excise.data.spans import without
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    corpus,
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
    drop: Literal["rows", "spans"] = "rows"
    """Whether a text with labels for its parts is dropped whole or loses the labelled parts."""
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
        read = {i: row for i, row in enumerate(map(self._read, rows)) if row is not None}
        remaining = tuple(read.values())
        if not remaining:
            raise UserError(
                "filtering drops every row; set 'filtering.unlabeled' to 'keep' or raise "
                "'filtering.drop_above'"
            )
        facts = dropped(rows, [rows[i] for i in read])
        facts["forget_rows_left"] = sum(1 for row in remaining if row.capability)
        return pretrain(start, remaining, config, ctx, stage=self.name, extras=facts)

    def _read(self, row: Row) -> Row | None:
        """Return what is read of a row: all, nothing, or its text without labelled parts."""
        if self.unlabeled == "drop" and row.label == UNLABELED:
            return None
        if self.drop == "spans" and row.spans:
            return without(row, lambda s: s.label > CORE and s.confidence > self.drop_above)
        return row if forget_score(row) <= self.drop_above else None


def makes_oracle(method: Method, domain: Domain) -> bool:
    """Return whether a method is filtering that leaves what an oracle reads.

    Args:
        method: Any method.
        domain: Where texts have parts, one that drops them whole reads less than an oracle.
    """
    if not isinstance(method, Filtering):
        return False
    return method.drop == "spans" or not any(row.spans for row in corpus(domain))
