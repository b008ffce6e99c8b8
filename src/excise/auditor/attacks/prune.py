"""Pruning: set weights to zero. No information about the capability is added.

An edit that lies in weights the rest of the model can spare goes with them. Three kinds:

- *Magnitude*: the smallest |w|, of a whole matrix or of every output row.
- *Wanda*: the smallest |w_ij| ||x_j||_2 of every output row, x over benign rows.
- *Set difference*: the weights that matter most on the relearn set and not on benign text, by
  |w dL/dw|. Wei et al. prune so what makes a model refuse; Lucki et al. what makes an edited one
  fail. The rows choose weights to lose and give none a value. No control of the attack hides in
  this way; on the tiny models of the tests it brings back half of what a password lock hides.

Shape legend: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.budget import Budget
from excise.auditor.controls import PositiveControl, SmallWeights
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set
from excise.auditor.pruning import (
    input_norms,
    lowest_of_matrix,
    lowest_of_rows,
    prune_,
    set_difference,
)
from excise.auditor.quantization import by_outputs, matrices
from excise.auditor.tuning import relearn_rows
from excise.auditor.weight_edits import WeightEdit, score_edits
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.subsample import subsample
from excise.methods.distillation.perturb import forget_saliency as saliency
from excise.record import Level

Criterion = Literal["magnitude", "magnitude_rows", "wanda", "set_difference"]
Share = Annotated[float, Field(gt=0, lt=1)]


class Prune(Attack):
    """Zero weights that matter least, or to T alone; embeddings and head are left as they are."""

    name: Literal["prune"] = "prune"
    """Name of the attack."""
    criteria: tuple[Criterion, ...] = Field(
        default=("magnitude", "magnitude_rows", "wanda", "set_difference"), min_length=1
    )
    """What says which weights go; see the module."""
    shares: tuple[Share, ...] = Field(default=(0.1, 0.3, 0.5), min_length=1)
    """Share of the weights that magnitude and Wanda prune, one variant each; Wanda's paper prunes
    half."""
    top_shares: tuple[Share, ...] = Field(default=(0.005, 0.01, 0.025, 0.05), min_length=1)
    """Share of the weights that set difference takes from T's most important, and spares of the
    benign most important: p = q, out of the grid of arXiv 2409.18025."""
    calibration_rows: int = Field(default=128, ge=1)
    """Benign rows that Wanda reads at most; 128 texts in its paper."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (SmallWeights(),)
    source: ClassVar[str] = "Sun et al., arXiv 2306.11695; Wei et al., arXiv 2402.05162"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; calibration is about three passes."""
        variants = sum(
            len(self.top_shares if criterion == "set_difference" else self.shares)
            for criterion in self.criteria
        )
        return 1 + variants + 3 * len({"wanda", "set_difference"} & set(self.criteria))

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Prune by every criterion and share, and score V; damage shows in the retain score.

        Args:
            subject: The model.
            domain: Rows by role; `benign` calibrates, `relearn` says what set difference takes.
            budget: Rows and lengths.
            ctx: Seed of the chosen rows, device, dtype.

        Returns:
            One variant per criterion and share. `facts["weights"]` counts what was set to zero,
            `facts["skipped"]` the weights of matrices that the criterion cannot rank.
        """
        edits = self._edits(subject, domain, budget, ctx)
        return score_edits(self, subject, domain, budget, ctx, edits)

    def _edits(
        self, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> Iterator[WeightEdit]:
        """Yield the edits; norms and gradients are read once for all shares.

        Raises:
            UserError: If rows are missing that say which weights go.
        """
        rows_read = {"wanda": [domain.benign]}
        rows_read["set_difference"] = [domain.benign, relearn_rows(domain)]
        for criterion in self.criteria:
            if not all(rows_read.get(criterion, [])):
                raise UserError(
                    f"{criterion} reads benign and relearn rows, and the domain lacks some; "
                    "check the split, or leave it out of the attack's criteria"
                )
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        for criterion in self.criteria:
            if criterion == "set_difference":
                yield from self._differences(subject, evaluation, ctx)
                continue
            norms = None
            if criterion == "wanda":
                rows = subsample(domain.benign, self.calibration_rows, by="row")
                norms = input_norms(
                    subject.checkpoint.load(device=ctx.device), rows, evaluation.tokenizer,
                    max_length=budget.max_length,
                )  # fmt: skip
            for share in self.shares:
                by_row = criterion != "magnitude"
                yield WeightEdit(
                    f"{criterion.replace('_', ' by ')} {100 * share:g}%",
                    partial(prune_lowest, share=share, by_row=by_row, norms=norms),
                )

    def _differences(
        self, subject: Subject, evaluation: EvaluationSet, ctx: Context
    ) -> Iterator[WeightEdit]:
        """Yield the edits by set difference."""
        domain, model = evaluation.domain, subject.checkpoint.load(device=ctx.device)
        forget, utility = (
            saliency(
                model, rows, evaluation.tokenizer, list(matrices(model)),
                max_length=evaluation.max_length, ctx=ctx,
            )
            for rows in (relearn_rows(domain), domain.benign)
        )  # fmt: skip
        del model
        for share in self.top_shares:
            apply = partial(prune_difference, forget=forget, utility=utility, share=share)
            yield WeightEdit(f"set difference {100 * share:g}%", apply, trained_on="relearn")


def prune_lowest(
    model: Any, *, share: float, by_row: bool, norms: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Prune the smallest weights of every matrix in place.

    Args:
        model: The model.
        share: Share of the weights.
        by_row: Whether weights are compared within an output, else within the matrix.
        norms: Norm of every input by parameter name (Wanda); what has none is left as it is. None
            for magnitude alone.

    Returns:
        `weights`, how many were set to zero, and `skipped`, how many lie in matrices left alone.
    """
    masks, skipped = {}, 0
    lowest = lowest_of_rows if by_row else lowest_of_matrix
    for name, (parameter, flipped) in matrices(model).items():
        if norms is not None and name not in norms:
            skipped += parameter.numel()
            continue
        score_RC = by_outputs(parameter.detach().abs(), flipped=flipped)
        if norms is not None:
            score_RC = score_RC * norms[name]
        masks[name] = by_outputs(lowest(score_RC, share), flipped=flipped)
    return {"weights": prune_(model, masks), "skipped": skipped}


def prune_difference(
    model: Any, *, forget: Mapping[str, Tensor], utility: Mapping[str, Tensor], share: float
) -> dict[str, Any]:
    """Prune what matters on T and not on benign text, in place.

    Args:
        model: The model.
        forget: Saliency on T by parameter name.
        utility: Saliency on benign text.
        share: The top share of both; see `set_difference`.

    Returns:
        `weights`, how many were set to zero, and `skipped`, 0: every matrix has gradients.
    """
    masks = {
        name: set_difference(forget[name], utility[name], share, share) for name in matrices(model)
    }
    return {"weights": prune_(model, masks), "skipped": 0}
