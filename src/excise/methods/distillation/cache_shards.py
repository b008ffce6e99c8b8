"""Files of a teacher cache: shards that are whole or are not there.

A shard is `shard-00000.safetensors` and an index `shard-00000.json`, written after it, both under
a temporary name that is then replaced. The index holds the SHA-256 of the shard, and of itself,
and the key of the cache; a shard that does not agree with its index is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.methods.distillation.cache_kinds import Facts

KEY = "cache.json"
"""What the cache was made with."""


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


def digest_of(data: Any) -> str:
    """Return the SHA-256 of JSON-able data, as hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def claim(folder: Path, key: Mapping[str, str]) -> None:
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
    check_key(folder, key)


def read_key(folder: Path) -> dict[str, str]:
    """Return what the cache in a folder was made with.

    Raises:
        UserError: If there is none.
    """
    try:
        found = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{folder} holds no teacher cache (no readable {KEY}); build it again")
    return found


def check_key(folder: Path, key: Mapping[str, str]) -> None:
    """Refuse a cache that was made with another teacher, tokenizer or setting.

    Raises:
        UserError: Naming what differs.
    """
    found = read_key(folder)
    for name, value in key.items():
        if found.get(name) != value:
            there, here = str(found.get(name))[:60], value[:60]
            raise UserError(
                f"the teacher cache in {folder} was made with another {name} ({there} and not "
                f"{here}); build one for this {name}"
            )


def write_shard(
    folder: Path,
    key: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    docs: Sequence[tuple[str, int, int]],
    facts: Facts,
) -> Path:
    """Write a shard and then its index.

    Args:
        folder: Of the cache.
        key: What it was made with.
        tensors: What is kept of all documents, one behind the other.
        docs: Hash, number of positions and of kept predictions of each document, in order.
        facts: What was measured.

    Returns:
        The shard's path.
    """
    from safetensors.torch import save_file

    taken = [int(p.stem.split("-")[1]) for p in folder.glob("shard-*.*") if not _part(p)]
    path = folder / f"shard-{max(taken, default=-1) + 1:05d}.safetensors"
    work = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({k: t.contiguous() for k, t in tensors.items()}, work)
        index = {
            "key": digest_of(dict(key)),
            "sha256": file_digest(work),
            "docs": [list(doc) for doc in docs],
            "facts": asdict(facts),
        }
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)
    index["check"] = digest_of(index)
    write_text(path.with_suffix(".json"), json.dumps(index) + "\n")
    return path


def _part(path: Path) -> bool:
    """Whether a file is a half-written one."""
    return path.name.startswith(".")


def read_shards(
    folder: Path, key: Mapping[str, str]
) -> tuple[dict[str, Doc], Facts, list[tuple[Path, str]]]:
    """Read the indices of a cache and check every shard byte by byte.

    Args:
        folder: Of the cache.
        key: What it must have been made with.

    Returns:
        Where each document lies (by its hash), what was measured, and damaged shards with what
        is wrong with them.
    """
    docs: dict[str, Doc] = {}
    facts = Facts()
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
        facts.merge(Facts(**index["facts"]))
    return docs, facts, damaged


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
    if check != digest_of(index):
        raise ValueError("its index has other contents than were written")
    if index["key"] != digest_of(dict(key)):
        raise ValueError("it belongs to another cache")
    if file_digest(path) != index["sha256"]:
        raise ValueError("it has other bytes than were written")
    return index


def remove_shard(path: Path) -> None:
    """Remove a shard and its index."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the cache of a folder against other builders; the kernel frees it on death."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.glob(".shard-*.part"):  # of a killed build
            left.unlink()
        yield
    finally:
        os.close(handle)
