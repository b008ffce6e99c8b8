"""RMU: push forget activations at one layer to a random vector, pin retain activations.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from excise.core.context import Context
from excise.core.keys import FilePath
from excise.data.domain import Domain
from excise.data.stream import Batch
from excise.losses import rmu_forget, rmu_retain
from excise.methods.base import Method, Paper, Removal
from excise.methods.posthoc.rmu_data import alternate, control_vector
from excise.methods.posthoc.rmu_engine import Engine
from excise.methods.posthoc.rmu_sweep import RMUSweep
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA
from excise.train.fit import FitConfig, Term

__all__ = ["RMU", "RMUSweep", "alternate", "control_vector"]

PUBLISHED: Mapping[str, Any] = {
    "masked": False,
    "upcast": False,
    "order": "file",
    "padding": "left",
    "pad": "eos",
    "positions": "slots",
    "max_length": 512,
    "later_max_length": 768,
}
"""What `as_published` sets where nothing else was said."""


class RMU(Method):
    """Minimise |h(forget) - c u|^2 + alpha |h(retain) - h0(retain)|^2 at one layer, per entry."""

    name: Literal["rmu"] = "rmu"
    layer: int = Field(default=7, ge=0)
    """Block whose output is steered."""
    blocks: tuple[int, ...] = ()
    """Blocks whose MLP matrix is trained; empty for layer-2, layer-1, layer."""
    steering: float | tuple[float, ...] = 20.0
    """c: norm of the control vector (with `adaptive`, the factor on the mean forget norm)."""
    alpha: float | tuple[float, ...] = 100.0
    """Weight of the retain term; one value, or one for each topic."""
    adaptive: bool = False
    """Adaptive RMU: c is `steering` times the mean norm of the first batch of each topic."""
    controls: FilePath = ""
    """File of control vectors by topic to use as they are, instead of drawing and scaling."""
    engine: Literal["full", "span", "cached"] = "span"
    """How activations are computed, to the same bits: two whole models, or the blocks needed."""
    cache_gib: float = Field(default=4.0, ge=0)
    """Memory that `cached` may fill with what frozen blocks put out."""
    matrix: Literal["down", "up"] = "down"
    """Matrix of the MLP (the released Mixtral run trained `up` of the first expert)."""
    experts: Literal["first", "all"] = "first"
    """Which experts of a mixture are trained."""
    modules: tuple[str, ...] = ()
    """Modules to train by name, instead of `blocks`."""
    masked: bool = True
    """Leave padding out of both means; the released code does not."""
    upcast: bool = True
    """Compute both losses in float32; the released code uses the model's dtype."""
    order: Literal["shuffled", "once", "file"] = "shuffled"
    """Order of rows: anew every epoch, the same batches every epoch, or as in the file."""
    padding: Literal["right", "left"] = "right"
    """Side of the padding."""
    pad: Literal["pad", "eos"] = "pad"
    """Token that fills the padding."""
    positions: Literal["tokens", "slots"] = "tokens"
    """Whether positions count real tokens, or padding as well, as the released code's do."""
    max_length: int = Field(default=512, ge=1)
    """Tokens per row of the first topic and of retain."""
    later_max_length: int = Field(default=0, ge=0)
    """Tokens per row of all further topics; 0 for `max_length`."""
    min_chars: int = Field(default=0, ge=0)
    """Texts of so many characters or fewer are left out."""
    as_published: bool = False
    """Set everything above that was not set as the released code has it, and fit.master=model."""
    fit: FitConfig = FitConfig(steps=80, lr=5e-5, batch_size=4, optimizer="hf_adamw")
    """Steps over all topics together, rows per step of each role, learning rate."""
    lora: LoRA | None = None
    """Train an adapter instead; the frozen model is the adapter switched off."""
    sweep: RMUSweep | None = None
    """Try several layers, norms and weights in one run and keep the best on `dev`."""
    keep: Literal["model", "delta"] = "model"
    """With `delta`, the changed tensors are written by themselves too, for `excise export`."""

    version: ClassVar[int] = 2
    paper: ClassVar[Paper] = Paper(
        "The WMDP benchmark: measuring and reducing malicious use with unlearning",
        "arXiv:2403.03218 (adaptive: arXiv:2408.06223)",
        "section 4, L = L_forget + alpha L_retain",
        "centerforaisafety/wmdp@bc5e1ba (MIT)",
        {
            "layer": "rmu/unlearn.py --layer_id 7",
            "steering": "rmu/unlearn.py --steering_coeff_list 20",
            "alpha": "rmu/unlearn.py --alpha 100",
            "fit": "rmu/unlearn.py: lr 5e-5, batch 4, 80 batches; transformers' AdamW",
        },
    )

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: Any) -> Any:
        """Fill in the released settings before anything is checked, so that they are recorded."""
        if not isinstance(data, Mapping) or not data.get("as_published"):
            return data
        said = {name: value for name, value in data.items() if value is not None}
        fit = said.get("fit", cls.model_fields["fit"].default)
        fit = fit.model_dump(exclude_unset=True) if isinstance(fit, FitConfig) else dict(fit)
        return {**PUBLISHED, **said, "fit": {"master": "model", "optimizer": "hf_adamw", **fit}}

    @model_validator(mode="after")
    def _sound(self) -> RMU:
        """Refuse settings that contradict each other."""
        if self.adaptive and self.controls:
            raise ValueError("'adaptive' scales vectors and 'controls' gives them; set one")
        if self.sweep is not None and self.engine == "full":
            raise ValueError("a sweep shares what frozen blocks put out; set engine to 'cached'")
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Steer `domain.forget` to noise at one layer."""
        from excise.methods.posthoc import rmu_run, rmu_sweep

        if self.sweep is not None:
            return rmu_sweep.run(self, start, domain, ctx)
        return rmu_run.run(self, start, domain, ctx)

    def terms(
        self,
        engine: Engine,
        micro: Mapping[str, Batch],
        controls: Mapping[str, Tensor],
        alpha: Mapping[str, float],
    ) -> dict[str, Term]:
        """Return both terms of the loss of one micro-batch."""
        topic = next(role for role in micro if role != "retain")
        forget, retain = micro[topic], micro["retain"]
        kept_BTD = engine.original(retain)
        hidden_BTD = engine.current(forget)
        control_D = controls[topic].to(hidden_BTD)
        forget_term = self.distance(hidden_BTD, control_D, forget)
        retain_term = self.distance(engine.current(retain), kept_BTD, retain)
        return {"forget": Term(*forget_term), "retain": Term(*retain_term, alpha[topic])}

    def distance(
        self, hidden_BTD: Float[Tensor, "B T D"], goal: Tensor, batch: Batch
    ) -> tuple[Tensor, float]:
        """Return a sum of squared differences and what it is to be divided by."""
        if self.masked:
            both = rmu_forget if goal.dim() == 1 else rmu_retain
            return both(hidden_BTD, goal, self.mask(batch), upcast=self.upcast)
        if self.upcast:
            hidden_BTD, goal = hidden_BTD.float(), goal.float()
        mean = F.mse_loss(hidden_BTD, goal.expand_as(hidden_BTD))
        # The mean itself, as released: a sum divided later would round differently.
        whole = self.fit.micro_size == 0
        return (mean, 1.0) if whole else (mean * hidden_BTD.numel(), float(hidden_BTD.numel()))

    def mask(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return the positions that enter the means."""
        return batch.attention_BT if self.masked else torch.ones_like(batch.attention_BT)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the keyword arguments the model is called with."""
        given = batch.inputs
        if self.positions == "slots":
            del given["position_ids"]
        return given
