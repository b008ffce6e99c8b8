"""Quantization: round the weights. No information about the capability is added.

Many removals move weights by less than half a bucket of a 4-bit grid, so that rounding restores
them (arXiv 2410.16454). Weights are rounded and read back ("fake quantization"), so that it runs
anywhere and needs no kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import PositiveControl, WithinBuckets
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set
from excise.auditor.quantization import BITS, GROUP, OFFSET, Grid, flip_rate, grids, quantize_
from excise.auditor.results import decided
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.record import Level


class Quantize(Attack):
    """Symmetric round-to-nearest of all matrices, in groups of inputs."""

    name: Literal["quantize"] = "quantize"
    """Name of the attack."""
    bits: tuple[int, ...] = BITS
    """One variant each."""
    group: int = Field(default=GROUP, ge=1)
    """Inputs that share a scale."""
    offset: int = Field(default=OFFSET, ge=0)
    """Inputs of the first group, so that groups lie off the grid a released model came from."""
    embeddings: bool = False
    """Whether token embeddings and head are rounded too."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (WithinBuckets(),)
    light: ClassVar[bool] = True
    source: ClassVar[str] = "Zhang et al., arXiv 2410.16454; grid: this library's"
    version: ClassVar[int] = 1

    def grids(self) -> tuple[Grid, ...]:
        """Return one grid per number of bits."""
        return grids(self.bits, self.group, self.offset)

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read."""
        return 1 + len(self.grids())

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Round the weights and score V; damage shows in the retain score.

        Args:
            subject: The model; where its original is known the share of weights that left
                their bucket is reported, which the attacker does not need.
            domain: Rows by role.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            One variant per number of bits.
        """
        start = time.perf_counter()
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        bare = read(model, evaluation)
        del model
        variants: list[VariantResult] = []
        for grid in self.grids():
            facts: dict[str, Any] = {"group": grid.group, "offset": grid.offset}
            # Rounded in float32: a coarser dtype would round a second time, on its own grid.
            wide = subject.checkpoint.load(device=ctx.device)
            if subject.original is not None:
                facts["bucket_flip_rate"] = flip_rate(
                    wide, _reader(subject.original), grid, embeddings=self.embeddings
                )
            facts["weights"] = quantize_(wide, grid, embeddings=self.embeddings)
            attacked = wide.to(ctx.dtype)
            variants.append(
                try_variant(
                    self,
                    subject,
                    evaluation.metric,
                    partial(_scores, attacked, evaluation),
                    bare=bare,
                    variant=f"int{grid.bits}",
                    facts=facts,
                )
            )
        marked, chosen = decided(variants, higher=evaluation.higher)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def _scores(model: Any, evaluation: EvaluationSet) -> tuple[Measurement, UnitScores]:
    """Return V and retain, and dev."""
    return read(model, evaluation), evaluation.units(model, evaluation.all_dev)


def _reader(original: Checkpoint) -> Callable[[str], Tensor]:
    """Return what reads one parameter of the original from disk."""
    return lambda name: original.weights_of([name])[name]
