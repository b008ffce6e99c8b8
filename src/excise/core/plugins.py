"""Third-party code: entry points of installed packages, `./mine.py:Cls` with `--allow-code`.

This module imports no torch; what it loads may.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

from excise.core.code_files import is_code, load_code
from excise.core.config import Config
from excise.core.errors import UserError

FAMILIES = ("method", "attack", "domain", "score", "recipe")
"""Families that are open; their entry-point groups are `excise.methods` and so on."""


def import_bitsandbytes() -> ModuleType | None:
    """Return bitsandbytes where it is installed, imported without what it says or fetches then.

    On some processors it asks the package `kernels` for compiled code of the hub, or complains
    that there is none: remote code, which stays off. peft imports it too, so it comes first.
    """
    logger, kernels = logging.getLogger("bitsandbytes"), sys.modules.get("kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        return None
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def offered(group: str, taken: Collection[str] = ()) -> dict[str, EntryPoint]:
    """Return what installed packages offer, by name, without loading it.

    Args:
        group: What comes after `excise.` in the name of the entry points.
        taken: Names that excise itself has.

    Raises:
        UserError: If a name is taken, or two packages offer it: which is meant cannot be told.
    """
    points: dict[str, EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=f"excise.{group}"):
        other = points.setdefault(point.name, point)
        rival = "excise itself" if point.name in taken else other.value
        if point.name in taken or other.value != point.value:
            raise UserError(
                f"{group}: both {rival} and {point.value} are called '{point.name}'; rename one "
                "or uninstall its package"
            )
    return points


def entry_points(family: str, taken: Collection[str] = ()) -> dict[str, Any]:
    """Load what installed packages offer for a family, by name; see `offered`."""
    return {name: point.load() for name, point in offered(f"{family}s", taken).items()}


def collect_code(data: Any, *, allow: bool) -> tuple[Any, dict[str, str], dict[str, type[Config]]]:
    """Replace every `name: ./mine.py:Cls` in plain data by the class's own name.

    Args:
        data: Plain data of a configuration.
        allow: Whether the user asked for code with `--allow-code`.

    Returns:
        The data with names in place of references, reference by name, and class by name.

    Raises:
        UserError: If the code cannot be loaded, or two references are called alike.
    """
    references: dict[str, str] = {}
    classes: dict[str, type[Config]] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            out = {k: walk(v) for k, v in value.items()}
            if is_code(out.get("name")):
                cls = load_code(out["name"], allow=allow)
                name = default_name(cls, out["name"])
                if references.get(name, out["name"]) != out["name"]:
                    raise UserError(
                        f"both '{references[name]}' and '{out['name']}' are called '{name}'; give "
                        "one another name"
                    )
                references[name], classes[name] = out["name"], cls
                out["name"] = name
            return out
        return [walk(v) for v in value] if isinstance(value, list | tuple) else value

    return walk(data), references, classes


def default_name(cls: Any, reference: str) -> str:
    """Return the name that a user's class declares.

    Raises:
        UserError: If it is not a configuration with a `name`.
    """
    if not (inspect.isclass(cls) and issubclass(cls, Config) and cls.kind in FAMILIES):
        raise UserError(f"'{reference}' is no {', '.join(FAMILIES[:-1])}; see docs/extending.md")
    if inspect.isabstract(cls):
        lacking = ", ".join(sorted(cls.__abstractmethods__))
        raise UserError(f"'{reference}' lacks {lacking}; see docs/extending.md")
    field = cls.model_fields.get("name")
    if field is None or not isinstance(field.default, str):
        raise UserError(
            f'\'{reference}\' has no field `name: Literal["..."] = "..."`; see docs/extending.md'
        )
    return field.default
