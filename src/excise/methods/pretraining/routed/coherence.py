"""The light repair after an ablation: a few steps on one batch of retained rows.

Source: Cloud et al. 2024, "Gradient Routing", arXiv:2410.04332, section 4.2: one batch of 64 rows,
learning rate 5e-5, at most 40 steps, the weights with the lowest loss on further retained rows.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context
from excise.data.domain import CORE, Rows
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.methods.pretraining.pretrain import plain_counts, plain_loss
from excise.methods.pretraining.routed.absorption import batches_of, hash_ordered, mean_loss
from excise.train.fit import FitConfig, fit


class Coherence(Config):
    """Fine-tune on one fixed batch, keep the best weights."""

    fit: FitConfig = FitConfig(steps=40, lr=5e-5, batch_size=64)
    """Schedule; its batch is drawn once and read at every step."""
    check_rows: int = Field(default=1000, ge=1)
    """Further retained rows on which the best step is chosen."""


def coherence(
    model: nn.Module,
    rows: Rows,
    tokenizer: Tokenizer,
    config: Coherence,
    ctx: Context,
    *,
    max_length: int,
) -> dict[str, Any]:
    """Fine-tune a model in place and leave it at its best step, which may be none.

    Args:
        model: The ablated model.
        rows: What was read in training, with the given labels; those labelled core are used.
        tokenizer: The model's tokenizer.
        config: Steps and rows.
        ctx: Seed, device, processes.
        max_length: Tokens per row.

    Returns:
        `best_step` (0 for none), and `losses` on the further rows, in nats per token, before the
        first step and after every one.
    """
    core = hash_ordered(
        list(dict.fromkeys(row for row in rows if row.label == CORE)), ctx.seed_for("erac")
    )
    size = config.fit.batch_size
    taught, further = core[:size], core[size : size + config.check_rows]
    if not taught or not config.fit.steps:
        return {"best_step": 0, "losses": []}
    examples = encode(taught, tokenizer, max_length=max_length)
    checks = batches_of(further or taught, tokenizer, max_length=max_length)

    def batches(step: int) -> list[Batch]:
        mine, pad_id = examples[ctx.rank :: ctx.world], tokenizer.pad_token_id
        each = config.fit.micro_size or len(mine)
        return [collate(mine[i : i + each], pad_id=pad_id) for i in range(0, len(mine), each)]

    losses = [mean_loss(model, checks, ctx.device)]
    best = _copy(model)
    ctx.emit("part", {"stage": ctx.work.name.removesuffix(".partial"), "part": "coherence"})
    for _ in fit(model, batches, plain_loss, config.fit, ctx, counts=plain_counts):
        losses.append(mean_loss(model, checks, ctx.device))
        if losses[-1] < min(losses[:-1]):
            best = _copy(model)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), best, strict=True):
            parameter.copy_(value)
    return {"best_step": losses.index(min(losses)), "losses": losses}


def _copy(model: nn.Module) -> list[Tensor]:
    """Return copies of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]
