"""The end of a run as a person sees it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from excise import record
from excise.report.terminal import render_terminal


def finish(folder: Path, next_command: str = "") -> int:
    """Print the summary of a run.

    Args:
        folder: Output folder with a `run.json`.
        next_command: What to type next; empty for what the record suggests.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the folder holds no record.
    """
    Console().print(render_terminal(record.load(folder), folder, next_command))
    return 0
