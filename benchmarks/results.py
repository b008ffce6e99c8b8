"""Rows of `results.csv`: which machine, which commit, and columns that grow at the end."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from excise.train.pool import visible_cores

TABLE = Path(__file__).with_name("results.csv")


def hardware(device: str = "cpu") -> str:
    """Return the name of the accelerator, or of the processor with its cores and threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    return f"{name}, {visible_cores()} cores, {torch.get_num_threads()} threads"


def commit() -> str:
    """Return the commit of the working tree, or `unknown`."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def save(benchmark: str, facts: Mapping[str, Any], device: str = "cpu") -> None:
    """Append a row; columns that the table lacks are added at its end."""
    row = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "benchmark": benchmark,
        "hardware": hardware(device),
        "commit": commit(),
        **facts,
    }
    rows: list[Mapping[str, Any]] = []
    columns: list[str] = []
    if TABLE.exists():
        with TABLE.open(newline="") as f:
            reader = csv.DictReader(f)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    columns += [name for name in row if name not in columns]
    work = TABLE.with_name(f".{TABLE.name}.{os.getpid()}")
    with work.open("w", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    work.replace(TABLE)
