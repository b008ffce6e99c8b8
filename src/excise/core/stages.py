"""How stages are kept: each in a folder named by the hash of its key, whole or not at all.

A stage is made in `NAME-HASH.partial/`, under a lock. The folder stays across kills, so that
training inside it resumes, and takes the name `NAME-HASH/` when it is whole. `done.json` in it
holds the key and the sum of every file, by which a damaged stage is found and made again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from excise.core.context import Context, Stage, own_device
from excise.core.disk import disk_full, file_sum, locked, note_sum, open_up, sweep, write_text
from excise.core.errors import DiskFull, UserError
from excise.core.events import Emit, emit, silent
from excise.core.keys import class_identity, fields_identity, library_versions, own_source

T = TypeVar("T")

DONE = "done.json"
"""Marker of a finished stage: its key, and size and SHA-256 of every file."""

LAYOUT = "v2"
"""Folder of a store in which stages of this layout lie."""

MOST_PROCESSES = 256
"""Numbers of processes up to which begun stages of others are looked for, to say so."""

PATIENT: ContextVar[bool] = ContextVar("PATIENT", default=True)
"""Whether a job waits for a stage that another process is making; whoever runs it sets it."""


class Busy(Exception):
    """Another process is making this stage, or one that it is made of, and nobody waits for it."""


@dataclass(frozen=True)
class Runtime:
    """Where and with what stages are made; it travels to workers.

    Attributes:
        store: Folder of the stages, shared by runs that lie side by side.
        dtype: Compute dtype, `float32` or `bfloat16`.
        device: Device of the worker.
        rank: Number of this process among those that make a stage together.
        world: Number of those processes.
        fsdp: Whether they cut a model over themselves while it trains.
        agree: Collective that returns process 0's boolean in every process, once all are there.
        began: When the run began, in seconds since the epoch. What was checked byte by byte since
            then is not read again.
    """

    store: Path
    dtype: str = "float32"
    device: str = "cpu"
    rank: int = 0
    world: int = 1
    fsdp: bool = False
    agree: Callable[[bool], bool] = field(default=bool, repr=False)
    began: float = field(default_factory=time.time)

    def run(self, stage: Stage[T]) -> T:
        """Return what a stage gives, making it if it is not there.

        Raises:
            DiskFull: If the disk is full.
            UserError: What the stage refuses.
            Busy: If another process is making it, in a job that is not `PATIENT`.
        """
        return stage.read(self.make(stage))

    def make(self, stage: Stage[Any]) -> Path:
        """Return the finished folder of a stage, making it if it is not there; see `run`."""
        if self.world > 1 and not stage.data_parallel:
            return replace(self, rank=0, world=1, fsdp=False, agree=bool).make(stage)

        def make(work: Path) -> None:
            if stage.counts_processes:
                self._note_others(stage)
            stage.make(self.context(work, seed=int(getattr(stage, "seed", 0))))

        return self._kept.stage(stage.name, self.key(stage), make)

    def path(self, stage: Stage[Any]) -> Path:
        """Return where a stage lies or will lie."""
        return self._kept.path(stage.name, self.key(stage))

    def key(self, stage: Stage[Any]) -> dict[str, Any]:
        """Return everything that decides what a stage gives, as plain data."""
        return {
            "stage": class_identity(type(stage)),
            "inputs": fields_identity(stage),
            "dtype": self.dtype,
            "device": self.device.partition(":")[0],
            "world": self.world if stage.counts_processes else 1,
            "libraries": dict(library_versions()),
            "code": own_source(),
        }

    def context(self, work: Path, *, seed: int = 0) -> Context:
        """Return the context of a stage that works in `work`."""
        return Context(
            work=work,
            seed=seed,
            device=torch.device(own_device(self.device)),
            dtype=getattr(torch, self.dtype),
            rank=self.rank,
            world=self.world,
            fsdp=self.fsdp,
            emit=emit,
            stages=self.run,
        )

    def _note_others(self, stage: Stage[Any]) -> None:
        """Say of other numbers of processes that began the stage that nothing of it is used."""
        if self.rank:
            return
        key = self.key(stage)
        for world in range(1, MOST_PROCESSES + 1):
            other = _partial(self._kept.path(stage.name, {**key, "world": world}))
            if world != self.world and other.exists():
                text = (
                    f"what '{stage.name}' makes depends on the number of processes, {self.world} "
                    f"here; what was begun with {world} is not used and lies in {other}"
                )
                emit("note", {"text": text})

    @property
    def _kept(self) -> Store:
        return Store(
            self.store / LAYOUT,
            emit,
            rank=self.rank,
            agree=self.agree,
            since=self.began,
            wait=PATIENT.get() or self.world > 1,  # alone, process 0 may not leave the others
        )


def old_stages(store: Path) -> str:
    """Say that a store holds stages of an earlier version, which are left alone; empty if none."""
    count = sum(1 for marker in store.glob(f"*/{DONE}"))
    if not count:
        return ""
    return (
        f"{store} holds {count} stages written by an earlier version of excise; they are not used "
        "and stay as they are; remove them to free their space"
    )


class Store:
    """Stages under one folder, shared by runs, seeds, studies and processes.

    Attributes:
        root: The folder; made when the first stage is.
        emit: Sink of `stage_start`, `stage_done` and `note`.
        rank: Number of this process; process 0 locks, checks and finishes.
        agree: Collective that returns process 0's boolean in every process.
        since: What was checked byte by byte after this time is not read again.
        wait: Whether to wait for another process that is making a stage.
    """

    def __init__(
        self,
        root: Path,
        emit: Emit = silent,
        *,
        rank: int = 0,
        agree: Callable[[bool], bool] = bool,
        since: float | None = None,
        wait: bool = True,
    ) -> None:
        """Look at `root` as a store."""
        self.root, self.emit, self.rank, self.agree = Path(root), emit, rank, agree
        self.since = time.time() if since is None else since
        self.wait = wait

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
            Busy: If another process is making it, and `wait` is false.
        """
        final = self.path(name, key)
        if self.rank == 0 and not self.damage(final):
            self.agree(True)
            return self._reused(final)

        def waiting() -> None:
            text = f"another process is making stage '{name}' in {self.root}; waiting for it"
            self.emit("note", {"text": text})

        lock = locked(self.root / ".locks" / f"{final.name}.lock", waiting if self.wait else None)
        with ExitStack() as held:
            if self.rank == 0:
                try:
                    held.enter_context(lock)
                except BlockingIOError:
                    raise Busy(final.name) from None
            # Another process may have made it while this one waited for the lock.
            if self.agree(self.rank == 0 and self._settled(final)):
                return self._reused(final)
            self._make(final, key, make)
        return final

    def damage(self, final: Path) -> str:
        """Say what is wrong with a finished stage.

        Every byte is read, unless this run has done so and nothing has touched the files since.

        Args:
            final: Its folder.

        Returns:
            A phrase such as `model/config.json is missing`; empty when all is well.
        """
        try:
            files = json.loads((final / DONE).read_text(encoding="utf-8"))["files"]
            entries = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in files.items()}
        except FileNotFoundError:
            return f"its {DONE} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"its {DONE} cannot be read"
        there = dict(_files(final))
        for name in sorted(entries.keys() ^ there.keys()):
            return f"{name} is missing" if name in entries else f"{name} was added"
        stats = {name: path.stat() for name, path in there.items()}
        checked = self._checked(final)
        read = checked < self.since or any(s.st_ctime >= checked for s in stats.values())
        for name, (size, sha256) in entries.items():
            if stats[name].st_size != size:
                return f"{name} has {stats[name].st_size} bytes instead of {size}"
            if not read:
                note_sum(there[name], sha256)
            elif file_sum(there[name]) != sha256:
                return f"{name} has other contents"
        if read:
            self._note_check(final)
        return ""

    def _stamp(self, final: Path) -> Path:
        """Return the file whose time says when a stage was last checked byte by byte."""
        return self.root / ".checked" / final.name

    def _note_check(self, final: Path) -> None:
        """Note that every byte of a stage was read just now."""
        self._stamp(final).parent.mkdir(parents=True, exist_ok=True)
        self._stamp(final).touch()

    def _checked(self, final: Path) -> float:
        """Return when a stage was last checked; 0 for never, or if the clock was set back since."""
        try:
            checked = self._stamp(final).stat().st_ctime
        except OSError:
            return 0.0
        return checked if checked <= time.time() else 0.0

    def _reused(self, final: Path) -> Path:
        """Say that a stage was there already."""
        self.emit("stage_done", {"stage": final.name, "reused": True, "seconds": 0.0})
        return final

    def _settled(self, final: Path) -> bool:
        """Return whether the stage is whole, clearing a damaged one away."""
        if not final.exists():
            return False
        wrong = self.damage(final)
        if wrong:
            self.emit("note", {"text": f"stage {final.name} is damaged ({wrong}); making it again"})
            shutil.rmtree(final)
        return not wrong

    def _make(self, final: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> None:
        """Fill the partial folder and, in process 0, finish and rename it."""
        start = time.perf_counter()
        partial = _partial(final)
        self.emit("stage_start", {"stage": final.name, "resumed": partial.exists()})
        with disk_full(partial):
            if self.rank == 0:
                partial.mkdir(parents=True, exist_ok=True)
                (partial / DONE).unlink(missing_ok=True)
                sweep(partial, deep=True)
            self.agree(True)
            try:
                make(partial)
            except UserError as error:
                if self.rank == 0 and not isinstance(error, DiskFull):
                    shutil.rmtree(partial, ignore_errors=True)  # refused: nothing to resume
                raise
            self.agree(True)
            if self.rank == 0:
                self._finish(partial, final, key)
            self.agree(True)
        seconds = round(time.perf_counter() - start, 3)
        self.emit("stage_done", {"stage": final.name, "reused": False, "seconds": seconds})

    def _finish(self, partial: Path, final: Path, key: Mapping[str, Any]) -> None:
        """Sum the files, which may have been done while they were written, and rename."""
        open_up(partial)
        files = {
            name: {"size": path.stat().st_size, "sha256": file_sum(path)}
            for name, path in _files(partial)
        }
        done = {"key": dict(key), "files": files}
        write_text(partial / DONE, json.dumps(done, indent=1, sort_keys=True) + "\n")
        partial.rename(final)
        for name, entry in files.items():
            note_sum(final / name, str(entry["sha256"]))
        self._note_check(final)


def _partial(final: Path) -> Path:
    """Return the folder in which a stage is made."""
    return final.with_name(final.name + ".partial")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of the files of a stage; hidden ones are not part of it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != DONE and not path.name.startswith("."):
            yield name, path
