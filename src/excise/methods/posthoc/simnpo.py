"""SimNPO: NPO without a reference, on the mean loss per token.

repeat
s(x) <- -log p(x) and n(x) <- number of the scored tokens of each forget sequence x
L <- gamma mean_x[-2/beta log sigmoid(beta (s(x) / n(x) - delta))] + alpha NLL(retain)
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from excise.core.config import SIGNED
from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch
from excise.losses import sequence_nll, simnpo
from excise.methods.base import Paper, Removal
from excise.methods.tuning import TuningMethod, logits_of, mean_nll, minimise, role_batches
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig, Term


class SimNPO(TuningMethod):
    """Minimise -2/beta log sigmoid(beta (s/n - delta)) on forget sequences + alpha NLL(retain)."""

    name: Literal["simnpo"] = "simnpo"
    beta: float = Field(default=4.5, gt=0)
    """Inverse temperature: how soon a sequence counts as forgotten."""
    delta: Annotated[float, SIGNED] = 0.0
    """Margin, nats per token; gamma in the paper."""
    gamma: float = 0.125
    """Weight of the forget loss."""
    alpha: float = 1.0
    """Weight of the retain loss."""
    fit: FitConfig = FitConfig(
        steps=125, lr=1e-5, batch_size=32, warmup=12, schedule="linear", weight_decay=0.01, clip=1.0
    )
    """Steps, rows per step of each role, learning rate."""

    paper: ClassVar[Paper] = Paper(
        "Simplicity prevails: rethinking negative preference optimization for LLM unlearning",
        "arXiv:2410.07163",
        "-2/beta E log sigmoid(-beta/|y| log p - gamma) on forget + NLL(retain)",
        "OPTML-Group/Unlearn-Simple@f1a355d (MIT)",
        {
            "beta": "TOFU/README.md, forget10: 4.5 (2.5 for forget05)",
            "delta": "TOFU/config/forget.yaml: gamma 0.0",
            "gamma": "TOFU/README.md, forget10: npo_coeff 0.125 (0.1375 for forget05)",
            "alpha": "TOFU/config/forget.yaml: grad_diff_coeff 1.0",
            "fit": "TOFU/config/forget.yaml: lr 1e-5, weight decay 0.01, 10 epochs of 32 rows (125 "
            "steps on the 400 of forget10), warm-up of one epoch, then linear; clipping at 1 is "
            "the default of the Trainer it uses",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by preferring anything else to it."""
        domain, quality = self.given(domain, ctx)
        batches = role_batches(
            domain, ("forget", "retain"), start.tokenizer(), self.fit, ctx,
            max_length=self.max_length,
        )  # fmt: skip

        def not_preferred(model: nn.Module, forget: Batch) -> Term:
            s_B, tokens_B = sequence_nll(logits_of(model, forget), forget)
            return Term(*simnpo(s_B, tokens_B, self.beta, self.delta), self.gamma)

        return minimise(
            self, start, domain, batches,
            {"forget": not_preferred, "retain": mean_nll(self.alpha)}, ctx,
            forget_count=lambda forget: float(len(forget.units)), extras=quality,
        )  # fmt: skip
