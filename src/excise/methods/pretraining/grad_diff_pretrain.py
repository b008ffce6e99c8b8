"""GradDiff as a pretraining loss: push away what is labelled, while the model trains.

The loss is next-token prediction on ordinary tokens minus a function of it on forget tokens,
where filtering would put nothing.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from excise.context import Context
from excise.domains.base import CORE, Domain
from excise.domains.labels import LabelNoise, tell_labels
from excise.domains.stream import Batch
from excise.losses import kl_to_uniform, predicting, token_nll
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import Pretrain, corpus, pretrain
from excise.models.checkpoint import Checkpoint
from excise.train.fit import Term


class GradDiffPretrain(Method):
    """Train on everything; labelled forget tokens are pushed away instead of learned."""

    name: Literal["grad_diff_pretrain"] = "grad_diff_pretrain"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    push: Literal["ascent", "unlikelihood", "uniform"] = "ascent"
    """Loss of a forget token: minus its loss up to log V, -log(1 - p), or KL(uniform || p)."""
    weight: float = 1.0
    """Weight of the forget tokens' loss."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning, discussion: -NTP(tokens) if harmful else NTP(tokens)",
        "arXiv:2506.06278",
        defaults={"push": "clipped at log V, since plain ascent has no lower bound"},
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on all rows, pushing away those with a forget label."""
        rows = corpus(domain)
        if self.labels is not None:
            rows = tell_labels(rows, self.labels, seed=ctx.seed_for("labels"))

        def policy(model: nn.Module, batch: Batch) -> dict[str, Term]:
            logits_BTV = model(**batch.inputs).logits
            keep_BT = batch.target_BT & (batch.label_BT <= CORE)
            away_BT = batch.target_BT & (batch.label_BT > CORE)
            nll_BT = token_nll(logits_BTV, batch.ids_BT)
            return {
                "nll": Term(nll_BT[keep_BT].sum(), float(keep_BT.sum())),
                "forget": Term(
                    push_away(logits_BTV, nll_BT, away_BT, self.push),
                    float(away_BT.sum()),
                    self.weight,
                ),
            }

        return pretrain(
            start,
            rows,
            policy,
            schedule(self.pretrain, self.name),
            ctx,
            stage=self.name,
            counts=counts,
        )


def counts(batch: Batch) -> dict[str, float]:
    """Return the number of kept and of pushed tokens."""
    forget = batch.target_BT & (batch.label_BT > CORE)
    away = float(forget.sum())
    return {"nll": batch.num_targets - away, "forget": away}


def push_away(
    logits_BTV: Tensor,
    nll_BT: Tensor,
    mask_BT: Tensor,
    push: Literal["ascent", "unlikelihood", "uniform"],
) -> Tensor:
    """Return the summed loss that drives the masked tokens away.

    Args:
        logits_BTV: Logits.
        nll_BT: Loss of each token given its past, in nats.
        mask_BT: Tokens to push away.
        push: Which of the three losses.
    """
    if push == "uniform":
        return kl_to_uniform(logits_BTV, predicting(mask_BT))[0]
    chosen = nll_BT[mask_BT].float()
    if push == "ascent":
        return -chosen.clamp(max=math.log(logits_BTV.shape[-1])).sum()
    return -torch.log(-torch.expm1(-chosen.clamp(min=1e-6))).sum()
