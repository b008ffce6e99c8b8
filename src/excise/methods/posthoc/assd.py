"""Adaptive SSD: SSD whose selection follows from how many rows are to be forgotten.

    I_f, I_D as in SSD
    P     = 100 - ln(1 + 100 |D_f| / |D|)
    alpha = percentile P of I_f / I_D over all weights that any row touches
    for every weight with I_f > alpha I_D:
        w <- min(I_D / I_f, 1) w

Source:
    arXiv 2402.10098; its repository holds notebooks alone. The percentile is that of
    if-loops/towards_poison_unlearning@5b5e83f (GPL-3, read only), src/utils.py.
"""

from __future__ import annotations

import time
from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.methods.base import Paper, Removal
from excise.methods.importance import (
    ImportanceMethod,
    SortedRatios,
    dampened,
    drop_ratios,
    percentile_of,
    share_of,
)
from excise.models.checkpoint import Checkpoint


class ASSD(ImportanceMethod):
    """SSD that needs no alpha: it takes the percentile that the size of the forget set gives."""

    name: Literal["assd"] = "assd"

    paper: ClassVar[Paper] = Paper(
        "Parameter-tuning-free data entry error unlearning with adaptive selective synaptic "
        "dampening",
        "arXiv:2402.10098",
        "alpha as a percentile of relative importances, lambda 1",
        "if-loops/adaptive-selective-synaptic-dampening@f04c49d (MIT)",
        {
            "batch_size": "SSD's 64 images, if-loops/selective-synaptic-dampening@cdfdc0e; rows of "
            "text are longer, so 8 here",
            "against": "arXiv:2402.10098: the paper's D; the released search of Potion reads "
            "retain rows alone",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Dampen what `domain.forget` leans on."""
        began = time.monotonic()
        domain, quality = self.given(domain, ctx)
        forget, full = self.measured("nll", start, domain, ctx)
        folder = ctx.work / f"ratios-{ctx.rank}"
        ratios = SortedRatios(forget, full, folder, names=self.names(forget))
        percentile = percentile_of(share_of(domain))
        alpha = ratios.threshold(percentile)
        removal = dampened(
            self, start, forget, full, ctx, alpha=alpha, lam=1.0, began=began,
            extras={**quality, "percentile": percentile},
        )  # fmt: skip
        drop_ratios(ctx)
        return removal
