"""MemSinks: every unit reads and writes a few sink neurons of its own, by the hash of its id.

What is said again and again about one unit collects in its sinks, what units share in the neurons
that all of them use; at the end all sinks are dropped. No label is needed, and none is read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.routing.ablation import Cutting, Seen, Setup, train_preset
from excise.routing.modules import How, Module, groups_of, place
from excise.routing.rules import Policy, Rule


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
            "module.width": "chosen here: about a third of the neurons are sinks",
            "sinks": "chosen here; the paper draws single neurons for each sequence",
            "active": "chosen here",
        },
    )

    @model_validator(mode="after")
    def _check(self) -> MemSinks:
        """Refuse more active sinks than there are, and shapes that differ from the start's."""
        if self.active >= self.sinks:
            raise ValueError(f"active: must be fewer than the {self.sinks} sinks")
        if (self.ablate == "delete") != self.module.grow:
            raise ValueError("ablate: grown sinks are deleted, carved ones zeroed or drawn anew")
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` with sinks and drop them."""

        def setup(model: nn.Module, seen: Seen) -> Setup:
            placed = place(model, self.module, self.sinks, ctx.seed_for("grow"))
            mine = ("core", f"hashed:{self.active}")
            rules: tuple[Rule, ...] = (Rule(read=mine, write=mine),)
            every = dict.fromkeys(("core", "unlabeled", "forget"), rules)
            policy = Policy(groups=groups_of(placed), rules=every, capabilities=seen.names)
            return Setup(policy, placed)

        cutting = Cutting(self.ablate, rate=self.module.lr)
        return train_preset(self, start, domain, ctx, setup, cutting)
