"""A share of the jobs of a run that several machines work on, which see one store of stages.

Every one of them runs the whole line of the run. What one has made is there for all, so that a
job is done once, by whoever comes to it first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Self

from excise.core.context import Stage
from excise.core.events import Emit
from excise.core.stages import PATIENT, Busy, Runtime
from excise.train.pool import Pool
from excise.train.worker import J, R

SOON, LATE = 0.5, 5.0
"""Seconds until what is busy elsewhere is looked at again: at first, and after long."""


@dataclass(frozen=True)
class _Try(Generic[J, R]):
    """A function that gives up where it would wait for another process."""

    function: Callable[[J], R]

    def __call__(self, job: J) -> R | Busy:
        """Return what the function does, or that another process is making it."""
        token = PATIENT.set(False)
        try:
            return self.function(job)
        except Busy as busy:
            return busy
        finally:
            PATIENT.reset(token)


class Shared:
    """A pool of this machine that takes its share of the jobs first, then what nobody has taken.

    Attributes:
        workers: Of the pool of this machine.
        emit: Of the pool of this machine.
        peak_bytes: Of the pool of this machine.
    """

    world = 1

    def __init__(self, pool: Pool, at: int, of: int) -> None:
        """Share jobs.

        Args:
            pool: What runs them here.
            at: Which share is ours: jobs `i` with `i % of == at`.
            of: Number of shares.
        """
        self.pool, self.at, self.of = pool, at, of

    @property
    def workers(self) -> int:
        """Return how many jobs run here at the same time."""
        return self.pool.workers

    @property
    def emit(self) -> Emit:
        """Return the sink of events."""
        return self.pool.emit

    @property
    def peak_bytes(self) -> int:
        """Return the largest resident memory of a worker here."""
        return self.pool.peak_bytes

    def __enter__(self) -> Self:
        """Start the pool of this machine."""
        self.pool.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End its workers."""
        self.pool.__exit__()

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        on_done: Callable[[int, R], None] | None = None,
        *,
        turns: Sequence[int | None] = (),
    ) -> list[R]:
        """Run `function` on every job that is not done elsewhere; see `Pool.map`.

        A job whose stage another machine is making is put back, and looked at again once nothing
        else is left: it is done then, or its machine is gone and it is ours to do.
        """
        results: dict[int, R] = {}
        waiting = sorted(range(len(jobs)), key=lambda i: ((i - self.at) % self.of, i))
        pause = SOON
        while waiting:
            done = len(results)

            def note(k: int, result: R | Busy, tried: Sequence[int] = tuple(waiting)) -> None:
                if isinstance(result, Busy):
                    return
                results[tried[k]] = result
                if on_done is not None:
                    on_done(tried[k], result)

            here = [turns[i] for i in waiting] if turns else ()
            self.pool.map(_Try(function), [jobs[i] for i in waiting], note, turns=here)
            waiting = [i for i in waiting if i not in results]
            if waiting:
                if len(results) > done:
                    pause = SOON
                    text = f"waiting for {len(waiting)} jobs that other shards are doing"
                    self.emit("phase", {"text": text})
                time.sleep(pause)
                pause = min(2 * pause, LATE)
        return [results[i] for i in range(len(jobs))]

    def make(self, stages: Sequence[Stage[R]], runtime: Runtime) -> list[R]:
        """Make each stage as a job; see `Pool.make`."""
        return self.map(runtime.run, stages)
