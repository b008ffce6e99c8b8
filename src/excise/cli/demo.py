"""`excise demo`: the recipe `demo`, offline, in under two minutes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from excise.cli.flags import flags
from excise.cli.run import RunOptions, start


@dataclass
class DemoOptions:
    """Train small models, remove by several methods, attack each, report."""

    out: Path = Path("runs/demo")
    """Output folder."""
    workers: int = 0
    """Worker processes with one thread each; 0 takes one for each core."""
    quiet: bool = False
    """Show no progress."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(DemoOptions, args, "excise demo")
    run = RunOptions("demo", options.out, options.workers, quiet=options.quiet)
    return start(run, rest, "excise demo " + shlex.join(args))
