"""What a teacher says about a set of documents, kept for as many students as like.

A cache belongs to one teacher, one tokenizer and one way of keeping; documents are found by the
hash of their token ids, so that neither their order, nor padding, nor how they are put into
batches matters. It lies in shards that are whole or are not there: `shard-00000.safetensors` and an
index `shard-00000.json`, written after it, both under a temporary name that is then replaced. The
index holds the SHA-256 of the shard, and of itself, and the key of the cache; a shard that does not
agree with its index is not used.

Shape legend: B rows, T tokens, L tokens of a document, N wanted predictions of a batch, n of a
document, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Bool, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from excise.core.context import Context, Stage
from excise.core.disk import disk_full, part_of, write_text
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
from excise.train.vocab import HiddenTarget, Sampled, Target, TopK, Uniform

KEY = "cache.json"
"""What the cache was made with."""
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

    What is there already is used; what is missing or damaged is made. A killed build resumes
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
    at = root / f"{kind.name}-{_digest(key)[:16]}"
    with disk_full(at), _locked(at):
        _claim(at, key)
        docs, stats, damaged = _read_shards(at, key)
        for path, wrong in damaged:
            ctx.emit("note", {"text": f"teacher cache {path}: {wrong}; making it again"})
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        cache = _opened(at, teacher, kind, ctx, docs, stats)
        wanted = cache.missing(examples)
        if wanted:
            _fill(cache, key, list(wanted.items()), ctx, shard_bytes, batch_tokens)
            docs, stats, _ = _read_shards(at, key)
            cache = _opened(at, teacher, kind, ctx, docs, stats)
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
        by_name: dict[str, KeptDocument] = {}
        longest = [len(by_length[-1][1][0].ids)] * len(by_length)
        for group in _cut(by_length, longest, batch_tokens):
            by_name |= _read_group(cache, model, head, group, ctx)
        documents = [by_name[name] for name, _ in part]
        stats = CacheStats()
        for document in documents:
            stats.merge(document.stats)
        names = documents[0].tensors
        tensors = {name: joined([d.tensors[name] for d in documents]) for name in names}
        tensors["types"] = torch.cat([d.types_L for d in documents]).to(torch.uint8)
        docs = [
            (name, len(d.types_L), int((d.types_L == STORED).sum()))
            for (name, _), d in zip(part, documents, strict=True)
        ]
        write_shard(cache.folder, key, tensors, docs, stats)
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
) -> dict[str, KeptDocument]:
    """Return what is kept of documents that are read together."""
    batch = collate([example for _, (example, _) in group], pad_id=0).to(ctx.device)
    hidden_BTD = final_hidden(model, batch.inputs)
    documents: dict[str, KeptDocument] = {}
    for (name, (example, types_L)), hidden_TD in zip(group, hidden_BTD, strict=True):
        seed = getattr(cache.kind, "seed", 0) ^ (int(name[:15], 16))
        try:
            documents[name] = keep(
                cache.kind, hidden_TD[: len(example.ids)], types_L, head, seed & (2**63 - 1)
            )
        except FloatingPointError as error:
            raise UserError(
                f"teacher {cache.teacher.path} gives NaN or infinity for unit '{example.unit}' "
                f"after token {error.args[0]}; unlearn with a lower learning rate, or run it in "
                "float32"
            ) from None
    return documents


def examples_identity(examples: tuple[Example, ...]) -> str:
    """Return the SHA-256 of the token ids, targets and labels of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.ids, example.target, example.label)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CacheTeacher(Stage[Path]):
    """What a teacher says about a corpus, kept for every student that reads it.

    Attributes:
        teacher: The teacher.
        examples: The corpus.
        kind: What is kept.
    """

    teacher: Checkpoint
    examples: tuple[Example, ...] = field(metadata={"identity": examples_identity})
    kind: CacheKind

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"teacher-cache-{self.kind.name}"

    def make(self, ctx: Context) -> None:
        """Let the teacher read the corpus; a killed build resumes behind its last shard."""
        build_cache(self.teacher, self.examples, self.kind, ctx, folder=ctx.work)

    def read(self, folder: Path) -> Path:
        """Return the folder of the cache."""
        return folder


def document_hash(ids: Iterable[int]) -> str:
    """Return the hash a document is found by: of its token ids alone."""
    text = ",".join(map(str, ids)).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def key_of(teacher: Checkpoint, kind: CacheKind, ctx: Context) -> dict[str, str]:
    """Return everything that decides what a cache holds of a document."""
    return {
        "teacher": teacher.fingerprint,
        "tokenizer": teacher.tokenizer_fingerprint,
        "kind": kind.name,
        "settings": kind.canonical(),
        "dtype": str(ctx.dtype).removeprefix("torch."),
        "format": "1",
    }


def wanted_of(
    examples: Sequence[Example], skip_labels: tuple[int, ...]
) -> dict[str, tuple[Example, Int[Tensor, " L"]]]:
    """Return each document with the type its positions are to have; equal ones are one."""
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
    return documents


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
        teacher: The teacher.
        kind: What is kept.
        head: The teacher's head, without gradients.
        docs: Where each document lies, by its hash.
        stats: What was measured while it was built.
    """

    folder: Path
    teacher: Checkpoint
    kind: CacheKind
    head: Head
    docs: Mapping[str, Doc]
    stats: CacheStats
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

    def _file(self, path: Path) -> Any:
        """Return an open shard."""
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
    _check_key(folder, key)
    docs, stats, damaged = _read_shards(folder, key)
    if damaged:
        path, wrong = damaged[0]
        raise UserError(f"teacher cache {path} is damaged: {wrong}; build it again")
    return _opened(folder, teacher, kind, ctx, docs, stats)


def _opened(
    folder: Path,
    teacher: Checkpoint,
    kind: CacheKind,
    ctx: Context,
    docs: Mapping[str, Doc],
    stats: CacheStats,
) -> TeacherCache:
    """Return the cache that checked shards make, with the teacher's head."""
    head = head_of_checkpoint(teacher, dtype=ctx.dtype, device=ctx.device)
    return TeacherCache(folder, teacher, kind, head, docs, stats)


def _digest(data: Any) -> str:
    """Return the SHA-256 of JSON-able data, as hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _claim(folder: Path, key: Mapping[str, str]) -> None:
    """Make a folder the cache of `key`, or see that it is.

    Raises:
        UserError: If it is the cache of something else, by what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / KEY
    if not path.exists():
        if any(folder.glob("shard-*")):
            raise UserError(f"{folder} holds shards without a {KEY}; remove the folder")
        write_text(path, json.dumps(dict(key), indent=1, sort_keys=True) + "\n")
    _check_key(folder, key)


def _check_key(folder: Path, key: Mapping[str, str]) -> None:
    """Refuse a cache that was made with another teacher, tokenizer or setting.

    Raises:
        UserError: If there is none, or naming what differs.
    """
    try:
        written = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        written = None
    if not isinstance(written, dict):
        raise UserError(f"{folder} holds no teacher cache (no readable {KEY}); build it again")
    for name, value in key.items():
        if written.get(name) != value:
            there, here = str(written.get(name))[:60], value[:60]
            raise UserError(
                f"the teacher cache in {folder} was made with another {name} ({there} and not "
                f"{here}); build one for this {name}"
            )


def write_shard(
    folder: Path,
    key: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    docs: Sequence[tuple[str, int, int]],
    stats: CacheStats,
) -> Path:
    """Write a shard and then its index.

    Args:
        folder: Of the cache.
        key: What it was made with.
        tensors: What is kept of all documents, one behind the other.
        docs: Hash, number of positions and of kept predictions of each document, in order.
        stats: What was measured.

    Returns:
        The shard's path.
    """
    taken = [int(path.stem.split("-")[1]) for path in folder.glob("shard-*.*")]
    path = folder / f"shard-{max(taken, default=-1) + 1:05d}.safetensors"
    work = part_of(path)
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, work)
        index = {
            "key": _digest(dict(key)),
            "sha256": _file_digest(work),
            "docs": [list(doc) for doc in docs],
            "facts": asdict(stats),
        }
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)
    index["check"] = _digest(index)
    write_text(path.with_suffix(".json"), json.dumps(index) + "\n")
    return path


def _read_shards(
    folder: Path, key: Mapping[str, str]
) -> tuple[dict[str, Doc], CacheStats, list[tuple[Path, str]]]:
    """Read the indices of a cache and check every shard byte by byte.

    Args:
        folder: Of the cache.
        key: What it must have been made with.

    Returns:
        Where each document lies (by its hash), what was measured, and damaged shards with what
        is wrong with them.
    """
    docs: dict[str, Doc] = {}
    stats = CacheStats()
    damaged: list[tuple[Path, str]] = []
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            index = _index(path, key)
        except ValueError as error:
            damaged.append((path, str(error)))
            continue
        start = offset = 0
        for name, length, stored in index["docs"]:
            docs[name] = Doc(path, start, length, offset, stored)
            start, offset = start + length, offset + stored
        stats.merge(CacheStats(**index["facts"]))
    return docs, stats, damaged


def _index(path: Path, key: Mapping[str, str]) -> dict[str, Any]:
    """Return a shard's index.

    Raises:
        ValueError: Saying what is wrong with index or shard.
    """
    try:
        index: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        check = index.pop("check")
    except FileNotFoundError:
        raise ValueError("it has no index, its writing was interrupted") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError("its index cannot be read") from None
    if check != _digest(index):
        raise ValueError("its index has other contents than were written")
    if index["key"] != _digest(dict(key)):
        raise ValueError("it belongs to another cache")
    if _file_digest(path) != index["sha256"]:
        raise ValueError("it has other bytes than were written")
    return index


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the cache of a folder against other builders; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for part in folder.glob(".shard-*.part"):  # of a killed build
            part.unlink()
        yield
