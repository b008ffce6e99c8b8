"""What processes tell each other: small values as JSON, gradients as flat sums.

Values are summed in order of rank, so that every process computes the same number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from excise.core.context import Context
from excise.core.errors import UserError

BUCKET = 1 << 25
"""Entries per all-reduce: large enough to amortise latency, small beside a model."""


def check_processes(ctx: Context) -> None:
    """Refuse several processes that cannot talk to each other.

    Raises:
        UserError: If `ctx.world` is above one and no process group of that size exists.
    """
    if ctx.world == 1:
        return
    if not dist.is_initialized() or dist.get_world_size() != ctx.world:
        raise UserError(
            f"the context names {ctx.world} processes but no process group of that size is "
            "running; start with torchrun or call torch.distributed.init_process_group first"
        )


def gather(value: Any, ctx: Context) -> list[Any]:
    """Return every process's JSON-able `value`, in order of rank."""
    if ctx.world == 1:
        return [value]
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=ctx.device)
    size = torch.tensor([data.numel()], device=ctx.device)
    sizes = [torch.zeros_like(size) for _ in range(ctx.world)]
    dist.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=ctx.device)
    padded[: data.numel()] = data
    parts = [torch.zeros_like(padded) for _ in range(ctx.world)]
    dist.all_gather(parts, padded)
    return [
        json.loads(bytes(part[: int(size)].tolist()))
        for part, size in zip(parts, sizes, strict=True)
    ]


def agree(value: bool, ctx: Context) -> bool:
    """Return process 0's `value` in every process; also a meeting point of all of them."""
    return bool(gather(bool(value), ctx)[0])


def add_up(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sum dictionaries of numbers by name, keeping the order in which names first appear."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def sum_gradients(
    grads: Sequence[Tensor | None], leaves: Sequence[Tensor], ctx: Context
) -> list[Tensor | None]:
    """Return gradients summed over processes, in flat buckets.

    Args:
        grads: One gradient per tensor, or None where this process has none.
        leaves: The tensors, for shapes.
        ctx: Which processes.

    Returns:
        The sums; None where no process has a gradient.
    """
    if ctx.world == 1 or not leaves:
        return list(grads)
    present = torch.tensor([g is not None for g in grads], dtype=torch.uint8, device=ctx.device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    summed: list[Tensor | None] = [None] * len(grads)
    bucket: list[int] = []
    entries = 0
    chosen = [i for i, flag in enumerate(present.tolist()) if flag]
    for at, i in enumerate(chosen):
        bucket.append(i)
        entries += leaves[i].numel()
        following = chosen[at + 1] if at + 1 < len(chosen) else None
        if (
            following is None
            or leaves[following].dtype != leaves[i].dtype
            or entries + leaves[following].numel() > BUCKET
        ):
            _sum_bucket(bucket, grads, leaves, summed)
            bucket, entries = [], 0
    return summed


def _sum_bucket(
    bucket: Sequence[int],
    grads: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    summed: list[Tensor | None],
) -> None:
    """All-reduce the gradients numbered in `bucket` as one flat tensor."""
    parts = []
    for i in bucket:
        grad = grads[i]
        parts.append(torch.zeros_like(leaves[i]).flatten() if grad is None else grad.flatten())
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    at = 0
    for i in bucket:
        size = leaves[i].numel()
        summed[i] = flat[at : at + size].view_as(leaves[i])
        at += size
