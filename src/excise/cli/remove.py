"""`excise remove METHOD`: the everyday case, a model and two files in, an edited model out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from excise.cli.options import RemoveOptions
from excise.cli.progress import progress
from excise.cli.settings import override
from excise.core.code_files import is_code
from excise.core.config import ConfigError
from excise.core.errors import UserError
from excise.methods.base import Method
from excise.report.terminal import finish
from excise.requests.registry import parse_recipe, registry
from excise.run.estimate import plan
from excise.run.output import check_out
from excise.run.run import run


def main(options: RemoveOptions) -> int:
    """Remove, or say what that would do."""
    try:
        recipe = parse_recipe(recipe_data(options), allow_code=options.allow_code)
    except ConfigError as error:
        raise ConfigError([as_flag(problem) for problem in error.problems]) from None
    check_out(options.out)
    estimate = plan(recipe, options.out)
    if options.dry_run:
        print(estimate.text())
        return 0
    estimate.refuse(force=options.force)
    events = options.out / "events.jsonl"
    with progress(events, quiet=options.quiet) as emit:
        run(
            recipe,
            options.out,
            workers=options.workers,
            emit=emit,
            command=options.command,
            kind="remove",
        )
    return finish(options.out)


def as_flag(problem: str) -> str:
    """Name a problem as the command line does: `arms.rmu.fit.lr` is `--fit.lr`."""
    problem = re.sub(r"^arms\.[^.:]+\.name: ", "", problem)
    problem = re.sub(r"^arms\.([^.:]+): ", r"\1 ", problem)
    problem = re.sub(r"^arms\.[^.:]+\.", "--", problem)
    return re.sub(r"^(domain|model|audit)\.(path|budget)?\.?", r"--", problem)


def recipe_data(options: RemoveOptions) -> dict[str, Any]:
    """Return the recipe that a `remove` command line stands for, as plain data."""
    method, name = {"name": options.method}, options.method
    if is_code(name):
        name = name.rpartition(":")[2].lower()
    domain: dict[str, Any] = {
        "name": "files",
        "forget": named(options.forget, "--forget"),
        "retain": options.retain,
        "seed": options.seed,
        "sensitive": options.sensitive,
    }
    if options.adjacent:
        domain["adjacent"] = options.adjacent
    for role in ("relearn", "test"):
        if getattr(options, role):
            domain[role] = named(getattr(options, role), f"--{role}")
    return {
        "name": f"remove-{name}",
        "title": f"{name} on {Path(options.model).name}",
        "domain": domain,
        "model": {"path": options.model, "revision": options.revision},
        "arms": {name: override(method, options.settings, Method, registry())},
        "audit": {"budget": options.audit, "require": options.require},
        "refit": options.refit,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device,
    }


def named(values: tuple[str, ...], flag: str) -> dict[str, str]:
    """Turn FILE and NAME=FILE into a mapping; a lone FILE is called `forget`.

    Raises:
        UserError: If a name is given twice or is no word.
    """
    files: dict[str, str] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or "/" in name or "." in name:
            name, file = "forget", value
        if name in files:
            raise UserError(f"{flag}: '{name}' is given twice; write NAME=FILE for each capability")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{flag}: '{name}' is no name; use letters, digits, '-' and '_'")
        files[name] = file
    return files
