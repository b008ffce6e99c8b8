"""`excise study NAME`: answer a question whose statistic and margin are stated beforehand."""

from __future__ import annotations

from pathlib import Path

from excise.cli.jobs import jobs_of, leave, whole_command
from excise.cli.options import DottedSettings, StudyOptions
from excise.cli.progress import progress
from excise.cli.settings import override
from excise.core.config import parse
from excise.core.plugins import collect_code, entry_points
from excise.recipes import RECIPES
from excise.requests.registry import registry
from excise.run.study import Study, conduct, study_named, study_points


def main(options: StudyOptions) -> int:
    """Run a study, or say what it would do."""
    study = study_of(
        options.name, options.settings, full=options.full, allow_code=options.allow_code
    )
    out = options.out or Path("runs") / (options.name + ("-full" if options.full else ""))
    jobs = jobs_of(options, out)
    if options.dry_run:
        print(f"{statement(study)}\noutput: {out}")
        return 0
    with progress(jobs.out / "events.jsonl", quiet=options.quiet, tracker=options.track) as emit:
        pool = jobs.pool(study.device, emit)
        conduct(study, jobs.out, pool, command=whole_command(options.command))
    return leave(jobs)


def is_study(name: str) -> bool:
    """Return whether a name is a study's and no recipe's."""
    return name in study_points() and name not in {*RECIPES, *entry_points("recipe")}


def study_of(name: str, settings: DottedSettings, *, full: bool, allow_code: bool = False) -> Study:
    """Return a study with changed settings.

    Args:
        name: Which study.
        settings: Values by dotted path, as written.
        full: Whether to start from its settings for a real model.
        allow_code: Whether the user asked for code of their own with `--allow-code`.

    Raises:
        UserError: If there is no such study, it has no such settings, or a value is wrong.
    """
    cls = study_named(name)
    data = (cls.full() if full else cls(**{})).model_dump(mode="json")
    changed = override(data, settings, cls, registry())
    named, _, classes = collect_code(changed, allow=allow_code)
    return parse(cls, named, registry(classes), source=f"study {name}")


def statement(study: Study) -> str:
    """Return what is stated before a study runs: question, statistic, margin and cost."""
    return "\n".join(
        [
            study.question,
            f"statistic: {study.statistic}",
            f"margin: {study.margin:g}",
            f"takes: {study.takes or 'not measured'}",
        ]
    )
