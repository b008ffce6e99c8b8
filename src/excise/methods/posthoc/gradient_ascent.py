"""Gradient ascent: raise the loss on forget text, with nothing that holds the rest in place."""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.losses import nll
from excise.methods.base import Paper, Removal
from excise.methods.tuning import TuningMethod, tune
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig


class GradientAscent(TuningMethod):
    """Minimise -NLL(forget); unbounded, so that the schedule alone decides how much is broken."""

    name: Literal["gradient_ascent"] = "gradient_ascent"
    fit: FitConfig = FitConfig(
        steps=60, lr=1e-5, batch_size=32, warmup=12, schedule="linear", weight_decay=0.01, clip=1.0
    )
    """Steps, rows per step, learning rate."""

    needs: ClassVar[tuple[str, ...]] = ("forget",)
    paper: ClassVar[Paper] = Paper(
        "Knowledge unlearning for mitigating privacy risks in language models",
        "arXiv:2210.01504",
        "L = sum log p of the sequences to forget, minimised",
        "locuslab/tofu@bdc209e (MIT)",
        {
            "fit": "config/forget.yaml and forget.py: lr 1e-5, weight decay 0.01, 5 epochs (here "
            "60 steps of 32, which is that on the 400 rows of forget10), warm-up of one epoch, "
            "then linear; clipping at 1 is the default of the Trainer it uses",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by ascending on its loss."""
        return tune(self, start, domain, {"forget": (-1.0, nll)}, ctx)
