"""All members of the open families: built in, from installed packages, from a file of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from excise.auditor.attacks import ATTACKS
from excise.core.config import C, Config, parse
from excise.core.errors import UserError
from excise.core.plugins import collect_code, entry_points
from excise.domains import DOMAINS
from excise.evals.extra import SCORES
from excise.methods import METHODS
from excise.requests.audit import AuditRun
from excise.requests.recipe import Recipe

BUILTIN: Mapping[str, Mapping[str, type[Config]]] = {
    "method": METHODS,
    "attack": ATTACKS,
    "domain": DOMAINS,
    "score": SCORES,
}


def registry(own: Mapping[str, type[Config]] | None = None) -> dict[str, dict[str, type[Config]]]:
    """Return every member by family and name.

    Args:
        own: Classes from a file of the user's, by name; they join the family they belong to.

    Raises:
        UserError: If two members of a family have one name.
    """
    members = {
        family: {**built, **entry_points(family, built)} for family, built in BUILTIN.items()
    }
    for name, cls in (own or {}).items():
        family = members.setdefault(cls.kind, {})
        if name in family:
            raise UserError(
                f"'{cls.__qualname__}' in {inspect.getfile(cls)} is called '{name}' like a "
                f"{cls.kind} that is there already; give it another name"
            )
        family[name] = cls
    return members


def parse_recipe(data: Mapping[str, Any], *, allow_code: bool = False, source: str = "") -> Recipe:
    """Build a recipe from plain data; see `parse_named`."""
    return parse_named(Recipe, data, allow_code=allow_code, source=source)


def parse_audit(data: Mapping[str, Any], *, allow_code: bool = False, source: str = "") -> AuditRun:
    """Build the request of an audit from plain data; see `parse_named`."""
    return parse_named(AuditRun, data, allow_code=allow_code, source=source)


def parse_named(cls: type[C], data: Mapping[str, Any], *, allow_code: bool, source: str) -> C:
    """Build a configuration whose parts are chosen by name.

    Args:
        cls: What to build.
        data: What YAML holds; `name: ./mine.py:Cls` is allowed wherever a name fits.
        allow_code: Whether the user asked for code of their own with `--allow-code`.
        source: File or command named in an error.

    Raises:
        ConfigError: With every problem found.
        UserError: If code is named and not allowed, or cannot be loaded.
    """
    known: dict[str, str] = dict(data.get("code") or {})
    named, references, classes = collect_code(dict(data), allow=allow_code)
    for name, reference in known.items():
        if name not in classes:
            _, again, loaded = collect_code({"name": reference}, allow=allow_code)
            references.update(again)
            classes.update(loaded)
    if references:
        named["code"] = {**known, **references}
    return parse(cls, named, registry(classes), source=source)
