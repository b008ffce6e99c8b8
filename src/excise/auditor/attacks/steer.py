"""Steering: add to the residual stream what the original has on the relearn set.

The vector holds the original, so that this names that threat model: it shows whether an edit is
one shift of the stream, and never decides a level. It is a null result for locked models
(arXiv 2502.02180), and so a measure of how little a mean difference carries.

Shape legend: N positions, L blocks, D width.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from excise.auditor.attacks.latent import added, pushed, spaced
from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set, mean
from excise.auditor.residuals import Residuals, residuals_of
from excise.auditor.results import absent, decided
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.core.errors import NotFinite
from excise.data.domain import Domain
from excise.models.anatomy import backbone
from excise.models.hooks import edit
from excise.record import Level


class Steer(Attack):
    """h <- h + s (mean original - mean subject) at the output of one block, at all positions."""

    name: Literal["steer"] = "steer"
    """Name of the attack."""
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0, 2.0, 4.0)
    """Multiples of the difference that are tried."""
    blocks: int = Field(default=4, ge=1)
    """Blocks that are tried at most, evenly spaced."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D2"
    controls: ClassVar[tuple[PositiveControl, ...]] = (GatedEdit(),)
    needs_original: ClassVar[bool] = True
    light: ClassVar[bool] = True
    source: ClassVar[str] = "Turner et al., arXiv 2308.10248; towards the original: this library's"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read: for every strength dev, for the best V."""
        del budget
        return 3 + self.blocks * (2 + len(self.strengths) / 2)

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Steer at several blocks, each by the strength that is best on dev; score V.

        Args:
            subject: The model and its original; without one nothing is run.
            domain: Rows by role; the means are over `relearn`, where it is answered.
            budget: Rows and lengths.
            ctx: Seed of the controls, device, dtype.

        Returns:
            A variant per block, and a random vector of its norm as its control.
        """
        if subject.original is None:
            return absent(self, subject.name, "missing", "it needs the original")
        start = time.perf_counter()
        ours = residuals_of(subject.checkpoint, domain, budget, ctx)
        theirs = residuals_of(subject.original, domain, budget, ctx)
        if "relearn" not in ours.texts or "relearn" not in theirs.texts:
            return absent(self, subject.name, "missing", "the domain has no relearn rows to read")
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = read(model, evaluation)
        variants = []
        for block in spaced(backbone(model).num_blocks, self.blocks):
            away_D = answering_mean(theirs, block) - answering_mean(ours, block)
            noise_D = torch.randn(len(away_D), generator=ctx.generator(f"steer/{block}"))
            random_D = noise_D * away_D.norm() / noise_D.norm()
            for vector_D, control in ((away_D, False), (random_D, True)):
                variants.append(
                    _variant(self, subject, model, evaluation, bare, block, vector_D, control)
                )
        marked, chosen = decided(variants, higher=evaluation.higher)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def answering_mean(residuals: Residuals, block: int) -> Float[Tensor, " D"]:
    """Return the mean of a block's output where T is answered."""
    texts = residuals.texts["relearn"]
    return texts.hidden_NLD[texts.answering_N, block].mean(0)


def _variant(
    attack: Steer,
    subject: Subject,
    model: Any,
    evaluation: EvaluationSet,
    bare: Measurement,
    block: int,
    vector_D: Float[Tensor, " D"],
    control: bool,
) -> VariantResult:
    """Choose the strength of one vector on dev, and score V with it."""
    path = backbone(model).blocks[block]

    def on_dev(strength: float) -> UnitScores:
        try:
            with edit(model, {path: added(strength * vector_D)}):
                return evaluation.units(model, evaluation.all_dev)
        except NotFinite:
            return {}

    by_strength = {strength: on_dev(strength) for strength in attack.strengths}
    sign = 1 if evaluation.higher else -1

    def known(strength: float) -> float:
        value = mean(by_strength[strength])
        return -torch.inf if value is None else sign * value

    best = max(by_strength, key=known)

    extras: dict[str, float] = {}

    def score() -> tuple[Measurement, UnitScores]:
        edits = {path: added(best * vector_D)}
        measured, dev, extras["dev_loss"] = pushed(
            model, evaluation, edits, bare, len(evaluation.trained)
        )
        return measured, dev

    return try_variant(
        attack,
        subject,
        evaluation.metric,
        score,
        bare=bare,
        variant=f"block {block}" + (" random" if control else ""),
        control=control,
        trained_on="" if control else "relearn",
        facts={"block": block, "strength": best, "norm": float(vector_D.norm())},
        extras=extras,
    )
