"""The static index that `ls` reads: what there is, without importing it.

`python -m excise.cli.index` writes it again; a test checks that it is current.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("index.json")

FAMILIES = ("methods", "attacks", "domains", "recipes", "studies")
"""What `excise ls` can list."""


def load_index() -> dict[str, list[dict[str, Any]]]:
    """Return the index: one entry per member, by family."""
    data: dict[str, list[dict[str, Any]]] = json.loads(PATH.read_text(encoding="utf-8"))
    return data


def build_index() -> dict[str, list[dict[str, Any]]]:
    """Build the index from the classes themselves; imports everything."""
    from excise.auditor.attacks import ATTACKS
    from excise.domains.builtin import DOMAINS
    from excise.methods import METHODS
    from excise.recipes import RECIPES, recipe_named
    from excise.run.study import study_named, study_points

    def line(member: type) -> str:
        return (member.__doc__ or "").strip().splitlines()[0]

    recipes = {name: recipe_named(name) for name in RECIPES}
    return {
        "methods": [
            {
                "name": name,
                "what": line(cls),
                "starts from": cls.starts_from,
                "needs": ", ".join(cls.needs),
                "source": f"{cls.paper.title} {cls.paper.url}".strip(),
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
        "recipes": [
            {"name": name, "what": recipe.title, "takes": recipe.takes}
            for name, recipe in recipes.items()
        ],
        "studies": [
            {"name": name, "what": study.question, "takes": study.takes}
            for name, study in ((name, study_named(name)) for name in study_points())
        ],
    }


def main() -> None:
    """Write the index."""
    from excise.record import write_text

    write_text(PATH, json.dumps(build_index(), indent=1) + "\n")


if __name__ == "__main__":
    main()
