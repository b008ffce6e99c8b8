"""The body of a worker process of `excise.train.pool.Processes`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from excise.core.context import OWN_DEVICE
from excise.core.events import CHANNEL, Emit

J = TypeVar("J")
R = TypeVar("R")

INSIDE = "EXCISE_WORKER"
"""Environment variable that is set inside a worker."""

MUCH = 1 << 30
"""Resident bytes from which on a worker tidies up between jobs."""


@contextmanager
def plain_modes() -> Iterator[None]:
    """Leave the modes of torch that the caller is in, which would decide numbers unseen."""
    import torch

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)


def run_job(function: Callable[[J], R], job: J) -> R:
    """Do a job in this process, in no mode that the caller is in."""
    with plain_modes():
        result = function(job)
    release()
    return result


def settle() -> None:
    """Make this process compute as a worker does: one thread, denormals flushed to zero."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def unsettle() -> None:
    """Count denormals again, in a process that continues with other work."""
    import torch

    torch.set_flush_denormal(False)


@contextmanager
def in_place(emit: Emit) -> Iterator[None]:
    """Let this process compute as a worker does, and hear what its jobs have to tell."""
    settle()
    inside = bool(os.environ.get(INSIDE))
    token = None if inside else CHANNEL.set(emit)  # a worker's channel leads home
    try:
        yield
    finally:
        if token is not None:
            CHANNEL.reset(token)
            unsettle()


def peak_bytes() -> int:
    """Return the largest resident memory of this process, in bytes; 0 where nothing tells it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def release() -> int:
    """Return the memory of a finished job to the system, where it was much.

    The allocator keeps it otherwise, and another worker's job would find too little.

    Returns:
        Resident bytes afterwards, 0 where the system does not tell.
    """
    if resident_bytes() > MUCH:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
            ctypes.CDLL(None).malloc_trim(0)  # glibc has it
    if name := os.environ.get(OWN_DEVICE):
        import torch

        getattr(torch.get_device_module(name), "empty_cache", bool)()
    return resident_bytes()


def resident_bytes() -> int:
    """Return this process's resident memory, in bytes; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * mmap.PAGESIZE


def _stop(*_: object) -> None:
    """Leave through `finally` blocks, so that training saves its state."""
    # The pool and the end of its owner both say so: the second must not cut the saving short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(143)


def _follow_parent() -> None:
    """End this worker when the process that owns the pool is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def take_device(name: str) -> None:
    """Make a device this process's own: kernels that name none, such as Triton's, run there."""
    import torch

    os.environ[OWN_DEVICE] = name
    choose = getattr(torch.get_device_module(name), "set_device", None)
    if choose is not None:  # Apple's are one
        choose(name)


def work(pipe: connection.Connection, path: list[str], device: str) -> None:
    """Answer jobs until the pipe closes: the body of a worker, with a device of its own or ``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner hears Ctrl-C and tells us
    signal.signal(signal.SIGTERM, _stop)
    os.environ[INSIDE] = "1"
    sys.path[:] = path
    threading.Thread(target=_follow_parent, daemon=True).start()
    settle()

    def forward(kind: str, data: Mapping[str, Any]) -> None:
        pipe.send_bytes(pickle.dumps(("emit", kind, dict(data))))

    CHANNEL.set(forward)
    if device:
        take_device(device)
    while True:
        try:
            _, main, data = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return

        def compute(main: str | None = main, data: bytes = data) -> Any:
            _adopt_main(main)
            function, job = pickle.loads(data)
            return function(job)

        try:
            pipe.send_bytes(answer(compute))
        except OSError:
            return


def answer(compute: Callable[[], Any]) -> bytes:
    """Do one job and return the message that says how it went.

    Returns:
        Pickled: `("done", result, largest and present resident bytes)` or `("error", error)`.
    """
    try:
        result = compute()
        resident = release()
        return pickle.dumps(("done", result, peak_bytes(), resident))
    except Exception as error:
        data = wrapped(error)
        release()
        return data


def wrapped(error: BaseException) -> bytes:
    """Return the message that raises `error` in the owner, with the worker's traceback."""
    text = "".join(traceback.format_exception(error))
    error.__traceback__ = error.__cause__ = error.__context__ = None
    error.add_note(f"in a worker process:\n{text}")
    try:
        data = pickle.dumps(("error", error))
        pickle.loads(data)
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(f"in a worker process:\n{text}")
        data = pickle.dumps(("error", plain))
    return data


def _adopt_main(path: str | None) -> None:
    """Load the owner's script under another name, so that its guarded part does not run."""
    if path is None or getattr(sys.modules["__main__"], "__file__", None) == path:
        return
    spec = importlib.util.spec_from_file_location("__mp_main__", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    spec.loader.exec_module(module)
