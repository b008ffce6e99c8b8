"""The light repair after an ablation: a few steps on one batch of retained rows.

Source: Cloud et al. 2024, "Gradient Routing", arXiv:2410.04332, section 4.2: one batch of 64 rows,
learning rate 5e-5, at most 40 steps, the weights with the lowest loss on further retained rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from excise.core.config import Config
from excise.core.context import Context
from excise.data.domain import CORE, Rows
from excise.data.split import hashed_order
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.losses import nll
from excise.routing.ablation import Seen
from excise.routing.absorption import CHUNK, mean_loss
from excise.train.fit import FitConfig, Term, fit


class Coherence(Config):
    """Fine-tune on one fixed batch, keep the best weights."""

    fit: FitConfig = FitConfig(steps=40, lr=5e-5, batch_size=64)
    """Schedule; its batch is drawn once and read at every step."""
    check_rows: int = Field(default=1000, ge=1)
    """Further retained rows on which the best step is chosen."""


def repairing(
    light: Coherence | None, ctx: Context, *, max_length: int
) -> Callable[[nn.Module, Seen], Mapping[str, Any]] | None:
    """Return what is done to a model after its modules were cut off; None for nothing."""
    if light is None:
        return None

    def repair(model: nn.Module, seen: Seen) -> dict[str, Any]:
        return coherence(model, seen.rows, seen.tokenizer, light, ctx, max_length=max_length)

    return repair


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
        rows: What was read in training, labelled as told; those told to be core are used.
        tokenizer: The model's tokenizer.
        config: Steps and rows.
        ctx: Seed, device, processes.
        max_length: Tokens per row.

    Returns:
        `best_step` (0 for none), and the loss on the further rows after every step.
    """
    core = list(dict.fromkeys(row for row in rows if row.label == CORE))
    order = hashed_order(
        core, [f"{r.unit}:{r.wording}:{r.text}" for r in core], ctx.seed_for("erac")
    )
    size = config.fit.batch_size
    taught, held = order[:size], order[size : size + config.check_rows]
    if not taught or not config.fit.steps:
        return {"best_step": 0, "losses": []}
    pad = tokenizer.pad_token_id
    train = encode(taught, tokenizer, max_length=max_length)
    check = encode(held or taught, tokenizer, max_length=max_length)
    checks = [collate(check[i : i + CHUNK], pad_id=pad) for i in range(0, len(check), CHUNK)]

    def batches(step: int) -> list[Batch]:
        mine = train[ctx.rank :: ctx.world]
        each = config.fit.micro_size or len(mine)
        return [collate(mine[i : i + each], pad_id=pad) for i in range(0, len(mine), each)]

    def loss(net: nn.Module, batch: Batch) -> dict[str, Term]:
        total, count = nll(net(**batch.inputs).logits, batch)
        return {"nll": Term(total, count)}

    found = [mean_loss(model, checks, ctx.device)]
    best = _copy(model)
    for record in fit(model, batches, loss, config.fit, ctx, counts=_counts):
        found.append(mean_loss(model, checks, ctx.device))
        ctx.emit("step", {"stage": "coherence", "step": record.step + 1,
                          "steps": config.fit.steps, "terms": record.terms})  # fmt: skip
        if found[-1] < min(found[:-1]):
            best = _copy(model)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), best, strict=True):
            parameter.copy_(value)
    return {"best_step": found.index(min(found)), "losses": found}


def _counts(batch: Batch) -> dict[str, float]:
    return {"nll": float(batch.num_targets)}


def _copy(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]
