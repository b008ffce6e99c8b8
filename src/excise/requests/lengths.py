"""Lengths of rows against the positions of the model, before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from excise.auditor.budget import budget_of
from excise.core.config import Config, ConfigError, configs_in
from excise.core.events import Emit, silent
from excise.fetch.model import outline_of
from excise.models.limits import position_limit
from excise.models.tiny import tiny_config
from excise.requests.audit import AuditRun
from excise.requests.inspection import InspectRun
from excise.requests.recipe import AuditSpec, Recipe

C = TypeVar("C", bound=Config)
Request = TypeVar("Request", bound=Recipe | AuditRun | InspectRun)


def fit_lengths(request: Request, emit: Emit = silent) -> Request:
    """Return a request whose rows fit the positions of its original; see `check_lengths`.

    Raises:
        UserError: If the model cannot be opened, or a length that was asked for exceeds it.
    """
    spec = request.model if isinstance(request, Recipe) else request.original
    if spec.scratch is not None:
        scratch = spec.scratch
        more: dict[str, Any] = dict(scratch.overrides)
        config = tiny_config(scratch.family, width=scratch.width, blocks=scratch.blocks, **more)
        return check_lengths(request, config, emit)
    with outline_of(spec) as original:
        return request if original is None else check_lengths(request, original.config, emit)


def check_lengths(asked: C, config: Any, emit: Emit = silent) -> C:
    """Return a configuration whose rows fit the model.

    A default that is longer than the model has positions is cut to them; so is the length of a
    named budget. A length that was asked for is refused instead.

    Args:
        asked: A recipe, an audit, a method or any other configuration.
        config: The model's `transformers` configuration.
        emit: Told of what is cut.

    Raises:
        ConfigError: If lengths that were asked for exceed the positions, one problem for each.
    """
    limit = position_limit(config)
    if limit is None:
        return asked
    problems: list[str] = []
    cut: list[str] = []
    fitted = _fitted(asked, limit, "", None, problems, cut)
    if problems:
        raise ConfigError(
            [
                f"{path}: the model has positions for {limit} tokens; use {limit} or fewer"
                for path in problems
            ]
        )
    if cut:
        emit("note", {"text": f"rows are cut to the {limit} positions of the model"})
    return fitted


def _fitted(
    asked: C, limit: int, at: str, default: Config | None, problems: list[str], cut: list[str]
) -> C:
    """Return `asked` with its lengths cut; `default` is what its field holds unasked."""
    changed: dict[str, Any] = {}
    for name in type(asked).model_fields:
        value, path = getattr(asked, name), f"{at}.{name}" if at else name
        if name.endswith("max_length") and isinstance(value, int) and value > limit:
            unasked = name not in asked.model_fields_set or value == getattr(default, name, None)
            (cut if unasked else problems).append(path)
            changed[name] = limit
            continue
        inner = type(asked).model_fields[name].default
        inner = inner if isinstance(inner, Config) and isinstance(value, Config) else None
        old = dict(configs_in(value))
        new = {
            key: _fitted(one, limit, path + key, inner, problems, cut) for key, one in old.items()
        }
        if any(new[key] is not one for key, one in old.items()):
            changed[name] = _replaced(value, new)
    if isinstance(asked, AuditSpec):
        changed |= _budget(asked, limit, at, problems, cut)
    return asked.model_copy(update=changed) if changed else asked


def _replaced(value: Any, new: Mapping[str, Config]) -> Any:
    """Return a field with its configurations replaced."""
    if isinstance(value, Mapping):
        return {key: new.get(f".{key}", one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(new.get(f"[{i}]", one) for i, one in enumerate(value))
    return new[""]


def _budget(
    asked: AuditSpec, limit: int, at: str, problems: list[str], cut: list[str]
) -> dict[str, Any]:
    """Return what changes in an audit whose budget reads longer rows than the model can."""
    if asked.budget == "none":
        return {}
    path = f"{at}.change.max_length" if at else "change.max_length"
    given = asked.change.get("max_length")
    if isinstance(given, int) and given > limit:
        problems.append(path)
    elif given is None and budget_of(asked.budget).max_length > limit:
        cut.append(path)
        return {"change": {**asked.change, "max_length": limit}}
    return {}
