"""MemSinks: every unit reads and writes a few sink neurons of its own, by the hash of its id.

What is said again and again about one unit collects in its sinks, what units share in the neurons
that all of them use; at the end all sinks are dropped. No label is needed, and none is read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain, labelled_corpus, schedule
from excise.methods.pretraining.routed import ModularModel, train_and_cut
from excise.methods.pretraining.routed.modules import How, Module, check_cut, groups_of, place
from excise.models.checkpoint import Checkpoint
from excise.routing import Policy, Rule


class MemSinks(Method):
    """Sink neurons by hash of the unit, dropped at the end; what is memorised goes with them."""

    name: Literal["memsinks"] = "memsinks"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """Taken as by every method that trains from scratch; nothing follows from it here."""
    module: Module = Module(width=0.02)
    """Neurons of one sink, as a share of a block's; carved out unless `module.grow`."""
    sinks: int = Field(default=16, ge=2, le=256)
    """Number of sinks; together they are `sinks * module.width` of a block."""
    active: int = Field(default=2, ge=1)
    """Sinks of one unit."""
    ablate: How = "zero"
    """How sinks are dropped; grown ones are deleted, others emptied or drawn anew."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Memorization sinks: isolating memorization during LLM training",
        "arXiv:2507.09937",
        "section 4",
        defaults={
            "module.width": "ours: no published value; about a third of the neurons are sinks",
            "sinks": "ours: the paper (section 4) draws single neurons for each sequence",
            "active": "ours: no published value",
        },
    )

    @model_validator(mode="after")
    def _check(self) -> MemSinks:
        """Refuse more active sinks than there are, and shapes that differ from the start's."""
        if self.active >= self.sinks:
            raise ValueError(f"active: must be fewer than the {self.sinks} sinks")
        check_cut(self.ablate, self.module, "sinks")
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` with sinks and drop them."""
        config = schedule(self.pretrain, self.name)
        rows = labelled_corpus(domain, self.labels, ctx)
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        placed = place(model, self.module, self.sinks, ctx.seed_for("grow"))
        core_and_sinks = ("core", f"hashed:{self.active}")
        every: tuple[Rule, ...] = (Rule(read=core_and_sinks, write=core_and_sinks),)
        rules = dict.fromkeys(("core", "unlabeled", "forget"), every)
        names = tuple(domain.forget)
        policy = Policy(groups=groups_of(placed), rules=rules, capabilities=names)
        modular = ModularModel(model, placed, policy)
        return train_and_cut(start, modular, rows, config, ctx, stage=self.name, how=self.ablate)
