"""The pool of a Ray cluster, on two nodes of this machine.

Run by `make ray-test`, which puts Ray into a folder of its own; `make test` does not need it.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster

from excise.core.errors import Diverged, UserError
from excise.core.events import emit
from excise.train.ray_pool import RayPool
from excise.train.worker import INSIDE


def settings(x: int) -> tuple[int, int, bool, str | None]:
    """Return what a job computes with, and tell an event."""
    emit("step", {"x": x})
    return x, torch.get_num_threads(), bool(torch.tensor([1e-40]) * 1.0 == 0), os.environ[INSIDE]


def fail(x: int) -> int:
    """Fail as a training does."""
    if x == 1:
        raise Diverged("term 'a' is nan at step 3")
    return x


def die_once(path: str) -> str:
    """Die the first time, as a process does whose node goes away."""
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def resolved(path: Path) -> Path:
    """Return what a relative path means to a job."""
    return path.absolute()


def die(_: int) -> None:
    """Die whenever it is tried."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_driver(job: tuple[int, int, Path, Path]) -> str:
    """Send the driver a signal once another job runs too, and save a state on the way out."""
    pid, number, own, other = job
    try:
        own.write_text("runs")
        while not other.exists():
            time.sleep(0.05)
        if pid:
            os.kill(pid, number)
        for _ in range(1200):  # steps of a training: Ray interrupts between, not within
            time.sleep(0.05)
    finally:
        own.write_text("saved")
    return "not stopped"


class Stopped(BaseException):
    """What the driver's own handler of a signal raises, as the command's does."""


def stop(*_: object) -> None:
    """Handle a signal."""
    raise Stopped


def check_signals(address: str, folder: Path) -> None:
    """End a run by a signal: its handler's error comes out as itself, and jobs save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.signal(number, stop)
        saved = a, b = folder / f"{number}-a", folder / f"{number}-b"
        jobs = [(os.getpid(), number, a, b), (0, number, b, a)]
        try:
            with RayPool(address, folder / "store") as pool:
                pool.map(stop_driver, jobs)
        except Stopped:
            assert signal.getsignal(number) is stop
        else:
            raise AssertionError("the signal was lost")
        finally:
            signal.signal(number, before)
        assert [path.read_text() for path in saved] == ["saved"] * 2
        assert not [*(folder / "store").iterdir()], "the token stayed"
    print("signals: their own error, states saved")


def said_by(pool: RayPool, kind: type[Exception] = UserError, jobs: Any = None) -> str:
    """Return what a pool refuses with when it starts, or at the jobs of a function."""
    try:
        with pool:
            if jobs is not None:
                pool.map(*jobs)
    except kind as error:
        return str(error)
    raise AssertionError("nothing was refused")


def check(address: str, folder: Path) -> None:
    """Hold a pool to what every pool does, and to what only this one refuses."""
    told: list[tuple[str, Mapping[str, Any]]] = []
    pool = RayPool(address, folder / "store", emit=lambda *event: told.append(event))
    before = signal.getsignal(signal.SIGTERM)
    done: list[int] = []
    with pool:
        assert signal.getsignal(signal.SIGTERM) == before
        assert pool.workers == 2
        found = pool.map(settings, range(6), lambda i, _: done.append(i), turns=[0, 0, None] * 2)
        assert found == [(x, 1, True, "1") for x in range(6)], found
        assert sorted(done) == sorted(data["x"] for _, data in told) == list(range(6))
        assert pool.peak_bytes > 0
        assert pool.map(die_once, [str(folder / name) for name in "ab"]) == ["alive"] * 2
        assert pool.map(settings, []) == []
    assert not [*(folder / "store").iterdir()], "the token stayed"
    os.chdir(folder)
    with RayPool(address, folder / "store") as pool:
        assert pool.map(resolved, [Path("a")]) == [folder / "a"], "names count from elsewhere"
    print("jobs: order, events, one thread, deaths, the driver's folder")
    assert "nan at step 3" in said_by(pool, Diverged, (fail, [0, 1, 2]))
    assert "lost its process or node 4 times" in said_by(pool, UserError, (die, [0]))
    versions = tuple((name, "1.0" if name == "torch" else v) for name, v in pool._site.versions)
    wrong = {
        f"has torch {torch.__version__.partition('+')[0]}": {"versions": versions},
        "where the driver has 1.0": {"versions": versions},
        "another state of its source": {"source": "x"},
        f"does not see {folder / 'elsewhere'}": {"token": folder / "elsewhere" / "token"},
        f"has no folder {folder / 'nowhere'}": {"folder": folder / "nowhere"},
    }
    for words, change in wrong.items():
        odd = RayPool(address, folder / "store")
        odd._site = replace(odd._site, **change)  # type: ignore[arg-type]
        said = said_by(odd)
        assert words in said, said
        assert said.startswith("node "), said
        print(f"refused: {said}")
    odd = RayPool(address, folder / "store", gpu=True)
    assert "has a GPU" in said_by(odd)


def main() -> int:
    """Start two nodes and check the pool on them."""
    assert threading.current_thread() is threading.main_thread()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory() as folder:
            check(cluster.address, Path(folder).resolve())
            check_signals(cluster.address, Path(folder).resolve())
    finally:
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
