"""What processes tell each other: small values as JSON, gradients as flat sums.

Values are summed in order of rank, so that every process computes the same number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
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


def barrier(ctx: Context) -> None:
    """Wait until every process is here."""
    gather(None, ctx)


def sum_dicts(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum mappings of numbers by name, in the order in which names first appear."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def sum_gradients(tensors: Sequence[Tensor], ctx: Context) -> None:
    """Sum the gradients of tensors over processes, in flat buckets.

    A tensor that has no gradient in any process gets none; one that has none here gets that of
    the others.

    Args:
        tensors: The tensors, in the same order in every process.
        ctx: Which processes.
    """
    if ctx.world == 1 or not tensors:
        return
    present = torch.tensor(
        [t.grad is not None for t in tensors], dtype=torch.uint8, device=ctx.device
    )
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    chosen = [t for t, flag in zip(tensors, present.tolist(), strict=True) if flag]
    for _, alike in groupby(chosen, key=lambda t: t.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
                _sum_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        _sum_bucket(bucket)


def _sum_bucket(bucket: Sequence[Tensor]) -> None:
    """All-reduce the gradients of a few tensors as one flat tensor."""
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in bucket]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for tensor, grad in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.grad = grad.view_as(tensor)
