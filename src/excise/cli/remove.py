"""`excise remove METHOD`: the everyday case, a model and two files in, an edited model out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from excise.cli.jobs import admitted, jobs_of, leave
from excise.cli.options import PairOptions, RemoveOptions
from excise.cli.progress import progress, show_plan
from excise.cli.settings import override
from excise.core.code_files import is_code
from excise.core.config import ConfigError
from excise.core.errors import UserError
from excise.methods.base import Method
from excise.requests.recipe import Recipe
from excise.requests.registry import parse_recipe, registry
from excise.run.estimate import plan
from excise.run.run import run


def main(options: RemoveOptions) -> int:
    """Remove, or say what that would do."""
    try:
        return _main(options)
    except ConfigError as error:
        raise ConfigError([as_flag(problem) for problem in error.problems]) from None


def _main(options: RemoveOptions) -> int:
    """Do the work of `main`, whose errors name fields and no flags."""
    recipe = parse_recipe(recipe_data(options), allow_code=options.allow_code)
    jobs = jobs_of(options, options.out)
    if options.dry_run or options.measure:
        show_plan(recipe, jobs.out, measure=options.measure, quiet=options.quiet)
        return 0
    estimate = plan(recipe, jobs.out, rows=False)
    with progress(jobs.out / "events.jsonl", quiet=options.quiet, tracker=options.track) as emit:
        jobs = admitted(jobs, estimate, emit, force=options.force)
        pool = jobs.pool(recipe.device, emit)
        run(recipe, jobs.out, pool, command=options.command, kind="remove")
    return leave(jobs)


def as_flag(problem: str) -> str:
    """Name a problem as the command line does: `arms.rmu.fit.lr` is `--fit.lr`."""
    problem = re.sub(r"^arms\.[^.:]+\.name: ", "", problem)
    problem = problem.replace(": unknown field; ", ": unknown setting; ")
    problem = re.sub(r"^arms\.[^.:]+: (\w+): ", r"--\1: ", problem)
    problem = re.sub(r"^arms\.([^.:]+): ", r"\1 ", problem)
    problem = re.sub(r"^arms\.[^.:]+\.", "--", problem)
    problem = re.sub(r"^model\.path\b", "--model", problem)
    problem = re.sub(r"^domain\.(?=(forget|retain|adjacent|relearn|test)\b)", "--", problem)
    return re.sub(r"^(domain|audit|evaluate)\.", r"--\1.", problem)


def recipe_data(options: RemoveOptions) -> dict[str, Any]:
    """Return the recipe that a `remove` command line stands for, as plain data."""
    method, name = {"name": options.method}, options.method
    if is_code(name):
        name = name.rpartition(":")[2].lower()
    rest = {p: v for p, v in options.settings.items() if of_rest(p)}
    settings = {p: v for p, v in options.settings.items() if p not in rest}
    if "domain.name" in rest:
        raise UserError(
            "--domain.name: name the domain with --domain, or give --forget and --retain"
        )
    data = {
        "name": f"remove-{name}",
        "title": f"{name} on {Path(options.model).name}",
        "domain": {
            **domain_data(options),
            **({"sensitive": True} if options.sensitive else {}),
        },
        "model": {"path": options.model, "revision": options.revision},
        "arms": {name: override(method, settings, Method, registry())},
        "audit": {"budget": options.audit, "require": options.require},
        "refit": options.refit,
        "keep": options.keep,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device,
        "fsdp": options.fsdp,
    }
    return override(data, rest, Recipe, registry())


def of_rest(path: str) -> bool:
    """Return whether a dotted setting is one of the recipe and none of the method."""
    return path.partition(".")[0] in ("audit", "evaluate", "domain") and "." in path


ROLES = (
    "forget",
    "retain",
    "adjacent",
    "relearn",
    "test",
    "dev_forget",
    "multi_hop",
    "retain_test",
    "adjacent_test",
    "fresh",
    "claim",
)
"""Flags that name files of one's own, and what is claimed of them."""


def domain_data(options: RemoveOptions | PairOptions) -> dict[str, Any]:
    """Return the domain that the flags of a command line name, as plain data.

    Raises:
        UserError: If a flag is missing or contradicts another, or a name is given twice or is no
            word.
    """
    if options.domain:
        for role in ROLES:
            if getattr(options, role):
                raise UserError(
                    f"--{role.replace('_', '-')} is given beside --domain {options.domain}, which "
                    "has data of its own; leave one of the two out"
                )
        return {"name": options.domain, "seed": options.seed}
    lacking = [f"--{role}" for role in ("forget", "retain") if not getattr(options, role)]
    if lacking:
        raise UserError(
            f"{' and '.join(lacking)} {'are' if len(lacking) > 1 else 'is'} missing; give --forget "
            "and --retain, or a --domain (excise ls domains)"
        )
    domain = {
        "name": "files",
        "forget": named(options.forget, "--forget"),
        "retain": options.retain,
        "seed": options.seed,
    }
    for role in ("relearn", "test", "dev_forget", "multi_hop"):
        if getattr(options, role):
            domain[role] = named(getattr(options, role), f"--{role.replace('_', '-')}")
    for role in ("adjacent", "retain_test", "adjacent_test", "fresh", "claim"):
        if getattr(options, role):
            domain[role] = getattr(options, role)
    return domain


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
