"""Dotted settings of a command line, put into the plain data of a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from excise.cli.options import DottedSettings
from excise.core.config import Config, Registry
from excise.core.errors import UserError, nearest
from excise.core.plain import NotPlain, read_yaml


def override(
    data: Mapping[str, Any], settings: DottedSettings, cls: type[Config], registry: Registry
) -> dict[str, Any]:
    """Return plain data with dotted settings changed.

    The name of a setting may be written with `-` for `_`; the key of a mapping, such as the name
    of a method run, is taken as it is. A number picks from a list. A `name` that is another than
    before names another thing, which starts from its own defaults; what is chosen by name may be
    given by that alone, `--domain glosses`, and several such things as `--methods rmu,./my.py:Own`.
    So does another `audit.budget` leave the changes behind that a recipe made to its own.

    Args:
        data: Plain data of a configuration.
        settings: Values by dotted path, as written.
        cls: The configuration.
        registry: Members of the open families.

    Raises:
        UserError: If a value is no YAML, or a path leads through something that has no settings,
            or through a key that is not there and is given no whole configuration either.
    """
    out: dict[str, Any] = deepcopy(dict(data))
    settings = dict(sorted(settings.items(), key=lambda item: _rank(item[0], settings)))
    new: list[tuple[str, str, dict[str, Any], list[str]]] = []
    for path, text in settings.items():
        node: Any = out
        annotation: Any = cls
        parts = path.split(".")
        for depth, part in enumerate(parts):
            key: Any = part
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                key = int(part)
            elif not isinstance(node, dict):
                raise UserError(f"--{path}: '{part}' leads nowhere; see excise show")
            elif part not in node and _mapping(annotation) is None:
                key = part.replace("-", "_")
            elif part not in node and configs(_mapping(annotation)):
                new.append((path, ".".join(parts[: depth + 1]), node, list(node)))
            owner, annotation = annotation, _below(annotation, node, key, registry)
            if depth == len(parts) - 1:
                value = _members(path, annotation, _value(path, text))
                _restart(node, key, value, owner)
                node[key] = value
            elif isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
    for path, place, node, known in new:
        key = place.rpartition(".")[2]
        if not isinstance(node[key], Mapping) or "name" not in node[key]:
            raise UserError(
                f"--{path}: there is no {place}, and a new one needs --{place}.name; "
                f"{nearest(key, known)}"
            )
    return out


def _rank(path: str, settings: Iterable[str]) -> int:
    """Return when a setting is put in place: whatever names a thing before what is in it."""
    last = path.split(".")[-1]
    names = last in ("name", "budget") or any(p.startswith(f"{path}.") for p in settings)
    return 2 * path.count(".") - (last == "budget") if names else 1 << 20


def _restart(node: Any, key: Any, value: Any, owner: Any) -> None:
    """Take out of a configuration what belongs to another value of one of its fields."""
    if not isinstance(node, dict):
        return
    if key == "name" and _chosen_by_name(owner) and node.get(key, value) != value:
        node.clear()
    for config in configs(owner):
        dependent = getattr(config, "restarts", {}).get(key, ())
        if dependent and node.get(key, config.model_fields[key].default) != value:
            for other in dependent:
                node.pop(other, None)


def _members(path: str, annotation: Any, value: Any) -> Any:
    """Return members of an open family where a field holds them and they are given by name alone.

    Raises:
        UserError: If one of several is named twice.
    """
    if not isinstance(value, str):
        return value
    if any(map(is_family, configs(annotation))):
        return {"name": value}
    if not any(map(is_family, configs(_mapping(annotation)))):
        return value
    members: dict[str, Any] = {}
    for name in (part.strip() for part in value.split(",") if part.strip()):
        label = name.rpartition(":")[2]
        if label in members:
            raise UserError(f"--{path}: names '{label}' twice; name it once")
        members[label] = {"name": name}
    return members


def _chosen_by_name(annotation: Any) -> bool:
    """Return whether the value of `name` says which configuration a field holds."""
    options = configs(annotation)
    return len(options) > 1 or any(map(is_family, options))


def _value(path: str, text: str) -> Any:
    try:
        return read_yaml(text) if text else ""
    except NotPlain as error:
        shown = text if len(text) < 80 else f"{text[:80]}..."
        why = f"{error}".removeprefix("line 1: ")
        raise UserError(f"--{path}: cannot read the value {shown!r}: {why}") from None


def _options(annotation: Any) -> list[Any]:
    """Return what a field may hold, one annotation for each alternative."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [option for part in get_args(annotation) for option in _options(part)]
    return [] if annotation is NoneType else [annotation]


def _mapping(annotation: Any) -> Any:
    """Return what the values of a mapping are annotated with; None where it is none."""
    mappings = [o for o in _options(annotation) if get_origin(o) in (dict, Mapping)]
    return get_args(mappings[0])[1] if mappings else None


def configs(annotation: Any) -> list[type[Config]]:
    """Return the configurations that a field may hold; the base of an open family is one."""
    return [o for o in _options(annotation) if isinstance(o, type) and issubclass(o, Config)]


def is_family(cls: type[Config]) -> bool:
    """Return whether a class is the base of an open family: a field takes any member by name."""
    return bool(cls.__dict__.get("kind"))


def _below(annotation: Any, node: Any, key: Any, registry: Registry) -> Any:
    """Return the annotation of what lies at `key` of a node; None where nobody can know."""
    if isinstance(node, list):
        inner = [get_args(o)[0] for o in _options(annotation) if get_origin(o) in (tuple, list)]
        return inner[0] if inner else None
    if _mapping(annotation) is not None:
        return _mapping(annotation)
    for cls in configs(annotation):
        named = str(node.get("name"))
        if is_family(cls):
            cls = registry.get(cls.kind, {}).get(named, cls)
        elif len(configs(annotation)) > 1 and cls.model_fields["name"].default != named:
            continue
        field = cls.model_fields.get(key)
        return field.annotation if field else None
    return None
