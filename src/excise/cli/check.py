"""`excise check RECIPE`: validate, estimate, and show a row as the model will see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from excise.cli.flags import flag_names, flags, override, overrides, recipe_data


@dataclass
class CheckOptions:
    """Validate a recipe and estimate its cost; trains nothing. Any field: --a.b VALUE."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of a recipe or a YAML file."""
    out: Path | None = None
    """Output folder the run would use."""
    force: bool = False
    """Do not refuse what cannot fit."""
    allow_code: bool = False
    """Load code of one's own that the recipe names as ./file.py:Class."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(CheckOptions, args, "excise check")
    changes = overrides(rest, flag_names(CheckOptions))
    data = override(recipe_data(options.recipe, allow_code=options.allow_code), changes)
    from excise.data.stream import show
    from excise.fetch.model import open_model
    from excise.requests.registry import parse_recipe
    from excise.run.estimate import plan

    recipe = parse_recipe(data, allow_code=options.allow_code, source=options.recipe)
    out = options.out or Path("runs") / recipe.name
    estimate = plan(recipe, out)
    print(estimate.text())
    estimate.refuse(force=options.force)
    original = None if recipe.model.scratch else open_model(recipe.model)
    domain = recipe.domain.build(original)
    tokenizer = original.tokenizer() if original else recipe.domain.tokenizer()
    print("\nrows by role")
    for role, rows in domain.roles():
        if rows:
            print(f"  {role:<22} {len(rows):>7,} rows  {len({r.unit for r in rows}):>7,} units")
    for note in domain.notes:
        print(f"  note: {note}")
    first = next(iter(domain.forget.values()))[0]
    print("\na forget row; scored tokens are marked")
    print(show(first, tokenizer) if not domain.sensitive else "(kept out: the data is sensitive)")
    return 0
