"""The control of every preset: plain training with a module that is removed all the same.

Every row reads and writes everything, so what the removal takes is what any piece of that size
holds, and what it costs is what its absence costs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain, labelled_corpus, schedule
from excise.methods.pretraining.routed import EVERYTHING, train_and_cut, with_modules
from excise.methods.pretraining.routed.modules import How, Module, check_cut
from excise.models.checkpoint import Checkpoint


class AblatedPlain(Method):
    """Plain training of a model with a module per capability, which is then removed."""

    name: Literal["ablated_plain"] = "ablated_plain"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; they change what is measured, not learned."""
    module: Module = Module(width=0.1, grow=True)
    """Size and place of each module."""
    ablate: How = "delete"
    """How modules are cut off; grown ones are deleted, others emptied or drawn anew."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Gradient routing: masking gradients to localize computation in neural networks",
        "arXiv:2410.04332",
        "figure 12: ablating a control trained without routing",
    )

    @model_validator(mode="after")
    def _check(self) -> AblatedPlain:
        """Refuse ways to cut that leave other shapes than the start's."""
        check_cut(self.ablate, self.module)
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` with modules, everything on and written, and cut them off."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = labelled_corpus(domain, self.labels, ctx)
        modular = with_modules(start, self.module, names, EVERYTHING, ctx)
        return train_and_cut(start, modular, rows, config, ctx, stage=self.name, how=self.ablate)
