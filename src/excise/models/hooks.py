"""Reading, editing and training parts of a model, for as long as a `with` block lasts.

Shape legend of typical module outputs: B rows, T tokens, D width. Paths and patterns:
`excise.models.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.names import (
    find_module,
    find_modules,
    is_compiled,
    match_modules,
    parameters_by_name,
    select,
)

__all__ = ["Edit", "capture", "edit", "find_module", "match_modules", "select", "trainable"]

Edit = Callable[[Tensor], Tensor]
"""What `edit` does to an output."""


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor of a module's output: itself, or of a tuple, list or mapping."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | tuple | list):
        return None
    return next((part for part in parts if isinstance(part, Tensor)), None)


def active_stream(hidden: Tensor) -> Tensor:
    """Return the residual stream [B, T, D] of a block's output.

    Blocks of Gemma 3n carry several streams stacked before the rows (AltUp, arXiv:2301.13310), of
    which attention and MLP read the first.
    """
    return hidden[0] if hidden.dim() == 4 else hidden


def _with_first(value: Any, new: Tensor) -> Any:
    """Return an output with its first tensor replaced and the rest kept."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        key = next(k for k, v in value.items() if isinstance(v, Tensor))
        # ModelOutput is a mapping whose constructor takes the fields by name.
        return type(value)(**{**value, key: new})
    at = next(i for i, part in enumerate(value) if isinstance(part, Tensor))
    parts = [*value[:at], new, *value[at + 1 :]]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which hooks run: compiled code has none of those added later."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


@contextmanager
def capture(
    model: nn.Module,
    paths: Sequence[str],
    *,
    of: Literal["output", "input"] = "output",
    grad: bool = False,
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what modules put out, or are given, while the block runs.

    Args:
        model: The model, wrapped or not; a compiled one runs eagerly meanwhile.
        paths: Modules, as `find_module` takes them.
        of: Outputs, or the first tensor among the inputs.
        grad: Whether to keep the tensors in the graph; otherwise they are detached copies.

    Yields:
        For every path the tensors of its calls, in order; of a tuple, its first tensor.

    Raises:
        UserError: If a path names no module or several.
    """
    got: dict[str, list[Tensor]] = {path: [] for path in paths}
    modules = find_modules(model, got)

    def keep(path: str, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is None:
            raise UserError(f"'{path}' has no tensor as {of}; capture a module inside it")
        got[path].append(tensor if grad else tensor.detach().clone())

    def on_output(path: str) -> Callable[..., None]:
        return lambda module, args, output: keep(path, output)

    def on_input(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: keep(path, (*args, *kwargs.values()))

    with ExitStack() as stack:
        stack.enter_context(eager(model))
        for path, module in modules.items():
            if of == "output":
                handle = module.register_forward_hook(on_output(path))
            else:
                handle = module.register_forward_pre_hook(on_input(path), with_kwargs=True)
            stack.callback(handle.remove)
        yield got


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace what modules put out while the block runs.

    Args:
        model: The model, wrapped or not; a compiled one runs eagerly meanwhile.
        edits: For every path (as `find_module` takes it) a function from the output to what
            replaces it; of a tuple, the first tensor is replaced and the rest kept.

    Raises:
        UserError: If a path names no module or several.
    """
    modules = find_modules(model, edits)

    def on_output(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = first_tensor(output)
            if tensor is None:
                raise UserError(f"'{path}' has no tensor as output; edit a module inside it")
            return _with_first(output, edits[path](tensor))

        return hook

    with ExitStack() as stack:
        stack.enter_context(eager(model))
        for path, module in modules.items():
            stack.callback(module.register_forward_hook(on_output(path)).remove)
        yield


@contextmanager
def trainable(model: nn.Module, patterns: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Let only some parameters require gradients while the block runs.

    At the end every parameter requires gradients as before, and gradients that were not there
    before are dropped.

    Args:
        model: The model, wrapped or not.
        patterns: Which parameters, as `excise.models.names.select` takes them.

    Yields:
        The chosen parameters by canonical name.

    Raises:
        UserError: If a pattern matches nothing.
    """
    chosen = set(select(model, patterns))
    named = parameters_by_name(model)
    before = [(p, p.requires_grad, p.grad is None) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        picked = {name: p for name, p in named.items() if name in chosen}
        for parameter in picked.values():
            parameter.requires_grad_(True)
        yield picked
    finally:
        for parameter, required, had_none in before:
            parameter.requires_grad_(required)
            if had_none:
                parameter.grad = None
