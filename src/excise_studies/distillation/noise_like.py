"""Random noise that changes benign predictions as much as an unlearned model does.

Shape legend: N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.methods.base import ApplyMethod, Cost, Method, Paper, Removal
from excise.methods.posthoc.maxent import MaxEnt
from excise.methods.tuning import write_edit
from excise.models.checkpoint import Checkpoint
from excise_studies.distillation.predictions import kl, predictions

STEPS = 40
"""Bisections at most."""


class NoiseLike(Method):
    """The original with Gaussian noise on its weights, of the same benign KL as an unlearned model.

    The noise of a tensor is in proportion to the root mean square of its entries. One factor for
    all of them is bisected until KL(noised || original) over the scored tokens of `dev_retain` is
    KL(unlearned || original) there.
    """

    name: Literal["noise_like"] = "noise_like"
    like: SerializeAsAny[Method] = MaxEnt()
    """How the unlearned model is made."""
    tolerance: float = Field(default=0.02, gt=0, lt=1)
    """Share of the KL by which the two may differ."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row."""

    paper: ClassVar[Paper] = Paper("A control: noise of equal KL on retain text", "")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Make the unlearned model, a stage that others share; then noise `start` as strongly."""
        began = time.monotonic()
        teacher = ctx.run(ApplyMethod(self.like, start, domain, ctx.seed)).checkpoint
        tokenizer, rows = start.tokenizer(), domain.dev_retain

        def read(model: Any) -> Tensor:
            return predictions(model, rows, tokenizer, max_length=self.max_length).log_NV

        def loaded(checkpoint: Checkpoint) -> Any:
            return checkpoint.load(dtype=ctx.dtype, device=ctx.device)

        model = loaded(start)
        original_NV = read(model)
        wanted = float(kl(read(loaded(teacher)), original_NV).mean())
        generator = ctx.generator("noise")
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        noise = {
            name: torch.randn(w.shape, generator=generator).to(w) * w.square().mean().sqrt()
            for name, w in weights.items()
        }

        def at(factor: float) -> float:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name] + factor * noise[name])
            return float(kl(read(model), original_NV).mean())

        low, high, factor, found = 0.0, math.inf, 0.01, math.nan
        for _ in range(STEPS):
            found = at(factor)
            if abs(found - wanted) <= self.tolerance * wanted:
                break
            low, high = (factor, high) if found < wanted else (low, factor)
            factor = 2 * low if math.isinf(high) else (low + high) / 2
        else:
            raise UserError(
                f"noise_like: no noise has the KL of the unlearned model on dev retain rows, "
                f"{wanted:.3g} nats ({found:.3g} at best); raise 'tolerance'"
            )
        return write_edit(
            start,
            {name: parameter.detach() for name, parameter in model.named_parameters()},
            ctx,
            extras={"noise": {"factor": factor, "kl": found, "wanted": wanted}},
            cost=Cost(seconds=time.monotonic() - began),
            history=(),
        )
