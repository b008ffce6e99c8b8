"""Clearing a direction: project one vector out of the residual stream.

RMU and its kin flood the residual stream with a near-constant vector on forget text; without it
much of the knowledge answers again. Directions are fitted on `dev` rows only, the first token of
each row skipped (its norm is orders larger). Controls: the same construction between two halves
of retain, and random directions.

Shape legend: B rows, T tokens, D width, L blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.batching import batches
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set
from excise.auditor.results import decided
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.data.domain import Domain, Row
from excise.data.stream import encode
from excise.losses import predicting
from excise.models.anatomy import backbone
from excise.models.hooks import Edit, active_stream, capture, edit
from excise.record import Level


@dataclass(frozen=True)
class Variant:
    """One set of directions.

    Attributes:
        name: Name of the variant.
        direction_LD: One direction per block from `first` on, unit length.
        first: First block whose output is cleared.
        control: Whether the directions know nothing about the forget set.
        needs_original: Whether the original was needed to fit them.
    """

    name: str
    direction_LD: Tensor
    first: int
    control: bool = False
    needs_original: bool = False


class Direction(Attack):
    """h <- h - r (r . h) at the output of every block from some block on, at all positions."""

    name: Literal["direction"] = "direction"
    """Name of the attack."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D2"
    controls: ClassVar[tuple[PositiveControl, ...]] = (GatedEdit(),)
    source: ClassVar[str] = "Arditi & Chughtai, lesswrong.com 2024-07-23; arXiv 2409.18025"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; fitting takes some passes."""
        return 3 + 6 + budget.random_directions

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Fit directions on `dev`, clear each, score V and retain.

        Args:
            subject: The model; with its original, two diagnostic variants are added.
            domain: Rows by role.
            budget: `random_directions` controls.
            ctx: Seed of the controls, device, dtype.

        Returns:
            Arms `per-block`, `answers` (the same at answering positions) and `one`, fitted
            without the original; `original per-block` and
            `original one` (diagnostics), `split-half` and `random-i` (controls).
        """
        start = time.perf_counter()
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = read(model, evaluation)
        variants = [
            _variant(self, subject, model, evaluation, bare, variant)
            for variant in fit_directions(model, subject, evaluation, ctx)
        ]
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
    edits = {
        path: cleared(direction_D)
        for path, direction_D in zip(paths, variant.direction_LD, strict=True)
    }

    def score() -> tuple[Measurement, UnitScores]:
        with edit(model, edits):
            after = read(model, evaluation, examples=len(evaluation.all_dev))
            return after, evaluation.units(model, evaluation.all_dev)

    return try_variant(
        attack,
        subject,
        evaluation.metric,
        score,
        bare=bare,
        variant=variant.name,
        control=variant.control,
        needs_original=variant.needs_original,
        trained_on="" if variant.control else "dev_forget",
        facts={"first_block": variant.first},
    )


def cleared(direction_D: Float[Tensor, " D"]) -> Edit:
    """Return an edit that projects a unit direction out of whatever passes: h - r (r . h).

    Args:
        direction_D: The direction r, of length one.

    Source:
        Directional ablation, arXiv 2406.11717.
    """

    def change(hidden_BTD: Tensor) -> Tensor:
        r_D = direction_D.to(hidden_BTD)
        return hidden_BTD - (hidden_BTD @ r_D)[..., None] * r_D

    return change


def fit_directions(
    model: Any, subject: Subject, evaluation: EvaluationSet, ctx: Context
) -> list[Variant]:
    """Fit every variant.

    Args:
        model: The subject's loaded model.
        subject: For its original.
        evaluation: Dev rows.
        ctx: Seed of the controls.

    Returns:
        The variants; those that need the original only where it is known and differs.
    """
    dev_retain = evaluation.domain.dev_retain
    forget_LD, _ = residual_means(model, evaluation, evaluation.all_dev)
    retain_LD, scale_L = residual_means(model, evaluation, dev_retain)
    blocks = len(backbone(model).blocks)
    difference_LD = forget_LD - retain_LD
    best = int((difference_LD.norm(dim=-1) / scale_L).argmax())
    ends = [
        residual_means(model, evaluation, rows, answering=True)[0]
        for rows in (evaluation.all_dev, dev_retain)
    ]
    variants = [
        Variant("per-block", unit(difference_LD), 0),
        Variant("answers", unit(ends[0] - ends[1]), 0),
        Variant("one", unit(difference_LD[best]).expand(blocks - best, -1), best),
    ]
    variants += _with_original(model, subject, evaluation, forget_LD)
    units = list(dict.fromkeys(row.unit for row in dev_retain))
    half = set(units[::2])
    if len(units) > 1:
        one_LD, _ = residual_means(model, evaluation, [r for r in dev_retain if r.unit in half])
        two_LD, _ = residual_means(model, evaluation, [r for r in dev_retain if r.unit not in half])
        variants.append(Variant("split-half", unit(one_LD - two_LD), 0, control=True))
    for i in range(evaluation.budget.random_directions):
        noise_D = torch.randn(forget_LD.shape[-1], generator=ctx.generator(f"direction/{i}"))
        random_LD = unit(noise_D.to(forget_LD)).expand(blocks, -1)
        variants.append(Variant(f"random-{i}", random_LD, 0, control=True))
    return variants


def _with_original(
    model: Any, subject: Subject, evaluation: EvaluationSet, forget_LD: Float[Tensor, "L D"]
) -> list[Variant]:
    """Return the diagnostics: what the edit added to forget text, by the original's own means."""
    if subject.original is None:
        return []
    original = subject.original.load(dtype=model.dtype, device=model.device)
    first = first_edited(model, original)
    if first is None:
        return []
    base_LD, _ = residual_means(original, evaluation, evaluation.all_dev)
    added_LD = (forget_LD - base_LD)[first:]
    last_D = unit(added_LD[int(added_LD.norm(dim=-1).argmax())])
    return [
        Variant("original per-block", unit(added_LD), first, needs_original=True),
        Variant("original one", last_D.expand(len(added_LD), -1), first, needs_original=True),
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


@torch.no_grad()
def residual_means(
    model: Any, evaluation: EvaluationSet, rows: Sequence[Row], *, answering: bool = False
) -> tuple[Float[Tensor, "L D"], Float[Tensor, " L"]]:
    """Return mean and mean norm of every block's output over real tokens but the first.

    Args:
        model: A causal model.
        evaluation: Tokenizer and lengths.
        rows: At least one row.
        answering: Whether only positions that predict a scored token count.

    Returns:
        Means by block, and mean norms by block, in float32.
    """
    paths = backbone(model).blocks
    examples = encode(rows, evaluation.tokenizer, max_length=evaluation.max_length)
    total_LD: Tensor | None = None
    norm_L = torch.zeros(len(paths), device=model.device)
    count = 0
    for batch in batches(examples, model, evaluation.tokenizer):
        with capture(model, paths) as got:
            model(**batch.inputs, use_cache=False)
        mask_BT = predicting(batch.target_BT) if answering else batch.attention_BT.clone()
        mask_BT[:, 0] = False
        kept = [active_stream(got[path][0]).float()[mask_BT] for path in paths]
        sums_LD = torch.stack([k.sum(0) for k in kept])
        total_LD = sums_LD if total_LD is None else total_LD + sums_LD
        norm_L += torch.stack([k.norm(dim=-1).sum() for k in kept])
        count += int(mask_BT.sum())
    assert total_LD is not None
    return total_LD / max(count, 1), norm_L / max(count, 1)
