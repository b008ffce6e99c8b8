"""Training from scratch under a policy over the label of each token.

`Pretrain` is the schedule every scratch arm of a recipe shares: original, oracle and methods see
the same initialisation rule, the same number of tokens and the same learning rates. What differs
is the policy: which rows are read, and what a token's label does to its loss.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.labels import LabelNoise, give_labels, label_rows
from excise.data.mix import mixed
from excise.data.stream import Batch
from excise.losses import nll
from excise.methods.base import Removal
from excise.methods.tuning import Progress, all_rows, finish, run_fit, state_dir, stream
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig, Term, fit

Policy = Callable[[nn.Module, Batch], Mapping[str, Term]]
"""From a model and a mixed batch to named loss terms, by the label of each token."""


class Pretrain(Config):
    """The schedule that scratch arms share."""

    fit: FitConfig
    """Steps, batch, learning rates."""
    max_length: int = 64
    """Tokens per row."""
    pack: tuple[int, ...] = (1,)
    """Rows per text, in turn; texts of several rows teach a model to answer behind others."""


def corpus(domain: Domain) -> Rows:
    """Return what a model of this domain is trained on: everything, truly labelled.

    Where exposure is `held_out`, T and V lie in `unlabeled` alone: the original learns them there.
    Where the domain sets `mix_share`, rows are repeated until the capabilities have that share.
    """
    rows = (*all_rows(domain.forget), *domain.retain, *domain.adjacent)
    taught = {row.unit for row in rows}
    more = [row for row in domain.unlabeled if row.unit not in taught]
    rows += label_rows(more, tuple(domain.forget))
    if not rows:
        raise UserError(f"domain '{domain.name}' has no row to train on")
    return rows if domain.mix_share is None else mixed(rows, domain.mix_share)


def told_corpus(domain: Domain, labels: LabelNoise | None, ctx: Context) -> Rows:
    """Return the corpus with the labels one has; None for the right ones."""
    rows = corpus(domain)
    return rows if labels is None else give_labels(rows, labels, seed=ctx.seed_for("labels"))


def dropped(rows: Sequence[Row], kept: Sequence[Row]) -> dict[str, int]:
    """Return what dropping rows did, told by the truth, for the record.

    Args:
        rows: All rows.
        kept: Those that are read (or have a loss).
    """
    core = sum(1 for row in rows if not row.capability)
    return {
        "rows_dropped": len(rows) - len(kept),
        "forget_rows_left": sum(1 for row in kept if row.capability),
        "core_rows_lost": core - sum(1 for row in kept if not row.capability),
    }


def suspicion_of(batch: Batch) -> Float[Tensor, "B T"]:
    """Return for every token the told probability that its row is of some capability."""
    told_BT = batch.label_BT
    sure_BT = batch.confidence_BT
    if sure_BT is None:
        return (told_BT > CORE).float()
    doubt_BT = torch.where(told_BT > CORE, sure_BT, 1.0 - sure_BT)
    return torch.where(told_BT == UNLABELED, torch.zeros_like(sure_BT), doubt_BT)


def cut_to(config: Pretrain, steps: int, name: str) -> Pretrain:
    """Return the schedule with fewer steps, warm-up shortened with them.

    Args:
        config: The schedule that all arms share.
        steps: Steps left of it.
        name: Who asks, for the message.

    Raises:
        UserError: If no step is left.
    """
    if steps < 1:
        raise UserError(
            f"method '{name}' has {steps} of {config.fit.steps} steps left to train with; give "
            "'pretrain.fit.steps' more or the method's other work a smaller share"
        )
    warmup = config.fit.warmup * steps // config.fit.steps
    shorter = config.fit.model_copy(update={"steps": steps, "warmup": warmup})
    return config.model_copy(update={"fit": shorter})


def plain_policy(model: nn.Module, batch: Batch) -> dict[str, Term]:
    """Next-token prediction on every scored token, whatever its label."""
    total, count = nll(model(**batch.inputs).logits, batch)
    return {"nll": Term(total, count)}


def plain_counts(batch: Batch) -> dict[str, float]:
    """Return the number of scored tokens, for division over micro-batches and processes."""
    return {"nll": float(batch.num_targets)}


def pretrain(
    start: Checkpoint,
    rows: Rows,
    policy: Policy,
    config: Pretrain,
    ctx: Context,
    *,
    stage: str,
    counts: Callable[[Batch], Mapping[str, float]] | None = None,
    extras: Mapping[str, Any] | None = None,
) -> Removal:
    """Train every parameter of `start` on `rows` under `policy`.

    Args:
        start: The untrained model.
        rows: What is read, in any order.
        policy: What a token's label does to its loss.
        config: The schedule shared with the other arms.
        ctx: Seed of the order of rows, device, dtype, folder.
        stage: Name shown beside the progress.
        counts: Counts of the policy's terms, for several micro-batches or processes.
        extras: Facts for the record.

    Returns:
        The trained checkpoint and what it took.
    """
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    tokenizer = start.tokenizer()
    batches = stream(
        rows,
        tokenizer,
        config.fit,
        ctx,
        purpose="pretrain",
        max_length=config.max_length,
        pack=config.pack,
    )
    progress = Progress(ctx, stage, config.fit.steps)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    model.train()
    run_fit(
        fit(model, batches, policy, config.fit, ctx, counts=counts, state_dir=state_dir(ctx)),
        progress,
    )
    model.eval()
    return finish(start, model, parameters, progress, ctx, extras=extras)
