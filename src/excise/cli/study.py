"""`excise study NAME`: answer a question whose statistic and margin are stated beforehand."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from excise.cli.flags import flag_names, flags, override, overrides, progress


@dataclass
class StudyOptions:
    """Run a study; run again, it goes on. Any setting of the study: --a.b VALUE."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of a study (excise ls studies)."""
    out: Path | None = None
    """Output folder; runs/NAME when missing."""
    workers: int = 0
    """Worker processes with one thread each; 0 takes one for each core."""
    full: bool = False
    """Use the settings for a real model, where the study has some."""
    quiet: bool = False
    """Show no progress."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(StudyOptions, args, "excise study")
    changes = overrides(rest, flag_names(StudyOptions))
    return start(options, changes, "excise study " + shlex.join(args))


def is_study(name: str) -> bool:
    """Return whether a name is a study's and no recipe's."""
    from excise.core.plugins import entry_points
    from excise.recipes import RECIPES

    offered = importlib.metadata.entry_points(group="excise.studies")
    return name in offered.names and name not in RECIPES and name not in entry_points("recipe")


def start(
    options: StudyOptions, changes: Mapping[str, Any], command: str, *, dry_run: bool = False
) -> int:
    """Run a study with changed settings, or say what it would do.

    Args:
        options: The verb's flags.
        changes: Settings by dotted path.
        command: What makes the record again.
        dry_run: Print question, statistic and cost, and stop.
    """
    from excise.run.study import conduct, study_named

    cls = study_named(options.name)
    from excise.core.config import parse
    from excise.report.terminal import finish
    from excise.requests.registry import registry
    from excise.run.output import check_out

    settings = cls.full() if options.full else cls(**{})
    data = override(settings.model_dump(mode="json"), changes)
    study = parse(cls, data, registry(), source=f"study {options.name}")
    out = options.out or Path("runs") / (options.name + ("-full" if options.full else ""))
    check_out(out)
    if dry_run:
        takes = cls.takes or "not measured"
        print(f"{cls.question}\nstatistic: {cls.statistic}\nmargin: {study.margin:g}")
        print(f"takes: {takes}\noutput: {out}")
        return 0
    with progress(out / "events.jsonl", quiet=options.quiet) as emit:
        conduct(study, out, workers=options.workers, emit=emit, command=command)
    return finish(out)
