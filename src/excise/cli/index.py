"""Builds the index that `ls` and `remove METHOD --help` read instead of importing everything.

`python -m excise.cli.index` writes it again; a test checks that it is current.
"""

from __future__ import annotations

import json
from typing import Any

from excise.auditor.attacks import ATTACKS
from excise.cli.ls import INDEX
from excise.cli.show import setting_lines
from excise.core.disk import write_text
from excise.domains import DOMAINS
from excise.evals.extra import SCORES
from excise.methods import METHODS, Chain, Method
from excise.recipes import RECIPES, recipe_named
from excise.run.study import study_named, study_points


def build_index() -> dict[str, list[dict[str, Any]]]:
    """Return what ships, by family; what other packages add is listed by its entry point."""

    def line(member: type) -> str:
        return (member.__doc__ or "").strip().splitlines()[0]

    recipes = {name: recipe_named(name) for name in RECIPES}
    studies = {
        name: study_named(name)
        for name, point in study_points().items()
        if point.module.startswith("excise_studies.")
    }
    return {
        "methods": [
            {
                "name": name,
                "what": line(cls),
                "starts from": cls.starts_from,
                "needs": ", ".join(cls.needs),
                **costs(cls),
                "source": f"{cls.paper.title} {cls.paper.url}".strip(),
                # `excise remove` takes no others.
                "settings": setting_lines(cls) if cls.starts_from == "original" else [],
            }
            for name, cls in METHODS.items()
        ],
        "attacks": [
            {
                "name": name,
                "what": line(cls),
                "access": cls.access,
                "level": cls.level,
                "needs original": "yes" if cls.needs_original else "no",
                "source": cls.source,
            }
            for name, cls in ATTACKS.items()
        ],
        "domains": [{"name": name, "what": line(cls)} for name, cls in DOMAINS.items()],
        "scores": [{"name": name, "what": line(cls)} for name, cls in SCORES.items()],
        "recipes": [
            {"name": name, "what": recipe.title, "takes": recipe.takes}
            for name, recipe in recipes.items()
        ],
        "studies": [
            {"name": name, "what": study.question, "takes": study.takes}
            for name, study in studies.items()
        ],
    }


def costs(cls: type[Method]) -> dict[str, str]:
    """Return what a method after training costs at its defaults; a chain costs what its links do.

    Those that train from scratch all have the schedule of the recipe.
    """
    if cls.starts_from == "scratch" or cls is Chain:
        return {}
    plain = cls.model_construct()
    readings = "one reading" if plain.step_cost == 1 else f"{plain.step_cost:.3g} readings"
    when = " a step" if "fit" in cls.model_fields else ""
    return {
        "cost": f"{readings} of its rows{when}, forward and back",
        "copies of the model": f"{1 + plain.extra_copies}",
    }


def main() -> None:
    """Write the index."""
    write_text(INDEX, json.dumps(build_index(), indent=1) + "\n")


if __name__ == "__main__":
    main()
