"""`excise check NAME`: validate, estimate, and show a row as the model will see it."""

from __future__ import annotations

from pathlib import Path

import yaml

from excise.cli.options import CheckOptions
from excise.cli.run import recipe_of
from excise.cli.study import is_study, statement, study_of
from excise.data.stream import show
from excise.fetch.model import open_model
from excise.requests.recipe import Recipe
from excise.run.estimate import plan


def main(options: CheckOptions) -> int:
    """Print what a recipe or a study would do."""
    if is_study(options.name):
        study = study_of(options.name, options.settings, full=options.full)
        settings = study.model_dump(mode="json", exclude={"name"})
        print(f"{statement(study)}\n\nsettings")
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
        return 0
    recipe = recipe_of(options)
    estimate = plan(recipe, options.out or Path("runs") / recipe.name)
    print(estimate.text())
    estimate.refuse(force=options.force)
    print_rows(recipe)
    return 0


def print_rows(recipe: Recipe) -> None:
    """Print how many rows each role has, and a forget row with its scored tokens marked."""
    original = None if recipe.model.scratch else open_model(recipe.model)
    domain = recipe.domain.build(original)
    tokenizer = original.tokenizer() if original else recipe.domain.tokenizer()
    print("\nrows by role")
    for role, rows in domain.roles():
        if rows:
            units = len({row.unit for row in rows})
            print(f"  {role:<22} {len(rows):>7,} rows  {units:>7,} units")
    for note in domain.notes:
        print(f"  note: {note}")
    first = next(iter(domain.forget.values()))[0]
    print("\na forget row; scored tokens are marked")
    print(show(first, tokenizer) if not domain.sensitive else "(kept out: the data is sensitive)")
