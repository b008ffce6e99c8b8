"""A pool whose workers are the nodes of a Ray cluster that somebody started.

The driver and all nodes see one store of stages, and compute with the same versions: both is
checked before work starts, and again by every worker, as nodes may join. Jobs of a node that dies
are done by others, which resume what it had saved.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from excise.core.context import Stage
from excise.core.errors import UserError
from excise.core.events import CHANNEL, Emit, silent
from excise.core.keys import library_versions, own_source
from excise.core.stages import Runtime
from excise.train.pool import GRACE
from excise.train.worker import INSIDE, J, R, answer, settle

TRIES = 4
"""How often a job may lose its node or its process."""

CONNECT = 5.0
"""Seconds in which somebody must answer at the address of a cluster."""

LOOK = 120.0
"""Seconds in which every node must have looked around; it imports torch for that."""

TICK = 0.2
"""Seconds between looks for events while jobs run."""


@dataclass(frozen=True)
class _Site:
    """What a worker must find where it is.

    Attributes:
        folder: The driver's working folder, from which names of files count.
        token: A file in the store, which the driver wrote.
        text: What it holds.
        versions: Those of the libraries that decide numbers.
        source: Sum over the code of excise.
    """

    folder: Path
    token: Path
    text: str
    versions: tuple[tuple[str, str], ...]
    source: str


def _wrong(site: _Site) -> str:
    """Say why this process may do no jobs of a driver; empty if it may."""
    here, there = dict(library_versions()), dict(site.versions)
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            had, wanted = (versions.get(name, "none") for versions in (here, there))
            return f"has {name} {had} where the driver has {wanted}; install the same there"
    if own_source() != site.source:
        return "has excise in another state of its source; install the same there"
    try:
        seen = site.token.read_text(encoding="utf-8") == site.text
    except OSError:
        seen = False
    if not seen:
        return f"does not see {site.token.parent}; give --out on a path that all nodes share"
    if not site.folder.is_dir():
        return f"has no folder {site.folder}; start from one that all nodes share"
    return ""


def _do(function: Callable[[J], R], job: J, site: _Site, mailbox: Any) -> bytes:
    """Do one job in a process of Ray's and return what `excise.train.worker.answer` does."""
    import ray

    os.environ[INSIDE] = "1"
    settle()
    sent = None

    def forward(kind: str, data: Mapping[str, Any]) -> None:
        nonlocal sent
        sent = mailbox.put.remote(kind, dict(data))

    def compute() -> R:
        if wrong := _wrong(site):
            raise UserError(f"node {socket.gethostname()} {wrong}")
        os.chdir(site.folder)
        return function(job)

    token = CHANNEL.set(forward)
    try:
        return answer(compute)
    finally:
        CHANNEL.reset(token)
        if sent is not None:
            ray.wait([sent], timeout=GRACE)  # events before the result they led to


class _Mailbox:
    """Events of jobs, until the driver takes them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def put(self, kind: str, data: dict[str, Any]) -> None:
        """Keep an event."""
        self.events.append((kind, data))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what came since the last time."""
        events, self.events = self.events, []
        return events


class RayPool:
    """Jobs as tasks of a Ray cluster, of one core or one GPU each; see `excise.train.pool.Pool`.

    Attributes:
        workers: Cores of the cluster, or its GPUs; 0 before `with`.
        emit: Sink of the jobs' events, called in this process.
        peak_bytes: Largest resident memory of any process that finished a job.
    """

    world = 1

    def __init__(
        self, address: str, store: Path, *, gpu: bool = False, emit: Emit = silent
    ) -> None:
        """Plan a pool; nothing is asked before `with`.

        Args:
            address: `HOST:PORT` of the cluster; `auto` for `RAY_ADDRESS`, else the one that runs
                on this machine.
            store: Folder of the stages, which all nodes must see.
            gpu: Whether jobs need a GPU each.
            emit: Sink of events.
        """
        self.address, self.store, self.gpu, self.emit = address, store.absolute(), gpu, emit
        self.workers = self.peak_bytes = 0
        self._token = self.store / f".ray-{secrets.token_hex(8)}"
        self._site = _Site(
            Path.cwd(),
            self._token,
            self._token.name,
            tuple(sorted(library_versions().items())),
            own_source(),
        )
        self._nodes: dict[str, Mapping[str, Any]] = {}

    def __enter__(self) -> Self:
        """Connect, and look at every node.

        Raises:
            UserError: If Ray is not installed, nobody answers, or a node computes otherwise or
                sees another store.
        """
        with _held():
            _connect(self.address)
        try:
            self.store.mkdir(parents=True, exist_ok=True)
            self._token.write_text(self._site.text, encoding="utf-8")
            with _held() as heed:
                self._look(heed)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster as it was."""
        import ray

        self._token.unlink(missing_ok=True)
        with _held():
            ray.shutdown()

    def _alive(self) -> dict[str, Mapping[str, Any]]:
        """Return the nodes that can do jobs, by number."""
        import ray

        unit = "GPU" if self.gpu else "CPU"
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get(unit, 0) >= 1]
        return {node["NodeID"]: node for node in nodes}

    def _look(self, heed: Callable[[], None]) -> None:
        """Refuse a cluster of which a node may do no jobs; `heed` is of `_held`."""
        import ray

        self._nodes = self._alive()
        unit = "GPU" if self.gpu else "CPU"
        self.workers = sum(int(n["Resources"][unit]) for n in self._nodes.values())
        if not self.workers:
            raise UserError(f"no node of the Ray cluster at {self.address} has a {unit}")
        look = ray.remote(num_cpus=0, max_retries=0)(_wrong)
        looks = {
            node_id: look.options(scheduling_strategy=_on(node_id)).remote(self._site)
            for node_id in self._nodes
        }
        until = time.monotonic() + LOOK
        for node_id, ref in looks.items():
            name = f"{self._nodes[node_id]['NodeManagerHostname']} ({node_id[:8]})"
            while not ray.wait([ref], timeout=TICK)[0]:
                heed()
                if time.monotonic() > until:
                    raise UserError(f"node {name} did not answer in {LOOK:.0f} seconds")
            try:
                wrong = ray.get(ref)
            except ray.exceptions.RayError as error:
                why = str(error).strip().splitlines()[-1]
                raise UserError(f"node {name} cannot run excise: {why}") from None
            if wrong:
                raise UserError(f"node {name} {wrong}")

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        on_done: Callable[[int, R], None] | None = None,
        *,
        turns: Sequence[int | None] = (),
    ) -> list[R]:
        """Run `function` on every job; see `Pool.map`.

        Turns are about the memory of one machine. A job that takes turns asks for so many cores
        that no node runs more of them than there are turns.
        """
        import ray

        heavy = len({turn for turn in turns if turn is not None})
        cores = min((int(n["Resources"].get("CPU", 1)) for n in self._nodes.values()), default=1)
        task = ray.remote(num_gpus=int(self.gpu), max_retries=TRIES - 1)(_do)
        box = ray.remote(_Mailbox).options(
            num_cpus=0, scheduling_strategy=_on(ray.get_runtime_context().get_node_id())
        )
        mailbox = box.remote()
        results: dict[int, R] = {}
        running = {}
        for i, job in enumerate(jobs):
            alone = bool(turns) and turns[i] is not None and not self.gpu
            wants = max(1, cores // heavy) if alone else 1
            running[task.options(num_cpus=wants).remote(function, job, self._site, mailbox)] = i
        with _held() as heed, _cancelled(running, mailbox):
            while running:
                heed()
                ready, _ = ray.wait(list(running), timeout=TICK)
                for event in ray.get(mailbox.take.remote()):
                    self.emit(*event)
                self._note_gone()
                for ref in ready:
                    i = running.pop(ref)
                    kind, value, *memory = pickle.loads(_got(ref, i))
                    if kind == "error":
                        raise value
                    results[i] = value
                    self.peak_bytes = max(self.peak_bytes, memory[0])
                    if on_done is not None:
                        on_done(i, value)
        return [results[i] for i in range(len(jobs))]

    def make(self, stages: Sequence[Stage[R]], runtime: Runtime) -> list[R]:
        """Make each stage as a job; see `Pool.make`."""
        return self.map(runtime.run, stages)

    def _note_gone(self) -> None:
        """Say which nodes died since the last time."""
        alive = self._alive()
        for node_id in self._nodes.keys() - alive.keys():
            name = self._nodes[node_id]["NodeManagerHostname"]
            text = f"node {name} ({node_id[:8]}) is gone; its jobs are done by others"
            self.emit("note", {"text": text})
        self._nodes = alive


def _on(node_id: str) -> Any:
    """Return the strategy that puts a task on one node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _got(ref: Any, i: int) -> bytes:
    """Return what a task gave.

    Raises:
        UserError: If its process or node died too often.
    """
    import ray

    try:
        data: bytes = ray.get(ref)
    except ray.exceptions.RayError as error:
        why = type(error).__name__
        raise UserError(
            f"job {i} lost its process or node {TRIES} times ({why}; memory that runs out ends "
            "them); use larger nodes or smaller batches"
        ) from None
    return data


def _connect(address: str) -> None:
    """Join a cluster as its driver.

    Raises:
        UserError: If Ray is not installed, or nobody answers.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "--pool ray needs ray, which is not installed: pip install 'excise[ray]'"
        ) from None
    where = "on this machine" if address == "auto" else f"at {address}"
    nobody = f"no Ray cluster answers {where}; start one with ray start --head, or name its address"
    try:
        if address != "auto":  # which Ray itself would try for two minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, ValueError, SystemExit):  # the last is what Ray gives up with
        raise UserError(nobody) from None
    except RuntimeError as error:  # other versions of Ray or Python
        raise UserError(
            f"the Ray cluster {where} refuses: {str(error).strip().splitlines()[0]}"
        ) from None


@contextmanager
def _cancelled(running: Mapping[Any, int], mailbox: Any) -> Iterator[None]:
    """Stop what still runs at the end, after it has saved its state, and drop the mailbox."""
    import ray

    try:
        yield
    finally:
        for ref in running:
            ray.cancel(ref)  # as Ctrl-C
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=GRACE)
        ray.kill(mailbox)


@contextmanager
def _held() -> Iterator[Callable[[], None]]:
    """Hold signals back while Ray is called, which makes other errors of what they raise.

    Ray also puts its own handler of SIGTERM in place, which goes at the end.

    Yields:
        What lets those that came since the last time take effect; the end does so as well.
    """
    if threading.current_thread() is not threading.main_thread():  # which no signal reaches
        yield lambda: None
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hold(number: int, _: object) -> None:
        came.append(number)

    def heed() -> None:
        while came:
            number = came.pop(0)
            signal.signal(number, before[signal.Signals(number)])
            try:
                signal.raise_signal(number)
            finally:
                signal.signal(number, hold)

    for number in before:
        signal.signal(number, hold)
    try:
        yield heed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
