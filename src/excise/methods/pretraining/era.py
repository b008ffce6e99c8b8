"""Expand-Route-Ablate as published: extra neurons that forget rows train, deleted at the end.

All rows run through the whole model. For a token of a row labelled as a capability, the gradient
that would pass back through the original neurons of the first blocks is reversed and shrunk, the
more wholly the more typical the token is of such rows; the added neurons always get theirs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.routing.ablation import Seen, Setup, train_preset
from excise.routing.era_steps import PUBLISHED, Expand, expand_cutting, expand_setup


class ERA(Method):
    """Grow neurons, route forget gradients away from the others, delete them, repair lightly."""

    name: Literal["era"] = "era"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    expand: Expand = Expand()
    """What is grown, how gradients are routed, and the repair."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Gradient routing: masking gradients to localize computation in neural networks",
        "arXiv:2410.04332",
        "section 4.2.1 and appendix C",
        "kxcloud/gradient-routing@896dba3 (MIT in its pyproject)",
        defaults=PUBLISHED,
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Expand `start`, train it under routing, ablate, and repair."""
        length = schedule(self.pretrain, self.name).max_length

        def setup(model: nn.Module, seen: Seen) -> Setup:
            return expand_setup(model, seen, self.expand, ctx, max_length=length, silent=False)

        cutting = expand_cutting(self.expand, ctx, max_length=length)
        return train_preset(self, start, domain, ctx, setup, cutting)
