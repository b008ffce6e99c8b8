"""The end of a run as a person sees it: the page written, the summary printed."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from excise import record
from excise.report.page import write_report
from excise.report.terminal import render_terminal


def finish(folder: Path, next_command: str = "") -> int:
    """Write `report.html` from the record in `folder` and print the summary.

    Args:
        folder: Output folder with a `run.json`.
        next_command: What to type next; empty for what the record suggests.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the folder holds no record.
    """
    loaded = record.load(folder)
    write_report(folder)
    Console().print(render_terminal(loaded, folder, next_command))
    return 0
