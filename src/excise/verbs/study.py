"""`excise study NAME`: answer a question whose statistic and margin are stated beforehand."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from excise.verbs.shared import flag_names, flags, override, overrides, progress


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
    from excise.studies import study_named

    cls = study_named(options.name)
    from excise.config import parse
    from excise.output import check_out
    from excise.registry import registry
    from excise.report.show import finish
    from excise.studies.base import conduct

    settings = cls.full() if options.full else cls(**{})
    data = override(settings.model_dump(mode="json"), changes)
    study = parse(cls, data, registry(), source=f"study {options.name}")
    out = options.out or Path("runs") / (options.name + ("-full" if options.full else ""))
    check_out(out)
    with progress(out / "events.jsonl", quiet=options.quiet) as emit:
        conduct(
            study,
            out,
            workers=options.workers,
            emit=emit,
            command="excise study " + shlex.join(args),
        )
    return finish(out)
