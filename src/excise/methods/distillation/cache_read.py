"""Reading a teacher cache: the targets of a batch, found by the token ids of its rows.

Shape legend: B rows, T tokens, L tokens of a document, N wanted predictions of a batch, n of a
document, D hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.stream import Batch, Example
from excise.losses import predicting
from excise.methods.distillation.cache_keys import document_hash, key_of, same_vocabulary, wanted_of
from excise.methods.distillation.cache_kinds import (
    ABSENT,
    STORED,
    UNIFORM,
    CacheKind,
    Facts,
    HiddenStates,
    SampledTokens,
    joined,
)
from excise.methods.distillation.cache_shards import Doc, check_key, read_shards
from excise.models.checkpoint import Checkpoint
from excise.models.head import Head, head_of_checkpoint
from excise.train.vocab import HiddenTarget, Sampled, Target, TopK, Uniform


@dataclass(frozen=True)
class Found:
    """Targets of the wanted predictions of a batch, as `chunked_splice` takes them.

    Attributes:
        kinds_N: Index into `targets`, or -1 for what was left out.
        targets: What was kept, and uniform.
    """

    kinds_N: Int[Tensor, " N"]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class TeacherCache:
    """What a teacher says about documents.

    Attributes:
        folder: Where it lies.
        teacher: The teacher.
        kind: What is kept.
        head: The teacher's head, without gradients.
        docs: Where each document lies, by its hash.
        facts: What was measured while it was built.
    """

    folder: Path
    teacher: Checkpoint
    kind: CacheKind
    head: Head
    docs: Mapping[str, Doc]
    facts: Facts
    _open: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    def missing(self, examples: Sequence[Example]) -> dict[str, tuple[Example, Tensor]]:
        """Return the documents of which some wanted prediction is not kept.

        Args:
            examples: Encoded rows; equal ones are one document.

        Returns:
            By hash an example and the types its positions are to have.
        """
        lacking: dict[str, tuple[Example, Tensor]] = {}
        for name, (example, types_L) in wanted_of(examples, self.kind.skip_labels).items():
            doc = self.docs.get(name)
            old_L = torch.zeros_like(types_L) if doc is None else self._types(doc)
            old_L = old_L.to(types_L.dtype).masked_fill(old_L == UNIFORM, STORED)
            if bool((old_L < types_L).any()):
                lacking[name] = example, torch.maximum(old_L, types_L)
        return lacking

    def check_student(self, student: Checkpoint) -> None:
        """Refuse a student that means other tokens by the same ids.

        Raises:
            UserError: Naming the first token that differs.
        """
        same_vocabulary(self.teacher, student)

    def summary(self) -> dict[str, float]:
        """Return numbers for the record: predictions kept, and how far what is kept is off.

        `gap_mean` and `gap_max` are KL(teacher || what is kept) in nats, measured over all
        predictions of the cache; `bound_mean` and `bound_max` bound it from what is kept.
        """
        count = max(1, self.facts.stored + self.facts.uniform)
        size = sum(path.stat().st_size for path in {doc.path for doc in self.docs.values()})
        return {
            "documents": len(self.docs),
            "stored": self.facts.stored,
            "uniform": self.facts.uniform,
            "skipped": self.facts.skipped,
            "bytes": size,
            "gap_mean": self.facts.gap_sum / count,
            "gap_max": self.facts.gap_max,
            "bound_mean": self.facts.bound_sum / count,
            "bound_max": self.facts.bound_max,
        }

    def lookup(
        self,
        batch: Batch,
        wanted_BT: Bool[Tensor, "B T"] | None = None,
        *,
        packed: bool = False,
        bos_id: int | None = None,
    ) -> Found:
        """Return the targets of a batch.

        Args:
            batch: Rows in any order, padded on any side.
            wanted_BT: Positions whose prediction is wanted; None for those that predict a
                scored token.
            packed: Whether a row that is not kept as a whole may be put together from documents
                that are; each then has the teacher's predictions on that document alone.
            bos_id: Id that begins a document and that packing leaves out behind the first.

        Returns:
            Targets of the N wanted positions, in the order of `hidden_BTD[wanted_BT]`, on the
            batch's device.

        Raises:
            UserError: If a document or a wanted prediction is not in the cache.
        """
        wanted_BT = predicting(batch.target_BT) if wanted_BT is None else wanted_BT
        types: list[Tensor] = []
        kept: list[dict[str, Tensor]] = []
        for i, unit in enumerate(batch.units):
            real_T = batch.attention_BT[i].cpu()
            ids = batch.ids_BT[i].cpu()[real_T].tolist()
            asked_L = wanted_BT[i].cpu()[real_T]
            for name, at_L in self._segments(ids, asked_L, unit, packed, bos_id):
                doc = self.docs[name]
                found_L = self._types(doc)
                if bool((found_L[at_L] == ABSENT).any()):
                    raise UserError(
                        f"the teacher cache in {self.folder} holds unit '{unit}' with fewer "
                        "scored tokens than are asked for; build it with these rows too"
                    )
                types.append(found_L[at_L])
                kept.append(self._read(doc, found_L, at_L))
        device = batch.ids_BT.device
        types_N = torch.cat(types).to(device) if types else torch.zeros(0, device=device)
        kinds_N = torch.full(types_N.shape, -1, dtype=torch.long, device=device)
        kinds_N[types_N == STORED], kinds_N[types_N == UNIFORM] = 0, 1
        targets = (self._target(kept, types_N == STORED), Uniform())
        return Found(kinds_N, targets)

    @functools.cached_property
    def _lengths(self) -> tuple[int, ...]:
        """Lengths of documents, falling."""
        return tuple(sorted({doc.length for doc in self.docs.values()}, reverse=True))

    def _segments(
        self, ids: list[int], asked_L: Tensor, unit: str, packed: bool, bos_id: int | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the documents of a row and, for each wanted position in order, where in them."""
        whole = document_hash(ids)
        if whole in self.docs:
            yield whole, asked_L.nonzero()[:, 0]
            return
        if not packed:
            raise UserError(
                f"unit '{unit}' ({len(ids)} tokens) is not in the teacher cache in {self.folder}; "
                "build it with this row too, or pass packed=True if rows were joined"
            )
        parts = unpack(ids, self.docs, self._lengths, bos_id)
        if parts is None:
            raise UserError(
                f"the row that begins with unit '{unit}' is not made of documents of the teacher "
                f"cache in {self.folder}; build it with these rows too"
            )
        begins = [begin for _, begin in parts]
        for (name, begin), end in zip(parts, [*begins[1:], len(ids)], strict=True):
            yield name, asked_L[begin:end].nonzero()[:, 0]

    def _file(self, path: Path) -> Any:
        """Return an open shard."""
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def _types(self, doc: Doc) -> Int[Tensor, " L"]:
        """Return the type of each position of a document."""
        types_L: Tensor = self._file(doc.path).get_slice("types")[
            doc.start : doc.start + doc.length
        ]
        return types_L

    def _read(self, doc: Doc, types_L: Tensor, at_n: Tensor) -> dict[str, Tensor]:
        """Return what is kept at some positions; zeros where nothing is."""
        file = self._file(doc.path)
        rank_n = ((types_L == STORED).cumsum(0) - 1)[at_n].clamp(min=0)
        held_n = types_L[at_n] == STORED
        out: dict[str, Tensor] = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name != "types":
                kept = file.get_slice(name)
                if not doc.stored:  # an empty slice has no dtype to ask for
                    out[name] = torch.zeros((len(at_n), *kept.get_shape()[1:]))
                    continue
                part = kept[doc.offset : doc.offset + doc.stored]
                whole = part.new_zeros((len(at_n), *part.shape[1:]))
                whole[held_n] = part[rank_n[held_n]]
                out[name] = whole
        return out

    def _target(self, kept: list[dict[str, Tensor]], held_N: Tensor) -> Target:
        """Return one target of all wanted positions."""
        device = held_N.device
        rows = {name: joined([k[name] for k in kept]).to(device) for name in kept[0]}
        vocab = self.head.vocab
        if isinstance(self.kind, HiddenStates):
            return HiddenTarget(rows["hidden"], self.head)
        at = self.kind.temperature
        if isinstance(self.kind, SampledTokens):
            return Sampled(rows["ids"].long(), rows["counts"].long(), vocab, at)
        return TopK(rows["ids"].long(), rows["logp"], vocab, at, rows["tail"])


def unpack(
    ids: Sequence[int], docs: Mapping[str, Doc], lengths: Sequence[int], bos_id: int | None
) -> list[tuple[str, int]] | None:
    """Return the documents a row was joined from, longer ones first where several fit.

    Joining takes the BOS of all documents but the first away; the prediction after it is then the
    one at the last token of the document before.

    Args:
        ids: Token ids of the row.
        docs: Known documents by hash.
        lengths: Lengths they have, falling.
        bos_id: Id that joining takes away; None for none.

    Returns:
        Hash of each document, and the position of the row that is its first; None if the row is
        not made of known documents.
    """
    dead: set[int] = set()
    parts: list[tuple[str, int]] = []
    ways = [
        (length, lost) for length in lengths for lost in ((1, 0) if bos_id is not None else (0,))
    ]
    ends: list[tuple[int, Iterator[tuple[int, int]]]] = [(0, iter(ways))]
    while ends:
        start, left = ends[-1]
        for length, lost in left:
            end = start + length - lost
            if not start < end <= len(ids) or end in dead or (lost and not start):
                continue
            head = [bos_id] if lost and bos_id is not None else []
            name = document_hash([*head, *ids[start:end]])
            if name not in docs:
                continue
            parts.append((name, start - lost))
            if end == len(ids):
                return parts
            ends.append((end, iter(ways)))
            break
        else:  # nothing goes on from here: the document before was another one
            dead.add(start)
            ends.pop()
            if parts:
                parts.pop()
    return None


def open_cache(folder: Path, teacher: Checkpoint, kind: CacheKind, ctx: Context) -> TeacherCache:
    """Open a cache as it is.

    Args:
        folder: The cache's own folder (`TeacherCache.folder`).
        teacher: Whose it must be.
        kind: What must be kept.
        ctx: Device and dtype.

    Raises:
        UserError: If it is another teacher's, tokenizer's or setting's, or a shard is damaged.
    """
    key = key_of(teacher, kind, ctx)
    check_key(folder, key)
    docs, facts, damaged = read_shards(folder, key)
    if damaged:
        path, wrong = damaged[0]
        raise UserError(f"teacher cache {path} is damaged: {wrong}; build it again")
    return opened(folder, teacher, kind, ctx, docs, facts)


def opened(
    folder: Path,
    teacher: Checkpoint,
    kind: CacheKind,
    ctx: Context,
    docs: Mapping[str, Doc],
    facts: Facts,
) -> TeacherCache:
    """Return the cache that checked shards make, with the teacher's head."""
    head = head_of_checkpoint(teacher, dtype=ctx.dtype, device=ctx.device)
    return TeacherCache(folder, teacher, kind, head, docs, facts)
