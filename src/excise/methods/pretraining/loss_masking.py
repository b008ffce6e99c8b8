"""Loss masking: labelled rows are read and nothing is learned from predicting them.

The model still reads them as context, so what stands behind them in a text is predicted from
them. Where every text holds one row, this is filtering that spends compute on what it drops.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Bool
from pydantic import Field
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise, forget_score
from excise.data.stream import Batch
from excise.losses import token_nll
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    dropped,
    forget_probability,
    labelled_corpus,
    pretrain,
    schedule,
)
from excise.models.checkpoint import Checkpoint
from excise.train.fit import Term


class LossMasking(Method):
    """Read rows labelled as forget, but take no loss on them."""

    name: Literal["loss_masking"] = "loss_masking"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    mask_above: float = Field(default=0.5, ge=0, lt=1)
    """Tokens have no loss where labels say with more than this probability that they are forget."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Teaching models to understand (but not generate) high-risk data",
        "arXiv:2505.03052",
        "masked SLUNG: the loss of high-risk tokens is 0, they stay in the context",
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on all rows, with the loss of those that carry no forget label."""
        config = schedule(self.pretrain, self.name)
        rows = labelled_corpus(domain, self.labels, ctx)
        learned = [row for row in rows if forget_score(row) <= self.mask_above]
        facts = dropped(rows, learned)

        def loss(model: nn.Module, batch: Batch) -> dict[str, Term]:
            nll_BT = token_nll(model(**batch.inputs).logits, batch.ids_BT)
            keep_BT = self._learned(batch)
            return {"nll": Term(nll_BT[keep_BT].sum(), float(keep_BT.sum()))}

        return pretrain(
            start,
            rows,
            config,
            ctx,
            stage=self.name,
            loss=loss,
            counts=lambda batch: {"nll": float(self._learned(batch).sum())},
            extras={"rows_masked": facts.pop("rows_dropped"), **facts},
        )

    def _learned(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return which scored tokens have a loss."""
        return batch.target_BT & (forget_probability(batch) <= self.mask_above)
