"""A model's names, looked up once, and the claims that parts of it lay on its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from excise.models.anatomy import Anatomy, anatomy
from excise.models.names import canonical, is_adapter, modules_by_name, parameters_by_name, unwrap
from excise.models.structure import sizes
from excise.routing.groups import Groups, Part, Place

Span = tuple[int | None, int, int]
"""Dimension (None for the whole), start, stop."""


@dataclass(frozen=True)
class Claim:
    """One group's claim on a slice of a parameter.

    Attributes:
        parameter: Canonical name; of tied ones the first.
        group: The group.
        dim: Dimension that is sliced, None for the whole.
        start: First entry.
        stop: Entry after the last.
        at: Where in the configuration the part stands.
        words: The part in words.
    """

    parameter: str
    group: str
    dim: int | None
    start: int
    stop: int
    at: str
    words: str


@dataclass
class Body:
    """A model's modules and parameters by canonical name, looked up once.

    Attributes:
        model: The model, wrapped or not.
        notes: What a reader of the map must know.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """List names; a tied tensor stands under its first name."""
        prefix, inner = unwrap(self.model)
        self.modules = modules_by_name(self.model)
        self.parameters = parameters_by_name(self.model)
        first = {id(p): name for name, p in self.parameters.items()}
        every = inner.named_parameters(remove_duplicate=False)
        self.first = {canonical(n, prefix): first[id(p)] for n, p in every}
        self.tied: dict[str, tuple[str, ...]] = {}
        for name, owner in self.first.items():
            if name != owner:
                self.tied[owner] = (*self.tied.get(owner, ()), name)
        config: Any = getattr(inner, "config", None)
        self.config: Any = (
            config.get_text_config() if hasattr(config, "get_text_config") else config
        )

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the parts of the model are; raises `UserError` where they are not found."""
        return anatomy(self.model)

    def below(self, path: str) -> list[str]:
        """Return the parameters in a module, adapters laid over it left out."""
        names = [n for n in self.first if n.startswith(f"{path}.") and not is_adapter(n)]
        return list(dict.fromkeys(self.first[n] for n in names))

    def width(self, path: str, side: str) -> int | None:
        """Return the number of columns at a place, None where the module does not say."""
        module = self.modules[path]
        if side == "experts":
            return next(int(p.shape[0]) for p in module.parameters(recurse=False))
        size = sizes(module)
        return channels(module) if side == "output" else (size[0] if size else None)


@dataclass
class Asked:
    """One part of one group while its claims are collected."""

    body: Body
    groups: Groups
    group: str
    part: Part
    at: str
    problems: list[str]
    claims: list[Claim] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def take(self, name: str, *spans: Span, group: str = "") -> None:
        """Claim spans of a parameter; a name the model lacks (a missing bias) is passed over."""
        if name in self.body.first:
            owner = self.body.first[name]
            words = self.part.words()
            for dim, start, stop in spans or ((None, 0, 0),):
                self.claims.append(
                    Claim(owner, group or self.group, dim, start, stop, self.at, words)
                )

    def refuse(self, what: str) -> None:
        """Note a problem once."""
        text = f"{self.at}: {what}"
        if text not in self.problems:
            self.problems.append(text)

    def units(self, count: int, what: str) -> tuple[int, int] | None:
        """Return the range of units, or None after noting what is wrong with it."""
        start, stop = self.part.units or (0, count)
        if not 0 <= start < stop <= count:
            self.refuse(f"units {start}:{stop} do not lie within the {count} {what}")
            return None
        return start, stop

    def put(self, path: str, side: Any, start: int, stop: int | None) -> None:
        """Add a place where the group's activations are masked."""
        self.places.append(Place(path, side, self.group, start, stop))


def conv1d(module: nn.Module | None) -> bool:
    """Return whether a layer stores (in, out), as `Conv1D` does."""
    return hasattr(getattr(module, "base_layer", module), "nf")


def channels(module: nn.Module) -> int | None:
    """Return the number of a module's output channels where it says so."""
    for name in ("out_features", "outchannels", "nf", "embedding_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None
