"""Dropping an adapter: take the low-rank part of an edit out of the weights again.

A removal that was trained as a LoRA adapter and merged is W + B A; whoever holds W + B A and the
original subtracts it. Without the original no low-rank part of W + B A can be told from W's own
leading directions, so that this is a diagnostic: it shows how low the rank of an edit is, and never
decides a level.

Shape legend: R rows (outputs), C columns (inputs), K directions that are sought.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.quantization import matrices
from excise.auditor.results import absent
from excise.auditor.weight_edits import WeightEdit, score_edits
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.record import Level

SPARE, ROUNDS = 8, 4
"""Directions sought beside those that are removed, and rounds of the search."""


class DropAdapter(Attack):
    """Subtract the leading singular directions of (candidate - original) from every matrix."""

    name: Literal["drop_adapter"] = "drop_adapter"
    """Name of the attack."""
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4, 16), min_length=1)
    """Directions removed from each matrix, one variant each; adapters mostly have 4 to 64."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (GatedEdit(),)
    needs_original: ClassVar[bool] = True
    light: ClassVar[bool] = True
    source: ClassVar[str] = "this library's; adapters: arXiv 2106.09685"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read."""
        return 1 + len(self.ranks)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Drop the low-rank part of the edit and score V; damage shows in the retain score.

        Args:
            subject: The model and its original; without one nothing is run, and the result says so.
            domain: Rows by role.
            budget: Rows and lengths.
            ctx: Seed of the search, device, dtype.

        Returns:
            One variant per rank. `facts["weights"]` counts the weights of the matrices that differ,
            `facts["share"]` is the share of their squared difference that went, and
            `facts["skipped"]` counts weights of matrices that the original has in another shape.
        """
        if subject.original is None:
            return absent(self, subject.name, "missing", "it needs the original")
        edits = self._edits(subject.original, ctx)
        return score_edits(self, subject, domain, budget, ctx, edits)

    def _edits(self, original: Checkpoint, ctx: Context) -> Iterator[WeightEdit]:
        """Yield one edit per rank."""
        for rank in self.ranks:
            yield WeightEdit(
                f"rank {rank}", partial(drop_low_rank, original=original, rank=rank, ctx=ctx)
            )


@torch.no_grad()
def drop_low_rank(model: Any, *, original: Checkpoint, rank: int, ctx: Context) -> dict[str, Any]:
    """Subtract the low-rank part of an edit from every matrix in place.

    Args:
        model: The edited model.
        original: The model before, read one parameter at a time.
        rank: Directions removed from each matrix, of packed experts from each expert's.
        ctx: Seed of the search.

    Returns:
        `weights`, `share` and `skipped`, as `DropAdapter.run` says.
    """
    count, skipped, removed, whole = 0, 0, 0.0, 0.0
    for name, (parameter, _) in matrices(model).items():
        before = original.weights_of([name])[name].to(parameter)
        if before.shape != parameter.shape:
            skipped += parameter.numel()
            continue
        edit_RC = parameter - before
        if not edit_RC.any():
            continue
        part_RC = leading_part(edit_RC, rank, ctx.generator(f"drop_adapter/{name}"))
        parameter.sub_(part_RC)
        count += parameter.numel()
        removed += float(part_RC.square().sum())
        whole += float(edit_RC.square().sum())
    return {"weights": count, "share": removed / whole if whole else 0.0, "skipped": skipped}


def leading_part(
    matrix_RC: Float[Tensor, "*E R C"], rank: int, generator: torch.Generator
) -> Float[Tensor, "*E R C"]:
    """Return the best approximation of a rank, by a randomized search.

    Args:
        matrix_RC: A matrix, or several of one shape.
        rank: Rank of the approximation.
        generator: Random numbers, on the CPU.

    Source:
        Halko, Martinsson & Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    start_CK = torch.randn(matrix_RC.shape[-1], rank + SPARE, generator=generator).to(matrix_RC)
    basis_RK = torch.linalg.qr(matrix_RC @ start_CK).Q
    for _ in range(ROUNDS):
        basis_CK = torch.linalg.qr(matrix_RC.mT @ basis_RK).Q
        basis_RK = torch.linalg.qr(matrix_RC @ basis_CK).Q
    u, s, vh = torch.linalg.svd(basis_RK.mT @ matrix_RC, full_matrices=False)
    part_RC: Tensor = basis_RK @ (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return part_RC
