"""The DPO loss on pairs of answers: what `dpo`, `idk_dpo` and `altpo` do with the pairs they make.

    w0, l0 <- -log p0 of the preferred and of the rejected answer of every pair, once
    repeat
        w, l <- -log p of both, summed over their tokens
        L <- gamma mean[-2/beta log sigmoid(beta ((l - l0) - (w - w0)))] + alpha NLL(retain)

Shape legend: B pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.core.keys import FilePath
from excise.data.domain import Domain, Row
from excise.data.stream import Batch, collate, encode, zip_streams
from excise.losses import dpo, sequence_nll
from excise.methods.base import Cost, Removal
from excise.methods.posthoc.reference import reference_of
from excise.methods.tuning import (
    NOTHING,
    TuningMethod,
    logits_of,
    mean_nll,
    minimise,
    stream,
)
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig, Term

Pairs = Sequence[tuple[Row, Row]]
"""Rows with the preferred and with the rejected answer to one prompt."""


class Preference(TuningMethod):
    """The settings of a method that prefers one answer to another; see `prefer`."""

    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature: how soon a pair counts as told apart."""
    gamma: float = 1.0
    """Weight of the loss on pairs."""
    alpha: float = 1.0
    """Weight of the retain loss."""
    reference: FilePath = ""
    """A kept file of what the model before gave every answer (`reference.json` of an earlier run);
    empty to compute it."""
    fit: FitConfig = FitConfig(
        steps=125, lr=1e-5, batch_size=32, warmup=12, schedule="linear", weight_decay=0.01, clip=1.0
    )
    """Steps, pairs and retain rows per step, learning rate."""

    @property
    def step_cost(self) -> float:
        """Both answers of a pair are read, twice where there is a radius, and a retain row."""
        return 2.5 if self.sam else 1.5


def prefer(
    method: Preference,
    start: Checkpoint,
    domain: Domain,
    pairs: Pairs,
    ctx: Context,
    *,
    before: Cost = NOTHING,
    extras: Mapping[str, object] | None = None,
) -> Removal:
    """Minimise the DPO loss on pairs + alpha NLL(retain); both answers are read in one forward.

    Args:
        method: Its settings.
        start: What it starts from, and the reference.
        domain: Gives the retain rows.
        pairs: Preferred and rejected rows.
        ctx: Seed, processes, folder.
        before: What making the pairs took.
        extras: Facts for the record.
    """
    tokenizer, length = start.tokenizer(), method.max_length
    rejected = stream(
        tuple(row for _, row in pairs), tokenizer, method.fit, ctx, purpose="forget",
        max_length=length,
    )  # fmt: skip
    retain = stream(domain.retain, tokenizer, method.fit, ctx, purpose="retain", max_length=length)
    preferred = encode([row for row, _ in pairs], tokenizer, max_length=length, only_spans=True)
    reference = reference_of(start, [*preferred, *rejected.examples], ctx, kept=method.reference)

    def both(step: int) -> list[Batch]:
        """Return the preferred answers of a step's pairs, and behind them the rejected ones."""
        order = rejected.indices(step)
        size = rejected.micro_size or len(order)
        if size < len(order):  # pairs of like length share a micro-batch: less padding
            order.sort(key=lambda i: max(len(preferred[i].ids), len(rejected.examples[i].ids)))
        parts = [order[at : at + size] for at in range(0, len(order), size)]
        return [
            collate(
                [*(preferred[i] for i in part), *(rejected.examples[i] for i in part)],
                pad_id=rejected.pad_id, padding_side=rejected.padding_side,
            )
            for part in parts
        ]  # fmt: skip

    def prefers(model: nn.Module, pair: Batch) -> Term:
        w0_B, l0_B = reference(pair).chunk(2)
        w_B, l_B = sequence_nll(logits_of(model, pair), pair)[0].chunk(2)
        return Term(*dpo(w_B, l_B, w0_B, l0_B, method.beta), method.gamma)

    return minimise(
        method, start, domain, zip_streams({"forget": both, "retain": retain}),
        {"forget": prefers, "retain": mean_nll(method.alpha)}, ctx,
        forget_count=lambda pair: len(pair.units) / 2, before=before + reference.cost,
        extras={**(extras or {}), **reference.facts, "pairs": len(pairs)},
    )  # fmt: skip
