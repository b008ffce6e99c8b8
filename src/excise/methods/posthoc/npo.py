"""NPO: push forget sequences below what the model gave them at first, ever more gently.

    s0(x) <- -log p0(x) for every forget sequence, once
    repeat
        s(x) <- -log p(x), summed over the scored tokens of x
        L <- gamma mean_x[-2/beta log sigmoid(beta (s(x) - s0(x)))] + alpha NLL(retain)

As beta falls to 0 this is gradient ascent; a sequence that is far below s0 already has no weight.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.core.keys import FilePath
from excise.data.domain import Domain
from excise.data.stream import Batch, zip_streams
from excise.losses import npo, sequence_nll
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.reference import reference_of
from excise.methods.tuning import TuningMethod, logits_of, mean_nll, minimise, role_streams
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig, Term


class NPO(TuningMethod):
    """Minimise -2/beta log sigmoid(beta (s - s0)) on forget sequences + alpha NLL(retain)."""

    name: Literal["npo"] = "npo"
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature: how soon a sequence counts as forgotten."""
    gamma: float = 1.0
    """Weight of the forget loss."""
    alpha: float = 1.0
    """Weight of the retain loss."""
    reduction: Literal["sequence_sum", "batch_mean"] = "sequence_sum"
    """What s is: the sum over a sequence's tokens, or, as the released code for WMDP has it, one
    mean over all tokens of a micro-batch, for which beta is 0.0125 to 0.05."""
    reference: FilePath = ""
    """A kept file of s0 (`reference.json` of an earlier run); empty to compute it."""
    fit: FitConfig = FitConfig(
        steps=125, lr=1e-5, batch_size=32, warmup=12, schedule="linear", weight_decay=0.01, clip=1.0
    )
    """Steps, rows per step of each role, learning rate."""

    paper: ClassVar[Paper] = Paper(
        "Negative preference optimization: from catastrophic collapse to effective unlearning",
        "arXiv:2404.05868",
        "NPO+RT: -2/beta E log sigmoid(-beta log p/p0) on forget + NLL(retain)",
        "licong-lin/negative-preference-optimization@1207bbe (no licence)",
        {
            "beta": "TOFU/config/forget.yaml: 0.1",
            "gamma": "TOFU/config/forget.yaml: npo_coeff 1.0",
            "alpha": "TOFU/config/forget.yaml: grad_diff_coeff 1.0",
            "reduction": "TOFU/dataloader.py, get_batch_loss: summed over each sequence; "
            "batch_mean is OPTML-Group/Unlearn-Simple@f1a355d (MIT), WMDP/src/unlearn/GA.py, with "
            "beta 0.0225",
            "fit": "TOFU/config/forget.yaml: lr 1e-5, weight decay 0.01, 10 epochs of 32 rows (125 "
            "steps on the 400 of forget10), warm-up of one epoch, then linear; clipping at 1 is "
            "the default of the Trainer it uses",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by preferring anything else to it."""
        domain, quality = self.given(domain, ctx)
        streams = role_streams(
            domain, ("forget", "retain"), start.tokenizer(), self.fit, ctx,
            max_length=self.max_length,
        )  # fmt: skip
        reference = reference_of(start, streams["forget"].examples, ctx, kept=self.reference)

        def not_preferred(model: nn.Module, forget: Batch) -> Term:
            s0_B = reference(forget)
            s_B, tokens_B = sequence_nll(logits_of(model, forget), forget)
            if self.reduction == "batch_mean":
                s_B, s0_B = (x_B.sum(0, keepdim=True) / tokens_B.sum() for x_B in (s_B, s0_B))
            return Term(*npo(s_B, s0_B, self.beta), self.gamma)

        def sequences(forget: Batch) -> float:
            return float(len(forget.units)) if self.reduction == "sequence_sum" else 1.0

        losses = {"forget": not_preferred, "retain": mean_nll(self.alpha)}
        return minimise(
            self, start, domain, zip_streams(streams), losses, ctx, forget_count=sequences,
            before=reference.cost, extras={**quality, **reference.facts},
        )  # fmt: skip
