"""MaxEnt: make the model's guess uniform on forget text, keep its loss on retain text.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch
from excise.losses import Summed, kl_to_uniform, nll, predicting
from excise.methods.base import Paper, Removal
from excise.methods.tuning import TuningMethod, tune
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig


class MaxEnt(TuningMethod):
    """Minimise KL(uniform || model) on forget tokens + alpha NLL(retain)."""

    name: Literal["maxent"] = "maxent"
    alpha: float = 1.0
    """Weight of the retain loss."""
    fit: FitConfig = FitConfig(steps=100, lr=3e-5, batch_size=8, clip=1.0)
    """Steps, rows per step of each role, learning rate."""

    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning (MaxEnt)",
        "arXiv:2506.06278",
        "L = KL(uniform || p) on forget + a CE(retain)",
        "AddieFoote/distillation-robustify-unlearning",
        {
            "fit": "run_unlearn_language.py: 100 steps of 4 x 2048 tokens, lr 3e-5 chosen of "
            "1e-5..8e-5, clip 1; here 8 rows of up to `max_length` tokens",
            "alpha": "run_unlearn_language.py: use_retain, which adds the two losses: 1",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by flattening what the model predicts on it."""
        terms = {"forget": (1.0, flatness), "retain": (self.alpha, nll)}
        return tune(self, start, domain, terms, ctx)


def flatness(logits_BTV: Float[Tensor, "B T V"], batch: Batch) -> Summed:
    """Return KL(uniform || model) in nats at the positions that predict the scored tokens.

    Args:
        logits_BTV: Logits of the model.
        batch: Says which tokens are scored.

    Source:
        MaxEnt of UNDO, arXiv 2506.06278.
    """
    return kl_to_uniform(logits_BTV, predicting(batch.target_BT))
