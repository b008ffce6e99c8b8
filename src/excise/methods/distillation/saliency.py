"""Which weights a capability leans on, so that only those are perturbed.

Score of a weight: |w * dL/dw| on a row, averaged over rows, all matrices ranked together.
Sources: SNIP, arXiv 1810.02340, equation 5; on single texts: Wei et al. 2024, arXiv 2402.05162,
section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import Tokenizer, collate, encode
from excise.data.subsample import subsample
from excise.losses import nll

ROWS = 128
"""Rows that are scored at most, drawn by hash."""


def forget_saliency(
    model: nn.Module,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    max_length: int,
    ctx: Context,
) -> dict[str, Tensor]:
    """Return |w * dL/dw| of every matrix among `names`, averaged over rows, in float32.

    Args:
        model: The model that knows; it keeps its gradients and flags.
        rows: Forget rows.
        tokenizer: Its tokenizer.
        names: Parameters; vectors are left out.
        max_length: Tokens per row.
        ctx: Seed of the draw of rows, device.
    """
    named = dict(model.named_parameters())
    chosen = {name: named[name] for name in names if named[name].dim() > 1}
    read = subsample(rows, ROWS, by="content", seed=ctx.seed_for("saliency"))
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
    flags = [(p, p.requires_grad) for p in chosen.values()]
    try:
        for p in chosen.values():
            p.requires_grad_(True)
        for example in encode(read, tokenizer, max_length=max_length):
            batch = collate([example], pad_id=tokenizer.pad_token_id).to(ctx.device)
            value, count = nll(model(**batch.inputs).logits, batch)
            grads = torch.autograd.grad(value / count, list(chosen.values()), allow_unused=True)
            for (name, p), grad in zip(chosen.items(), grads, strict=True):
                if grad is not None:
                    total[name] += (p.detach() * grad).abs().float() / len(read)
    finally:
        for p, needed in flags:
            p.requires_grad_(needed)
    return total


def largest(scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return masks of the weights with the largest scores, all tensors ranked together.

    Args:
        scores: Score of every weight, by parameter name.
        share: How many, as a share of all of them.

    Raises:
        UserError: If there is no weight to choose from.
    """
    if not scores:
        raise UserError("the groups hold no matrix to choose weights from; name other groups")
    flat = torch.cat([value.flatten() for value in scores.values()])
    count = max(1, round(share * flat.numel()))
    picked = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    picked[flat.topk(count).indices] = True
    sizes = [value.numel() for value in scores.values()]
    parts = picked.split(sizes)
    return {n: m.view_as(v) for (n, v), m in zip(scores.items(), parts, strict=True)}


def at_random(
    model: nn.Module, names: Sequence[str], share: float, ctx: Context
) -> dict[str, Tensor]:
    """Return masks of as many weights drawn at random: the control of `forget_saliency`."""
    named = dict(model.named_parameters())
    scores = {
        name: torch.rand(named[name].shape, generator=ctx.generator(f"saliency/{name}"))
        for name in names
        if named[name].dim() > 1
    }
    masks = largest(scores, share)
    return {name: mask.to(named[name].device) for name, mask in masks.items()}
