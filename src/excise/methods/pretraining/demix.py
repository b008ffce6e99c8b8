"""DEMix: one feed-forward expert per domain, chosen by the label; the trunk is shared.

Every row runs through the attention, norms and embeddings that all share and through the expert
of its own domain alone; it writes what it reads. Rows without a label are core rows. An expert
that is absent from the forward pass cannot absorb anything: that is what routing adds.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.routing.ablation import Cutting, Seen, Setup, own_units, train_preset
from excise.routing.groups import Groups
from excise.routing.modules import Module, place
from excise.routing.rules import Policy, Rule


class DEMix(Method):
    """Hard experts by domain over a shared trunk; the experts of capabilities are deleted."""

    name: Literal["demix"] = "demix"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    module: Module = Module(width=1.0, grow=True)
    """Size of a capability's expert: 1 is as large as the core's."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "DEMix layers: disentangling domains for modular language modeling",
        "arXiv:2108.05036",
        "section 2",
        defaults={"module.width": "experts are as large as the feed-forward layer they replace"},
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` with an expert per capability and delete those."""
        module = self.module.model_copy(update={"grow": True})

        def setup(model: nn.Module, seen: Seen) -> Setup:
            own = own_units(model, module.blocks)
            placed = place(model, module, len(seen.names), ctx.seed_for("grow"))
            groups = Groups(parts={"core": own, **placed.parts}, leftovers="joint")
            core, mine = ("joint", "core"), ("joint", "self")
            rules: dict[str, tuple[Rule, ...]] = {
                "core": (Rule(read=core, write=core),),
                "unlabeled": (Rule(read=core, write=core),),
                "forget": (Rule(read=mine, write=mine),),
            }
            return Setup(Policy(groups=groups, rules=rules, capabilities=seen.names), placed)

        cutting = Cutting("delete", rate=module.lr)
        return train_preset(self, start, domain, ctx, setup, cutting)
