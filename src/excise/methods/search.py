"""Where a search looks for the settings of a method: around those that its paper published.

A method declares `search: ClassVar[Mapping[str, Range | tuple]]`, range or choices by the path of a
setting (`fit.lr`). One that declares nothing is searched over its learning rate and the weights of
its losses, one made of methods over what they are (`methods.0.fit.lr`). The first setting of a
search is the method as it is; the others are points of a scrambled Sobol sequence (Owen 1998,
doi:10.1006/jcom.1998.0487), of which a longer search has the same first ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field, model_validator
from torch.quasirandom import SobolEngine

from excise.core.config import Config

C = TypeVar("C", bound=Config)


class Range(Config):
    """Two ends between which a number is searched for."""

    low: float = Field(default=0.25, gt=0)
    """Lower end."""
    high: float = Field(default=4.0, gt=0)
    """Upper end."""
    log: bool = True
    """Whether factors count alike, rather than differences."""
    absolute: bool = False
    """Whether the ends are values; else they are factors of the value that the method has."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        """Refuse ends in the wrong order."""
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} is not below high, {self.high:g}")
        return self

    def at(self, share: float, value: Any) -> Any:
        """Return the number at a share of the way from low to high.

        Args:
            share: 0 to 1.
            value: What the method has: a number, or several, each searched by the same factor.
        """
        if isinstance(value, tuple):
            return tuple(self.at(share, each) for each in value)
        low, high = self.low, self.high
        number = low * (high / low) ** share if self.log else low + (high - low) * share
        number = float(f"{number if self.absolute else number * value:.4g}")
        return round(number) if isinstance(value, int) else number


Space = Mapping[str, Range | tuple[Any, ...]]
"""A range, or the values to choose from, by the path of a setting."""

RATE = "fit.lr"
WEIGHTS = (
    "alpha", "beta", "gamma", "delta", "eta", "lam", "scale", "steering", "retain", "remove",
    "erase", "weight",
)  # fmt: skip
"""Names of settings that weigh the losses of a method, and how such names end."""


def space_of(method: Config, ranges: Mapping[str, Range]) -> dict[str, Range | tuple[Any, ...]]:
    """Return where a method's settings are searched for.

    Args:
        method: The method with the settings that are searched around.
        ranges: Ranges by path in place of the method's own, where it has that setting.
    """
    space: dict[str, Range | tuple[Any, ...]] = dict(getattr(type(method), "search", {}))
    for i, part in enumerate(getattr(method, "methods", ())):
        if isinstance(part, Config):
            space |= {f"methods.{i}.{path}": r for path, r in space_of(part, ranges).items()}
    if not space:
        own = [name for name in type(method).model_fields if name.split("_")[-1] in WEIGHTS]
        space = {path: Range() for path in (RATE, *own) if _searchable(setting(method, path))}
    return space | {path: r for path, r in ranges.items() if _searchable(setting(method, path))}


def _searchable(value: Any) -> bool:
    """Return whether a setting is a number, or several, of which factors make others."""
    if isinstance(value, tuple):
        return bool(value) and all(map(_searchable, value))
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def setting(config: Config, path: str) -> Any:
    """Return the value of a setting by its dotted path; None where there is no such setting."""
    value: Any = config
    for name in path.split("."):
        if isinstance(value, tuple) and name.isdecimal():
            value = value[int(name)] if int(name) < len(value) else None
        else:
            value = getattr(value, name, None) if isinstance(value, Config) else None
    return value


def changed(config: C, settings: Mapping[str, Any]) -> C:
    """Return a configuration with settings by dotted path changed, and checked.

    Args:
        config: A configuration.
        settings: Values by path.

    Raises:
        ValueError: If there is no such setting, or it does not take the value.
    """
    for path, value in settings.items():
        name, _, rest = path.partition(".")
        if rest:
            value = _changed_inside(getattr(config, name, None), rest, value)
            if value is None:
                raise ValueError(f"{path}: there is no such setting")
        given = {key: getattr(config, key) for key in config.model_fields_set}
        config = type(config)(**{**given, name: value})
    return config


def _changed_inside(inner: Any, path: str, value: Any) -> Any:
    """Return a part, or a tuple of parts, with one setting changed; None where there is none."""
    if isinstance(inner, Config):
        return changed(inner, {path: value})
    at, _, rest = path.partition(".")
    if not (isinstance(inner, tuple) and at.isdecimal() and int(at) < len(inner) and rest):
        return None
    part = _changed_inside(inner[int(at)], rest, value)
    return None if part is None else (*inner[: int(at)], part, *inner[int(at) + 1 :])


def settings_of(
    method: Config, trials: int, seed: int, ranges: Mapping[str, Range] | None = None
) -> Sequence[dict[str, Any]]:
    """Return the settings of a search, as changes of the method; the first changes nothing.

    Args:
        method: The method with the settings that are searched around.
        trials: Number of settings at most: a method with nothing to search has one.
        seed: Seed of the sequence.
        ranges: As `space_of`.
    """
    space = space_of(method, ranges or {})
    if not space or trials < 2:
        return [{}]
    points = SobolEngine(len(space), scramble=True, seed=seed).draw(trials - 1).tolist()
    return [{}, *(_setting_at(method, space, point) for point in points)]


def _setting_at(method: Config, space: Space, point: Sequence[float]) -> dict[str, Any]:
    """Return the setting at one point of the unit cube."""
    found = {}
    for (path, where), share in zip(space.items(), point, strict=True):
        if isinstance(where, Range):
            found[path] = where.at(share, setting(method, path))
        else:
            found[path] = where[min(int(share * len(where)), len(where) - 1)]
    return found
