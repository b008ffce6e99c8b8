"""`excise run NAME`: make the models, remove, attack, judge, report; or answer a study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from excise.cli import study
from excise.cli.jobs import admitted, jobs_of, leave, whole_command
from excise.cli.options import CheckOptions, RunOptions
from excise.cli.progress import progress, show_plan
from excise.cli.settings import override
from excise.core.code_files import is_code, load_code
from excise.core.disk import check_regular
from excise.core.errors import UserError, nearest
from excise.core.plain import NotPlain, read_yaml
from excise.core.plugins import entry_points
from excise.recipes import RECIPES, recipe_named
from excise.requests.recipe import Recipe
from excise.requests.registry import parse_recipe, registry
from excise.run.estimate import plan
from excise.run.run import run
from excise.run.study import study_points


def main(options: RunOptions) -> int:
    """Run a recipe or a study, or say what that would do."""
    if study.is_study(options.name):
        if options.measure or options.require:
            flag = "--measure" if options.measure else "--require"
            raise UserError(f"{flag} is for recipes, and {options.name} is a study; leave it out")
        return study.main(options)
    recipe = recipe_of(options)
    out = options.out or Path("runs") / recipe.name
    jobs = jobs_of(options, out)
    if options.dry_run or options.measure:
        show_plan(recipe, jobs.out, measure=options.measure, quiet=options.quiet)
        return 0
    estimate = plan(recipe, jobs.out, rows=False)
    if jobs.shard is not None and jobs.shard.number > 1:
        recipe = recipe.model_copy(update={"keep": "none"})  # one copy of the models is enough
    with progress(jobs.out / "events.jsonl", quiet=options.quiet, tracker=options.track) as emit:
        jobs = admitted(jobs, estimate, emit, force=options.force)
        pool = jobs.pool(recipe.device, emit)
        run(recipe, jobs.out, pool, command=whole_command(options.command))
    return leave(jobs)


def recipe_of(options: RunOptions | CheckOptions) -> Recipe:
    """Return the recipe that is named, with changed settings.

    Raises:
        UserError: If there is no such recipe, it has no such settings, or a value is wrong.
    """
    data = recipe_data(options.name, allow_code=options.allow_code)
    if options.full:
        raise UserError(f"--full is for studies, and {options.name} is a recipe; leave it out")
    settings = dict(options.settings)
    if isinstance(options, RunOptions) and options.require:
        settings["audit.require"] = json.dumps(options.require)
    return parse_recipe(
        override(data, settings, Recipe, registry()),
        allow_code=options.allow_code,
        source=options.name,
    )


def recipe_data(name: str, *, allow_code: bool = False) -> Mapping[str, Any]:
    """Return the plain data of a recipe: by name, from a YAML file, or `./mine.py:recipe`.

    Args:
        name: Which.
        allow_code: Whether the user asked for code of their own with `--allow-code`.

    Raises:
        UserError: If there is none of these, or it is no recipe.
    """
    if is_code(name):
        recipe = load_code(name, allow=allow_code)
        recipe = recipe() if callable(recipe) else recipe
        if not isinstance(recipe, Recipe):
            raise UserError(f"'{name}' gives no recipe; let it return an excise.Recipe")
        return recipe.model_dump(mode="json")
    recipes = {*RECIPES, *entry_points("recipe")}
    if name in recipes:
        return recipe_named(name).model_dump(mode="json")
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{name} is a folder; name a recipe or its YAML file")
    if path.exists():
        return _read_yaml(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        raise UserError(f"there is no recipe file {name}; check the path")
    hint = nearest(name, [*recipes, *study_points()])
    if not hint.startswith("did"):
        hint = "excise ls recipes and excise ls studies list what there is"
    raise UserError(f"unknown recipe '{name}'; {hint}")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    """Return the mapping that a YAML file holds."""
    check_regular(path)
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not valid UTF-8; save the file as UTF-8") from None
    except NotPlain as error:
        raise UserError(f"{path} {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no mapping; see excise show demo for a recipe")
    return data
