"""Clearing directions: project one vector, or a few, out of the residual stream.

RMU and its kin flood the residual stream with a near-constant vector on forget text; without it
much of the knowledge answers again. Directions are fitted on `dev` rows: the difference of the
means of forget and retain text and, from *standard* on, the same read by Fisher's discriminant in
place of itself, and the leading directions of what forget text has beyond the mean of retain.
Controls: the same construction between two halves of retain, and random directions, as many as
are cleared.

In models of few blocks forget and retain text differ in much that both are computed with, and a
difference of means cleared breaks them. So one direction is also trained, from the difference
where answers are given, to make the relearn set likely and keep benign text while it is cleared.

Shape legend: B rows, T tokens, N positions, K directions, D width, L blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from excise.auditor.attacks.latent import rows_per_step, trained_vector
from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set
from excise.auditor.residuals import Positions, Residuals, residuals_of
from excise.auditor.results import decided, with_loss
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.subsample import subsample
from excise.models.anatomy import backbone
from excise.models.hooks import Edit, edit
from excise.record import Level

KEEPS = 0.05
"""Share of the retain score that a trained direction may cost before the next rate is tried."""


@dataclass(frozen=True)
class Variant:
    """One set of directions.

    Attributes:
        name: Name of the variant.
        basis_LKD: Orthonormal directions per block from `first` on, K of them.
        first: First block whose output is cleared.
        control: Whether the directions know nothing about the forget set.
        needs_original: Whether the original was needed to fit them.
        reader_LKD: What says how much of each there is, where it is not the direction itself.
    """

    name: str
    basis_LKD: Tensor
    first: int
    control: bool = False
    needs_original: bool = False
    reader_LKD: Tensor | None = None


class Direction(Attack):
    """h <- h - R (R^T h) at the output of every block from some block on, at all positions."""

    name: Literal["direction"] = "direction"
    """Name of the attack."""
    steps: int = Field(default=24, ge=1)
    """Optimizer steps of the direction that is trained."""
    retain_weight: float = Field(default=16.0, ge=0)
    """Weight of the loss on benign rows beside that on the relearn set: of 1, 4 and 16 the one that
    leaves models of two blocks, never taught, most of their retain set (`docs/lab-notes.md`)."""
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.02, 0.2), min_length=1)
    """Lengths of the first step, as shares of the direction's. A strong edit is cleared by what is
    close to it alone; from a direction that the model itself needs one has to go far, which is
    tried where what is close costs retain."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D2"
    controls: ClassVar[tuple[PositiveControl, ...]] = (GatedEdit(),)
    source: ClassVar[str] = (
        "Arditi & Chughtai, lesswrong.com 2024-07-23; arXiv 2409.18025; principal components as "
        "arXiv 2310.01405, the whitened difference as arXiv 2306.03819, trained as arXiv "
        "2502.17420"
    )
    version: ClassVar[int] = 3

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; a trained row costs two that are read."""
        further = 1 + 2 * len(budget.subspaces) if budget.subspaces else 0
        trained = 2 * 2 * len(self.rates) * self.steps * budget.batch_size
        trained_passes = trained / (budget.max_test_rows + 2 * budget.max_other_rows)
        return 3 + 7 + budget.random_directions + further + trained_passes

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Fit directions on `dev`, clear each, score V and retain.

        Args:
            subject: The model; with its original, two diagnostic variants are added.
            domain: Rows by role.
            budget: `random_directions` controls; `subspaces`, sizes of those cleared.
            ctx: Seed of the controls, device, dtype.

        Returns:
            Variants `per-block`, `answers` (the same at answering positions), `one`, and, where
            there is a relearn set, `trained`, fitted without the original; with subspaces `lda` and
            `pca k=K`; `original per-block` and `original one` (diagnostics); `split-half`,
            `random-i` and `random k=K` (controls).
        """
        start = time.perf_counter()
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = read(model, evaluation)
        residuals = residuals_of(subject.checkpoint, domain, budget, ctx)
        fitted = fit_directions(residuals, evaluation, ctx)
        fitted += _with_original(model, subject, residuals, evaluation, ctx)
        variants = [_variant(self, subject, model, evaluation, bare, each) for each in fitted]
        if domain.relearn:
            variants.append(_trained(self, subject, model, evaluation, bare, residuals, ctx))
        marked, chosen = decided(variants, higher=evaluation.higher)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def _variant(
    attack: Direction,
    subject: Subject,
    model: Any,
    evaluation: EvaluationSet,
    bare: Measurement,
    variant: Variant,
) -> VariantResult:
    """Clear one set of directions and score."""
    paths = backbone(model).blocks[variant.first :]
    readers = variant.basis_LKD if variant.reader_LKD is None else variant.reader_LKD
    edits = {
        path: cleared(basis_KD, reader_KD)
        for path, basis_KD, reader_KD in zip(paths, variant.basis_LKD, readers, strict=True)
    }

    return _scored(
        attack,
        subject,
        model,
        evaluation,
        bare,
        lambda: (edits, len(evaluation.all_dev)),
        variant=variant.name,
        control=variant.control,
        needs_original=variant.needs_original,
        trained_on="" if variant.control else "dev_forget",
        facts={"first_block": variant.first},
    )


def _trained(
    attack: Direction,
    subject: Subject,
    model: Any,
    evaluation: EvaluationSet,
    bare: Measurement,
    residuals: Residuals,
    ctx: Context,
) -> VariantResult:
    """Train one direction, cleared from some block on, and score.

    It begins as the difference of answers of forget and retain text, in the block where that is
    largest beside the stream. Rates are tried until one keeps `dev_retain`; that of the lowest loss
    counts.
    """
    dev, retain = residuals.texts["dev"], residuals.texts["retain"]
    at_retain_NLD = retain.hidden_NLD[retain.answering_N]
    apart_LD = dev.hidden_NLD[dev.answering_N].mean(0) - at_retain_NLD.mean(0)
    first = int((apart_LD.norm(dim=-1) / at_retain_NLD.norm(dim=-1).mean(0)).argmax())
    paths = backbone(model).blocks[first:]
    most = evaluation.budget.max_other_rows
    dev_retain = subsample(evaluation.domain.dev_retain, most, by="row")

    def clearing(vector_D: Tensor) -> dict[str, Edit]:
        return dict.fromkeys(paths, lambda hidden_BTD: cleared(unit(vector_D))(hidden_BTD))

    def fitted() -> tuple[dict[str, Edit], int]:
        kept, tried = evaluation.retained(model, dev_retain), []
        for rate in attack.rates:
            vector_D, loss = trained_vector(
                model,
                evaluation,
                unit(apart_LD[first]),
                clearing,
                ctx,
                lr=rate / apart_LD.shape[-1] ** 0.5,  # Adam moves each of D coordinates
                steps=attack.steps,
                retain_weight=attack.retain_weight,
            )
            tried.append((loss, vector_D))
            with edit(model, clearing(vector_D)):
                lost = evaluation.retain_lost(kept, evaluation.retained(model, dev_retain))
            if lost <= KEEPS:
                break
        _, best_D = min(tried, key=lambda one: one[0])
        return clearing(best_D), len(tried) * attack.steps * rows_per_step(model, evaluation)

    return _scored(
        attack,
        subject,
        model,
        evaluation,
        bare,
        fitted,
        variant="trained",
        trained_on="relearn",
        facts={"first_block": first},
    )


def _scored(
    attack: Direction,
    subject: Subject,
    model: Any,
    evaluation: EvaluationSet,
    bare: Measurement,
    edits: Callable[[], tuple[Mapping[str, Edit], int]],
    **row: Any,
) -> VariantResult:
    """Score V, retain and `dev` under edits, and note what they cost retain.

    Args:
        attack: The attack.
        subject: Whose model it is.
        model: The model.
        evaluation: Rows.
        bare: The measurement before the attack.
        edits: Returns the edits and how many rows they cost.
        **row: As `try_variant`.
    """

    def score() -> tuple[Measurement, UnitScores]:
        made, examples = edits()
        with edit(model, made):
            after = read(model, evaluation, examples=examples)
            return after, evaluation.units(model, evaluation.all_dev)

    one = try_variant(attack, subject, evaluation.metric, score, bare=bare, **row)
    return with_loss(one, evaluation.retain_lost(bare.retain, one.extras["retain"]))


def cleared(
    basis_KD: Float[Tensor, "*K D"], reader_KD: Float[Tensor, "*K D"] | None = None
) -> Edit:
    """Return an edit that projects directions out of whatever passes: h - R^T (Q h).

    Args:
        basis_KD: The directions R, one of them or several.
        reader_KD: Q, what reads how much of each there is, with Q R^T = I; R by default, which
            must then be orthonormal.

    Source:
        Directional ablation, arXiv 2406.11717; oblique, arXiv 2306.03819.
    """
    rows_KD = basis_KD.reshape(-1, basis_KD.shape[-1])
    reads_KD = rows_KD if reader_KD is None else reader_KD.reshape(rows_KD.shape)

    def change(hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD - (hidden_BTD @ reads_KD.to(hidden_BTD).T) @ rows_KD.to(hidden_BTD)

    return change


def fit_directions(residuals: Residuals, evaluation: EvaluationSet, ctx: Context) -> list[Variant]:
    """Fit every variant that needs no original, and the controls.

    Args:
        residuals: Of dev rows and of the retain rows beside them.
        evaluation: The rows, and a budget that says how many controls and subspaces.
        ctx: Seed of the controls.

    Returns:
        The variants, those of *smoke* first.

    Raises:
        UserError: If there is no `dev_retain` row to tell forget rows from.
    """
    if "retain" not in residuals.texts:
        raise UserError("there is no row in dev_retain to fit a direction beside; check the split")
    dev, retain = residuals.texts["dev"], residuals.texts["retain"]
    forget_LD, retain_LD = dev.hidden_NLD.mean(0), retain.hidden_NLD.mean(0)
    blocks, width = forget_LD.shape
    difference_LD = forget_LD - retain_LD
    best = int((difference_LD.norm(dim=-1) / retain.hidden_NLD.norm(dim=-1).mean(0)).argmax())
    ends = [part.hidden_NLD[part.answering_N].mean(0) for part in (dev, retain)]
    variants = [
        Variant("per-block", basis_of(difference_LD), 0),
        Variant("answers", basis_of(ends[0] - ends[1]), 0),
        Variant("one", basis_of(difference_LD[best]).expand(blocks - best, -1, -1), best),
    ]
    units = [row.unit for row in evaluation.domain.dev_retain]
    half = set(list(dict.fromkeys(units))[::2])
    first_N = torch.tensor([unit in half for unit in units])[retain.row_N]
    if first_N.any() and not first_N.all():
        halves = [retain.hidden_NLD[which].mean(0) for which in (first_N, ~first_N)]
        variants.append(Variant("split-half", basis_of(halves[0] - halves[1]), 0, control=True))
    for i in range(evaluation.budget.random_directions):
        noise_D = torch.randn(width, generator=ctx.generator(f"direction/{i}"))
        variants.append(
            Variant(f"random-{i}", basis_of(noise_D).expand(blocks, -1, -1), 0, control=True)
        )
    # More than a quarter of the stream is no longer a small part of it.
    sizes = [size for size in evaluation.budget.subspaces if size <= max(1, width // 4)]
    return variants + _subspaces(dev, retain, sizes, ctx)


def _subspaces(
    dev: Positions, retain: Positions, sizes: Sequence[int], ctx: Context
) -> list[Variant]:
    """Return the whitened difference, and subspaces with random ones of the same size."""
    if not sizes:
        return []
    forget_LND, other_LND = dev.hidden_NLD.transpose(0, 1), retain.hidden_NLD.transpose(0, 1)
    apart_LD = forget_LND.mean(1) - other_LND.mean(1)
    lda_LD = torch.stack([whitened(f, o) for f, o in zip(forget_LND, other_LND, strict=True)])
    lda_LD = lda_LD / (lda_LD * apart_LD).sum(-1, keepdim=True).clamp(min=1e-12)
    beyond_LND = forget_LND - other_LND.mean(1, keepdim=True)
    most, (blocks, _, width) = max(sizes), beyond_LND.shape
    pca_LKD = torch.stack([leading(b, most, ctx.generator("direction/pca")) for b in beyond_LND])
    noise_KD = torch.randn(most, width, generator=ctx.generator("direction/subspace"))
    random_KD = torch.linalg.qr(noise_KD.T).Q.T
    variants = [Variant("lda", apart_LD[:, None], 0, reader_LKD=lda_LD[:, None])]
    for size in sizes:
        random_LKD = random_KD[:size].expand(blocks, -1, -1)
        variants.append(Variant(f"pca k={size}", pca_LKD[:, :size], 0))
        variants.append(Variant(f"random k={size}", random_LKD, 0, control=True))
    return variants


def whitened(
    forget_ND: Float[Tensor, "N D"], other_ND: Float[Tensor, "M D"], shrink: float = 0.1
) -> Float[Tensor, " D"]:
    """Return Fisher's direction: S^-1 (m_f - m_o), S the covariance within both classes, shrunk.

    Args:
        forget_ND: One class.
        other_ND: The other.
        shrink: Share of S that is replaced by its mean variance, so that it can be inverted.

    Source:
        Fisher 1936; Ledoit & Wolf 2004 for the shape of the shrinkage, at a fixed share.
    """
    within_ND = torch.cat([part - part.mean(0) for part in (forget_ND, other_ND)])
    cov_DD = within_ND.T @ within_ND / len(within_ND)
    mean = cov_DD.diagonal().mean().clamp(min=1e-12)
    cov_DD = (1 - shrink) * cov_DD + shrink * mean * torch.eye(len(cov_DD))
    direction_D: Tensor = torch.linalg.solve(cov_DD, forget_ND.mean(0) - other_ND.mean(0))
    return direction_D


def leading(
    hidden_ND: Float[Tensor, "N D"], count: int, generator: torch.Generator
) -> Float[Tensor, "K D"]:
    """Return the leading right singular vectors, by a randomized search (arXiv 0909.4061).

    Args:
        hidden_ND: Rows to span.
        count: K.
        generator: Random numbers, on the CPU.
    """
    width = hidden_ND.shape[1]
    basis_DK = torch.randn(width, min(width, count + 8), generator=generator)
    for _ in range(5):
        basis_DK = torch.linalg.qr(hidden_ND.T @ (hidden_ND @ basis_DK)).Q
    _, _, turn_KK = torch.linalg.svd(hidden_ND @ basis_DK, full_matrices=False)
    leading_KD: Tensor = (basis_DK @ turn_KK.T).T[:count]
    return leading_KD


def _with_original(
    model: Any, subject: Subject, residuals: Residuals, evaluation: EvaluationSet, ctx: Context
) -> list[Variant]:
    """Return the diagnostics: what the edit added to forget text, by the original's own means."""
    if subject.original is None:
        return []
    original = subject.original.load(dtype=model.dtype, device=model.device)
    first = first_edited(model, original)
    if first is None:
        return []
    base = residuals_of(subject.original, evaluation.domain, evaluation.budget, ctx).texts["dev"]
    added_LD = residuals.texts["dev"].hidden_NLD.mean(0) - base.hidden_NLD.mean(0)
    added_LD = added_LD[first:]
    last_D = added_LD[int(added_LD.norm(dim=-1).argmax())]
    one_LKD = basis_of(last_D).expand(len(added_LD), -1, -1)
    return [
        Variant("original per-block", basis_of(added_LD), first, needs_original=True),
        Variant("original one", one_LKD, first, needs_original=True),
    ]


def first_edited(model: Any, original: Any) -> int | None:
    """Return the first block whose weights differ, 0 if only others do, None if none do."""
    before = dict(original.named_parameters())
    names = [
        name
        for name, parameter in model.named_parameters()
        if name not in before
        or before[name].shape != parameter.shape
        or not torch.equal(before[name], parameter)
    ]
    if not names:
        return None
    for i, path in enumerate(backbone(model).blocks):
        if any(name.startswith(path + ".") for name in names):
            return i
    return 0


def unit(vector_D: Float[Tensor, "*L D"]) -> Float[Tensor, "*L D"]:
    """Return vectors of length one; a zero vector stays zero and clears nothing."""
    length_D: Tensor = vector_D.norm(dim=-1, keepdim=True)
    return vector_D / length_D.clamp(min=1e-12)


def basis_of(vector_LD: Float[Tensor, "*L D"]) -> Float[Tensor, "*L 1 D"]:
    """Return one direction each as the basis it spans."""
    return unit(vector_LD)[..., None, :]
