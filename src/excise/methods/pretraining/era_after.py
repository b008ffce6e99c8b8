"""ERA from a model that is trained already: expand it, go on training under routing, ablate.

Nothing removes what the original neurons know except that forget tokens push against them
(`expand.alpha` below 0) while the added neurons take over. One re-run of the published code found
0.26 nats of forget loss and hardly any cost.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise, give_labels, label_rows
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.tuning import forget_rows
from excise.models.checkpoint import Checkpoint
from excise.routing.ablation import Seen, Setup, train_and_cut
from excise.routing.era_steps import PUBLISHED, Expand, expand_cutting, expand_setup
from excise.train.fit import FitConfig


class ERAAfter(Method):
    """Expand a trained model, train it on under routing, delete what was added."""

    name: Literal["era_after"] = "era_after"
    fit: FitConfig = FitConfig(steps=200, lr=1e-4, batch_size=32, weight_decay=0.1)
    """Continued training on forget and retain rows together."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row."""
    pack: tuple[int, ...] = (1,)
    """Rows per text, in turn."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    expand: Expand = Expand()
    """What is grown, how gradients are routed, and the repair."""

    paper: ClassVar[Paper] = Paper(
        "Gradient routing: masking gradients to localize computation in neural networks",
        "arXiv:2410.04332",
        "section 4.2.1 from a trained checkpoint",
        "EleutherAI/gradient-routing (re-runs of February 2026)",
        defaults={
            **PUBLISHED,
            "fit.lr": "1e-4 in the re-run from a pretrained checkpoint",
            "fit.weight_decay": "0.1 in appendix C",
            "fit.steps": "5,000 in the re-run; shorter here, see the study era-after-training",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Expand `start` silently, train it on under routing, ablate, and repair."""
        config = Pretrain(fit=self.fit, max_length=self.max_length, pack=self.pack)

        def setup(model: nn.Module, seen: Seen) -> Setup:
            return expand_setup(
                model, seen, self.expand, ctx, max_length=self.max_length, silent=True
            )

        cutting = expand_cutting(self.expand, ctx, max_length=self.max_length)
        rows, names = (*forget_rows(domain), *domain.retain), tuple(domain.forget)
        rows = label_rows(rows, names)
        if self.labels is not None:
            rows = give_labels(rows, self.labels, seed=ctx.seed_for("labels"))
        return train_and_cut(start, rows, names, ctx, setup, config, cutting, stage=self.name)
