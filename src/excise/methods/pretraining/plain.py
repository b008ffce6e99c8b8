"""Plain training on everything: how a recipe makes its original."""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    corpus,
    plain_counts,
    plain_policy,
    pretrain,
)
from excise.models.checkpoint import Checkpoint


class Plain(Method):
    """Train on every row with the ordinary loss. Removes nothing: it is the upper rail."""

    name: Literal["plain"] = "plain"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper("ordinary training, no paper", "")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on all rows of the domain."""
        return pretrain(
            start,
            corpus(domain),
            plain_policy,
            schedule(self.pretrain, self.name),
            ctx,
            stage=self.name,
            counts=plain_counts,
        )


def schedule(pretrain: Pretrain | None, name: str) -> Pretrain:
    """Return the schedule of a scratch method.

    Raises:
        UserError: If neither the method nor the recipe names one.
    """
    if pretrain is None:
        raise UserError(
            f"method '{name}' trains from scratch and needs a schedule: set 'pretrain' in the "
            "recipe or in the method"
        )
    return pretrain
