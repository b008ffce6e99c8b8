"""Several workers on several devices: who has which, and how many fit into memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from excise.cli.jobs import admitted
from excise.core.context import OWN_DEVICE, own_device
from excise.core.errors import UserError
from excise.core.events import silent
from excise.core.stages import Runtime
from excise.run import devices
from excise.run.devices import fitting_workers, pool_on, worker_devices
from excise.run.estimate import Pace, Plan
from excise.run.pools import Jobs, Shard
from excise.train.pool import Processes

GIB = 2**30


def accelerators(
    monkeypatch: pytest.MonkeyPatch, free: Sequence[float], kind: str = "cuda"
) -> None:
    """Let there be accelerators with so many GiB free each."""
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: len(free))
    each = {f"{kind}:{i}": int(one * GIB) for i, one in enumerate(free)}
    monkeypatch.setattr(module, "mem_get_info", lambda device: (each[device], 80 * GIB))


@pytest.mark.parametrize(
    ("device", "workers", "given"),
    [
        ("auto", 0, (0, 1, 2)),
        ("cuda", 0, (0, 1, 2)),
        ("cuda", 2, (0, 1)),
        ("cuda", 5, (0, 1, 2, 0, 1)),
    ],
)
def test_workers_take_the_visible_devices_in_turn(
    device: str, workers: int, given: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerators(monkeypatch, [8, 8, 8])
    monkeypatch.setattr(devices, "device_of", lambda name: "cuda" if name == "auto" else name)
    assert worker_devices(device, workers) == tuple(f"cuda:{i}" for i in given)


def test_a_device_that_is_named_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, [8, 8, 8])
    monkeypatch.setattr(devices, "device_of", lambda name: name)
    assert worker_devices("cuda:1") == ("cuda:1",)
    assert worker_devices("cuda:1", 2) == ("cuda:1", "cuda:1")


def test_without_an_accelerator_there_is_a_worker_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_cores", lambda: 5)
    assert worker_devices("cpu") == ("cpu",) * 5
    assert pool_on("cpu", 3, silent).workers == 3


def test_workers_that_do_not_fit_on_a_device_are_refused_with_how_many_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerators(monkeypatch, [79, 40])
    monkeypatch.setattr(devices, "device_of", lambda name: name)
    assert fitting_workers("cuda", 0, 30 * GIB) == 2
    assert fitting_workers("cuda", 3, 30 * GIB) == 3
    sentence = r"2 workers need about 60.00 GiB of memory and cuda:1 has free only 40.00 GiB"
    with pytest.raises(UserError, match=rf"{sentence}, in which 1 fits; use fewer --workers"):
        fitting_workers("cuda", 4, 30 * GIB)
    with pytest.raises(UserError, match=r"^needs about 50.00 GiB of memory and cuda:1 has free"):
        fitting_workers("cuda", 0, 50 * GIB)


def test_on_the_cpu_as_many_start_as_fit_and_no_more_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "visible_cores", lambda: 8)
    monkeypatch.setattr(devices, "free_memory", lambda _: 10.0 * GIB)
    pace = Pace(1e-9, 1e-9)
    estimate = Plan("x", 1, (), 3.0 * GIB, 1.0, tmp_path, pace)
    told: list[Mapping[str, Any]] = []
    assert estimate.admit(0, lambda _, data: told.append(data), force=False) == 3
    assert told == [{"text": "3 of 8 workers start, at about 3.00 GiB of memory each"}]
    assert estimate.admit(2, silent, force=False) == 2
    with pytest.raises(UserError, match=r"4 workers need about 12.00 GiB .* 10.00 GiB, in which 3"):
        estimate.admit(4, silent, force=False)
    assert estimate.admit(4, silent, force=True) == 4
    large = replace(estimate, memory=11.0 * GIB)
    with pytest.raises(UserError, match=r"about 11.00 GiB of memory and this machine has 10.00"):
        large.admit(0, silent, force=False)


def test_only_workers_of_this_machine_are_planned_by_its_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "visible_cores", lambda: 8)
    monkeypatch.setattr(devices, "free_memory", lambda _: 10.0 * GIB)
    estimate = Plan("x", 1, (), 3.0 * GIB, 1.0, tmp_path, Pace(1e-9, 1e-9))
    shard = Shard(1, 2, tmp_path / "out")
    for jobs in (Jobs(tmp_path), Jobs(tmp_path, shard=shard)):
        assert admitted(jobs, estimate, silent, force=False).pool("cpu", silent).workers == 3
    cluster = Jobs(tmp_path, cluster="auto")
    large = replace(estimate, memory=11.0 * GIB)
    assert admitted(cluster, large, silent, force=False) == cluster
    with pytest.raises(UserError, match="of disk under"):
        admitted(cluster, replace(large, disk=2.0**80), silent, force=False)


def test_memory_that_nothing_tells_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, [1])
    monkeypatch.setattr(devices, "device_of", lambda name: name)
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    assert fitting_workers("cuda", 7, 30 * GIB) == 7


def _where(runtime: Runtime) -> tuple[str, int]:
    return str(runtime.context(Path()).device), os.getpid()


@pytest.mark.slow
def test_every_worker_computes_on_a_device_of_its_own(tmp_path: Path) -> None:
    """On devices whose number the CPU ignores; a new worker takes the place of one that ended."""
    runtime = Runtime(tmp_path, device="cpu")
    with Processes(3, preload=("torch",), devices=("cpu:0", "cpu:1", "cpu:0")) as pool:
        found = dict(pid for pid in pool.map(_swapped, [runtime] * 12))
        assert set(found.values()) <= {"cpu:0", "cpu:1"}
        pool.map(_die_at_first, [(runtime, str(tmp_path / f"{i}")) for i in range(4)])
        again = dict(pool.map(_swapped, [runtime] * 12))
    assert len(again) <= 3
    assert sorted(again.values()) in (["cpu:0", "cpu:0", "cpu:1"], ["cpu:0", "cpu:1"])


def _swapped(runtime: Runtime) -> tuple[int, str]:
    time.sleep(0.1)
    device, pid = _where(runtime)
    return pid, device


def _die_at_first(job: tuple[Runtime, str]) -> str:
    if not Path(job[1]).exists():
        Path(job[1]).touch()
        os._exit(9)
    return _where(job[0])[0]


def test_a_device_that_is_named_stays_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_DEVICE, "cuda:3")
    assert own_device("cuda") == "cuda:3"
    assert own_device("cuda:1") == "cuda:1"
    assert own_device("cpu") == "cpu"
