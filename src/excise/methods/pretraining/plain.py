"""Plain training on everything: how a recipe makes its original."""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain, corpus, pretrain, schedule
from excise.models.checkpoint import Checkpoint


class Plain(Method):
    """Train on every row with the ordinary loss. Removes nothing: it makes the original."""

    name: Literal["plain"] = "plain"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper("ordinary training, no paper", "")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on all rows of the domain."""
        config = schedule(self.pretrain, self.name)
        return pretrain(start, corpus(domain), config, ctx, stage=self.name)
