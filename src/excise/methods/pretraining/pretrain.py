"""Training from scratch, with a loss that may depend on the label of each token.

`Pretrain` is the schedule every method from scratch of a recipe shares: original, oracle and
methods see the same initialisation rule, the same number of tokens and the same learning rates.
What differs is which rows are read, and what a token's label does to its loss.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows, all_rows
from excise.data.labels import LabelNoise, give_labels, label_quality, label_rows
from excise.data.mix import in_texts, mixed
from excise.data.spans import word_pieces
from excise.data.stream import Batch, Stream, Tokenizer
from excise.losses import nll
from excise.methods.base import Removal
from excise.methods.tuning import (
    Progress,
    finish,
    forget_rows,
    run_fit,
    state_dir,
    stream,
)
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig, Term, fit

TokenLoss = Callable[[nn.Module, Batch], Mapping[str, Term]]
"""From a model and a mixed batch to named loss terms, by the label of each token."""


class Pretrain(Config):
    """The schedule that methods from scratch share."""

    fit: FitConfig
    """Steps, batch, learning rates."""
    max_length: int = Field(default=64, ge=2)
    """Tokens per row."""
    pack: tuple[int, ...] = (1,)
    """Rows per text, in turn; texts of several rows teach a model to answer behind others."""


def schedule(pretrain: Pretrain | None, name: str) -> Pretrain:
    """Return the schedule of a method from scratch.

    Args:
        pretrain: What the method or the recipe names.
        name: Name of the method, for the message.

    Raises:
        UserError: If neither names one.
    """
    if pretrain is None:
        raise UserError(
            f"method '{name}' trains from scratch and needs a schedule: set 'pretrain' in the "
            "recipe or in the method"
        )
    return pretrain


def cut_to(config: Pretrain, steps: int, name: str) -> Pretrain:
    """Return the schedule with fewer steps, warm-up shortened with them.

    Args:
        config: The shared schedule.
        steps: Steps left of it.
        name: Name of the method, for the message.

    Raises:
        UserError: If no step is left.
    """
    if steps < 1:
        raise UserError(
            f"method '{name}' has none of {config.fit.steps:,} steps left to train with, for its "
            f"other work takes as much as {config.fit.steps - steps:,}; give 'pretrain.fit.steps' "
            "more or the method's other work a smaller share"
        )
    warmup = config.fit.warmup * steps // config.fit.steps
    shorter = config.fit.model_copy(update={"steps": steps, "warmup": warmup})
    return config.model_copy(update={"fit": shorter})


def corpus(domain: Domain) -> Rows:
    """Return the texts a model of this domain is trained on: everything, truly labelled.

    These are `taught` rows, several in a text where the domain sets `rows_per_text`.

    Args:
        domain: Rows by role.

    Raises:
        UserError: If there is no row.
    """
    return in_texts(taught(domain), domain.rows_per_text)


def taught(domain: Domain) -> Rows:
    """Return the rows a model of this domain is trained on, as often as one epoch reads them.

    Where exposure is `held_out`, the relearn and the held-out test set lie in `unlabeled` alone:
    the original learns them there. Where the domain sets `mix_share`, rows are repeated until the
    capabilities have that share.

    Args:
        domain: Rows by role.

    Raises:
        UserError: If there is no row.
    """
    rows = (*all_rows(domain.forget), *domain.retain, *domain.adjacent)
    units = {row.unit for row in rows}
    more = [row for row in domain.unlabeled if row.unit not in units]
    rows += label_rows(more, tuple(domain.forget))
    if not rows:
        raise UserError(f"domain '{domain.name}' has no row to train on")
    return rows if domain.mix_share is None else mixed(rows, domain.mix_share)


def labelled_corpus(domain: Domain, labels: LabelNoise | None, ctx: Context) -> Rows:
    """Return the corpus with the labels that a method is given.

    Args:
        domain: Rows by role.
        labels: How they differ from the truth; None for not at all.
        ctx: Seed of the draw.
    """
    return _given(corpus(domain), labels, ctx)


def labelled_tuning_rows(domain: Domain, labels: LabelNoise | None, ctx: Context) -> Rows:
    """Return forget and retain rows with the labels that a method on a trained model is given.

    Args:
        domain: Rows by role.
        labels: How they differ from the truth; None for not at all.
        ctx: Seed of the draw.

    Raises:
        UserError: If there is no row to forget.
    """
    rows = label_rows((*forget_rows(domain), *domain.retain), tuple(domain.forget))
    return _given(rows, labels, ctx)


def _given(rows: Rows, labels: LabelNoise | None, ctx: Context) -> Rows:
    """Return truly labelled rows with the labels that a method is given."""
    return rows if labels is None else give_labels(rows, labels, seed=ctx.seed_for("labels"))


def quality_of_labels(rows: Rows) -> dict[str, float | None]:
    """Return `label_quality` for the record: None, which JSON has, for NaN, which it lacks."""
    return {name: None if value != value else value for name, value in label_quality(rows).items()}


def dropped(rows: Sequence[Row], remaining: Sequence[Row]) -> dict[str, int]:
    """Return what dropping rows did, judged by the truth, for the record.

    Args:
        rows: All rows.
        remaining: Those that are read (or have a loss).

    Returns:
        Numbers of rows, and where rows have spans `core_words_lost`: words that teach no capability
        and went with their texts.
    """
    core = sum(1 for row in rows if not row.capability)
    counts = {
        "rows_dropped": len(rows) - len(remaining),
        "forget_rows_left": sum(1 for row in remaining if row.capability),
        "core_rows_lost": core - sum(1 for row in remaining if not row.capability),
    }
    if any(row.spans for row in rows):
        counts["core_words_lost"] = _core_words(rows) - _core_words(remaining)
    return counts


def _core_words(rows: Sequence[Row]) -> int:
    """Return the number of words that teach no capability."""
    return sum(not piece.capability for row in rows for piece in word_pieces(row))


def forget_probability(batch: Batch) -> Float[Tensor, "B T"]:
    """Return for every token the probability, as labels give it, that its row is to forget."""
    label_BT, confidence_BT = batch.label_BT, batch.confidence_BT
    if confidence_BT is None:
        return (label_BT > CORE).float()
    forget_BT = torch.where(label_BT > CORE, confidence_BT, 1.0 - confidence_BT)
    return torch.where(label_BT == UNLABELED, torch.zeros_like(forget_BT), forget_BT)


def plain_loss(model: nn.Module, batch: Batch) -> dict[str, Term]:
    """Next-token prediction on every scored token, whatever its label."""
    total, count = nll(model(**batch.inputs, use_cache=False).logits, batch)
    return {"nll": Term(total, count)}


def plain_counts(batch: Batch) -> dict[str, float]:
    """Return the number of scored tokens, for division over micro-batches and processes."""
    return {"nll": float(batch.num_targets)}


def texts(
    rows: Rows, tokenizer: Tokenizer, config: Pretrain, ctx: Context, *, purpose: str
) -> Stream:
    """Return the stream of a schedule over rows, whose order is a draw of its own.

    Args:
        rows: What is read, in any order.
        tokenizer: The model's tokenizer.
        config: Batch and micro-batch sizes, length, rows per text.
        ctx: Seed and processes.
        purpose: Names the draw.
    """
    return stream(
        rows,
        tokenizer,
        config.fit,
        ctx,
        purpose=purpose,
        max_length=config.max_length,
        pack=config.pack,
        only_spans=False,
    )


def pretrain(
    start: Checkpoint,
    rows: Rows,
    config: Pretrain,
    ctx: Context,
    *,
    stage: str,
    loss: TokenLoss = plain_loss,
    counts: Callable[[Batch], Mapping[str, float]] = plain_counts,
    extras: Mapping[str, Any] | None = None,
) -> Removal:
    """Train every parameter of `start` on `rows`.

    Args:
        start: The untrained model.
        rows: What is read, in any order.
        config: The schedule shared with the other methods.
        ctx: Seed of the order of rows, device, dtype, folder.
        stage: Name shown beside the progress.
        loss: What a token's label does to its loss.
        counts: Counts of the terms of `loss`, for several micro-batches or processes.
        extras: Facts for the record.

    Returns:
        The trained checkpoint and what it took.
    """
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    batches = texts(rows, start.tokenizer(), config, ctx, purpose="pretrain")
    progress = Progress(ctx, stage, config.fit.steps)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    model.train()
    run_fit(
        fit(model, batches, loss, config.fit, ctx, counts=counts, state_dir=state_dir(ctx)),
        progress,
    )
    model.eval()
    return finish(start, model, parameters, progress, ctx, extras=extras)
