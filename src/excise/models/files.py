"""Bytes of a model folder: safetensors headers, single tensors, sums, rewritten shards.

Nothing here is unpickled and no input file is opened for writing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from excise.core.disk import Signature, file_sum, note_sum, share_blocks, signature_of
from excise.core.errors import UserError
from excise.core.plain import read_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names that safetensors gives to dtypes."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file.

    Attributes:
        file: The file.
        key: Name in the file.
        code: Name of the dtype in the file.
        shape: Sizes.
        start: First byte, from the start of the file.
        end: One past the last byte.
    """

    file: Path
    key: str
    code: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype the tensor is stored in."""
        return DTYPES[self.code]


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file and check it against the file's size.

    Args:
        path: The file.

    Returns:
        Entry by tensor name, in file order.

    Raises:
        UserError: If the file is truncated, or its header is not one.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        if len(head) < 8:
            raise UserError(f"{path} is truncated ({size} bytes); copy or download it again")
        length = struct.unpack("<Q", head)[0]
        if length > _MAX_HEADER:
            raise UserError(f"{path} is not a safetensors file: its header is garbage")
        if 8 + length > size:
            raise UserError(
                f"{path} is truncated: its header needs {8 + length} bytes and the file has {size};"
                " copy or download it again"
            )
        text = f.read(length)
    try:
        entries = list(_parse(path, read_json(text), 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not a safetensors file: its header is garbage; copy or download it again"
        ) from None
    entries.sort(key=lambda e: (e.start, e.end))
    ends = [8 + length, *(entry.end for entry in entries)]
    if any(entry.start != end for entry, end in zip(entries, ends, strict=False)):
        raise UserError(
            f"{path} is damaged: its tensors overlap or leave holes; copy or download it again"
        )
    for entry in entries:
        if entry.end > size:
            raise UserError(
                f"{path} is truncated: tensor '{entry.key}' ends at byte {entry.end} and the file"
                f" has {size}; copy or download it again"
            )
    if ends[-1] != size:
        raise UserError(f"{path} holds bytes behind its last tensor; copy or download it again")
    return {entry.key: entry for entry in entries}


def _parse(path: Path, header: dict[str, object], base: int) -> Iterator[Entry]:
    """Yield the entries of a decoded header; raise ValueError or KeyError where it is wrong."""
    for key, value in header.items():
        if key == "__metadata__":
            if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
                raise ValueError(key)
            continue
        if not isinstance(value, dict):
            raise ValueError(key)
        shape = tuple(map(_whole, value["shape"]))
        start, end = map(_whole, value["data_offsets"])
        count = 1
        for n in shape:
            count *= n
        if min((start, *shape)) < 0 or end - start != count * DTYPES[value["dtype"]].itemsize:
            raise ValueError(key)
        yield Entry(path, key, value["dtype"], shape, base + start, base + end)


def _whole(number: object) -> int:
    if type(number) is not int:
        raise ValueError(number)
    return number


def read_tensor(entry: Entry) -> Tensor:
    """Read one tensor from its file; no other tensor is touched."""
    return _read(entry, entry.start, entry.end).reshape(entry.shape)


def _read(entry: Entry, start: int, end: int) -> Tensor:
    """Read bytes of a file as flat values of the entry's dtype."""
    raw = torch.empty(end - start, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    with entry.file.open("rb", buffering=0) as f:
        f.seek(start)
        while done < len(view):
            count = f.readinto(view[done : done + _CHUNK])
            if not count:
                raise UserError(f"{entry.file} is truncated; copy or download it again")
            done += count
    return raw.view(entry.dtype)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def rewrite_shard(
    source: Path,
    to: Path,
    dtypes: Mapping[str, torch.dtype],
    values: Iterable[tuple[str, Tensor]],
) -> int:
    """Write a safetensors file with some tensors replaced, one new tensor in memory at a time.

    Where the file system shares blocks, the file is a clone with some of them written anew. Else
    it is copied, and its SHA-256 taken, in one pass over the source.

    Args:
        source: The file to start from.
        to: The file to make; it must not exist.
        dtypes: Dtype to store each replaced tensor in, by name in the file.
        values: Name and new value of each of them, in any order, shaped as stored.

    Returns:
        By how many bytes the tensors grew.
    """
    entries = read_header(source)
    header, spans = _new_layout(source, entries, dtypes)
    with source.open("rb") as a, to.open("x+b") as b:
        same = all(entries[key].dtype == dtype for key, dtype in dtypes.items())
        shared = same and share_blocks(a, b)
        for key, tensor in values:
            b.seek(spans[key][0])
            b.write(tensor_bytes(tensor.to(dtypes[key])))
        if not shared:
            sha256 = _fill(
                a, b, header, [(*spans[k], entries[k].start, k in dtypes) for k in entries]
            )
    if not shared:
        note_sum(to, sha256)
    old = sum(entry.end - entry.start for entry in entries.values())
    return sum(end - start for start, end in spans.values()) - old


def _fill(
    a: BinaryIO, b: BinaryIO, header: bytes, parts: Iterable[tuple[int, int, int, bool]]
) -> str:
    """Write header and all tensors of `a` that `b` does not hold yet, in one pass.

    Args:
        a: The source.
        b: The new file, in which new tensors are written already.
        header: What comes first.
        parts: For every tensor, in file order: start and end in `b`, start in `a`, whether new.

    Returns:
        The SHA-256 of all of `b`.
    """
    b.seek(0)
    b.write(header)
    digest = hashlib.sha256(header)
    for start, end, source, new in parts:
        (b if new else a).seek(start if new else source)
        for at in range(start, end, _CHUNK):
            block = (b if new else a).read(min(_CHUNK, end - at))
            if not block:
                raise UserError(f"{a.name} is truncated; copy or download it again")
            digest.update(block)
            if not new:
                b.seek(at)
                b.write(block)
    return digest.hexdigest()


def _new_layout(
    source: Path, entries: Mapping[str, Entry], dtypes: Mapping[str, torch.dtype]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the header for new dtypes, and where each tensor lies behind it.

    Where no dtype changes, it is the source's own, byte by byte.
    """
    with source.open("rb") as f:
        length = f.read(8)
        text = f.read(struct.unpack("<Q", length)[0])
    if all(entries[key].dtype == dtype for key, dtype in dtypes.items()):
        return length + text, {key: (entry.start, entry.end) for key, entry in entries.items()}
    old = json.loads(text)
    header: dict[str, object] = {k: old[k] for k in ("__metadata__",) if k in old}
    at, spans = 0, {}
    for key, entry in entries.items():
        size, code = entry.end - entry.start, entry.code
        if key in dtypes:
            code = _CODES[dtypes[key]]
            size = size // entry.dtype.itemsize * dtypes[key].itemsize
        header[key] = {"dtype": code, "shape": entry.shape, "data_offsets": [at, at + size]}
        spans[key] = at, at + size
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    header_bytes = struct.pack("<Q", len(text)) + text
    return header_bytes, {key: (base + a, base + b) for key, (a, b) in spans.items()}


def hash_files(paths: list[Path]) -> str:
    """Return the SHA-256 over names and contents of files, as hex."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}\0{file_sum(path)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _bad_tensor(path: Path, signature: Signature) -> str:
    """Do the work of `bad_tensor`, once for as long as nothing touches the file."""
    del signature  # part of the cache's key
    bad = ""
    entries = read_header(path)
    with path.open("rb") as f:
        digest = hashlib.sha256(f.read(min((e.start for e in entries.values()), default=-1)))
    for key, entry in entries.items():
        for start in range(entry.start, entry.end, _CHUNK):
            values = _read(entry, start, min(start + _CHUNK, entry.end))
            digest.update(tensor_bytes(values))
            if not bad and values.dtype.is_floating_point:
                wide = values if values.element_size() > 1 else values.float()
                bad = "" if torch.isfinite(wide).all() else key
    note_sum(path, digest.hexdigest())
    return bad


def bad_tensor(path: Path) -> str:
    """Return the first tensor of a file with a NaN or infinity, or an empty string.

    The file is read once a process for this, and its SHA-256 taken on the way.
    """
    return _bad_tensor(path, signature_of(path))
