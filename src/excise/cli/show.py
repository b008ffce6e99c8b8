"""`excise show NAME`: a recipe as YAML, or the settings of a method, attack or domain."""

from __future__ import annotations

from typing import get_args

import yaml
from pydantic.fields import FieldInfo

from excise.core.config import Config
from excise.core.errors import UserError, nearest


def main(args: list[str]) -> int:
    """Print a recipe or what can be set."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: excise show NAME\n\nPrint a recipe, or the settings of a method or attack.")
        return 0
    if len(args) > 1:
        raise UserError(f"unexpected argument '{args[1]}'; excise show takes one name")
    name = args[0]
    from excise.recipes import RECIPES, recipe_named

    if name in RECIPES:
        recipe = recipe_named(name).model_dump(mode="json")
        print(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), end="")
        return 0
    from excise.requests.registry import registry
    from excise.run.study import study_named, study_points

    if name in study_points():
        print(settings(study_named(name)))
        return 0
    members = {n: cls for family in registry().values() for n, cls in family.items()}
    if name not in members:
        known = [*members, *RECIPES, *study_points()]
        raise UserError(f"unknown name '{name}'; {nearest(name, known)}")
    print(settings(members[name]))
    return 0


def _is_config(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


def choices(annotation: object) -> dict[str, type[Config]]:
    """Return the configurations a field chooses from by `name`; empty where it holds none."""
    found: dict[str, type[Config]] = {}
    if isinstance(annotation, type):
        field = annotation.model_fields.get("name") if issubclass(annotation, Config) else None
        return (
            {}
            if field is None or not isinstance(field.default, str)
            else {field.default: annotation}
        )
    for part in get_args(annotation):
        found |= choices(part)
    return found if len(found) > 1 else {}


def _default(field: FieldInfo) -> str:
    """Return what a field is where nothing is given."""
    if field.is_required():
        return "required"
    return repr(field.get_default(call_default_factory=True))


def _alternatives(
    path: str, default: object, description: str | None, known: dict[str, type[Config]]
) -> list[str]:
    """Return the lines of a field that chooses by `name`."""
    shown = repr(getattr(default, "name", None))
    lines = [f"  --{path}.name = {shown}  {description or ''}"]
    for name, cls in known.items():
        lines.append(f"    {name}: {(cls.__doc__ or '').strip().splitlines()[0]}")
        for inner, field in cls.model_fields.items():
            if inner != "name":
                lines.append(f"      --{path}.{inner} = {_default(field)}")
    return lines


def settings(cls: type[Config], prefix: str = "") -> str:
    """Return the fields of a configuration, one a line, with defaults and help."""
    lines = [] if prefix else [f"{cls.__doc__ or ''}".strip(), ""]
    paper = getattr(cls, "paper", None)
    if paper is not None and not prefix:
        lines += [f"source: {paper.title} {paper.url} {paper.repository}".rstrip(), ""]
    for name, field in cls.model_fields.items():
        default = field.default
        alternatives = choices(field.annotation)
        if len(alternatives) > 1:
            lines += _alternatives(f"{prefix}{name}", default, field.description, alternatives)
            continue
        inner_class = next((a for a in get_args(field.annotation) if _is_config(a)), None)
        if default is None and inner_class is not None:
            lines.append(f"  --{prefix}{name}.*  {field.description or ''} (off by default)")
            lines += [
                f"    --{prefix}{name}.{inner} = {_default(part)}"
                for inner, part in inner_class.model_fields.items()
            ]
        elif isinstance(default, Config):
            lines.append(f"  --{prefix}{name}.*  {field.description or ''}")
            set_by = {n for n in default.model_fields_set}
            lines += [
                f"    --{prefix}{name}.{inner} = {getattr(default, inner)!r}"
                + ("" if inner in set_by else "  (default of every loop)")
                for inner in type(default).model_fields
            ]
        else:
            lines.append(f"  --{prefix}{name} = {_default(field)}  {field.description or ''}")
    return "\n".join(lines)
