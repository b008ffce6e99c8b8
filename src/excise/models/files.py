"""Bytes of a model folder: safetensors headers, single tensors, hashes, copies, atomic folders.

Nothing here is unpickled and no input file is opened for writing.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from excise.core.errors import UserError

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
_FICLONE = 0x40049409
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
        entries = list(_parse(path, json.loads(text), 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not a safetensors file: its header is garbage; copy or download it again"
        ) from None
    for entry in entries:
        if entry.end > size:
            raise UserError(
                f"{path} is truncated: tensor '{entry.key}' ends at byte {entry.end} and the file"
                f" has {size}; copy or download it again"
            )
    return {entry.key: entry for entry in sorted(entries, key=lambda e: (e.start, e.end))}


def _parse(path: Path, header: dict[str, object], base: int) -> Iterator[Entry]:
    """Yield the entries of a decoded header; raise ValueError or KeyError where it is wrong."""
    for key, value in header.items():
        if key == "__metadata__":
            continue
        if not isinstance(value, dict):
            raise ValueError(key)
        shape = tuple(int(n) for n in value["shape"])
        start, end = (int(n) for n in value["data_offsets"])
        count = 1
        for n in shape:
            count *= n
        if min((start, *shape)) < 0 or end - start != count * DTYPES[value["dtype"]].itemsize:
            raise ValueError(key)
        yield Entry(path, key, value["dtype"], shape, base + start, base + end)


def read_tensor(entry: Entry) -> Tensor:
    """Read one tensor from its file; no other tensor is touched."""
    return _read(entry, entry.start, entry.end).reshape(entry.shape)


def read_parts(entry: Entry) -> Iterator[Tensor]:
    """Yield a tensor's values in flat pieces of 16 MiB at most."""
    for start in range(entry.start, entry.end, _CHUNK):
        yield _read(entry, start, min(start + _CHUNK, entry.end))


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


def clone_file(source: Path, to: Path) -> None:
    """Copy a file, sharing its blocks where the file system can."""
    with source.open("rb") as a, to.open("xb") as b:
        try:
            fcntl.ioctl(b.fileno(), _FICLONE, a.fileno())
        except OSError:
            _copy_range(a, b, 0, 0, os.fstat(a.fileno()).st_size)


def _copy_range(a: BinaryIO, b: BinaryIO, start: int, to: int, count: int) -> None:
    """Copy `count` bytes from `start` of `a` to `to` of `b`, inside the kernel where possible."""
    b.flush()
    copy = getattr(os, "copy_file_range", None)
    while copy is not None and count > 0:
        try:
            done = copy(a.fileno(), b.fileno(), min(count, 1 << 30), start, to)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            break
        if done == 0:
            break
        start, to, count = start + done, to + done, count - done
    a.seek(start)
    b.seek(to)
    while count > 0:
        block = a.read(min(count, _CHUNK))
        if not block:
            raise UserError(f"{a.name} is truncated; copy or download it again")
        b.write(block)
        count -= len(block)


def rewrite_shard(
    source: Path,
    to: Path,
    dtypes: Mapping[str, torch.dtype],
    values: Iterable[tuple[str, Tensor]],
) -> int:
    """Write a safetensors file with some tensors replaced, one new tensor in memory at a time.

    Args:
        source: The file to start from.
        to: The file to make; it must not exist.
        dtypes: Dtype to store each replaced tensor in, by name in the file.
        values: Name and new value of each of them, in any order, shaped as stored.

    Returns:
        By how many bytes the tensors grew.
    """
    entries = read_header(source)
    starts = {key: entry.start for key, entry in entries.items()}
    grown = 0
    if all(entries[key].dtype == dtype for key, dtype in dtypes.items()):
        clone_file(source, to)
    else:
        starts, grown = _new_layout(source, to, entries, dtypes)
    with to.open("r+b") as f:
        for key, tensor in values:
            f.seek(starts[key])
            f.write(tensor_bytes(tensor.to(dtypes[key])))
    return grown


def _new_layout(
    source: Path, to: Path, entries: Mapping[str, Entry], dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, int], int]:
    """Write the header for new dtypes and the kept tensors; return new starts and the growth."""
    with source.open("rb") as f:
        old = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    header: dict[str, object] = {k: old[k] for k in ("__metadata__",) if k in old}
    at, offsets = 0, {}
    for key, entry in entries.items():
        size = entry.end - entry.start
        code = entry.code
        if key in dtypes:
            code = _CODES[dtypes[key]]
            size = size // entry.dtype.itemsize * dtypes[key].itemsize
        header[key] = {"dtype": code, "shape": entry.shape, "data_offsets": [at, at + size]}
        offsets[key] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    with source.open("rb") as a, to.open("xb") as b:
        b.write(struct.pack("<Q", len(text)) + text)
        for key, entry in entries.items():
            if key not in dtypes:
                _copy_range(a, b, entry.start, base + offsets[key], entry.end - entry.start)
        b.flush()
        b.truncate(base + at)
    grown = at - sum(entry.end - entry.start for entry in entries.values())
    return {key: base + offset for key, offset in offsets.items()}, grown


@functools.lru_cache(maxsize=4096)
def _hash(path: str, size: int, mtime_ns: int) -> str:
    """Hash a file once per process as long as size and time stay."""
    del size, mtime_ns
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_files(paths: list[Path]) -> str:
    """Return the SHA-256 over names and contents of files, as hex."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        stat = path.stat()
        content = _hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Give a temporary folder that takes the name `to` when the block ends well.

    Args:
        to: A folder that does not exist or is empty.

    Yields:
        The temporary folder, next to `to`; removed when the block fails.

    Raises:
        UserError: If `to` is a file or a folder that holds something.
    """
    check_free(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))
    try:
        work.chmod(0o755)
        yield work
        check_free(to)
        try:
            os.replace(work, to)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            check_free(to)
            raise
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def check_free(to: Path) -> None:
    """Raise UserError unless `to` does not exist or is an empty folder."""
    if to.is_dir():
        if any(to.iterdir()):
            raise UserError(f"{to} already holds files; name a new or empty folder")
    elif to.exists() or to.is_symlink():
        raise UserError(f"{to} is a file; name a new or empty folder")
