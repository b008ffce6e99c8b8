"""What a piece of work takes, in memory and time, on a CPU or a GPU."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler is talkative

import torch
from torch.profiler import ProfilerActivity, profile


def peak(device: str, work: Callable[[], Any]) -> int:
    """Return the bytes that `work` holds at its peak beyond what is there before it."""
    gc.collect()
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    results: Any = seen.profiler
    events = results.kineto_results.events()
    deltas = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(0, *itertools.accumulate(nbytes for _, nbytes in sorted(deltas)))


def timed(device: str, work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that `work` takes, on the clock and of this process."""
    began = time.perf_counter(), time.process_time()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began[0], time.process_time() - began[1]
