"""SSD: dampen the weights that matter more to forget rows than to all rows.

    I_f, I_D = mean over batches of (gradient of the mean loss)^2, on D_f and on D = D_f + D_r
    for every weight with I_f > alpha I_D:
        w <- min(lambda I_D / I_f, 1) w

One pass over the rows and no step of training.

Source:
    arXiv 2308.07707, equations 4 and 5; if-loops/selective-synaptic-dampening@cdfdc0e (MIT),
    src/ssd.py. Its `min_layer`, `max_layer`, `exponent` and `forget_threshold` do nothing there.
"""

from __future__ import annotations

import time
from typing import ClassVar, Literal

from pydantic import Field

from excise.core.context import Context
from excise.data.domain import Domain
from excise.methods.base import Paper, Removal
from excise.methods.importance import ImportanceMethod, check_alpha, dampened
from excise.methods.search import Range, Space
from excise.models.checkpoint import Checkpoint


class SSD(ImportanceMethod):
    """Dampen weights whose squared gradient on forget rows exceeds alpha times that on all rows."""

    name: Literal["ssd"] = "ssd"
    alpha: float = Field(default=10.0, gt=0)
    """Selection: how many times more important a weight must be to forget rows than to all."""
    lam: float = Field(default=1.0, ge=0)
    """Dampening (lambda): smaller values take more away from what was selected."""

    search: ClassVar[Space] = {"alpha": Range(), "lam": Range(low=0.1, high=1.0)}
    paper: ClassVar[Paper] = Paper(
        "Fast machine unlearning without retraining through selective synaptic dampening",
        "arXiv:2308.07707",
        "equations 4 and 5",
        "if-loops/selective-synaptic-dampening@cdfdc0e (MIT)",
        {
            "alpha": "src/forget_full_class_main.py: selection_weighting 10 (5 for ViT, 50 faces)",
            "lam": "src/forget_full_class_main.py: dampening_constant 1 (0.1 for faces)",
            "batch_size": "src/forget_full_class_main.py: 64 images; rows of text are longer, so 8 "
            "here",
            "against": "src/forget_full_class_main.py: full_train_dl is retain and forget; the one "
            "batch there that holds both is cut in two here",
            "vectors": "src/ssd.py dampens every parameter",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Dampen what `domain.forget` leans on."""
        began = time.monotonic()
        domain, quality = self.given(domain, ctx)
        check_alpha(self, self.alpha, domain)
        forget, full = self.measured("nll", start, domain, ctx)
        return dampened(
            self, start, forget, full, ctx, alpha=self.alpha, lam=self.lam, began=began,
            extras=quality,
        )  # fmt: skip
