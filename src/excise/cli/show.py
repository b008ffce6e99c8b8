"""`excise show NAME`: a recipe as YAML, or the settings of anything else that `ls` lists."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator

import yaml

from excise.cli.options import ShowOptions
from excise.cli.settings import configs, is_family
from excise.core.code_files import is_code, load_code
from excise.core.config import Config
from excise.core.errors import UserError, nearest
from excise.core.plugins import default_name, entry_points
from excise.recipes import RECIPES, recipe_named
from excise.requests.registry import registry
from excise.run.study import study_named, study_points

WIDTH = 80
"""Columns of a line."""


def main(options: ShowOptions) -> int:
    """Print what a name stands for; every family's member where two share one.

    Raises:
        UserError: If nothing is called so.
    """
    name = options.name
    if is_code(name):
        cls = load_code(name, allow=options.allow_code)
        default_name(cls, name)  # refuses what is no member of a family
        print(settings(cls))
        return 0
    recipes = {*RECIPES, *entry_points("recipe")}
    families = registry()
    texts = [settings(members[name]) for members in families.values() if name in members]
    if name in study_points():
        texts.append(settings(study_named(name)))
    if name in recipes:
        data = recipe_named(name).model_dump(mode="json")
        texts.append(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip())
    if not texts:
        members = [member for family in families.values() for member in family]
        raise UserError(
            f"unknown name '{name}'; {nearest(name, [*members, *recipes, *study_points()])}"
        )
    print("\n\n".join(texts))
    return 0


def settings(cls: type[Config]) -> str:
    """Return what a configuration is, its source, and all that can be set in it."""
    parts = [inspect.cleandoc(cls.__doc__ or "")]
    paper = getattr(cls, "paper", None)
    if paper is not None:
        source = f"source: {paper.title} {paper.url} {paper.repository}".rstrip()
        parts.append("\n".join(_wrapped(source)))
    return "\n\n".join([*parts, "\n".join(setting_lines(cls)) or "It has no settings."])


def setting_lines(cls: type[Config]) -> list[str]:
    """Return what can be set in a configuration, with defaults and help, wrapped."""
    lines = _fields(cls, None, "", 1)
    return [line for long in lines for line in _wrapped(long)]


def _fields(cls: type[Config], default: Config | None, prefix: str, depth: int) -> Iterator[str]:
    """Yield a line for each setting: those of a nested configuration below its own.

    Args:
        cls: The configuration.
        default: The values that stand where nothing is given; None for the defaults of `cls`.
        prefix: Path to the configuration, with a dot at its end.
        depth: How far lines are indented.
    """
    indent = "  " * depth
    for name, field in cls.model_fields.items():
        if name == "name":
            continue
        path = f"{indent}--{prefix}{name}"
        value = field.get_default(call_default_factory=True)
        if default is not None:
            value = getattr(default, name)
        required = default is None and field.is_required()
        shown = "required" if required else repr(value)
        help_text = f"  {' '.join((field.description or '').split())}".rstrip()
        below = f"{prefix}{name}."
        nested = configs(field.annotation)
        if len(nested) > 1:
            shown = "required" if required else repr(getattr(value, "name", None))
            yield f"{path}.name = {shown}{help_text}"
            for inner in nested:
                yield f"{indent}  {inner.model_fields['name'].default}: {_first_line(inner)}"
                chosen = value if isinstance(value, inner) else None
                yield from _fields(inner, chosen, below, depth + 2)
        elif isinstance(value, Config):
            yield f"{path}.*{help_text}"
            if any(map(is_family, nested)):
                yield f"{indent}  --{below}name = {getattr(value, 'name', None)!r}"
            yield from _fields(type(value), value, below, depth + 1)
        elif nested and not is_family(nested[0]):
            off = f"{path}.*{help_text} (off by default)"
            yield f"{path} = {shown}{help_text}" if required else off
            yield from _fields(nested[0], None, below, depth + 1)
        else:
            yield f"{path} = {shown}{help_text}"


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _wrapped(line: str) -> list[str]:
    """Return a line folded to the width, what follows its first part indented further."""
    indent = " " * (len(line) - len(line.lstrip()) + 6)
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
