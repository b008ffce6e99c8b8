"""GradDiff: ascend on forget, descend on retain."""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.losses import nll
from excise.methods.base import Paper, Removal
from excise.methods.tuning import TuningMethod, tune
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig


class GradDiff(TuningMethod):
    """Minimise -NLL(forget) + alpha NLL(retain)."""

    name: Literal["grad_diff"] = "grad_diff"
    alpha: float = 1.0
    """Weight of the retain loss."""
    fit: FitConfig = FitConfig(steps=100, lr=6e-5, batch_size=8, clip=1.0)
    """Steps, rows per step of each role, learning rate."""

    version: ClassVar[int] = 1
    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning (GradDiff: Liu et al. 2022, Maini et al. 2024)",
        "arXiv:2506.06278",
        "L = -CE(forget) + a CE(retain)",
        "AddieFoote/distillation-robustify-unlearning",
        {
            "fit": "language setting: 100 steps, lr 6e-5 chosen of 1e-5..8e-5",
            "alpha": "language: 1",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by descending on the difference of the two losses."""
        terms = {"forget": (-1.0, nll), "retain": (self.alpha, nll)}
        return tune(self, start, domain, terms, ctx)
