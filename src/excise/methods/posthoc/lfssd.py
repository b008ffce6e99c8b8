"""LFSSD: SSD without labels, by how much a weight moves the length of the model's output.

    I_f, I_D = mean over batches of |gradient of the mean of ||z||^2|, on D_f and on D
    for every weight with I_f > alpha I_D:
        w <- min(lambda I_D / I_f, 1) w

with z the logits at a position. They are never made: ||W h||^2 = h^T (W^T W) h.

Source:
    arXiv 2402.19308; if-loops/towards_poison_unlearning@5b5e83f (GPL-3, read only), src/utils.py,
    holds the authors' loss.
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


class LFSSD(ImportanceMethod):
    """Dampen weights to which the squared length of the logits of forget rows is more sensitive."""

    name: Literal["lfssd"] = "lfssd"
    alpha: float = Field(default=10.0, gt=0)
    """Selection; importances are not squared, so that 10 asks for more than SSD's 10 does."""
    lam: float = Field(default=1.0, ge=0)
    """Dampening (lambda)."""

    search: ClassVar[Space] = {"alpha": Range(), "lam": Range(low=0.1, high=1.0)}
    paper: ClassVar[Paper] = Paper(
        "Loss-free machine unlearning",
        "arXiv:2402.19308",
        "Omega_i, the gradient of the squared l2 norm of the output",
        "if-loops/towards_poison_unlearning@5b5e83f (GPL-3)",
        {
            "alpha": "SSD's, if-loops/selective-synaptic-dampening@cdfdc0e; the paper's own was "
            "not to be read",
            "lam": "SSD's, if-loops/selective-synaptic-dampening@cdfdc0e",
            "batch_size": "SSD's 64 images, if-loops/selective-synaptic-dampening@cdfdc0e; rows of "
            "text are longer, so 8 here",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Dampen what the outputs on `domain.forget` lean on."""
        began = time.monotonic()
        domain, quality = self.given(domain, ctx)
        check_alpha(self, self.alpha, domain)
        forget, full = self.measured("squared_logits", start, domain, ctx)
        return dampened(
            self, start, forget, full, ctx, alpha=self.alpha, lam=self.lam, began=began,
            extras=quality,
        )  # fmt: skip
