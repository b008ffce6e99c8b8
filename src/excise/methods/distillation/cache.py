"""What a teacher says about a set of documents, kept for as many students as like.

A cache belongs to one teacher, one tokenizer and one way of keeping; documents are found by the
hash of their token ids, so that neither their order, nor padding, nor how they are put into
batches matters. Nothing damaged or made with something else is used.

Shape legend: T tokens, L tokens of a document, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.core.context import Context
from excise.core.disk import disk_full
from excise.core.errors import UserError
from excise.data.stream import Example, collate
from excise.methods.distillation.cache_keys import document_hash, key_of, same_vocabulary
from excise.methods.distillation.cache_kinds import (
    STORED,
    CacheKind,
    Facts,
    HiddenStates,
    Kept,
    SampledTokens,
    TopTokens,
    bytes_each,
    joined,
    keep,
)
from excise.methods.distillation.cache_read import Found, TeacherCache, open_cache, opened
from excise.methods.distillation.cache_shards import (
    claim,
    digest_of,
    locked,
    read_shards,
    remove_shard,
    write_shard,
)
from excise.models.checkpoint import Checkpoint
from excise.models.head import Head, final_hidden, head_of

__all__ = [
    "CacheKind",
    "Found",
    "HiddenStates",
    "SampledTokens",
    "TeacherCache",
    "TopTokens",
    "build_cache",
    "document_hash",
    "open_cache",
    "same_vocabulary",
]

SHARD_BYTES = 1 << 26
"""Bytes of a shard, about: what a killed build loses at most."""
BATCH_TOKENS = 4096
"""Tokens the teacher reads at once."""


def build_cache(
    teacher: Checkpoint,
    examples: Sequence[Example],
    kind: CacheKind,
    ctx: Context,
    *,
    folder: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    batch_tokens: int = BATCH_TOKENS,
) -> TeacherCache:
    """Return a cache that holds what a teacher predicts on every example.

    What is there already is used; what is missing or damaged is made. A killed build goes on
    behind the last whole shard. Predictions of scored tokens are kept, others are not.

    Args:
        teacher: The teacher; loaded only if something is missing.
        examples: Encoded rows (`excise.data.stream.encode`).
        kind: What to keep.
        ctx: Device and dtype the teacher runs in.
        folder: Folder of caches that several stages share; None for one in `ctx.work`.
        shard_bytes: Bytes of a shard, about.
        batch_tokens: Tokens read at once.

    Returns:
        The cache.

    Raises:
        UserError: If the teacher's predictions are not finite, or the folder holds another cache.
    """
    key = key_of(teacher, kind, ctx)
    root = ctx.work / "teacher-caches" if folder is None else folder
    at = root / f"{kind.name}-{digest_of(key)[:16]}"
    with disk_full(at), locked(at):
        claim(at, key)
        docs, facts, damaged = read_shards(at, key)
        for path, wrong in damaged:
            ctx.emit("note", {"text": f"teacher cache {path}: {wrong}; making it again"})
            remove_shard(path)
        cache = opened(at, teacher, kind, ctx, docs, facts)
        wanted = cache.missing(examples)
        if wanted:
            _fill(cache, key, list(wanted.items()), ctx, shard_bytes, batch_tokens)
            docs, facts, _ = read_shards(at, key)
            cache = opened(at, teacher, kind, ctx, docs, facts)
    return cache


def _fill(
    cache: TeacherCache,
    key: Mapping[str, str],
    wanted: list[tuple[str, tuple[Example, Tensor]]],
    ctx: Context,
    shard_bytes: int,
    batch_tokens: int,
) -> None:
    """Let the teacher read documents and write them, shard by shard, in the order given."""
    model = cache.teacher.load(dtype=ctx.dtype, device=ctx.device)
    head = head_of(model).detach()
    if not bool(head.weight_VD.isfinite().all()):
        raise UserError(
            f"teacher {cache.teacher.path} has NaN or infinity in its head; take another one"
        )
    width, itemsize = head.weight_VD.shape[1], head.weight_VD.element_size()
    each = bytes_each(cache.kind, width, head.vocab, itemsize)
    done = 0
    for part in _cut(wanted, [len(x[1][0].ids) * each for x in wanted], shard_bytes):
        by_length = sorted(part, key=lambda x: len(x[1][0].ids))
        made: dict[str, Kept] = {}
        longest = [len(by_length[-1][1][0].ids)] * len(by_length)
        for group in _cut(by_length, longest, batch_tokens):
            made |= _read_group(cache, model, head, group, ctx)
        kept = [made[name] for name, _ in part]
        facts = Facts()
        for one in kept:
            facts.merge(one.facts)
        tensors = {name: joined([k.tensors[name] for k in kept]) for name in kept[0].tensors}
        tensors["types"] = torch.cat([k.types_L for k in kept]).to(torch.uint8)
        docs = [
            (name, len(k.types_L), int((k.types_L == STORED).sum()))
            for (name, _), k in zip(part, kept, strict=True)
        ]
        write_shard(cache.folder, key, tensors, docs, facts)
        done += len(part)
        ctx.emit("step", {"stage": "teacher cache", "step": done, "steps": len(wanted)})


def _cut(things: Sequence[Any], sizes: Sequence[int], limit: int) -> Iterator[list[Any]]:
    """Yield runs of things whose sizes add up to a limit, one thing at least."""
    run: list[Any] = []
    total = 0
    for thing, size in zip(things, sizes, strict=True):
        if run and total + size > limit:
            yield run
            run, total = [], 0
        run.append(thing)
        total += size
    if run:
        yield run


@torch.no_grad()
def _read_group(
    cache: TeacherCache,
    model: Any,
    head: Head,
    group: Sequence[tuple[str, tuple[Example, Tensor]]],
    ctx: Context,
) -> dict[str, Kept]:
    """Return what is kept of documents that are read together."""
    batch = collate([example for _, (example, _) in group], pad_id=0).to(ctx.device)
    hidden_BTD = final_hidden(model, batch.inputs)
    made: dict[str, Kept] = {}
    for (name, (example, types_L)), hidden_TD in zip(group, hidden_BTD, strict=True):
        seed = getattr(cache.kind, "seed", 0) ^ (int(name[:15], 16))
        try:
            made[name] = keep(
                cache.kind, hidden_TD[: len(example.ids)], types_L, head, seed & (2**63 - 1)
            )
        except FloatingPointError as error:
            raise UserError(
                f"teacher {cache.teacher.path} gives NaN or infinity for unit '{example.unit}' "
                f"after token {error.args[0]}; unlearn with a lower learning rate, or run it in "
                "float32"
            ) from None
    return made
