"""Many small jobs: what a pool of workers is, and warm processes of one thread each.

Importing torch and transformers costs seconds a process, so a server process imports them once
and forks the workers, which then live as long as the pool. Messages go through pipes between our
own processes; nothing is read from a file.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, Protocol, Self

from excise.core.context import Stage
from excise.core.errors import UserError
from excise.core.events import Emit, silent
from excise.core.stages import Runtime
from excise.train.worker import INSIDE, J, R, in_place, run_job, work

PRELOAD = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "excise.train.fit",
)
"""What the server imports before it forks workers; a module that is missing is left out."""

REUSED_BELOW = 800 << 20
"""Resident bytes up to which a worker takes another job: what a large model leaves behind, in
pieces that no allocator gives back, would be needed by the next job of another worker."""

GRACE = 10.0
"""Seconds a worker has to save its state before it is killed."""

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def visible_cores() -> int:
    """Return how many cores this process may use: affinity, then the quota of its cgroup."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    v2 = Path("/sys/fs/cgroup/cpu.max")
    v1 = Path("/sys/fs/cgroup/cpu")
    try:
        if v2.is_file():
            quota, period = v2.read_text().split()
        else:
            quota = (v1 / "cpu.cfs_quota_us").read_text().strip()
            period = (v1 / "cpu.cfs_period_us").read_text().strip()
        if quota not in ("max", "-1"):
            cores = min(cores, float(quota) / float(period))
    except (OSError, ValueError, ZeroDivisionError):
        pass  # no cgroup to ask
    return max(1, math.floor(cores))


@dataclass
class _Worker:
    """A process and our end of its pipe."""

    process: Any
    pipe: connection.Connection
    device: str

    def end(self, grace: float) -> None:
        """Ask the process to save and go, and kill it if it does not."""
        self.pipe.close()
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(grace)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


class Pool(Protocol):
    """Workers that take jobs inside a `with` block.

    `Processes`, `Shared`, `RayPool` and `TorchrunPool` are the ways there are.

    Attributes:
        workers: Jobs that run at the same time at most.
        emit: Sink of events that jobs send through `excise.core.events.emit`.
        peak_bytes: Largest resident memory of any worker that finished a job.
        world: Processes that make one stage together in `make`.
    """

    @property
    def workers(self) -> int: ...  # noqa: D102

    @property
    def emit(self) -> Emit: ...  # noqa: D102

    @property
    def peak_bytes(self) -> int: ...  # noqa: D102

    @property
    def world(self) -> int: ...  # noqa: D102

    def __enter__(self) -> Self:
        """Get ready for jobs."""
        ...

    def __exit__(self, *_: object) -> None:
        """End all workers."""
        ...

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        on_done: Callable[[int, R], None] | None = None,
        *,
        turns: Sequence[int | None] = (),
    ) -> list[R]:
        """Run `function` on every job.

        Args:
            function: Named at module level, so that a worker can find it.
            jobs: Its arguments; like results they must be picklable.
            on_done: Called in this process with number and result as jobs finish.
            turns: One number per job; jobs of one number take turns, so that their memory is
                needed once. None (and no `turns`) for a job that waits for nobody.

        Returns:
            Results in the order of `jobs`.

        Raises:
            UserError: If a worker dies too often on the same job.
            Exception: What a job raised, as itself; other running jobs are stopped, after
                saving their state.
        """
        ...

    def make(self, stages: Sequence[Stage[R]], runtime: Runtime) -> list[R]:
        """Make stages that train models, in their order.

        Args:
            stages: Those that are `data_parallel` are made by `world` processes together.
            runtime: Has the number of these processes.

        Raises:
            Exception: What a stage raised, as itself.
        """
        ...


class Processes:
    """The pool of one machine: worker processes that stay warm.

    Attributes:
        workers: Number of processes; with one, jobs run in this process.
        emit: See `Pool`.
        peak_bytes: See `Pool`.
    """

    world = 1

    def __init__(
        self,
        workers: int | None = None,
        *,
        emit: Emit = silent,
        preload: Sequence[str] = PRELOAD,
        devices: Sequence[str] = (),
    ) -> None:
        """Plan a pool; nothing starts before `with`.

        Args:
            workers: Number of processes; None for the cores this process may use. A pool inside
                a worker runs its jobs in place.
            emit: Sink of the jobs' events, called in this process.
            preload: Modules imported before workers are forked.
            devices: One a worker, that it calls its own (`own_device`); empty where all compute
                on the CPU.
        """
        wanted = visible_cores() if workers is None else workers
        self.workers = 1 if os.environ.get(INSIDE) else max(1, wanted)
        self.emit = emit
        self.preload = list(preload)
        self.peak_bytes = 0
        self._context = multiprocessing.get_context("forkserver")
        self._idle: list[_Worker] = []
        self._untaken = list(devices) or [""] * self.workers

    def __enter__(self) -> Self:
        """Start the server, which imports in the background."""
        if self.workers > 1:
            with _bare_start():
                self._context.set_forkserver_preload(self.preload)
                forkserver.ensure_running()
        return self

    def __exit__(self, *_: object) -> None:
        """End all workers."""
        self._end(self._idle)
        self._idle = []

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        on_done: Callable[[int, R], None] | None = None,
        *,
        turns: Sequence[int | None] = (),
    ) -> list[R]:
        """Run `function` on every job; a worker may die once on each. See `Pool.map`."""
        if self.workers == 1 or len(jobs) == 0:
            return self._inline(function, jobs, on_done)
        results: dict[int, R] = {}
        waiting = deque((i, False) for i in range(len(jobs)))
        running: dict[int, tuple[_Worker, bool]] = {}
        try:
            while waiting or running:
                while (taken := self._take(waiting, running, turns)) is not None:
                    i, again = taken
                    worker = self._idle.pop() if self._idle else self._start()
                    running[i] = (worker, again)
                    _give(worker, i, function, jobs[i])
                for i in self._ready(running):
                    worker, again = running[i]
                    answer = self._answer(worker)
                    if answer is None:
                        del running[i]
                        waiting.appendleft((i, self._died(worker, i, again)))
                    elif answer[0] == "emit":
                        self.emit(answer[1], answer[2])
                    else:
                        del running[i]
                        self._idle.append(worker)
                        # On a device of its own most of that is the driver's.
                        if answer[0] == "done" and not worker.device and answer[3] > REUSED_BELOW:
                            self._end([self._idle.pop()])  # a fresh one has no such pieces
                        if answer[0] == "error":
                            raise answer[1]
                        results[i] = answer[1]
                        self.peak_bytes = max(self.peak_bytes, answer[2])
                        if on_done is not None:
                            on_done(i, answer[1])
        finally:
            self._end([worker for worker, _ in running.values()])
        return [results[i] for i in range(len(jobs))]

    def make(self, stages: Sequence[Stage[R]], runtime: Runtime) -> list[R]:
        """Make each stage in a worker; see `Pool.make`."""
        return self.map(runtime.run, stages)

    def _take(
        self,
        waiting: deque[tuple[int, bool]],
        running: Mapping[int, object],
        turns: Sequence[int | None],
    ) -> tuple[int, bool] | None:
        """Take the first waiting job whose turn nobody has; None where none may start now."""
        if len(running) >= self.workers:
            return None
        busy = {turns[i] for i in running if turns and turns[i] is not None}
        for at, (i, again) in enumerate(waiting):
            if not turns or turns[i] not in busy:
                del waiting[at]
                return i, again
        return None

    def _inline(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        on_done: Callable[[int, R], None] | None,
    ) -> list[R]:
        """Run the jobs in this process, one after the other."""
        results = []
        with in_place(self.emit):
            for i, job in enumerate(jobs):
                results.append(run_job(function, job))
                if on_done is not None:
                    on_done(i, results[-1])
        return results

    def _start(self) -> _Worker:
        """Fork one worker from the server."""
        ours, theirs = self._context.Pipe()
        device = self._untaken.pop(0)
        args = (theirs, list(sys.path), device)
        process = self._context.Process(target=work, args=args, daemon=True)
        with _bare_start():
            process.start()
        theirs.close()
        return _Worker(process, ours, device)

    def _ready(self, running: Mapping[int, tuple[_Worker, bool]]) -> list[int]:
        """Wait until a running worker has something to say or is gone."""
        things: dict[Any, int] = {}
        for i, (worker, _) in running.items():
            things[worker.pipe] = i
            things[worker.process.sentinel] = i
        return sorted({things[thing] for thing in connection.wait(list(things))})

    def _answer(self, worker: _Worker) -> tuple[Any, ...] | None:
        """Return the worker's next message, or None when it is gone."""
        try:
            if worker.pipe.poll() or worker.process.is_alive():
                answer: tuple[Any, ...] = pickle.loads(worker.pipe.recv_bytes())
                return answer
        except (EOFError, OSError):
            pass
        return None

    def _died(self, worker: _Worker, i: int, again: bool) -> bool:
        """Say that the job is tried once more, or that it was tried enough."""
        worker.process.join(GRACE)
        code = worker.process.exitcode
        worker.end(0.0)
        self._untaken.append(worker.device)
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if again:
            raise UserError(
                f"a worker process died twice on job {i} ({how}; signal 9 is what the system "
                "sends when memory runs out); use fewer workers or smaller batches"
            )
        self.emit("note", {"text": f"a worker process died on job {i} ({how}); trying once more"})
        return True

    def _end(self, workers: Sequence[_Worker]) -> None:
        """End workers together, so that they save their states at the same time."""
        for worker in workers:
            if worker.process.is_alive():
                worker.process.terminate()
        for worker in workers:
            worker.end(GRACE)
            self._untaken.append(worker.device)


def _give(worker: _Worker, i: int, function: Callable[..., Any], job: Any) -> None:
    """Send a job; a worker that died in the meantime is noticed when its answer is awaited."""
    main = None
    if function.__module__ == "__main__":
        main = getattr(sys.modules["__main__"], "__file__", None)
    data = pickle.dumps((function, job))
    with suppress(OSError):
        worker.pipe.send_bytes(pickle.dumps((i, main, data)))


@contextmanager
def _bare_start() -> Iterator[None]:
    """Start processes with one thread and without running the caller's script again.

    `multiprocessing` imports the parent's main module in every child; a script without a main
    guard would start itself over. Workers load it only when a job's function lives there.
    """
    main = sys.modules["__main__"]
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
