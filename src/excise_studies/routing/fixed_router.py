"""A mixture of experts with a fixed router, made of a dense model by hand, in float64.

Every MLP is cut into modules of their own, one for the core and one for each capability; a token
is handed to those it is told to use, and ordinary backpropagation does the rest. Nothing of it
is routed: the studies and tests of gradient routing hold their gradients against it.

Shape legend: B rows, T tokens, N = B * T positions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from excise.models.anatomy import anatomy
from excise.routing import GroupMap, Part, count_units, delete


def loss_of(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the mean loss of the next token."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def gradient(param: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, zeros where it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad


Pieces = dict[tuple[str, str], Tensor]
"""Tensors by parameter and group."""


def owned(model: nn.Module, map: GroupMap, of: Callable[[nn.Parameter], Tensor]) -> Pieces:
    """Return what each group owns of a tensor of each parameter, slices side by side."""
    out: Pieces = {}
    for name, param in model.named_parameters():
        held = of(param).detach()
        by_group: dict[str, list[Tensor]] = {}
        for one in sorted(map.owners[name], key=lambda o: o.start):
            span = (
                held if one.dim is None else held.narrow(one.dim, one.start, one.stop - one.start)
            )
            by_group.setdefault(one.group, []).append(span)
        dim = next((one.dim for one in map.owners[name] if one.dim is not None), 0)
        out |= {(name, group): torch.cat(parts, dim) for group, parts in by_group.items()}
    return out


class Experts(nn.Module):
    """One block's MLP in parts: the core's, which every token uses, and one for each module."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        """Take the parts; `tokens` says who uses them."""
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self.tokens: Mapping[str, Tensor] = {}

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the sum of the parts that each token uses, [B, T, D]."""
        x_ND = x_BTD.flatten(0, -2)
        out_ND = self.parts["core"](x_ND)
        for name, uses_N in self.tokens.items():
            at = uses_N.nonzero()[:, 0]
            out_ND = out_ND.index_add(0, at, self.parts[name](x_ND[at]))
        out_BTD: Tensor = out_ND.view_as(x_BTD)
        return out_BTD


class Mixture:
    """A copy of a model whose MLPs are cut into experts; ordinary backpropagation."""

    def __init__(self, model: Any, spans: Mapping[str, tuple[int, int]]) -> None:
        """Cut every MLP.

        Args:
            model: A dense causal model; left alone.
            spans: Neurons of each module, the same in every block.
        """
        found = anatomy(model)
        units = count_units(model, 0)
        kept = {"core": list(spans.values())}
        for name, (start, stop) in spans.items():
            rest = ((0, start), (stop, units))
            kept[name] = [span for span in rest if span[0] < span[1]]
        cut = {name: _without(model, gone) for name, gone in kept.items()}
        self.model = copy.deepcopy(model)
        self.experts: list[Experts] = []
        self.paths = found.mlp
        for block, path in enumerate(found.mlp):
            parts = {name: other.get_submodule(path) for name, other in cut.items()}
            for name in spans:
                _drop_bias(cut[name].get_submodule(found.mlp_down[block]))
            self.experts.append(Experts(parts))
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.experts[-1])
        self.loss = float("nan")

    def backward(self, ids_BT: Tensor, tokens: Mapping[str, Tensor]) -> Pieces:
        """Return the gradients by parameter of the uncut model and group.

        Args:
            ids_BT: Token ids.
            tokens: Which positions [N] use each module.
        """
        for experts in self.experts:
            experts.tokens = tokens
        loss = loss_of(self.model, ids_BT)
        loss.backward()
        self.loss = loss.item()
        out: Pieces = {}
        for name, param in self.model.named_parameters():
            if not param.requires_grad:
                continue
            path, _, inside = name.partition(".parts.")
            group, _, leaf = inside.partition(".")
            key = (f"{path}.{leaf}", group) if inside else (name, "core")
            out[key] = gradient(param)
        return out


def _without(model: Any, spans: Sequence[tuple[int, int]]) -> Any:
    """Return a copy of a model that lacks neurons."""
    other = copy.deepcopy(model)
    delete(other, [Part(at="mlp", units=span) for span in spans])
    return other


def _drop_bias(down: nn.Module) -> None:
    """Empty the bias of a module's down-projection: it is the core's, and added once."""
    bias = getattr(down, "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias.zero_()
        bias.requires_grad_(False)


class _KeepDouble(TorchFunctionMode):
    """Leave float64 tensors alone where a model asks for float32 (norms, softmaxes)."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` without its change of dtype."""
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in args[1:]):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def doubles() -> Iterator[None]:
    """Compute in float64 throughout while the block runs."""
    with _KeepDouble():
        yield
