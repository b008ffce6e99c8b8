"""Files that are whole or not there: written aside and renamed, summed once, locked, swept.

This module imports no torch.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import filelock

from excise.core.errors import DiskFull, UserError

PATIENCE = 5.0
"""Seconds of waiting for another process before saying so."""

TICK = 0.05
"""Seconds within which a file may be written twice and bear one time stamp."""

_CHUNK = 1 << 24
_FICLONE = 0x40049409
_PART = re.compile(r"\.part-([0-9a-f]{8})-(\d+)-")


@contextmanager
def disk_full(where: Path, needed: int = 0) -> Iterator[None]:
    """Turn a full disk into a sentence.

    Args:
        where: What is being written, for the sentence.
        needed: Bytes it takes, where known.

    Raises:
        DiskFull: If the disk fills up inside the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        amount = f"about {max(1, round(needed / 2**20))} MiB" if needed else "some space"
        raise DiskFull(
            f"the disk of {where} is full; free {amount} and run the same command again, it resumes"
        ) from None


def expand(name: str | Path) -> Path:
    """Return a path with `~` as the user's folder; a user that is not there is a plain name."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def check_regular(path: Path) -> None:
    """Refuse what is there and has no end or no bytes of its own: a pipe, a device, a socket.

    Raises:
        UserError: Naming it.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is a pipe or a device and no file; copy what it gives into a file")


def _host() -> str:
    """Return eight characters for what numbers processes: this machine, or a container on it."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()}{numbers}".encode()).hexdigest()[:8]


def part_of(path: Path) -> Path:
    """Return a name beside `path` under which it can be made; `sweep` knows such names."""
    return path.with_name(f".part-{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def sweep(folder: Path, *, deep: bool = False) -> None:
    """Remove what processes of this machine that are gone left half-made in a folder.

    Args:
        folder: Where to look; it may be missing.
        deep: Whether to look in the folders under it as well.
    """
    for path in list(folder.rglob(".part-*") if deep else folder.glob(".part-*")):
        made = _PART.match(path.name)
        if made is None or made[1] != _host() or _alive(int(made[2])):
            continue
        _remove(path)


@functools.cache
def _sweep_once(folder: Path) -> None:
    """Sweep a folder that is written into, the first time in this process."""
    sweep(folder)


def _remove(path: Path) -> None:
    """Remove a folder or file; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Return whether a file or folder is a half-made one."""
    return _PART.match(path.name) is not None


def _alive(pid: int) -> bool:
    """Return whether a process of this machine runs; where that cannot be asked, it does."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def open_up(folder: Path) -> None:
    """Give the files of a folder the rights that the user's umask says.

    Libraries write some for their owner alone. A file that has another name elsewhere is left.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        about = path.lstat()
        if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
            rights = 0o666 & ~mask
            if about.st_mode & 0o666 != rights:
                path.chmod(rights)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a name for a file that replaces `path` when the block ends well.

    Args:
        path: The file; its folder must exist.

    Yields:
        A path beside it at which nothing lies yet.
    """
    _sweep_once(path.parent)
    part = part_of(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(to: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a new folder that takes the name `to` when the block ends well.

    Args:
        to: A folder that does not exist or is empty.
        replace: Whether a folder that holds something is removed for it, once the new one is whole.

    Yields:
        The folder, beside `to`; removed when the block fails.

    Raises:
        UserError: If `to` is a file, or holds something that is not to be replaced.
    """
    if not replace:
        check_free(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(to.parent)
    part = part_of(to)
    try:
        part.mkdir()
        yield part
        open_up(part)
        if not replace:
            check_free(to)
        elif to.exists() or to.is_symlink():
            old = part_of(to)
            os.replace(to, old)
            os.replace(part, to)
            _remove(old)
            return
        if to.is_dir():
            to.rmdir()
        os.replace(part, to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder of the system's that goes away; what killed processes left there goes first."""
    root = Path(tempfile.gettempdir())
    sweep(root)
    with tempfile.TemporaryDirectory(dir=root, prefix=part_of(root / "excise").name) as folder:
        yield Path(folder)


def check_free(to: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        UserError: If `to` is a file, or a folder that holds something.
    """
    if to.is_dir():
        if any(not is_part(path) for path in to.iterdir()):
            raise UserError(f"{to} already holds files; name a new or empty folder")
    elif to.exists() or to.is_symlink():
        raise UserError(f"{to} is a file; name a new or empty folder")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: never half-written.

    Args:
        path: Where; its folder must exist.
        text: What.
    """
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


Signature = tuple[int, int, int, int, int]
"""Size, modification and change time in nanoseconds, inode and device of a file."""

_SUMS: dict[str, tuple[Signature, str]] = {}
"""Sums by path, for as long as nothing has touched the file."""


def signature_of(path: Path) -> Signature:
    """Return what changes when a file is written to, whatever is done to its time stamp."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file as `sha256sum` prints it, reading it once a process.

    A file that was written just now is read again next time: within one tick of the file system's
    clock, another content may follow that has the same size and time.
    """
    name, signature = str(path.resolve()), signature_of(path)
    known = _SUMS.get(name)
    if known is not None and known[0] == signature:
        return known[1]
    settled = time.time() - signature[2] / 1e9 > TICK
    with path.open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    if settled:
        _SUMS[name] = signature, sha256
    return sha256


def note_sum(path: Path, sha256: str) -> None:
    """Note the sum of a file that was taken while it was written, or checked by another process."""
    _SUMS[str(path.resolve())] = signature_of(path), sha256


def clone_file(source: Path, to: Path) -> None:
    """Copy a file, sharing its blocks where the file system can; its sum comes along.

    Raises:
        FileExistsError: If there is something at `to`.
    """
    known = _SUMS.get(str(source.resolve()))
    sha256 = known[1] if known is not None and known[0] == signature_of(source) else None
    with source.open("rb") as a, to.open("xb") as b:
        if not share_blocks(a, b):
            digest = hashlib.sha256()
            while block := a.read(_CHUNK):
                b.write(block)
                if sha256 is None:
                    digest.update(block)
            sha256 = sha256 or digest.hexdigest()
    if sha256 is not None:
        note_sum(to, sha256)


def share_blocks(a: BinaryIO, b: BinaryIO) -> bool:
    """Let `b` share the blocks of `a`; return whether the file system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.ioctl(b.fileno(), _FICLONE, a.fileno())
    except OSError:
        return False
    return True


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock between processes; the system frees it when the holder dies.

    Args:
        path: The lock's file; its folder is made.
        waiting: Called once, after a while of waiting for another process. None refuses to wait.

    Raises:
        BlockingIOError: If another process holds it and `waiting` is None.
    """
    with disk_full(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0 if waiting is None else PATIENCE, poll_interval=0.05)
    except filelock.Timeout:
        if waiting is None:
            raise BlockingIOError(str(path)) from None
        waiting()
        lock.acquire(poll_interval=0.05)
    try:
        yield
    finally:
        lock.release()
