"""A pool that shares its jobs with others: what it takes first, and what it puts back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from excise.core.context import Context, Stage
from excise.core.disk import locked
from excise.core.stages import LAYOUT, Busy, Runtime, Store
from excise.train.pool import Processes
from excise.train.shared import Shared


@dataclass(frozen=True)
class Number(Stage[int]):
    """A number, made of another one where `of` says so."""

    value: int
    of: int | None = None

    @property
    def name(self) -> str:
        return f"number-{self.value}"

    def make(self, ctx: Context) -> None:
        more = 0 if self.of is None else ctx.run(Number(self.of))
        (ctx.work / "n").write_text(str(self.value + more))

    def read(self, folder: Path) -> int:
        return int((folder / "n").read_text())


def lock_of(runtime: Runtime, stage: Number) -> Path:
    """Return the lock that whoever makes a stage holds."""
    path = runtime.path(stage)
    return path.parent / ".locks" / f"{path.name}.lock"


def test_own_jobs_come_first_and_others_after(tmp_path: Path) -> None:
    order: list[int] = []
    jobs = [Number(i) for i in range(6)]
    pool = Shared(Processes(1), 1, 3)
    with pool:
        found = pool.map(Runtime(tmp_path).run, jobs, lambda i, _: order.append(i))
    assert found == list(range(6))
    assert order == [1, 4, 2, 5, 0, 3]


@pytest.mark.parametrize("held", [Number(0), Number(9)])
def test_what_another_process_makes_is_put_back(
    held: Number, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process holds the lock of the first job, or of what the first job is made of."""
    runtime = Runtime(tmp_path)
    jobs = [Number(0, of=9) if held.value == 9 else Number(0), Number(1), Number(2)]
    lock = locked(lock_of(runtime, held), lambda: None)
    order: list[int] = []

    def pause(seconds: float) -> None:
        """Let the other process end while this one looks away."""
        assert order == [2, 1]
        lock.__exit__(None, None, None)

    monkeypatch.setattr("excise.train.shared.time.sleep", pause)
    pool = Shared(Processes(1), 2, 3)
    lock.__enter__()
    with pool:
        found = pool.map(runtime.run, jobs, lambda i, _: order.append(i), turns=[0, None, 0])
    assert found == [9 if held.value == 9 else 0, 1, 2]
    assert order == [2, 1, 0]


def test_only_a_job_that_is_told_so_gives_up(tmp_path: Path) -> None:
    store = Store(tmp_path / LAYOUT, wait=False)
    path = store.path("a", {})
    with locked(path.parent / ".locks" / f"{path.name}.lock"), pytest.raises(Busy, match="a-"):
        store.stage("a", {}, lambda work: None)
    assert store.stage("a", {}, lambda work: None) == path
    assert Runtime(tmp_path)._kept.wait
