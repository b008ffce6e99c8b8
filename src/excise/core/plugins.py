"""What strangers add: entry points of installed packages, and `./mine.py:Cls` with `--allow-code`.

This module imports no torch; what it loads may.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from excise.core.config import Config
from excise.core.errors import UserError, nearest

FAMILIES = ("method", "attack", "domain", "score", "recipe")
"""Families that are open; their entry-point groups are `excise.methods` and so on."""


def is_code(name: object) -> bool:
    """Whether a name is a reference to code in a file, `./mine.py:Cls`."""
    return isinstance(name, str) and ".py:" in name


def load_code(reference: str, *, allow: bool) -> Any:
    """Import a file and return the object in it that `reference` names.

    Args:
        reference: `path/to/file.py:Name`.
        allow: Whether the user asked for it with `--allow-code`.

    Raises:
        UserError: If it was not asked for, the file is missing or broken, or holds no such name.
    """
    path_text, _, attribute = reference.rpartition(":")
    path = Path(path_text).expanduser()
    if not allow:
        raise UserError(f"'{reference}' runs code from {path}; add --allow-code if you trust it")
    if not path.is_file():
        raise UserError(f"'{reference}' names code in {path}, which is not a file")
    # By place and contents: an edited file is another module, and so is a copy elsewhere.
    digest = hashlib.sha256(f"{path.resolve()}\n".encode() + path.read_bytes()).hexdigest()
    name = f"excise_user_{path.stem}_{digest[:12]}"
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{path} has no '{attribute}'; {nearest(attribute, public)}")
    return getattr(module, attribute)


def entry_points(family: str) -> dict[str, Any]:
    """Load what installed packages offer for a family, by name."""
    found = importlib.metadata.entry_points(group=f"excise.{family}s")
    return {point.name: point.load() for point in found}


def collect_code(data: Any, *, allow: bool) -> tuple[Any, dict[str, str], dict[str, type[Config]]]:
    """Replace every `name: ./mine.py:Cls` in plain data by the class's own name.

    Args:
        data: Plain data of a configuration.
        allow: Whether the user asked for code with `--allow-code`.

    Returns:
        The data with names in place of references, reference by name, and class by name.
    """
    references: dict[str, str] = {}
    classes: dict[str, type[Config]] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            out = {k: walk(v) for k, v in value.items()}
            if is_code(out.get("name")):
                cls = load_code(out["name"], allow=allow)
                name = default_name(cls, out["name"])
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


def source_hash(cls: type) -> str:
    """Return the SHA-256 of the file that defines a class, or empty for one without a file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def where(cls: type) -> str:
    """Return the reference by which a class from a user's file is loaded again."""
    return f"{inspect.getfile(cls)}:{cls.__qualname__}"


def rebuild(reference: str, fields: Mapping[str, Any]) -> Config:
    """Make a configuration of a user's class in another process of the same run."""
    made: Config = load_code(reference, allow=True).model_validate(fields)
    return made
