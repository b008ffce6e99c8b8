"""DEMix: one feed-forward expert per domain, chosen by the label; the trunk is shared.

Every row runs through the attention, norms and embeddings that all share and through the expert
of its own domain alone; it writes what it reads. Rows without a label are core rows. An expert
that is absent from the forward pass cannot absorb anything: that is what routing adds.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain, labelled_corpus, schedule
from excise.methods.pretraining.routed import ModularModel, train_and_cut
from excise.methods.pretraining.routed.modules import Module, own_units, place
from excise.models.checkpoint import Checkpoint
from excise.routing import Groups, Policy, Rule


class DEMix(Method):
    """Hard experts by domain over a shared trunk; the experts of capabilities are deleted."""

    name: Literal["demix"] = "demix"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    module: Module = Module(width=1.0, grow=True)
    """Size of a capability's expert: 1 is as large as the core's."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "DEMix layers: disentangling domains for modular language modeling",
        "arXiv:2108.05036",
        "section 2",
        defaults={
            "module.width": "section 2: experts are as large as the feed-forward layer they replace"
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` with an expert per capability and delete those."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = labelled_corpus(domain, self.labels, ctx)
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        expert = self.module.model_copy(update={"grow": True})
        core_units = own_units(model, expert.blocks)
        placed = place(model, expert, len(names), ctx.seed_for("grow"))
        core, forget = ("joint", "core"), ("joint", "self")
        policy = Policy(
            groups=Groups(parts={"core": core_units, **placed.parts}, leftovers="joint"),
            rules={
                "core": (Rule(read=core, write=core),),
                "unlabeled": (Rule(read=core, write=core),),
                "forget": (Rule(read=forget, write=forget),),
            },
            capabilities=names,
        )
        modular = ModularModel(model, placed, policy)
        return train_and_cut(start, modular, rows, config, ctx, stage=self.name, how="delete")
