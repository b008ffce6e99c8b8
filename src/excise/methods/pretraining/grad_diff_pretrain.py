"""GradDiff as a pretraining loss: push away what is labelled, while the model trains.

The loss is next-token prediction on ordinary tokens minus a function of it on forget tokens,
where filtering would put nothing.

Shape legend: B rows, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, Domain
from excise.data.labels import LabelNoise, give_labels
from excise.data.stream import Batch
from excise.losses import kl_to_uniform, predicting, token_nll
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import Pretrain, corpus, pretrain
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import capture
from excise.train.fit import Term

Push = Literal["ascent", "unlikelihood", "uniform", "activations"]
"""Ways to push a token away."""


class GradDiffPretrain(Method):
    """Train on everything; labelled forget tokens are pushed away instead of learned."""

    name: Literal["grad_diff_pretrain"] = "grad_diff_pretrain"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    push: Push = "ascent"
    """Loss of a forget token: minus its loss up to log V, -log(1 - p), KL(uniform || p), or as RMU
    the squared distance of the activation that predicts it to one random vector."""
    layer: int | None = None
    """Block whose output `activations` steers, negative from the last; the middle when missing."""
    steering: float = Field(default=10.0, gt=0)
    """Norm of that vector."""
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
            rows = give_labels(rows, self.labels, seed=ctx.seed_for("labels"))

        def policy(model: nn.Module, batch: Batch) -> dict[str, Term]:
            if self.push == "activations":
                return self._steered(model, batch, ctx)
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

    def _steered(self, model: nn.Module, batch: Batch, ctx: Context) -> dict[str, Term]:
        """Return the terms of `activations`: RMU's forget loss beside next-token prediction."""
        layout = anatomy(model)
        block = layout.num_blocks // 2 if self.layer is None else self.layer
        if not -layout.num_blocks <= block < layout.num_blocks:
            raise UserError(
                f"{self.name}: layer {block} does not exist; the model has "
                f"{layout.num_blocks} blocks"
            )
        path = layout.blocks[block]
        with capture(model, [path], grad=True) as found:
            logits_BTV = model(**batch.inputs).logits
        hidden_BTD = found[path][0].float()
        width = hidden_BTD.shape[-1]
        u_D = torch.randn(width, generator=ctx.generator("push")).to(hidden_BTD)
        target_D = self.steering * u_D / u_D.norm()
        keep_BT = batch.target_BT & (batch.label_BT <= CORE)
        away_BT = batch.target_BT & (batch.label_BT > CORE)
        nll_BT = token_nll(logits_BTV, batch.ids_BT)
        apart_BT = (hidden_BTD - target_D).square().mean(-1)
        pushed = apart_BT[predicting(away_BT)].sum()
        return {
            "nll": Term(nll_BT[keep_BT].sum(), float(keep_BT.sum())),
            "forget": Term(pushed, float(away_BT.sum()), self.weight),
        }


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
