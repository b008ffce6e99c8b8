"""GRAM: a small module beside every MLP for each capability, and a core trained to do without.

Core rows run through the core alone, or together with one module drawn at random; rows of a
capability run through core and their module and write into the module; unlabelled rows read and
write everything. A sum of MLPs is one wider MLP, so that modules are grown neurons here, and any
subset of them can be served: the others are deleted (`routed.modules.serve`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain, labelled_corpus, schedule
from excise.methods.pretraining.routed import (
    alternatives,
    forget_rules,
    train_and_cut,
    with_modules,
)
from excise.methods.pretraining.routed.modules import How, Module, Shared, check_cut
from excise.models.checkpoint import Checkpoint
from excise.routing import Rule


class GRAM(Method):
    """Modules grown beside a core that learns to work with and without them."""

    name: Literal["gram"] = "gram"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    module: Module = Module(width=0.1, grow=True)
    """Neurons that each capability gets beside those of the core."""
    p_cr: float = Field(default=0.5, ge=0, le=1)
    """Core robustness: share of core rows that run with one module, drawn by number of rows."""
    p_as: float = Field(default=0.3, ge=0, le=1)
    """Auxiliary spread: share of labelled rows that write into the core too."""
    joint: tuple[Shared, ...] = ()
    """What labelled rows may write beside their module."""
    joint_down: bool = False
    """Whether every row that reads a module writes its down-projection."""
    alpha: float = 1.0
    """Weight of the gradient of labelled rows that passes back through the core's neurons."""
    p_push: float = Field(default=0.0, ge=0, le=1)
    """Share of labelled rows that are read without their module and pushed out of the core."""
    push: float = Field(default=1.0, ge=0)
    """How hard: minus the weight of their loss, which counts up to log V."""
    l1: float = Field(default=0.0, ge=0)
    """Weight of the L1 norm of MLP activations."""
    ablate: How = "delete"
    """How modules are cut off; grown ones are deleted, others emptied or drawn anew."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Modular pretraining enables access control",
        "arXiv:2607.08077",
        "the batch plan of core, auxiliary and unlabelled data",
        "agencyenterprise/modular-pretraining (no licence file; read only)",
        defaults={
            "module.width": "src/run/experiment/stories/methods/run.py: aux_param_prc 0.1, 192 of "
            "2048 neurons",
            "p_cr": "stories/methods/run.py: robust_prc 0.5; partial/run.py: 0.2",
            "p_as": "stories/methods/run.py: aux_route_prc 0.3; partial/run.py: 0",
            "p_push": "ours: not in the paper; 0 is the paper",
            "joint": "src/run/train/routed.py: attention, norms and embeddings belong to the core",
        },
    )

    @model_validator(mode="after")
    def _check(self) -> GRAM:
        """Refuse ways to cut that leave other shapes than the start's."""
        check_cut(self.ablate, self.module)
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` with modules under the policy and cut them off."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = labelled_corpus(domain, self.labels, ctx)
        modular = with_modules(
            start, self.module, names, self._rules(), ctx, self.joint, joint_down=self.joint_down
        )
        return train_and_cut(
            start, modular, rows, config, ctx, stage=self.name, how=self.ablate, l1=self.l1
        )

    def _rules(self) -> dict[str, tuple[Rule, ...]]:
        """Return what rows of each label read and write."""
        joint = ("joint",) if self.joint or self.joint_down else ()
        core = ("core", *joint)
        both = (*core, "drawn")
        return {
            "core": alternatives(
                (1 - self.p_cr, Rule(read=core, write=core)),
                (self.p_cr, Rule(read=both, write=both)),
            ),
            "forget": forget_rules(
                core,
                joint,
                read=(*core, "self"),
                p_as=self.p_as,
                alpha=self.alpha,
                p_push=self.p_push,
                push=self.push,
            ),
            "unlabeled": (Rule(),),
        }
