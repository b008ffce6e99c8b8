"""What verbs on an edited model and its original share: data from flags, models from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from excise.cli.remove import named
from excise.core.errors import UserError

if TYPE_CHECKING:
    from excise.record import Record


class PairOptions(Protocol):
    """Flags that name an edited model, its original, and the data between them."""

    model: str
    original: str
    forget: Any
    retain: Any
    split: Any
    seed: int


def files_domain(options: PairOptions) -> dict[str, Any]:
    """Return the data that the flags of `audit` and `inspect` stand for.

    Raises:
        UserError: If a needed flag is missing.
    """
    for flag in ("model", "original", "forget", "retain"):
        if not getattr(options, flag):
            raise UserError(
                f"--{flag} is missing; give --model, --original, --forget and --retain, or the "
                "output folder of a removal"
            )
    domain: dict[str, Any] = {
        "name": "files",
        "forget": named(options.forget, "--forget"),
        "retain": options.retain,
        "seed": options.seed,
    }
    return domain | ({"split": options.split} if options.split else {"exposure": "unknown"})


def edited_models(folder: Path, made: Record, recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the edited models of an output folder by name.

    Args:
        folder: The folder.
        made: Its record.
        recipe: What was asked for; an audit names its candidates there.
    """
    if made.kind == "audit":
        return dict(recipe["candidates"])
    several = len(made.method_runs) > 1
    return {
        arm.name: str(folder / "models" / arm.name if several else folder / "model")
        for arm in made.method_runs
    }


def recipe_of(folder: Path) -> Mapping[str, Any]:
    """Return the recipe that a run wrote into its output folder.

    Raises:
        UserError: If it is gone or broken.
    """
    path = folder / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, Mapping) or "domain" not in recipe:
        raise UserError(f"{path} is missing or damaged; name a whole output folder of a run")
    return recipe
