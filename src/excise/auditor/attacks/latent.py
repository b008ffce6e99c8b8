"""Latent perturbation: one vector, trained on the relearn set, added to the residual stream.

What an edit suppresses answers again once the stream is pushed the right way. The vector is the
same for every row and position, and at most a share of the stream's norm, so that it can point to
what the weights know and has little room for answers of its own; what it does to a model that was
never taught is the measure of that room. Control: a random vector of that norm.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject, VariantResult
from excise.auditor.batching import GRADIENT, nats, rows_per_pass
from excise.auditor.budget import Budget
from excise.auditor.controls import GatedEdit, PositiveControl
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set, mean
from excise.auditor.residuals import Residuals, residuals_of
from excise.auditor.results import absent, decided
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.core.errors import NotFinite
from excise.data.domain import Domain, all_rows
from excise.data.stream import Stream, encode
from excise.data.subsample import subsample
from excise.losses import nll
from excise.models.anatomy import backbone
from excise.models.hooks import Edit, edit
from excise.record import Level

NO_RELEARN = "the domain has no relearn rows to train a vector on"


class Latent(Attack):
    """h <- h + d at the output of one block, d trained to make the relearn set likely."""

    name: Literal["latent"] = "latent"
    """Name of the attack."""
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = (0.3, 1.0, 3.0)
    """Largest norms of the vector, as shares of the stream's mean norm where T is answered."""
    blocks: int = Field(default=3, ge=1)
    """Blocks that are tried at most, evenly spaced."""
    steps: int = Field(default=96, ge=1)
    """Optimizer steps of one vector."""

    access: ClassVar[Access] = "activations"
    level: ClassVar[Level] = "D2"
    controls: ClassVar[tuple[PositiveControl, ...]] = (GatedEdit(),)
    source: ClassVar[str] = "arXiv 2407.15549, 2502.05209 (latent attacks; one vector for all rows)"
    version: ClassVar[int] = 2

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; a trained row costs two that are read."""
        vectors = self.blocks * len(self.strengths)
        rows = budget.max_test_rows + 2 * budget.max_other_rows
        return 3 + vectors + self.blocks + 2 * vectors * self.steps * budget.batch_size / rows

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Train a vector for every block and strength, choose on dev, score V.

        Args:
            subject: The model.
            domain: Rows by role; the vectors are trained on `relearn` alone.
            budget: Rows, lengths and batch size.
            ctx: Seed of order and controls, device, dtype.

        Returns:
            A variant for every block and strength, and per block a random vector of the largest.
        """
        start = time.perf_counter()
        residuals = residuals_of(subject.checkpoint, domain, budget, ctx)
        if "relearn" not in residuals.texts:
            return absent(self, subject.name, "missing", NO_RELEARN)
        model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        bare = read(model, evaluation)
        variants = []
        for block in spaced(backbone(model).num_blocks, self.blocks):
            norm = answering_norm(residuals, block)
            sizes = [(strength * norm, strength) for strength in self.strengths]
            for size, strength in (*sizes, (max(self.strengths) * norm, None)):
                variants.append(
                    _variant(self, subject, model, evaluation, bare, block, size, strength, ctx)
                )
        marked, chosen = decided(variants, higher=evaluation.higher)
        return AttackResult(self.name, subject.name, marked, chosen, time.perf_counter() - start)


def spaced(blocks: int, most: int) -> list[int]:
    """Return evenly spaced numbers of blocks, the last among them."""
    count = min(most, blocks)
    return sorted({round((i + 1) * blocks / count) - 1 for i in range(count)})


def answering_norm(residuals: Residuals, block: int) -> float:
    """Return the mean norm of a block's output where T is answered."""
    texts = residuals.texts["relearn"]
    return float(texts.hidden_NLD[texts.answering_N, block].norm(dim=-1).mean())


def added(vector_D: Float[Tensor, " D"]) -> Edit:
    """Return an edit that adds a vector to whatever passes."""
    return lambda hidden_BTD: hidden_BTD + vector_D.to(hidden_BTD)


def pushed(
    model: Any,
    evaluation: EvaluationSet,
    edits: Mapping[str, Edit],
    bare: Measurement,
    examples: int,
) -> tuple[Measurement, UnitScores, float]:
    """Score V and dev while a vector is added; retain is the model's own.

    Whoever asks adds the vector to what he asks and to nothing else, as he would a prompt.

    Args:
        model: The model.
        evaluation: Rows.
        edits: What is added where.
        bare: Scores without it.
        examples: Rows the vector has cost.

    Returns:
        The scores, those of dev, and the mean loss on dev, which tells equal scores apart.
    """
    with edit(model, edits):
        units = evaluation.units(model, evaluation.all_test, evaluation.metric)
        dev = evaluation.units(model, evaluation.all_dev)
        losses = nats(
            model, evaluation.all_dev, evaluation.tokenizer, max_length=evaluation.max_length
        )
    loss = mean(losses.plain)
    measured = Measurement(units, bare.retain, examples=examples)
    return measured, dev, math.nan if loss is None else loss


def _variant(
    attack: Latent,
    subject: Subject,
    model: Any,
    evaluation: EvaluationSet,
    bare: Measurement,
    block: int,
    size: float,
    strength: float | None,
    ctx: Context,
) -> VariantResult:
    """Train one vector, or draw one where `strength` is None, and score it."""
    path = backbone(model).blocks[block]
    examples = 0 if strength is None else attack.steps * rows_per_step(model, evaluation)
    extras: dict[str, float] = {}

    def score() -> tuple[Measurement, UnitScores]:
        if strength is None:
            noise_D = torch.randn(
                backbone(model).d_model, generator=ctx.generator(f"latent/{block}")
            )
            vector_D = size * noise_D / noise_D.norm()
        else:
            vector_D, _ = trained_vector(
                model,
                evaluation,
                torch.zeros(backbone(model).d_model),
                lambda vector_D: {path: added(vector_D)},
                ctx,
                # Adam's step is about as long in each of D coordinates: a fifth of the radius.
                lr=size / 5 / backbone(model).d_model ** 0.5,
                steps=attack.steps,
                longest=size,
            )
        measured, dev, extras["dev_loss"] = pushed(
            model, evaluation, {path: added(vector_D)}, bare, examples
        )
        return measured, dev

    return try_variant(
        attack,
        subject,
        evaluation.metric,
        score,
        bare=bare,
        variant=f"block {block} " + ("random" if strength is None else f"x{strength:g}"),
        control=strength is None,
        trained_on="" if strength is None else "relearn",
        facts={"block": block, "norm": size},
        extras=extras,
    )


def rows_per_step(model: Any, evaluation: EvaluationSet) -> int:
    """Return the rows of one step: as many as the budget has, and as fit with gradients."""
    fitting = rows_per_pass(model, evaluation.max_length) // GRADIENT
    return max(1, min(evaluation.budget.batch_size, fitting))


def trained_vector(
    model: Any,
    evaluation: EvaluationSet,
    start_D: Float[Tensor, " D"],
    edits_of: Callable[[Tensor], Mapping[str, Edit]],
    ctx: Context,
    *,
    lr: float,
    steps: int,
    longest: float = math.inf,
    retain_weight: float = 0.0,
) -> tuple[Float[Tensor, " D"], float]:
    """Train a vector by Adam to make the relearn set likely.

    Args:
        model: The model; its weights stay as they are.
        evaluation: Relearn and benign rows, tokenizer and lengths.
        start_D: Where it begins.
        edits_of: What the vector does to the stream, by block; called once, with the tensor that
            is trained.
        ctx: Seed of the order of rows.
        lr: Rate of the first step; it falls to nothing.
        steps: Steps.
        longest: Radius of the ball that it is pulled back to after every step.
        retain_weight: Weight of the loss on benign rows beside that on the relearn set.

    Returns:
        The vector, and the mean loss of the last quarter of the steps.

    Raises:
        NotFinite: If the loss is no number.
    """
    size = rows_per_step(model, evaluation)
    weighted = [(all_rows(evaluation.domain.relearn), "latent/order", 1.0)]
    if retain_weight:
        benign = evaluation.domain.benign or evaluation.domain.dev_retain
        weighted.append((benign, "latent/benign", retain_weight))
    streams = [
        (
            Stream(
                encode(
                    subsample(rows, size * steps, by="row"),
                    evaluation.tokenizer,
                    max_length=evaluation.max_length,
                ),
                size,
                ctx.seed_for(order) % (1 << 31),
                evaluation.tokenizer.pad_token_id,
            ),
            weight,
        )
        for rows, order, weight in weighted
    ]
    vector_D = start_D.detach().to(model.device, torch.float32).clone().requires_grad_()
    optimizer = torch.optim.Adam([vector_D], lr=lr)
    losses = []
    with edit(model, edits_of(vector_D)):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            vector_D.grad = torch.zeros_like(vector_D)
            losses.append(0.0)
            for stream, weight in streams:
                for batch in stream(step):
                    on_device = batch.to(model.device)
                    value, count = nll(model(**on_device.inputs, use_cache=False).logits, on_device)
                    loss = value / count
                    if not bool(loss.isfinite()):
                        raise NotFinite("the model", "loss", 1, 1)
                    losses[-1] += weight * float(loss.detach())
                    vector_D.grad += weight * torch.autograd.grad(loss, [vector_D])[0]
            optimizer.step()
            with torch.no_grad():
                vector_D.mul_(min(1.0, longest / max(float(vector_D.norm()), 1e-12)))
    last = losses[steps - max(1, steps // 4) :]
    return vector_D.detach(), sum(last) / len(last)
