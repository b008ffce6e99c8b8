"""What a teacher says about a set of documents, kept for as many students as like.

A cache is a stage: its key names the teacher, the documents and what is kept of them, and its
folder is whole or not there. In it, documents are found by the hash of their token ids, so that
neither their order, nor padding, nor how they are put into batches matters. It lies in shards
`shard-NUMBER-SHA256.safetensors`, each with the index of its documents in the header: a killed
build resumes behind the shards whose bytes agree with their names.

Shape legend: B rows, T tokens, L tokens of a document, N wanted predictions of a batch, n of a
document, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from excise.core.context import Context, Stage
from excise.core.disk import file_sum, note_sum, part_of
from excise.core.errors import UserError
from excise.data.stream import Batch, Example, collate
from excise.losses import predicting
from excise.methods.distillation.cache_kinds import (
    ABSENT,
    SKIP,
    STORED,
    UNIFORM,
    CacheKind,
    CacheStats,
    HiddenStates,
    KeptDocument,
    SampledTokens,
    bytes_each,
    joined,
    keep,
)
from excise.models.checkpoint import Checkpoint
from excise.models.head import Head, final_hidden, head_of, head_of_checkpoint
from excise.train.distributed import barrier
from excise.train.vocab import HiddenTarget, Sampled, Target, TopK, Uniform

SHARD_BYTES = 1 << 26
"""Bytes of a shard, about: what a killed build loses at most."""
BATCH_TOKENS = 4096
"""Tokens the teacher reads at once."""

Wanted = tuple[str, tuple[Example, Int[Tensor, " L"]]]
"""Hash of a document, the document, and the types its positions are to have."""


def examples_identity(examples: tuple[Example, ...]) -> str:
    """Return the SHA-256 of the token ids, targets and labels of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.ids, example.target, example.label)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CacheTeacher(Stage[Path]):
    """What a teacher predicts at the scored tokens of documents; `build_cache` opens it.

    Attributes:
        teacher: The teacher; loaded only if a shard is missing.
        examples: Encoded rows (`excise.data.stream.encode`); equal ones are one document.
        kind: What is kept.
        shard_bytes: Bytes of a shard, about.
        batch_tokens: Tokens the teacher reads at once.
    """

    data_parallel: ClassVar[bool] = True

    teacher: Checkpoint
    examples: tuple[Example, ...] = field(metadata={"identity": examples_identity})
    kind: CacheKind
    shard_bytes: int = SHARD_BYTES
    batch_tokens: int = BATCH_TOKENS

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"teacher-cache-{self.kind.name}"

    def make(self, ctx: Context) -> None:
        """Write the shards that are not there, each process its share of them.

        Raises:
            UserError: If the teacher's predictions are not finite.
        """
        head = head_of_checkpoint(self.teacher, dtype=ctx.dtype, device=ctx.device)
        if not bool(head.weight_VD.isfinite().all()):
            raise UserError(
                f"teacher {self.teacher.path} has NaN or infinity in its head; take another one"
            )
        width, itemsize = head.weight_VD.shape[1], head.weight_VD.element_size()
        each = bytes_each(self.kind, width, head.vocab, itemsize)
        wanted = list(wanted_of(self.examples, self.kind.skip_labels).items())
        parts = _cut(wanted, [len(x[1][0].ids) * each for x in wanted], self.shard_bytes)
        shares = [(i, part) for i, part in enumerate(parts) if i % ctx.world == ctx.rank]
        missing = [(i, part) for i, part in shares if not _whole(ctx.work, i)]
        if missing:
            model = self.teacher.load(dtype=ctx.dtype, device=ctx.device)
            done, steps = 0, sum(len(part) for _, part in missing)
            for i, part in missing:
                write_shard(ctx.work, i, part, self._read(model, part, ctx))
                done += len(part)
                ctx.emit("step", {"stage": "teacher cache", "step": done, "steps": steps})
        barrier(ctx)

    def read(self, folder: Path) -> Path:
        """Return the folder of the cache."""
        return folder

    def _read(self, model: Any, part: list[Wanted], ctx: Context) -> list[KeptDocument]:
        """Let the teacher read the documents of a shard, those of one length together."""
        by_length = sorted(part, key=lambda x: len(x[1][0].ids))
        longest = [len(by_length[-1][1][0].ids)] * len(by_length)
        documents: dict[str, KeptDocument] = {}
        for group in _cut(by_length, longest, self.batch_tokens):
            documents |= self._read_group(model, group, ctx)
        return [documents[name] for name, _ in part]

    @torch.no_grad()
    def _read_group(
        self, model: Any, group: Sequence[Wanted], ctx: Context
    ) -> dict[str, KeptDocument]:
        """Return what is kept of documents that are read together."""
        head = head_of(model).detach()
        batch = collate([example for _, (example, _) in group], pad_id=0).to(ctx.device)
        hidden_BTD = final_hidden(model, batch.inputs)
        documents: dict[str, KeptDocument] = {}
        for (name, (example, types_L)), hidden_TD in zip(group, hidden_BTD, strict=True):
            seed = getattr(self.kind, "seed", 0) ^ (int(name[:15], 16))
            try:
                documents[name] = keep(
                    self.kind, hidden_TD[: len(example.ids)], types_L, head, seed & (2**63 - 1)
                )
            except FloatingPointError as error:
                raise UserError(
                    f"teacher {self.teacher.path} gives NaN or infinity for unit '{example.unit}' "
                    f"after token {error.args[0]}; unlearn with a lower learning rate, or run it "
                    "in float32"
                ) from None
        return documents


def build_cache(
    teacher: Checkpoint, examples: Sequence[Example], kind: CacheKind, ctx: Context
) -> TeacherCache:
    """Return what a teacher says about documents, read once for all who ask the same.

    Args:
        teacher: The teacher.
        examples: Encoded rows.
        kind: What to keep.
        ctx: Runs the stage; device and dtype of the teacher.

    Returns:
        The cache.

    Raises:
        UserError: If the teacher's predictions are not finite.
    """
    folder = ctx.run(CacheTeacher(teacher, tuple(examples), kind))
    head = head_of_checkpoint(teacher, dtype=ctx.dtype, device=ctx.device)
    return TeacherCache.open(folder, kind, head)


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


def write_shard(
    folder: Path, number: int, part: Sequence[Wanted], documents: Sequence[KeptDocument]
) -> Path:
    """Write a shard under the name that says its number and its bytes.

    Args:
        folder: Of the cache.
        number: Of the shard.
        part: Its documents by hash.
        documents: What is kept of each, in the same order.

    Returns:
        The shard's path.
    """
    stats = CacheStats()
    for document in documents:
        stats.merge(document.stats)
    names = documents[0].tensors
    tensors = {name: joined([d.tensors[name] for d in documents]) for name in names}
    tensors["types"] = torch.cat([d.types_L for d in documents]).to(torch.uint8)
    index = {
        "docs": [
            (name, len(d.types_L), int((d.types_L == STORED).sum()))
            for (name, _), d in zip(part, documents, strict=True)
        ],
        "stats": asdict(stats),
    }
    temporary = part_of(folder / f"shard-{number:05d}")
    try:
        metadata = {"index": json.dumps(index)}  # one entry: the order of several is random
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata)
        sha256 = file_sum(temporary)
        path = temporary.rename(folder / f"shard-{number:05d}-{sha256}.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    note_sum(path, sha256)
    return path


def _whole(folder: Path, number: int) -> bool:
    """Return whether a shard is there as it was written, clearing a damaged one away."""
    for path in folder.glob(f"shard-{number:05d}-*.safetensors"):
        if path.stem.endswith(file_sum(path)):
            return True
        path.unlink()
    return False


def document_hash(ids: Iterable[int]) -> str:
    """Return the hash a document is found by: of its token ids alone."""
    text = ",".join(map(str, ids)).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def wanted_of(
    examples: Sequence[Example], skip_labels: tuple[int, ...]
) -> dict[str, tuple[Example, Int[Tensor, " L"]]]:
    """Return each document of which something is asked, with the types of its positions.

    Args:
        examples: Encoded rows; equal ones are one document.
        skip_labels: Capability labels of tokens whose prediction is left out.
    """
    documents: dict[str, tuple[Example, Tensor]] = {}
    for example in examples:
        target_L = torch.tensor(example.target, dtype=torch.bool)
        label_L = torch.tensor(example.label).expand(len(example.ids)).roll(-1)
        skipped_L = torch.isin(label_L, torch.tensor(skip_labels, dtype=torch.long))
        types_L = torch.where(predicting(target_L[None])[0], STORED, ABSENT)
        types_L = types_L.masked_fill((types_L == STORED) & skipped_L, SKIP)
        name = document_hash(example.ids)
        if name in documents:
            types_L = torch.maximum(types_L, documents[name][1])
        documents[name] = (example, types_L)
    return {name: w for name, w in documents.items() if bool((w[1] != ABSENT).any())}


def same_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """Refuse a teacher and a student that mean different tokens by the same ids.

    Args:
        teacher: Whose predictions are learned.
        student: Who learns them.

    Raises:
        UserError: If the sizes differ, or naming the first token that does.
    """
    sizes = [c.config.get_text_config().vocab_size for c in (teacher, student)]
    what = f"teacher {teacher.path} and student {student.path}"
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{what} have vocabularies of {sizes[0]} and {sizes[1]} tokens; take a teacher with "
            "the student's tokenizer"
        )
    if teacher.tokenizer_fingerprint == student.tokenizer_fingerprint:
        return
    ours, theirs = (
        {i: token for token, i in c.tokenizer().get_vocab().items()} for c in (teacher, student)
    )
    for i in sorted({*ours, *theirs}):
        if ours.get(i) != theirs.get(i):
            raise UserError(
                f"{what} have different tokenizers: id {i} is {ours.get(i)!r} and "
                f"{theirs.get(i)!r}; take a teacher with the student's tokenizer"
            )


@dataclass(frozen=True)
class Doc:
    """Where a document lies.

    Attributes:
        path: Its shard.
        start: First of its positions among the shard's types.
        length: Number of its positions.
        offset: First of its predictions among those kept.
        stored: Number of predictions kept.
    """

    path: Path
    start: int
    length: int
    offset: int
    stored: int


@dataclass(frozen=True)
class CachedTargets:
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
        kind: What is kept.
        head: The teacher's head, without gradients.
        docs: Where each document lies, by its hash.
        stats: What was measured while it was built.
    """

    folder: Path
    kind: CacheKind
    head: Head
    docs: Mapping[str, Doc]
    stats: CacheStats
    _files: Mapping[Path, Any] = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, kind: CacheKind, head: Head) -> TeacherCache:
        """Return the cache in the folder of a finished `CacheTeacher`.

        Args:
            folder: The folder; the store has checked its bytes.
            kind: What was kept.
            head: The teacher's head.
        """
        docs: dict[str, Doc] = {}
        stats = CacheStats()
        files = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            files[path] = safe_open(path, framework="pt")
            index = json.loads(files[path].metadata()["index"])
            start = offset = 0
            for name, length, stored in index["docs"]:
                docs[name] = Doc(path, start, length, offset, stored)
                start, offset = start + length, offset + stored
            stats.merge(CacheStats(**index["stats"]))
        return cls(folder, kind, head, docs, stats, files)

    def summary(self) -> dict[str, float]:
        """Return numbers for the record: predictions kept, and how far what is kept is off.

        `gap_mean` and `gap_max` are KL(teacher || what is kept) in nats, measured over all
        predictions of the cache; `bound_mean` and `bound_max` bound it from what is kept.
        """
        count = max(1, self.stats.stored + self.stats.uniform)
        size = sum(path.stat().st_size for path in {doc.path for doc in self.docs.values()})
        return {
            "documents": len(self.docs),
            "stored": self.stats.stored,
            "uniform": self.stats.uniform,
            "skipped": self.stats.skipped,
            "bytes": size,
            "gap_mean": self.stats.gap_sum / count,
            "gap_max": self.stats.gap_max,
            "bound_mean": self.stats.bound_sum / count,
            "bound_max": self.stats.bound_max,
        }

    def lookup(
        self,
        batch: Batch,
        wanted_BT: Bool[Tensor, "B T"] | None = None,
        *,
        packed: bool = False,
        bos_id: int | None = None,
    ) -> CachedTargets:
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
        tensors: list[dict[str, Tensor]] = []
        for i, unit in enumerate(batch.units):
            real_T = batch.attention_BT[i].cpu()
            ids = batch.ids_BT[i].cpu()[real_T].tolist()
            asked_L = wanted_BT[i].cpu()[real_T]
            for name, at_L in self._segments(ids, asked_L, unit, packed, bos_id):
                doc = self.docs[name]
                types_L = self._types(doc)
                if bool((types_L[at_L] == ABSENT).any()):
                    raise UserError(
                        f"the teacher cache in {self.folder} holds unit '{unit}' with fewer "
                        "scored tokens than are asked for; build it with these rows too"
                    )
                types.append(types_L[at_L])
                tensors.append(self._read(doc, types_L, at_L))
        device = batch.ids_BT.device
        types_N = torch.cat(types).to(device) if types else torch.zeros(0, device=device)
        kinds_N = torch.full(types_N.shape, -1, dtype=torch.long, device=device)
        kinds_N[types_N == STORED], kinds_N[types_N == UNIFORM] = 0, 1
        targets = (self._target(tensors, device), Uniform())
        return CachedTargets(kinds_N, targets)

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

    def _types(self, doc: Doc) -> Int[Tensor, " L"]:
        """Return the type of each position of a document."""
        types_L: Tensor = self._files[doc.path].get_slice("types")[
            doc.start : doc.start + doc.length
        ]
        return types_L

    def _read(self, doc: Doc, types_L: Tensor, at_n: Tensor) -> dict[str, Tensor]:
        """Return what is kept at some positions; zeros where nothing is."""
        file = self._files[doc.path]
        rank_n = ((types_L == STORED).cumsum(0) - 1)[at_n].clamp(min=0)
        stored_n = types_L[at_n] == STORED
        out: dict[str, Tensor] = {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name != "types":
                tensor = file.get_slice(name)
                if not doc.stored:  # an empty slice has no dtype to ask for
                    out[name] = torch.zeros((len(at_n), *tensor.get_shape()[1:]))
                    continue
                part = tensor[doc.offset : doc.offset + doc.stored]
                whole = part.new_zeros((len(at_n), *part.shape[1:]))
                whole[stored_n] = part[rank_n[stored_n]]
                out[name] = whole
        return out

    def _target(self, tensors: list[dict[str, Tensor]], device: torch.device) -> Target:
        """Return one target of all wanted positions."""
        rows = {name: joined([t[name] for t in tensors]).to(device) for name in tensors[0]}
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
        else:  # nothing continues from here: the document before was another one
            dead.add(start)
            ends.pop()
            if parts:
                parts.pop()
    return None
