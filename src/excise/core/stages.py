"""The store of stages: a folder named by the hash of what decides its contents.

A stage is made once, under a lock, in `NAME-HASH.partial/`, which stays across kills so that
training inside it goes on; it is renamed to `NAME-HASH/` when whole. `done.json` in it holds the
key and the size of every file (and the SHA-256 of small ones), by which a damaged stage is
found and made again. This module imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from excise.core.errors import DiskFull, UserError

Emit = Callable[[str, Mapping[str, Any]], None]
"""Sink of progress events."""

DONE = "done.json"
"""Marker and manifest of a finished stage."""

SMALL = 1 << 20
"""Files up to this size are checked by their bytes, larger ones by their size."""

LIBRARIES = ("excise", "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
"""Packages that decide numbers."""

PATIENCE = 5.0
"""Seconds of waiting for another process before saying so."""


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that decide numbers."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


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
            f"the disk of {where} is full; free {amount} and run the same command again, "
            "it goes on where it was"
        ) from None


def _silent(kind: str, data: Mapping[str, Any]) -> None:
    """Drop an event."""


def _same(value: bool) -> bool:
    """Agree with oneself: the default of a single process."""
    return value


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size, and SHA-256 of small ones, of every file under `folder`, by relative path."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == DONE:
            continue
        entry: dict[str, Any] = {"size": path.stat().st_size}
        if entry["size"] <= SMALL:
            entry["sha256"] = _digest(path)
        files[name] = entry
    return files


def damage(folder: Path) -> str:
    """Say what is wrong with a finished stage.

    Args:
        folder: Its folder.

    Returns:
        A phrase such as `model/config.json is missing`; empty when all is well.
    """
    try:
        files = json.loads((folder / DONE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"its {DONE} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {DONE} cannot be read"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes instead of {entry['size']}"
        if "sha256" in entry and _digest(path) != entry["sha256"]:
            return f"{name} has other contents"
    return ""


class Store:
    """Stages under one folder, shared by arms, seeds, studies and processes.

    Attributes:
        root: The folder; made when the first stage is.
        emit: Sink of `stage_start`, `stage_done` and `note`.
        rank: Number of this process; process 0 locks, checks and finishes.
        agree: Collective that returns process 0's boolean in every process.
    """

    def __init__(
        self,
        root: Path,
        emit: Emit = _silent,
        *,
        rank: int = 0,
        agree: Callable[[bool], bool] = _same,
    ) -> None:
        """Look at `root` as a store."""
        self.root, self.emit, self.rank, self.agree = Path(root), emit, rank, agree

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """Return the folder of a stage, made or not.

        Args:
            name: What it is to a reader; characters unfit for a folder become `-`.
            key: Everything that decides its contents, JSON-able.
        """
        text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()[:16]
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "stage"
        return self.root / f"{plain[:80]}-{digest}"

    def has(self, name: str, key: Mapping[str, Any]) -> bool:
        """Return whether the stage is there, whole."""
        return not damage(self.path(name, key))

    def forget(self, name: str, key: Mapping[str, Any]) -> None:
        """Remove a stage and what is left of an interrupted one."""
        final = self.path(name, key)
        with self._lock(final, name):
            shutil.rmtree(final, ignore_errors=True)
            shutil.rmtree(_partial(final), ignore_errors=True)

    def stage(self, name: str, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Return the folder of a stage, making it if it is not there.

        Args:
            name: What it is to a reader.
            key: Everything that decides its contents, JSON-able.
            make: Fills the folder it is given; after a kill it is called again on what it left.

        Returns:
            The finished folder; read it, never write into it.

        Raises:
            DiskFull: If the disk is full.
        """
        final = self.path(name, key)
        if self.rank == 0 and not damage(final):
            self.agree(True)
            return self._reused(final)
        with self._lock(final, name) if self.rank == 0 else nullcontext():
            # Another process may have made it while this one waited for the lock.
            if self.agree(self.rank == 0 and self._settled(final)):
                return self._reused(final)
            self._make(final, key, make)
        return final

    def _reused(self, final: Path) -> Path:
        """Say that a stage was there already."""
        self.emit("stage_done", {"stage": final.name, "reused": True, "seconds": 0.0})
        return final

    def _settled(self, final: Path) -> bool:
        """Return whether the stage is whole, clearing a damaged one away."""
        if not final.exists():
            return False
        wrong = damage(final)
        if wrong:
            self.emit("note", {"text": f"stage {final.name} is damaged ({wrong}); making it again"})
            shutil.rmtree(final)
        return not wrong

    def _make(self, final: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> None:
        """Fill the partial folder and, in process 0, finish and rename it."""
        began = time.perf_counter()
        partial = _partial(final)
        self.emit("stage_start", {"stage": final.name, "resumed": partial.exists()})
        with disk_full(partial):
            partial.mkdir(parents=True, exist_ok=True)
            (partial / DONE).unlink(missing_ok=True)
            try:
                make(partial)
            except UserError as error:
                if self.rank == 0 and not isinstance(error, DiskFull):
                    shutil.rmtree(partial, ignore_errors=True)  # refused: nothing to go on with
                raise
            self.agree(True)
            if self.rank == 0:
                done = {"key": dict(key), "files": manifest(partial)}
                (partial / DONE).write_text(
                    json.dumps(done, indent=1, sort_keys=True) + "\n", encoding="utf-8"
                )
                partial.rename(final)
            self.agree(True)
        seconds = round(time.perf_counter() - began, 3)
        self.emit("stage_done", {"stage": final.name, "reused": False, "seconds": seconds})

    @contextmanager
    def _lock(self, final: Path, name: str) -> Iterator[None]:
        """Hold the stage's lock; the kernel frees it when the process dies."""
        folder = self.root / ".locks"
        with disk_full(folder):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / f"{final.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            began, told = time.monotonic(), False
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        raise
                if not told and time.monotonic() - began > PATIENCE:
                    told = True
                    text = f"another process is making stage '{name}' in {self.root}; waiting"
                    self.emit("note", {"text": text})
                time.sleep(0.05)
            yield
        finally:
            os.close(handle)


def _partial(final: Path) -> Path:
    """Return the folder in which a stage is made."""
    return final.with_name(final.name + ".partial")
