"""The pool: order, errors as themselves, deaths, interrupts, and no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from excise.core.errors import Diverged, UserError
from excise.core.events import emit
from excise.train import pool as pool_module
from excise.train.pool import Processes, visible_cores


def _square(x: int) -> tuple[int, int]:
    time.sleep(0.02 * (3 - x % 3))
    return x * x, os.getpid()


def _fail(x: int) -> int:
    if x == 1:
        raise Diverged("term 'a' is nan at step 3")
    if x == 2:
        raise UserError("one sentence")
    if x == 3:
        raise _Odd(1, 2)
    return x


class _Odd(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def _die_once(path: str) -> str:
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def _die(x: int) -> int:
    if x == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def _tell(x: int) -> int:
    emit("step", {"x": x})
    return x


def _settings(_: int) -> tuple[int, bool, str | None]:
    tiny = torch.tensor([1e-40]) * 1.0
    return torch.get_num_threads(), bool(tiny == 0), os.environ.get("OMP_NUM_THREADS")


def _nested(x: int) -> list[int]:
    with Processes(4) as pool:
        return pool.map(_tell, [x, x + 1])


def _tensor(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _alone(folder: str) -> int:
    """Count the jobs that run at the same time as this one."""
    mine = Path(folder) / f"{os.getpid()}"
    mine.touch()
    time.sleep(0.2)
    others = len(list(Path(folder).iterdir())) - 1
    mine.unlink()
    return others


def _meet(folder: str) -> bool:
    """Wait until another job is here at the same time."""
    (Path(folder) / f"{os.getpid()}").touch()
    for _ in range(600):
        if len(list(Path(folder).iterdir())) > 1:
            return True
        time.sleep(0.05)
    return False


def _hold(size: int) -> int:
    """Keep memory beyond the job, as fragments of a large model do."""
    setattr(sys.modules[__name__], "_held", torch.ones(size))  # noqa: B010
    return os.getpid()


@pytest.fixture(scope="module")
def pool() -> Iterator[Processes]:
    with Processes(2, preload=("torch",)) as pool:
        yield pool


def test_results_come_in_order_from_warm_workers(pool: Processes) -> None:
    done: list[int] = []
    first = pool.map(_square, range(6), on_done=lambda i, _: done.append(i))
    assert [value for value, _ in first] == [0, 1, 4, 9, 16, 25]
    assert sorted(done) == list(range(6))
    pids = {pid for _, pid in first}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert {pid for _, pid in pool.map(_square, range(6))} <= pids
    assert pool.map(_square, []) == []


def test_workers_compute_with_one_thread(pool: Processes) -> None:
    assert pool.map(_settings, [0, 1]) == [(1, True, "1")] * 2


def test_tensors_travel_by_value(pool: Processes) -> None:
    (out,) = pool.map(_tensor, [torch.ones(3)])
    assert out.tolist() == [2, 2, 2]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("jobs", "kind", "words"),
    [([0, 1], Diverged, "at step 3"), ([0, 2], UserError, "one sentence")],
)
def test_errors_come_back_as_themselves(
    pool: Processes, workers: int, jobs: list[int], kind: type[Exception], words: str
) -> None:
    here = pool if workers == 2 else Processes(1)
    with pytest.raises(kind, match=words):
        here.map(_fail, jobs)
    assert here.map(_fail, [4, 5]) == [4, 5]


def test_an_error_that_cannot_travel_keeps_its_name(pool: Processes) -> None:
    with pytest.raises(RuntimeError, match="_Odd: 1 and 2") as caught:
        pool.map(_fail, [3])
    assert "in _fail" in caught.value.__notes__[0]


def test_what_cannot_be_sent_says_so_and_leaves_the_pool_usable(pool: Processes) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"local|pickle"):
        pool.map(lambda x: x, [1])
    assert pool.map(_tell, [1]) == [1]


def test_a_dead_worker_is_replaced_once(pool: Processes, tmp_path: Path) -> None:
    told: list[str] = []
    pool.emit = lambda kind, data: told.append(data["text"])
    paths = [str(tmp_path / name) for name in "abc"]
    assert pool.map(_die_once, paths) == ["alive"] * 3
    assert len(told) == 3
    with pytest.raises(UserError, match=r"died twice on job 1 \(killed by signal 9"):
        pool.map(_die, [0, 1, 2])
    assert pool.map(_die, [4, 5]) == [4, 5]


@pytest.mark.parametrize("workers", [1, 2])
def test_events_of_jobs_reach_the_owner(pool: Processes, workers: int) -> None:
    here = pool if workers == 2 else Processes(1)
    told: list[tuple[str, Mapping[str, Any]]] = []
    here.emit = lambda kind, data: told.append((kind, data))
    here.map(_tell, [3, 4])
    assert sorted(data["x"] for _, data in told) == [3, 4]
    told.clear()
    assert here.map(_nested, [7]) == [[7, 8]]  # a pool in a worker runs in place


def test_default_is_the_cores_we_may_use() -> None:
    assert 1 <= visible_cores() <= (os.cpu_count() or 1)
    assert Processes().workers == visible_cores()
    assert Processes(0).workers == 1


JOBS = """
import os, time
from pathlib import Path
def wait(folder):
    try:
        Path(folder, f"{os.getpid()}.started").touch()
        time.sleep(60)
    finally:
        time.sleep(0.3)  # as saving does: told twice to stop, it is not cut short
        Path(folder, f"{os.getpid()}.saved").touch()
"""
MAIN = """
import sys
from excise.train.pool import Processes
from jobs import wait
with Processes(2, preload=("torch",)) as pool:
    pool.map(wait, [sys.argv[1]] * 4)
"""


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def started(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a script that owns a pool, and return it and its busy workers.

    The script has no main guard, as scripts often have none.
    """
    (folder / "jobs.py").write_text(JOBS)
    (folder / "main.py").write_text(MAIN)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen(
        [sys.executable, "main.py", str(folder)],
        cwd=folder,
        env=env,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.started"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.stem) for path in folder.glob("*.started")]
    assert len(workers) == 2
    return owner, workers


def test_a_worker_told_twice_to_stop_still_saves(tmp_path: Path) -> None:
    owner, workers = started(tmp_path)
    try:
        for _ in range(2):
            os.kill(workers[0], signal.SIGTERM)
            time.sleep(0.1)  # in the middle of the saving, which takes 0.3 s
        deadline = time.monotonic() + 20
        while not _gone(workers[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (tmp_path / f"{workers[0]}.saved").exists()
    finally:
        owner.kill()
        owner.wait()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_save_and_go_when_the_owner_is_stopped(how: signal.Signals, tmp_path: Path) -> None:
    owner, workers = started(tmp_path)
    began = time.monotonic()
    owner.send_signal(how)
    assert owner.wait(30) != 0
    while not all(_gone(pid) for pid in workers) and time.monotonic() < began + 20:
        time.sleep(0.05)
    assert all(_gone(pid) for pid in workers)
    assert sorted(int(p.stem) for p in tmp_path.glob("*.saved")) == sorted(workers)
    assert time.monotonic() - began < 10


def _fill(megabytes: int) -> int:
    return len(bytearray(megabytes << 20))


def test_the_pool_knows_the_peak_memory_of_its_workers() -> None:
    with Processes(2, preload=()) as pool:
        pool.map(_fill, [1])
        small = pool.peak_bytes
        pool.map(_fill, [900])
    assert 0 < small < 900 << 20
    assert pool.peak_bytes > 900 << 20


def test_jobs_of_one_turn_never_run_together(pool: Processes, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    done: list[int] = []
    jobs = [str(tmp_path / "a")] * 3
    assert pool.map(_alone, jobs, lambda i, _: done.append(i), turns=[0, 0, 0]) == [0, 0, 0]
    assert done == [0, 1, 2]
    (tmp_path / "b").mkdir()
    assert all(pool.map(_meet, [str(tmp_path / "b")] * 2, turns=[0, 1]))
    mixed = pool.map(_square, list(range(6)), turns=[0, None, 0, None, 0, 1])
    assert [value for value, _ in mixed] == [0, 1, 4, 9, 16, 25]


def test_a_worker_that_still_holds_much_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with Processes(2, preload=("torch",)) as pool:
        one = pool.map(_hold, [10])[0]
        assert pool.map(_hold, [10])[0] == one
        monkeypatch.setattr(pool_module, "REUSED_BELOW", 1)
        pool.map(_hold, [10])
        monkeypatch.undo()
        assert pool.map(_hold, [10])[0] != one
