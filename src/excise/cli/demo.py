"""`excise demo`: the recipe `demo`, offline, in under two minutes."""

from __future__ import annotations

from excise.cli import run
from excise.cli.options import DemoOptions, RunOptions


def main(options: DemoOptions) -> int:
    """Run the recipe."""
    return run.main(RunOptions(name="demo", **vars(options)))
