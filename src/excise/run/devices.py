"""Which device each worker has, and how much memory there is on it."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from excise.core.errors import UserError
from excise.core.events import Emit
from excise.run.environment import device_of
from excise.train.pool import Processes, visible_cores


def worker_devices(device: str, workers: int = 0) -> tuple[str, ...]:
    """Return the device of every worker.

    Args:
        device: As a request names it: `auto`, a kind of device, or one of several as `cuda:1`.
        workers: How many are asked for; 0 for one a device that this process sees
            (`CUDA_VISIBLE_DEVICES` says which), or one a core on the CPU.

    Raises:
        UserError: If the device is not here.
    """
    kind, _, index = device_of(device).partition(":")
    if kind == "cpu":
        return ("cpu",) * (workers or visible_cores())
    if index:
        return (f"{kind}:{index}",) * (workers or 1)
    count = max(1, torch.get_device_module(kind).device_count())
    return tuple(f"{kind}:{i % count}" for i in range(workers or count))


def pool_on(device: str, workers: int, emit: Emit) -> Processes:
    """Return a pool with a device for every worker; arguments as `worker_devices`."""
    devices = worker_devices(device, workers)
    return Processes(len(devices), emit=emit, devices=() if devices[0] == "cpu" else devices)


def free_memory(device: str) -> float:
    """Return the bytes of memory that workers may fill on a device.

    Of the CPU that is all of the machine's, or of this process's cgroup; of an accelerator what
    is free there now. Where nothing tells it, infinity.
    """
    kind = device.partition(":")[0]
    if kind != "cpu":
        ask = getattr(torch.get_device_module(kind), "mem_get_info", None)
        return float("inf") if ask is None else float(ask(device)[0])
    limits = [float("inf")]
    with suppress(AttributeError):  # Windows
        limits.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    with suppress(OSError, ValueError):  # no cgroup, or `max`
        limits.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def fitting_workers(device: str, workers: int, need: float) -> int:
    """Return how many workers start, all of them within the memory of their devices.

    Args:
        device: As in `worker_devices`.
        workers: How many are asked for; 0 for one a device, or on the CPU for one a core, but no
            more than fit.
        need: Bytes of memory that one worker takes at its peak.

    Raises:
        UserError: If they do not fit.
    """
    devices = Counter(worker_devices(device, workers))
    fit = {}
    for name, count in devices.items():
        free = free_memory(name)
        fit[name] = count if free >= count * need else int(free / need)
        if not fit[name]:
            where = "this machine has" if name == "cpu" else f"{name} has free only"
            raise UserError(
                f"needs about {gib(need)} of memory and {where} {gib(free)}; "
                "use --lora.rank, a smaller fit.micro_size, or --force to try"
            )
        if fit[name] < count and workers:
            where = "this machine has" if name == "cpu" else f"{name} has free only"
            raise UserError(
                f"{count} workers need about {gib(count * need)} of memory and {where} "
                f"{gib(free)}, in which {fit[name]} fit{'s' * (fit[name] == 1)}; use fewer "
                "--workers, or --force to try"
            )
    return sum(fit.values())


def gib(count: float) -> str:
    """Return bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.0f} MiB"
