"""Named recipes, one module each; a recipe is a function that returns the whole configuration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from excise.core.errors import UserError, nearest
from excise.core.plugins import entry_points

if TYPE_CHECKING:
    from excise.requests.recipe import Recipe

RECIPES: Mapping[str, str] = {
    "demo": "excise.recipes.demo",
    "era-facts": "excise.recipes.era_facts",
    "sgtm-facts": "excise.recipes.sgtm_facts",
    "routed-prose": "excise.recipes.routed_prose",
    "smollm-cyber": "excise.recipes.smollm_cyber",
    "smollm-glosses": "excise.recipes.smollm_glosses",
    "undo-arithmetic": "excise.recipes.undo_arithmetic",
    "undo-languages": "excise.recipes.undo_languages",
    "smollm-undo": "excise.recipes.smollm_undo",
}
"""Recipes by name: the module whose `recipe()` returns it."""


def recipe_named(name: str) -> Recipe:
    """Return a recipe by name, built in or from an installed package.

    Raises:
        UserError: If there is none of that name.
    """
    if name in RECIPES:
        recipe: Recipe = importlib.import_module(RECIPES[name]).recipe()
        return recipe
    offered = entry_points("recipe", RECIPES)
    if name not in offered:
        raise UserError(f"unknown recipe '{name}'; {nearest(name, [*RECIPES, *offered])}")
    recipe = offered[name]()
    return recipe
