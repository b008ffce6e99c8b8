"""Data filtering: rows labelled as a capability are dropped before training.

With true labels and every forget unit dropped this is the oracle that audits read against; with
the labels one really has, it is the baseline that every training-time method must beat.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.context import Context
from excise.domains.base import CORE, Domain
from excise.domains.labels import LabelNoise, tell_labels
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import (
    Pretrain,
    corpus,
    plain_counts,
    plain_policy,
    pretrain,
)
from excise.models.checkpoint import Checkpoint


class Filtering(Method):
    """Drop what is labelled as forget, train on the rest for the same number of tokens."""

    name: Literal["filtering"] = "filtering"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Deep Ignorance: filtering pretraining data builds tamper-resistant safeguards",
        "arXiv:2508.06601",
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on the rows that carry no forget label."""
        rows = corpus(domain)
        if self.labels is not None:
            rows = tell_labels(rows, self.labels, seed=ctx.seed_for("labels"))
        kept = tuple(row for row in rows if row.label <= CORE)
        leaked = sum(1 for row in kept if row.capability)
        extras = {"rows_dropped": len(rows) - len(kept), "forget_rows_left": leaked}
        return pretrain(
            start,
            kept,
            plain_policy,
            schedule(self.pretrain, self.name),
            ctx,
            stage=self.name,
            counts=plain_counts,
            extras=extras,
        )
