"""`excise run NAME`: make the models, remove, attack, judge, report; or answer a study."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from excise.cli.flags import flag_names, flags, override, overrides, progress, recipe_data
from excise.cli.study import StudyOptions, is_study
from excise.cli.study import start as start_study
from excise.core.errors import UserError


@dataclass
class RunOptions:
    """Run a recipe or a study; run again, it goes on. Any field of it: --a.b VALUE."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a recipe (excise ls recipes), a YAML file, or a study (excise ls studies)."""
    out: Path | None = None
    """Output folder; runs/NAME when missing."""
    workers: int = 0
    """Worker processes with one thread each; 0 takes one for each core."""
    dry_run: bool = False
    """Print what would be done and what it would cost, and stop."""
    force: bool = False
    """Start even if the estimate says it cannot fit."""
    quiet: bool = False
    """Show no progress."""
    allow_code: bool = False
    """Run code of one's own that the recipe names as ./file.py:Class."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(RunOptions, args, "excise run")
    return start(options, rest, "excise run " + shlex.join(args))


def start(options: RunOptions, rest: list[str], command: str) -> int:
    """Parse the recipe with its overrides, check that it fits, and run it."""
    changes = overrides(rest, flag_names(RunOptions))
    if is_study(options.recipe):
        asked = StudyOptions(options.recipe, options.out, options.workers, quiet=options.quiet)
        return start_study(asked, changes, command, dry_run=options.dry_run)
    data = override(recipe_data(options.recipe, allow_code=options.allow_code), changes)
    from excise.requests.registry import parse_recipe
    from excise.run.estimate import plan

    recipe = parse_recipe(data, allow_code=options.allow_code, source=options.recipe)
    out = options.out or Path("runs") / recipe.name
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    estimate = plan(recipe, out)
    if options.dry_run:
        print(estimate.text())
        return 0
    estimate.refuse(force=options.force)
    from excise.report.terminal import finish
    from excise.run.run import run

    with progress(out / "events.jsonl", quiet=options.quiet) as emit:
        run(recipe, out, workers=options.workers, emit=emit, command=command)
    return finish(out)
