"""Where and with what a run was made, for the record."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

from excise.core.errors import UserError
from excise.core.keys import library_versions
from excise.record import Environment
from excise.train.worker import peak_bytes


def device_of(name: str) -> str:
    """Return the device a run uses: `auto` takes an accelerator where there is one.

    Of several kinds the first of cuda, xpu, mps.

    Raises:
        UserError: If the named device is not here.
    """
    if name == "auto":
        kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
        return next((kind for kind, its in kinds.items() if its.is_available()), "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"device '{name}' is not available here; use cpu or auto") from None
    return name


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment(dtype: str, device: str, started: str, world: int = 1) -> Environment:
    """Return what decides numbers here: versions, device, processes, threads; and when it began."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    versions = dict(library_versions())
    return Environment(
        excise=versions.get("excise", ""),
        versions=versions,
        device=f"{device} ({name})",
        dtype=dtype,
        git=git_state(Path(__file__).parent),
        platform=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        threads=torch.get_num_threads(),
        world=world,
        started=started,
    )


def git_state(folder: Path) -> str:
    """Return the commit of the working tree around `folder`, `+dirty` when it was not clean."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *args],  # a kill would leave them
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        tracked = git("ls-files", "--error-unmatch", str(Path(__file__)))
        if not (commit and tracked):
            return ""
        return commit + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return ""


def peak_memory(workers: int = 0) -> int:
    """Return the largest resident memory in bytes that one process of the run has had.

    Args:
        workers: The same of the workers, as `Pool.peak_bytes` has it.
    """
    return max(peak_bytes(), workers)
