"""Which modules take part in routing, with what they own and where their masks act."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from excise.routing.call import instead
from excise.routing.groups import Owned, Place
from excise.routing.weights import Piece

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Forward = Callable[..., Any]
Span = tuple[int, int, str]
"""Start, stop, group."""


class State(Protocol):
    """What a module asks of the routing it takes part in."""

    muted: bool

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and tokens of the batch."""
        ...

    def pieces(self, which: str, spans: Sequence[Span], lead: int, who: str) -> list[Piece]:
        """Return token weights by slice, for an activation of `lead` positions."""
        ...

    def matrix(self, which: str) -> Tensor | None:
        """Return all weights [N, G], None where all are 1."""
        ...

    def number(self, group: str) -> int:
        """Return the column of a group."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """Return a context in which all routed parameters are constants."""
        ...


@dataclass
class Plan:
    """One module that takes part.

    Attributes:
        path: Canonical path.
        module: The module.
        forward: Its own forward.
        kind: Which backward pass it gets.
        own: Slices of its own parameters, by their name in the module.
        inputs: Places at its input columns.
        outputs: Places at its output channels.
        experts: Places at the experts it weighs.
        called: Whether it was called since the last step.
    """

    path: str
    module: nn.Module
    forward: Forward
    kind: str = "any"
    own: dict[str, tuple[Owned, ...]] = field(default_factory=dict)
    inputs: tuple[Place, ...] = ()
    outputs: tuple[Place, ...] = ()
    experts: tuple[Place, ...] = ()
    called: bool = False

    def spans(self, name: str) -> tuple[list[Span], int | None]:
        """Return slices of one parameter and their dimension."""
        owned = self.own[name]
        size = self.module.get_parameter(name).shape
        if owned[0].dim is None:
            return [(0, int(size[0]) if len(size) else 1, owned[0].group)], None
        return [(o.start, o.stop, o.group) for o in owned], owned[0].dim


def kind_of(module: nn.Module, own: Mapping[str, tuple[Owned, ...]]) -> str:
    """Return which backward pass a module gets: that of a known layer, or two calls."""
    forward = type(module).forward
    if not own or "forward" in module.__dict__:
        return "any"
    dims = {o.dim for owned in own.values() for o in owned}
    if forward is nn.Linear.forward:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward:
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        fits = 1 not in dims or module.groups == 1
        return "conv2d" if plain and fits else "any"
    if isinstance(module, nn.Embedding) and 1 not in dims and list(own) == ["weight"]:
        return "embedding"
    if forward is nn.LayerNorm.forward and own.keys() <= {"weight", "bias"}:
        assert isinstance(module, nn.LayerNorm)
        return "layer_norm" if "weight" in own and len(module.normalized_shape) == 1 else "any"
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    if isinstance(module, batch_norms) and forward is nn.BatchNorm2d.forward and module.affine:
        return "batch_norm"
    return "spread" if _spreads(module, own) else "any"


def _spreads(module: nn.Module, own: Mapping[str, tuple[Owned, ...]]) -> bool:
    """Return whether a norm multiplies by its weight in a way that takes one per token."""
    if "norm" not in type(module).__name__.lower() or list(own) != ["weight"]:
        return False
    weight = module.get_parameter("weight")
    if weight.dim() != 1 or weight.is_meta or any(True for _ in module.children()):
        return False
    x = torch.linspace(-1, 2, 2 * len(weight), device=weight.device, dtype=weight.dtype)
    x = x.view(2, -1)
    try:
        with torch.no_grad():
            plain = type(module).forward(module, x)
            with instead(module, {"weight": weight.expand(2, -1)}):
                laid = type(module).forward(module, x)
        return torch.equal(plain, laid)
    except (RuntimeError, TypeError, ValueError):
        return False


def first_input(args: Args, kwargs: Kwargs) -> Tensor:
    """Return the first tensor among arguments."""
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def with_input(args: Args, kwargs: Kwargs, new: Tensor) -> tuple[Args, Kwargs]:
    """Return the arguments with the first tensor replaced."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], new, *args[i + 1 :]), kwargs
    key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, key: new}
