"""How each kind of module takes part in routing: what it owns, and which backward pass it gets.

While `route` is in force, `call` stands in for the forward of every `RoutedModule`. It masks the
places at the module's inputs and outputs, and computes the module so that its own weights receive
gradients weighted by token.

Shape legend: N positions, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.routing.backward import (
    detached,
    instead,
    routed_batch_norm,
    routed_call,
    routed_conv2d,
    routed_layer_norm,
    routed_linear,
    scale_columns,
    scale_grad,
    spread,
    with_value,
)
from excise.routing.groups import Owned, Place
from excise.routing.policy import Routes
from excise.routing.weights import Weight, WeightedRange, nothing, trivial

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
GroupRange = tuple[int, int, str]
"""Start, stop, group."""


class ActiveRoutes:
    """The routes of the present batch, as modules ask for them.

    Attributes:
        routes: What the tokens read and write; None for plain training.
        muted: Whether all routed parameters are constants at the moment.
    """

    def __init__(self, groups: Sequence[str]) -> None:
        """Start with plain training."""
        self.routes: Routes | None = None
        self.muted = False
        self._groups = tuple(groups)
        self._columns = {name: i for i, name in enumerate(groups)}
        self._weights: dict[str, list[Weight | None]] = {}
        self._repeated: dict[tuple[int, int], Weight] = {}
        self._pieces: dict[tuple[str, str, tuple[GroupRange, ...], int], list[WeightedRange]] = {}

    def put(self, routes: Routes | None, *, zeros: bool) -> None:
        """Put routes in force until the next call.

        Args:
            routes: The routes, where the model is; None for plain training.
            zeros: Whether what no token may write gets a gradient of zeros in place of none.
        """
        self.routes = routes
        self._repeated.clear()
        self._pieces.clear()
        if routes is None:
            return
        count, by_group = len(self._groups), routes.by_group()
        for which in ("read", "write", "edge"):
            weights = list(by_group.get(which, (None,) * count))
            if len(weights) != count:
                raise UserError(
                    f"{which}_NG has {len(weights)} columns but the model has {count} groups: "
                    f"{', '.join(self._groups)}"
                )
            if zeros:
                weights = [None if w is None else replace(w, zero=False) for w in weights]
            self._weights[which] = weights

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and tokens of the batch."""
        return None if self.routes is None else self.routes.shape

    def pieces(
        self, which: str, spans: Sequence[GroupRange], positions: int, path: str
    ) -> list[WeightedRange]:
        """Return token weights by slice.

        Args:
            which: `read`, `write` or `edge`.
            spans: Slices and their groups.
            positions: Positions of the activation that they weigh; 0 for those of the labels.
            path: Path of the module, for messages.
        """
        key = (which, path, tuple(spans), positions)
        if key not in self._pieces:
            weights = self._weights[which]
            self._pieces[key] = [
                (start, stop, self._repeat(weights[self._columns[group]], positions, path))
                for start, stop, group in spans
            ]
        return self._pieces[key]

    def _repeat(self, weight: Weight | None, positions: int, path: str) -> Weight | None:
        """Repeat a token's weight over the positions it has in an activation."""
        if weight is None or positions in (0, len(weight.values_N)):
            return weight
        count = len(weight.values_N)
        if positions % count:
            raise UserError(
                f"{path} sees {positions} positions but labels were given for {count}; give labels "
                "for what the model really reads"
            )
        key = (id(weight), positions)
        if key not in self._repeated:
            values = weight.values_N.repeat_interleave(positions // count)
            self._repeated[key] = Weight(values, weight.zero, None, weight.binary)
        return self._repeated[key]

    def matrix(self, which: str) -> Tensor | None:
        """Return all weights [N, G], None where all are 1."""
        values_NG: Tensor | None = getattr(self.routes, f"{which}_NG")
        return values_NG

    def column(self, group: str) -> int:
        """Return the column of a group in `matrix`."""
        return self._columns[group]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let all routed parameters be constants while the block runs."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before


@dataclass
class RoutedModule:
    """One module that takes part.

    Attributes:
        path: Canonical path.
        module: The module.
        forward: Its own forward.
        kind: Which backward pass it gets.
        owned: Slices of its own parameters, by their name in the module.
        inputs: Places at its input columns.
        outputs: Places at its output channels.
        experts: Places at the experts it weighs.
        called: Whether it was called since the last step.
    """

    path: str
    module: nn.Module
    forward: Callable[..., Any]
    kind: str = "any"
    owned: dict[str, tuple[Owned, ...]] = field(default_factory=dict)
    inputs: tuple[Place, ...] = ()
    outputs: tuple[Place, ...] = ()
    experts: tuple[Place, ...] = ()
    called: bool = False

    def spans(self, name: str) -> tuple[list[GroupRange], int | None]:
        """Return slices of one parameter and their dimension."""
        owned = self.owned[name]
        shape = self.module.get_parameter(name).shape
        if owned[0].dim is None:
            return [(0, int(shape[0]) if len(shape) else 1, owned[0].group)], None
        return [(o.start, o.stop, o.group) for o in owned], owned[0].dim


def kind_of(module: nn.Module, owned: Mapping[str, tuple[Owned, ...]]) -> str:
    """Return which backward pass a module gets: that of a known layer, or two calls.

    Args:
        module: The module.
        owned: Slices of its own parameters.
    """
    forward = type(module).forward
    if not owned or "forward" in module.__dict__:
        return "any"
    dims = {o.dim for slices in owned.values() for o in slices}
    if forward is nn.Linear.forward:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward:
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        fits = 1 not in dims or module.groups == 1
        return "conv2d" if plain and fits else "any"
    if isinstance(module, nn.Embedding) and 1 not in dims and list(owned) == ["weight"]:
        return "embedding"
    if forward is nn.LayerNorm.forward and owned.keys() <= {"weight", "bias"}:
        assert isinstance(module, nn.LayerNorm)
        return "layer_norm" if "weight" in owned and len(module.normalized_shape) == 1 else "any"
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    if isinstance(module, batch_norms) and forward is nn.BatchNorm2d.forward and module.affine:
        return "batch_norm"
    return "spread" if _spreads(module, owned) else "any"


def _spreads(module: nn.Module, owned: Mapping[str, tuple[Owned, ...]]) -> bool:
    """Return whether a norm multiplies by its weight in a way that takes one per token."""
    if "norm" not in type(module).__name__.lower() or list(owned) != ["weight"]:
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


def call(routed: RoutedModule, active: ActiveRoutes, args: Args, kwargs: Kwargs) -> Any:
    """Call a module that takes part in routing.

    Args:
        routed: The module.
        active: The routes in force.
        args: Arguments of its forward.
        kwargs: Keyword arguments.
    """
    routed.called = True
    if routed.inputs:
        x = _masked(routed, active, routed.inputs, _first_input(args, kwargs))
        args, kwargs = _with_input(args, kwargs, x)
    if routed.experts:
        out = _experts(routed, active, args, kwargs)
    else:
        out = _written(routed, active, args, kwargs)
    return _masked_output(routed, active, out) if routed.outputs else out


def _first_input(args: Args, kwargs: Kwargs) -> Tensor:
    """Return the first tensor among arguments."""
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def _with_input(args: Args, kwargs: Kwargs, new: Tensor) -> tuple[Args, Kwargs]:
    """Return the arguments with the first tensor replaced."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], new, *args[i + 1 :]), kwargs
    key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, key: new}


def _masked(
    routed: RoutedModule, active: ActiveRoutes, places: Sequence[Place], x: Tensor
) -> Tensor:
    """Weigh columns of an activation in the forward pass and on the way back."""
    width = x.shape[-1]
    spans: list[GroupRange] = [
        (p.start, width if p.stop is None else p.stop, p.group) for p in places if p.start < width
    ]
    positions = x.numel() // width
    read = active.pieces("read", spans, positions, routed.path)
    edge = active.pieces("edge", spans, positions, routed.path) if torch.is_grad_enabled() else None
    return scale_columns(x, read, edge)


def _masked_output(routed: RoutedModule, active: ActiveRoutes, out: Any) -> Any:
    """Weigh channels of a module's output: the second dimension of images, else the last."""
    if isinstance(out, tuple | list):
        i = next(i for i, value in enumerate(out) if isinstance(value, Tensor))
        parts = [*out[:i], _masked_output(routed, active, out[i]), *out[i + 1 :]]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
    if isinstance(out, Mapping):
        key = next(k for k, v in out.items() if isinstance(v, Tensor))
        return type(out)(**{**out, key: _masked_output(routed, active, out[key])})
    if out.dim() == 4:
        return _masked(routed, active, routed.outputs, out.movedim(1, -1)).movedim(-1, 1)
    return _masked(routed, active, routed.outputs, out)


def _experts(routed: RoutedModule, active: ActiveRoutes, args: Args, kwargs: Kwargs) -> Any:
    """Call experts with the weights of those that a token does not read set to 0.

    The output is linear in the experts' weights, so edges that leave an expert are routed by a
    call with weighted weights whose value is replaced by the true one.
    """
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, index_NK, weight_NK = (given[name] for name in names)
    last = max(p.stop or 0 for p in routed.experts)
    column_E = torch.zeros(last + 1, dtype=torch.long, device=x.device)
    for p in routed.experts:
        column_E[p.start : p.stop] = active.column(p.group)
    column_NK = column_E[index_NK.clamp(max=last)]
    read_NG, edge_NG = active.matrix("read"), active.matrix("edge")
    if read_NG is not None:
        weight_NK = weight_NK * read_NG.to(weight_NK.dtype).gather(1, column_NK)
    if edge_NG is None or not torch.is_grad_enabled():
        return _written(routed, active, (x, index_NK, weight_NK), {})
    with torch.no_grad():
        value = routed.forward(x, index_NK, weight_NK)
    edge_NK = edge_NG.to(weight_NK.dtype).gather(1, column_NK)
    out = _written(routed, active, (x, index_NK, weight_NK * edge_NK), {})
    return with_value(out, value)


def _written(routed: RoutedModule, active: ActiveRoutes, args: Args, kwargs: Kwargs) -> Any:
    """Call a module so that its own weights receive gradients weighted by token."""
    trained = [n for n in routed.owned if routed.module.get_parameter(n).requires_grad]
    if not trained or not torch.is_grad_enabled():
        return routed.forward(*args, **kwargs)
    if active.muted:
        with detached(routed.module):
            return routed.forward(*args, **kwargs)
    x = _first_input(args, kwargs)
    if routed.kind == "embedding":
        return _embedding(routed, active, x, args, kwargs)
    positions = _positions(routed, x)
    dims: dict[str, int | None] = {}
    pieces: dict[str, list[WeightedRange]] = {}
    for name in routed.owned:
        spans, dims[name] = routed.spans(name)
        pieces[name] = active.pieces("write", spans, positions, routed.path)
    if all(trivial(pieces[name]) for name in trained):
        return routed.forward(*args, **kwargs)
    module: Any = routed.module
    if routed.kind in ("linear", "conv1d"):
        return _linear(routed, x, pieces, dims["weight"])
    if routed.kind == "conv2d":
        return _conv2d(module, x, pieces, of_inputs=dims["weight"] == 1)
    if routed.kind == "layer_norm":
        return routed_layer_norm(x, module, pieces["weight"], pieces.get("bias", pieces["weight"]))
    if routed.kind == "batch_norm":
        return routed_batch_norm(x, module, pieces["weight"], pieces["bias"])
    if routed.kind == "spread":
        # Token weights of an activation with heads repeat within a token: one a position is enough.
        laid = spread(module.weight, tuple(x.shape[:-1]), positions, pieces["weight"])
        with instead(module, {"weight": laid}):
            return routed.forward(*args, **kwargs)
    owners = {name: (dims[name], pieces[name]) for name in pieces}
    return routed_call(
        module, routed.forward, owners, args, kwargs, alone=active.alone, path=routed.path
    )


def _positions(routed: RoutedModule, x: Tensor) -> int:
    """Return the number of positions of an input."""
    if routed.kind in ("conv2d", "batch_norm"):
        return int(x.shape[0])
    return 0 if routed.kind == "any" else x.numel() // x.shape[-1]


def _linear(
    routed: RoutedModule, x: Tensor, pieces: Mapping[str, list[WeightedRange]], dim: int | None
) -> Tensor:
    """Call a linear layer or `Conv1D` whose weight is sliced along `dim`."""
    module: Any = routed.module
    transposed = routed.kind == "conv1d"
    of_weight = pieces["weight"]
    if dim is None and transposed:
        of_weight = [(0, int(module.weight.shape[1]), of_weight[0][2])]
    of_inputs = dim == (0 if transposed else 1)
    return routed_linear(
        x,
        module.weight,
        module.bias,
        write_out=None if of_inputs else of_weight,
        write_in=of_weight if of_inputs else None,
        write_bias=pieces.get("bias"),
        transposed=transposed,
    )


def _conv2d(
    module: Any, x: Tensor, pieces: Mapping[str, list[WeightedRange]], *, of_inputs: bool
) -> Tensor:
    """Call a convolution whose weight is sliced along its inputs or its outputs."""
    return routed_conv2d(
        x,
        module.weight,
        module.bias,
        write_out=None if of_inputs else pieces["weight"],
        write_in=pieces["weight"] if of_inputs else None,
        write_bias=pieces.get("bias"),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
    )


def _embedding(
    routed: RoutedModule, active: ActiveRoutes, ids: Tensor, args: Args, kwargs: Kwargs
) -> Tensor:
    """Scatter gradients with token weights: the output has no other use than the weight."""
    spans, dim = routed.spans("weight")
    shape = active.shape
    if shape is not None and tuple(ids.shape) == (1, shape[1]) and shape[0] > 1:
        ids = ids.expand(shape)  # positions shared by all rows, whose tokens weigh differently
        args, kwargs = _with_input(args, kwargs, ids)
    pieces = active.pieces("write", spans, ids.numel(), routed.path)
    if trivial(pieces):
        out: Tensor = routed.forward(*args, **kwargs)
        return out
    if nothing(pieces):
        with detached(routed.module):
            out = routed.forward(*args, **kwargs)
            return out
    values = [
        torch.ones(ids.numel(), device=ids.device) if w is None else w.values_N
        for _, _, w in pieces
    ]
    if dim is None:
        weight_N = values[0]
    else:
        ends = torch.tensor([stop for _, stop, _ in pieces], device=ids.device)
        which_N = torch.bucketize(ids.reshape(-1), ends, right=True)
        weight_N = torch.stack(values, 1).gather(1, which_N[:, None]).squeeze(1)
    return scale_grad(routed.forward(*args, **kwargs), weight_N.view(*ids.shape, 1))
