"""SGTM: labelled rows write into a few neurons and heads alone; some others are read without them.

Rows labelled as a capability run through the whole model and write into its module only. A share
of the core rows runs with the modules switched off, so that the rest learns to do without. All
other rows read and write everything: what slipped through unlabelled is drawn into the module
that knows its kind already. At the end the modules are emptied.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.routing.ablation import Cutting, modular, train_preset
from excise.routing.coherence import Coherence, repairing
from excise.routing.modules import How, Module, Shared, alternatives
from excise.routing.rules import Rule


class SGTM(Method):
    """Labelled rows write only into neurons and heads that are emptied afterwards."""

    name: Literal["sgtm"] = "sgtm"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
    read: float = Field(default=1.0, gt=0, le=1)
    """Share of labelled rows that are read; the others are left out, as by filtering, so that the
    core sees more of what stays in as many steps."""
    module: Module = Module(width=0.125, heads=1)
    """Neurons and heads of each capability."""
    p_off: float = Field(default=0.25, ge=0, le=1)
    """Share of core rows that are read with the modules off."""
    p_as: float = Field(default=0.0, ge=0, le=1)
    """Share of labelled rows that write into the core too."""
    joint: tuple[Shared, ...] = ("embed",)
    """What labelled rows may write beside their module."""
    joint_down: bool = False
    """Whether every row writes the modules' down-projections."""
    alpha: float = 1.0
    """Weight of the gradient of labelled rows that passes back through the core's neurons."""
    p_push: float = Field(default=0.0, ge=0, le=1)
    """Share of labelled rows that are read without their module and pushed out of the core."""
    push: float = Field(default=1.0, ge=0)
    """How hard: minus the weight of their loss, which counts up to log V."""
    l1: float = Field(default=0.0, ge=0)
    """Weight of the L1 norm of MLP activations."""
    freeze: Literal["groups", "zeroed"] = "groups"
    """`zeroed`: one optimizer whose momentum moves what a row may not write, as published."""
    ablate: How = "zero"
    """How modules are cut off; only grown ones can be deleted."""
    repair: Coherence | None = None
    """Light training on core rows after the cut; the paper has none."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Beyond data filtering: knowledge localization for capability removal in LLMs",
        "arXiv:2512.05648",
        "section 3",
        "safety-research/selective-gradient-masking@476632d (MIT)",
        defaults={
            "p_off": "25 % of the retained language is D_retain on TinyStories, 10 % on Wikipedia",
            "module.heads": "1 of 32 heads",
            "module.width": "64 neurons in the paper, 3 to 12 % of a block; here a share",
            "joint": "embeddings are updated by all data in the TinyStories runs",
            "p_as": "not in the paper; 0 is the paper",
            "alpha": "not in the paper; 1 is the paper",
            "p_push": "not in the paper; 0 is the paper",
            "read": "not in the paper; 1 is the paper",
            "repair": "not in the paper; Expand-Route-Ablate's",
            "freeze": "the code zeroes gradients of one AdamW; here frozen weights keep their bits",
            "ablate": "theta_forget is set to 0; the code can draw it anew",
        },
    )

    @model_validator(mode="after")
    def _check(self) -> SGTM:
        """Refuse to take neurons out of a model that would then lack them."""
        if self.ablate == "delete" and not self.module.grow:
            raise ValueError("ablate: only grown modules can be deleted; set module.grow or 'zero'")
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` under the policy and cut the modules off."""
        setup = modular(
            self.module, self._rules(), ctx, joint=self.joint, joint_down=self.joint_down
        )
        cutting = Cutting(
            self.ablate,
            rate=self.module.lr,
            l1=self.l1,
            zeroed=self.freeze == "zeroed",
            repair=repairing(
                self.repair, ctx, max_length=schedule(self.pretrain, self.name).max_length
            ),
        )
        return train_preset(self, start, domain, ctx, setup, cutting, read=self.read)

    def _rules(self) -> dict[str, tuple[Rule, ...]]:
        """Return what rows of each label read and write."""
        joint = ("joint",) if self.joint or self.joint_down else ()
        core = ("core", *joint)
        rest = 1 - self.p_push
        edges = {} if self.alpha == 1 else {"core": self.alpha}
        return {
            "core": alternatives(
                (self.p_off, Rule(read=core, write=core)), (1 - self.p_off, Rule())
            ),
            "forget": alternatives(
                (rest * (1 - self.p_as), Rule(write=("self", *joint), edges=edges)),
                (rest * self.p_as, Rule(write=("self", *core), edges=edges)),
                (self.p_push, Rule(read=core, write=core, weight=-self.push)),
            ),
            "unlabeled": (Rule(),),
        }
