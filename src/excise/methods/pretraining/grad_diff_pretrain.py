"""GradDiff as a pretraining loss: push away what is labelled, while the model trains.

The loss is next-token prediction on ordinary tokens minus a function of it on forget tokens,
where filtering would put nothing.

Shape legend: B rows, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from excise.core.config import SIGNED
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.data.stream import Batch
from excise.losses import kl_to_uniform, predicting, token_nll
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    forget_probability,
    labelled_corpus,
    pretrain,
    schedule,
)
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
    """How the given labels differ from the truth; missing means they are right."""
    push: Push = "ascent"
    """Loss of a forget token: minus its loss up to log V, -log(1 - p), KL(uniform || p), or as RMU
    the squared distance of the activation that predicts it to one random vector."""
    layer: Annotated[int | None, SIGNED] = None
    """Block whose output `activations` steers, negative from the last; the middle when missing."""
    steering: float = Field(default=10.0, gt=0)
    """Norm of that vector."""
    weight: Annotated[float, SIGNED] = 1.0
    """Weight of the forget tokens' loss."""
    push_above: float = Field(default=0.5, ge=0, lt=1)
    """A token is pushed away where labels say with more than this probability that it is forget;
    all others are learned."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning, discussion: -NTP(tokens) if harmful else NTP(tokens)",
        "arXiv:2506.06278",
        defaults={
            "push": "arXiv:2506.06278, discussion: plain ascent; here clipped at "
            "log V, since it has no lower bound"
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on all rows, pushing away those with a forget label."""
        config = schedule(self.pretrain, self.name)
        rows = labelled_corpus(domain, self.labels, ctx)

        def loss(model: nn.Module, batch: Batch) -> dict[str, Term]:
            away_BT = self._pushed(batch)
            keep_BT = batch.target_BT & ~away_BT
            paths = [self._steered(model)] if self.push == "activations" else []
            with capture(model, paths, grad=True) as captured:
                logits_BTV = model(**batch.inputs, use_cache=False).logits
            nll_BT = token_nll(logits_BTV, batch.ids_BT)
            if self.push == "activations":
                hidden_BTD = captured[paths[0]][0]
                pushed = steer(hidden_BTD, away_BT, self.steering, ctx.generator("push"))
            else:
                pushed = push_away(logits_BTV, nll_BT, away_BT, self.push)
            return {
                "nll": Term(nll_BT[keep_BT].sum(), float(keep_BT.sum())),
                "forget": Term(pushed, float(away_BT.sum()), self.weight),
            }

        return pretrain(start, rows, config, ctx, stage=self.name, loss=loss, counts=self._counts)

    def _pushed(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return which scored tokens are pushed away."""
        return batch.target_BT & (forget_probability(batch) > self.push_above)

    def _counts(self, batch: Batch) -> dict[str, float]:
        """Return the number of learned and of pushed tokens."""
        away = float(self._pushed(batch).sum())
        return {"nll": batch.num_targets - away, "forget": away}

    def _steered(self, model: nn.Module) -> str:
        """Return the block whose output `activations` steers."""
        layout = anatomy(model)
        block = layout.num_blocks // 2 if self.layer is None else self.layer
        if not -layout.num_blocks <= block < layout.num_blocks:
            raise UserError(
                f"{self.name}: layer {block} does not exist; the model has "
                f"{layout.num_blocks} blocks"
            )
        return layout.blocks[block]


def push_away(
    logits_BTV: Float[Tensor, "B T V"],
    nll_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
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


def steer(
    hidden_BTD: Float[Tensor, "B T D"],
    mask_BT: Bool[Tensor, "B T"],
    norm: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the summed squared distance to one random vector of what predicts masked tokens.

    Source: the forget loss of RMU, Li et al. 2024, arXiv:2403.03218, section 4; the direction is
    Gaussian here and uniform in [0, 1) there.

    Args:
        hidden_BTD: Output of a block.
        mask_BT: Tokens to push away.
        norm: Norm of the vector.
        generator: Draws its direction.
    """
    hidden_BTD = hidden_BTD.float()
    u_D = torch.randn(hidden_BTD.shape[-1], generator=generator).to(hidden_BTD)
    target_D = norm * u_D / u_D.norm()
    apart_BT = (hidden_BTD - target_D).square().mean(-1)
    total: Tensor = apart_BT[predicting(mask_BT)].sum()
    return total
