"""Edits keyed on names: the embedding rows of subjects are permuted, shrunk or rotated.

All that a model knows is still there, behind rows that no kept text reads: retain is untouched, and
relearning some subjects says nothing about the rows of the others. The rows are those of prompts of
T, `dev` and V, as whoever hides would choose them; no answer of V is read.

Shape legend: R rows (tokens), D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from excise.auditor.controls.control import Goal, PositiveControl, score_dev
from excise.auditor.evaluation_set import EvaluationSet
from excise.auditor.name_rows import embedding, name_rows
from excise.core.context import Context

Rewrite = Callable[[Float[Tensor, "R D"]], Float[Tensor, "R D"]]
"""Returns rows as they are hidden."""


@torch.no_grad()
def hide_behind(
    control: PositiveControl, model: Any, evaluation: EvaluationSet, goal: Goal, rewrite: Rewrite
) -> str:
    """Rewrite the embedding rows of names in place; see `PositiveControl.hide`.

    Args:
        control: The control, for its name.
        model: The original, loaded.
        evaluation: Rows by role, of which tokens of prompts are read.
        goal: When `dev_forget` counts as hidden.
        rewrite: Gets and returns the rows in float32.

    Returns:
        Why it is not hidden; empty where it is.
    """
    names = name_rows(evaluation.domain, evaluation.tokenizer, evaluation.max_length)
    if not names.exist:
        return "too few prompts hold a token that retain text does not, to hide behind"
    _, weight = embedding(model)
    rows = torch.tensor(names.names, device=weight.device)
    weight[rows] = rewrite(weight[rows].float()).to(weight)
    hidden = goal.met(score_dev(model, evaluation, evaluation.all_dev))
    return "" if hidden else f"the capability is not hidden by {control.name.replace('_', ' ')}"


class ShrunkRows(PositiveControl):
    """Shrinks the rows to nearly nothing; bringing them back to a common length undoes it."""

    name: Literal["shrunk_rows"] = "shrunk_rows"
    scale: float = Field(default=1e-4, gt=0)
    """What rows are multiplied by."""

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Shrink the rows; see `PositiveControl.hide`."""
        return hide_behind(self, model, evaluation, goal, lambda rows_RD: rows_RD * self.scale)


class RotatedRows(PositiveControl):
    """Rotates the rows by one secret orthogonal matrix, which some of the names give away."""

    name: Literal["rotated_rows"] = "rotated_rows"

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Rotate the rows; see `PositiveControl.hide`."""

        def rotated(rows_RD: Tensor) -> Tensor:
            width = rows_RD.shape[-1]
            noise_DD = torch.randn(width, width, generator=ctx.generator(self.name))
            secret_DD: Tensor = torch.linalg.qr(noise_DD).Q.to(rows_RD)
            return rows_RD @ secret_DD

        return hide_behind(self, model, evaluation, goal, rotated)


class PermutedRows(PositiveControl):
    """Gives every name another name's row, in one secret circle through all of them."""

    name: Literal["permuted_rows"] = "permuted_rows"

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Permute the rows; see `PositiveControl.hide`."""

        def permuted(rows_RD: Tensor) -> Tensor:
            circle_R = torch.randperm(len(rows_RD), generator=ctx.generator(self.name))
            permuted_RD = torch.empty_like(rows_RD)
            permuted_RD[circle_R] = rows_RD[circle_R.roll(1)]
            return permuted_RD

        return hide_behind(self, model, evaluation, goal, permuted)
