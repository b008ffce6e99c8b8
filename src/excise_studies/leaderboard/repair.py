"""What an owner may do to any edited model: train it on for a while on retain rows."""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.losses import nll
from excise.methods.base import Paper, Removal
from excise.methods.tuning import TuningMethod, tune
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig


class RetainTuning(TuningMethod):
    """Minimise NLL(retain): it repairs what an edit broke, and may bring back what it hid."""

    name: Literal["retain_tuning"] = "retain_tuning"
    fit: FitConfig = FitConfig(steps=60, lr=5e-4, batch_size=16, clip=1.0)
    """Steps, rows per step, learning rate."""

    needs: ClassVar[tuple[str, ...]] = ("retain",)
    paper: ClassVar[Paper] = Paper("Fine-tuning on retain data", "")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on `domain.retain`."""
        return tune(self, start, domain, {"retain": (1.0, nll)}, ctx)
