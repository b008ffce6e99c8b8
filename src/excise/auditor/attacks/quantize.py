"""Quantization: round the weights. No information about the capability is added.

Many removals move weights by less than half a bucket of a 4-bit grid, so that rounding restores
them (arXiv 2410.16454). Weights are rounded and read back ("fake quantization"), so that it runs
anywhere and needs no kernel. Columns that are scaled against what feeds them lose their small
weights on a grid that they share: what breaks is rounded again with scales put back.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget, Format
from excise.auditor.controls import PositiveControl, WithinBuckets
from excise.auditor.quantization import (
    GROUP,
    OFFSET,
    Grid,
    flip_rate,
    grid_of,
    quantize_,
)
from excise.auditor.weight_edits import WeightEdit, score_edits
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.record import Level


class Quantize(Attack):
    """Round-to-nearest of all matrices, in groups of inputs."""

    name: Literal["quantize"] = "quantize"
    """Name of the attack."""
    formats: tuple[Format, ...] = ()
    """Grids, one variant each: symmetric integers, or the levels of NF4; empty for the budget's."""
    group: int = Field(default=GROUP, ge=1)
    """Inputs that share a scale; 64 in QLoRA's NF4."""
    offset: int = Field(default=OFFSET, ge=0)
    """Inputs of the first group, so that groups lie off the grid a released model came from."""
    embeddings: bool = False
    """Whether token embeddings and head are rounded too."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (WithinBuckets(),)
    light: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Zhang et al., arXiv 2410.16454; NF4: QLoRA, arXiv 2305.14314; grids: this library's"
    )
    version: ClassVar[int] = 2

    def formats_at(self, budget: Budget) -> tuple[Format, ...]:
        """Return the grids that are tried at a budget."""
        return self.formats or budget.formats

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read."""
        return 1 + len(self.formats_at(budget))

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Round the weights and score V; damage shows in the retain score.

        Args:
            subject: The model; where its original is known the share of weights that left
                their bucket is reported, which the attacker does not need.
            domain: Rows by role.
            budget: Rows, lengths, and the grids where the attack names none.
            ctx: Device, dtype.

        Returns:
            One variant per grid, and another on rebalanced weights where a grid broke the model.
        """
        edits = []
        for form in self.formats_at(budget):
            apply = partial(
                quantized_facts,
                grid=grid_of(form, self.group, self.offset),
                embeddings=self.embeddings,
            )
            # Rebalanced weights have no buckets in common with the original's.
            again = partial(apply, original=None)
            edits.append(WeightEdit(form, partial(apply, original=subject.original), again=again))
        return score_edits(self, subject, domain, budget, ctx, edits)


def quantized_facts(
    model: Any, *, grid: Grid, original: Checkpoint | None, embeddings: bool
) -> dict[str, Any]:
    """Round a model in place and return what is to be noted.

    Args:
        model: The model.
        grid: The grid.
        original: The model before removal, read one parameter at a time; None if unknown.
        embeddings: Whether token embeddings and head are rounded too.

    Returns:
        `group`, `offset`, `weights` (how many were rounded), and with the original
        `bucket_flip_rate`.
    """
    facts: dict[str, Any] = {"group": grid.group, "offset": grid.offset}
    if original is not None:
        facts["bucket_flip_rate"] = flip_rate(
            model, lambda name: original.weights_of([name])[name], grid, embeddings=embeddings
        )
    facts["weights"] = quantize_(model, grid, embeddings=embeddings)
    return facts
