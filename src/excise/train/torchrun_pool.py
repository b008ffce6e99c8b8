"""The processes that torchrun started for one command: process 0 leads, the others do as it says.

Only the leader runs a verb, so only it claims an output folder, prints and writes. What it gives
out is either a list of jobs, of which every process does its share by itself, or a list of stages,
each of which all make together. Orders, answers and errors go through the store at which the
processes met; it holds what our own processes wrote there and nothing that was read from a file.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import distributed as dist

from excise.core.context import Context, Stage
from excise.core.errors import ProcessLost, UserError, counted, first_line
from excise.core.events import Emit, silent
from excise.core.keys import library_versions, own_source
from excise.core.stages import Runtime
from excise.train.distributed import gather
from excise.train.worker import INSIDE, J, R, answer, in_place, peak_bytes, run_job, settle, wrapped

MEETING = 120.0
"""Seconds that processes wait for each other at the start, where one may still import torch."""

STEP = timedelta(minutes=30)
"""How long one process may keep the others waiting in the middle of a stage."""

LEAVING = 20.0
"""Seconds that a process waits for what the leader has to say of an end."""

FAILED = 1
"""Exit code where the leader leaves none."""

TICK = 0.02
"""Seconds between two looks at the store."""

NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets."""


class TorchrunPool:
    """The pool whose workers are the processes of one command, of which this is one.

    Attributes:
        rank: Number of this process; 0 leads.
        world: How many there are.
        workers: As many.
        emit: Sink of the events of what the leader does itself.
        peak_bytes: See `excise.train.pool.Pool`.
        hosts: Whether the store lies in this process.
    """

    def __init__(self, rank: int, world: int, store: Any, *, hosts: bool = False) -> None:
        """Take part; see `join`."""
        self.rank, self.world, self.hosts, self._store = rank, world, hosts, store
        self.workers = world
        self.emit: Emit = silent
        self.peak_bytes = 0
        self._orders = 0

    # What the leader does.

    def __enter__(self) -> Self:
        """Take orders; the others have long been there."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the others where they are, for `end` says how a command ends."""

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        on_done: Callable[[int, R], None] | None = None,
        *,
        turns: Sequence[int | None] = (),
    ) -> list[R]:
        """Run `function` on every job, each in one process; see `Pool.map`.

        Jobs of one turn go to one process. Who does a job changes nothing about it.

        Raises:
            Exception: What a job raised, as itself.
        """
        order = self._order("map", (function, jobs, turns))
        mine = _share(len(jobs), turns, self.rank, self.world)
        results: dict[int, R] = {}

        def take(i: int, result: R, peak: int) -> None:
            results[i] = result
            self.peak_bytes = max(self.peak_bytes, peak)
            if on_done is not None:
                on_done(i, result)

        def collect() -> None:
            for i in set(range(len(jobs))) - results.keys() - set(mine):
                if self._store.check([f"{order}/{i}"]):
                    kind, value, *memory = pickle.loads(self._store.get(f"{order}/{i}"))
                    if kind == "error":
                        raise value
                    take(i, value, memory[0])

        with in_place(self.emit):
            for i in mine:
                take(i, run_job(function, jobs[i]), peak_bytes())
                collect()
            while len(results) < len(jobs):
                self._check_others()
                time.sleep(TICK)
                collect()
        return [results[i] for i in range(len(jobs))]

    def make(self, stages: Sequence[Stage[R]], runtime: Runtime) -> list[R]:
        """Make stages, one after the other, all processes together.

        Raises:
            Exception: What a process raised, as itself.
            ProcessLost: If one is gone and left no word.
        """
        self._order("make", (stages, runtime))
        try:
            with in_place(self.emit):
                return [self._make(stage, runtime) for stage in stages]
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            self._check_others(patience=LEAVING / 4)
            raise _lost() from error

    def end(self, code: int) -> None:
        """Let the others go with the exit code of the leader, and outlive them where it must.

        Whoever keeps the store goes last; torchrun keeps it itself.
        """
        _deafen()
        try:
            self._store.set("end", str(code))
        except RuntimeError:  # whoever kept the store is gone
            return
        if self.hosts:
            until = time.monotonic() + LEAVING
            for rank in range(1, self.world):
                self._wait(f"left/{rank}", max(0.0, until - time.monotonic()))

    # What the others do.

    def follow(self) -> int:
        """Do what the leader orders, until it says how the command ends.

        Returns:
            The exit code.
        """
        os.environ[INSIDE] = "1"
        settle()
        try:
            while True:
                order = f"order/{self._orders}"
                while not self._store.check([order]):
                    if self._store.check(["end"]):
                        return self._leave(FAILED) or 0
                    time.sleep(TICK)
                self._orders += 1
                kind, facts = pickle.loads(self._store.get(order))
                if kind == "map":
                    self._do_share(order, *facts)
                else:
                    for stage in facts[0]:
                        self._make(stage, facts[1])
        except BaseException as error:
            _deafen()
            with suppress(RuntimeError):  # whoever kept the store is gone
                if not self._store.check(["end"]) and not _is_lost(error):
                    self._store.set(f"failed/{self.rank}", wrapped(error))
            dist.destroy_process_group()  # whoever waits for this process wakes up
            code = self._leave(None)
            if code is not None:
                return code
            if _is_lost(error):
                raise _lost() from None
            raise

    def first_to_speak(self) -> bool:
        """Return whether nobody has said yet why the command ends; only one may."""
        try:
            return int(self._store.add("said", 1)) == 1
        except RuntimeError:  # whoever kept the store is gone
            return self.rank == 0

    def _leave(self, code: int | None) -> int | None:
        """Return the leader's exit code, or `code` where it leaves none."""
        said = self._wait("end", LEAVING)
        if said is None:
            return code
        self._store.set(f"left/{self.rank}", b"")
        return int(said)

    def _do_share(
        self, order: str, function: Callable[[J], R], jobs: Sequence[J], turns: Sequence[int | None]
    ) -> None:
        """Do this process's share of the jobs and send the results."""
        for i in _share(len(jobs), turns, self.rank, self.world):
            self._store.set(f"{order}/{i}", answer(partial(run_job, function, jobs[i])))

    # What all do.

    def _make(self, stage: Stage[R], runtime: Runtime) -> R:
        """Make one stage as this process."""
        here = replace(runtime, rank=self.rank, agree=self.agree)
        return run_job(here.run, stage)

    def check_versions(self) -> None:
        """Refuse processes that would compute otherwise.

        Raises:
            UserError: Naming what differs.
        """
        ours = {**library_versions(), "excise (its source)": own_source()[:12]}
        everyone = gather(ours, self._context())
        for name in sorted({name for one in everyone for name in one}):
            found = list(dict.fromkeys(str(one.get(name, "none")) for one in everyone))
            if len(found) > 1:
                raise UserError(
                    f"the processes have different versions of {name}: {' and '.join(found)}; "
                    "install the same on every machine"
                )

    def agree(self, value: bool) -> bool:
        """Wait for all processes; return what process 0 said."""
        return bool(gather(value, self._context())[0])

    def _context(self) -> Context:
        return Context(work=Path(), rank=self.rank, world=self.world)

    def _order(self, kind: str, facts: object) -> str:
        """Tell the others what comes next, and return its key."""
        order = f"order/{self._orders}"
        self._orders += 1
        self._store.set(order, pickle.dumps((kind, facts)))
        return order

    def _check_others(self, patience: float = 0.0) -> None:
        """Raise what another process raised; wait a while for word of it."""
        until = time.monotonic() + patience
        while True:
            for rank in range(1, self.world):
                if self._store.check([f"failed/{rank}"]):
                    raise pickle.loads(self._store.get(f"failed/{rank}"))[1]
            if time.monotonic() >= until:
                return
            time.sleep(TICK)

    def _wait(self, key: str, seconds: float) -> bytes | None:
        """Return what stands under a key of the store; None where nothing comes."""
        until = time.monotonic() + seconds
        try:
            while not self._store.check([key]):
                if time.monotonic() >= until:
                    return None
                time.sleep(TICK)
            return bytes(self._store.get(key))
        except RuntimeError:  # whoever kept the store is gone
            return None


def join(*, meeting: float = MEETING) -> TorchrunPool:
    """Meet the other processes of this command, and refuse those that compute otherwise.

    Args:
        meeting: Seconds that they wait for each other.

    Raises:
        UserError: If torchrun's variables are missing, nobody answers, or the processes have other
            versions of the libraries.
    """
    lacking = [name for name in NEEDED if not os.environ.get(name)]
    if lacking:
        raise UserError(
            f"WORLD_SIZE names several processes but {lacking[0]} is not set; start with torchrun "
            "--nproc-per-node N -m excise, or unset WORLD_SIZE"
        )
    try:
        rank, local, world, port = (int(os.environ[name]) for name in (*NEEDED[:3], "MASTER_PORT"))
        host = os.environ["MASTER_ADDR"]
        # torchrun itself keeps the store, unless somebody sets the variables by hand.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        wait = timedelta(seconds=meeting)
        hosts = rank == 0 and not kept
        store = dist.TCPStore(host, port, world, hosts, wait)  # type: ignore[attr-defined]
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=STEP)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes did not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            f" within {meeting:.0f} s ({first_line(error)}); start all of them with one torchrun "
            "command, whose address every machine reaches"
        ) from None
    ours = dist.PrefixStore("excise", store)  # type: ignore[attr-defined]
    pool = TorchrunPool(rank, world, ours, hosts=hosts)
    pool.check_versions()
    return pool


def check_device(device: str, world: int) -> None:
    """Refuse a device that several processes cannot each have one of.

    Raises:
        UserError: If one device is named, or there are fewer than processes on this machine.
    """
    if not device.startswith("cuda"):
        return
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if ":" in device:
        raise UserError(
            f"device '{device}' is one for {world} processes; write cuda, and each takes its own"
        )
    if here > there:
        raise UserError(
            f"this machine has {counted(there, 'GPU')} for {here} processes; start torchrun with "
            f"--nproc-per-node {there}, or use --device cpu"
        )


def _share(count: int, turns: Sequence[int | None], rank: int, world: int) -> list[int]:
    """Return the jobs of a process: in turn, those of one turn together."""
    keys = [i if not turns or turns[i] is None else turns[i] for i in range(count)]
    return [i for i, key in enumerate(keys) if key is not None and key % world == rank]


def _deafen() -> None:
    """Let no second signal cut short what is done on the way out."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _is_lost(error: BaseException) -> bool:
    """Return whether an error says that another process cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _lost() -> ProcessLost:
    return ProcessLost(
        "another process of this run is gone without a word (memory may have run out); run the "
        "same command again, it resumes"
    )
