"""Norm reset: give every norm one scale again. No information about the capability is added.

A removal that only turns down the scale of a norm is undone by it; one that changed what the
matrices hold is not.
"""

from __future__ import annotations

import time
from typing import ClassVar, Literal

import torch

import excise as ex
from excise.auditor.base import Access
from excise.auditor.controls import LogitScaling, PositiveControl
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.results import decided
from excise.auditor.scoring import read, variant_of
from excise.record import Level


class NormReset(ex.Attack):
    """Set the scale of every norm to a constant."""

    name: Literal["norm_reset"] = "norm_reset"
    """Name of the attack."""
    scales: tuple[float, ...] = (1.0,)
    """One variant each."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (LogitScaling(),)
    source: ClassVar[str] = "an example"

    def run(
        self, subject: ex.Subject, domain: ex.Domain, budget: ex.Budget, ctx: ex.Context
    ) -> ex.AttackResult:
        """Reset the norms and score the held-out test set; see `Attack.run`."""
        start = time.perf_counter()
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        before = read(model, evaluation)
        variants = []
        for scale in self.scales:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("norm.weight"):
                        parameter.fill_(scale)
            variants.append(
                variant_of(
                    self,
                    subject,
                    evaluation.metric,
                    variant=f"scale {scale}",
                    measurements=(before, read(model, evaluation)),
                    dev=evaluation.units(model, evaluation.all_dev),
                )
            )
        marked, chosen = decided(variants, higher=evaluation.higher)
        return ex.AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)
