"""SGTM: labelled rows write into a few neurons and heads alone; some others are read without them.

Rows labelled as a capability run through the whole model and write into its module only. A share
of the core rows runs with the modules switched off, so that the rest learns to do without. All
other rows read and write everything: what slipped through unlabelled is drawn into the module
that knows its kind already. At the end the modules are emptied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from excise.core.context import Context
from excise.data.domain import CORE, Domain, Rows
from excise.data.labels import LabelNoise
from excise.data.split import hashed_order
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain, labelled_corpus, schedule
from excise.methods.pretraining.routed import core_rules, forget_rules, train_and_cut, with_modules
from excise.methods.pretraining.routed.coherence import Coherence
from excise.methods.pretraining.routed.modules import How, Module, Shared
from excise.models.checkpoint import Checkpoint
from excise.routing import Rule

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "tinystories": {
        "module": {"width": 64 / 2048, "heads": 1},
        "p_off": 0.25,
        "joint": ("embed", "head", "norms"),
        "freeze": "zeroed",
    },
    "wikipedia": {
        "module": {"width": 64 / 4096, "heads": 1},
        "p_off": 0.1,
        "joint": ("final_norm", "head_bias"),
        "freeze": "zeroed",
    },
}
"""What `preset` sets where nothing else was said: the largest model of each released run."""


class SGTM(Method):
    """Labelled rows write only into neurons and heads that are emptied afterwards."""

    name: Literal["sgtm"] = "sgtm"
    preset: Literal["", "tinystories", "wikipedia"] = ""
    """Set module, p_off, joint and freeze, where they were not set, as this released run has them;
    empty for the values below."""
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
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
            "preset": "scripts/tinystories/tradeoff.sh and scripts/wiki/run.sh; empty here, "
            "which is neither: see joint, freeze, module; a preset leaves learning rate, betas "
            "(.9, .95), decay (.1) and warm-up to the schedule, and labels to rows, where the "
            "release gives a whole step one label",
            "p_off": "scripts/tinystories/tradeoff.sh: 25 % of the retained language is D_retain, "
            "10 % on Wikipedia",
            "module.heads": "scripts/tinystories/tradeoff.sh: 1 of 32 heads",
            "module.width": "scripts/tinystories/tradeoff.sh: 64 neurons, 3 to 12 % of a block on "
            "TinyStories, 1.6 % of the 254M model on Wikipedia; here a share, that of the smallest "
            "(configs/tinystories/8M.yaml)",
            "joint": "src/sgtm/model/parameter_masking.py: labelled data also write all norms, "
            "the output matrix (tied) and its bias on TinyStories (`tinystories`), and on "
            "Wikipedia the last norm and the output bias alone (`wikipedia`, --mask-embeddings); "
            "an untied output matrix, which neither run had, stays core there. Embeddings alone "
            "lie between the two, and the numbers printed here were made with them or with "
            "nothing joint",
            "p_as": "ours: not in the paper; 0 is the paper",
            "alpha": "ours: not in the paper; 1 is the paper",
            "p_push": "ours: not in the paper; 0 is the paper",
            "read": "ours: not in the paper; 1 is the paper",
            "repair": "ours: not in the paper; Expand-Route-Ablate's",
            "freeze": "src/sgtm/model/parameter_masking.py zeroes gradients of one AdamW; here "
            "frozen weights keep their bits",
            "ablate": "section 3: theta_forget is set to 0; the code can draw it anew",
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: Any) -> Any:
        """Fill in a released run's settings before anything is checked: they are recorded."""
        chosen = PUBLISHED.get(data.get("preset") or "") if isinstance(data, Mapping) else None
        if chosen is None:
            return data
        given = {name: value for name, value in data.items() if value is not None}
        module = given.get("module", {})
        if isinstance(module, Module):
            module = module.model_dump(exclude_unset=True)
        return {**chosen, **given, "module": {**chosen["module"], **module}}

    @model_validator(mode="after")
    def _check(self) -> SGTM:
        """Refuse to take neurons out of a model that would then lack them."""
        if self.ablate == "delete" and not self.module.grow:
            raise ValueError("ablate: only grown modules can be deleted; set module.grow or 'zero'")
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` under the policy and cut the modules off."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = thinned(labelled_corpus(domain, self.labels, ctx), self.read, ctx.seed_for("read"))
        modular = with_modules(
            start, self.module, names, self._rules(), ctx, self.joint, joint_down=self.joint_down
        )
        return train_and_cut(
            start,
            modular,
            rows,
            config,
            ctx,
            stage=self.name,
            how=self.ablate,
            l1=self.l1,
            zeroed=self.freeze == "zeroed",
            repair=self.repair,
        )

    def _rules(self) -> dict[str, tuple[Rule, ...]]:
        """Return what rows of each label read and write."""
        joint = ("joint",) if self.joint or self.joint_down else ()
        core = ("core", *joint)
        return {
            "core": core_rules(core, p_off=self.p_off),
            "forget": forget_rules(
                core,
                joint,
                p_as=self.p_as,
                alpha=self.alpha,
                p_push=self.p_push,
                push=self.push,
            ),
            "unlabeled": (Rule(),),
        }


def thinned(rows: Rows, share: float, seed: int) -> Rows:
    """Return the rows with a share of those labelled as a capability, drawn by hash.

    Args:
        rows: Rows with the given labels.
        share: Share of the labelled ones that stays.
        seed: Seed of the draw.
    """
    if share >= 1:
        return rows
    labelled = [row for row in rows if row.label > CORE]
    keys = [f"{row.unit}:{row.wording}:{row.text}:{row.prompt}" for row in labelled]
    chosen = {id(row) for row in hashed_order(labelled, keys, seed)[: round(share * len(labelled))]}
    return tuple(row for row in rows if row.label <= CORE or id(row) in chosen)
