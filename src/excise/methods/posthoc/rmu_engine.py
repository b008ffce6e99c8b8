"""Three ways to the same activations: whole forwards, a span of blocks, a span with a memory.

`Full` is the published loop: every forward runs the whole model, and a second model stands for
the original. `Span` runs the frozen blocks once without gradients and only the blocks between
the first trained matrix and the steered layer after that; copies of the trained matrices, put in
for one pass, stand for the second model. What it remembers is a `PrefixCache`: the last batch
(retain text is read twice in a step, and again for every topic) or, for `cached`, all that fit.
All three call the same modules with the same tensors in the same shapes, so that bits agree.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.data.stream import Batch
from excise.methods.posthoc.rmu_cache import Prefix, PrefixCache, batch_key
from excise.methods.posthoc.rmu_places import Places
from excise.models.hooks import capture
from excise.models.names import find_module
from excise.models.span import record_calls, run_span, without_start

Hidden = Float[Tensor, "B T D"]
Inputs = Callable[[Batch], dict[str, Tensor]]
"""From a batch to the keyword arguments of the model's forward."""


class Engine(Protocol):
    """Where activations at the steered layer come from."""

    def current(self, batch: Batch) -> Hidden:
        """Return what the edited model's steered block puts out, with its graph."""
        ...

    def original(self, batch: Batch) -> Hidden:
        """Return what it puts out in the original model, without gradients."""
        ...


@dataclass
class Full:
    """The published loop: whole forwards of two models.

    Attributes:
        model: The model that is trained.
        frozen: A second copy, or the same model where `restored` makes it the original.
        at: Path of the steered block.
        inputs: How the model is called.
        restored: Context in which `frozen` is the original model.
    """

    model: nn.Module
    frozen: nn.Module
    at: str
    inputs: Inputs
    restored: Callable[[], AbstractContextManager[object]]

    def current(self, batch: Batch) -> Hidden:
        """Return the current activations."""
        return self._hidden(self.model, batch)

    def original(self, batch: Batch) -> Hidden:
        """Return the original's activations."""
        with torch.no_grad(), self.restored():
            return self._hidden(self.frozen, batch)

    def _hidden(self, model: nn.Module, batch: Batch) -> Hidden:
        with capture(model, [self.at], grad=torch.is_grad_enabled()) as seen:
            model(**self.inputs(batch))
        return seen[self.at][-1]


@dataclass
class Span:
    """Only the blocks that matter, on one model.

    Attributes:
        model: The model that is trained; blocks above the steered one may be missing.
        places: What is trained.
        inputs: How the model is called.
        restored: Context in which the model is the original.
        cache: What is remembered.
        upto: Blocks whose calls are recorded; 0 for those up to the steered one.
    """

    model: nn.Module
    places: Places
    inputs: Inputs
    restored: Callable[[], AbstractContextManager[object]]
    cache: PrefixCache = field(default_factory=PrefixCache)
    upto: int = 0

    def current(self, batch: Batch) -> Hidden:
        """Return the current activations."""
        key = batch_key(batch)
        prefix = self._prefix(key, batch)
        hidden_BTD = self._tail(prefix, grad=torch.is_grad_enabled())
        self.cache.keep(key, prefix)
        return hidden_BTD

    def original(self, batch: Batch) -> Hidden:
        """Return the original's activations."""
        key = batch_key(batch)
        prefix = self._prefix(key, batch)
        layer = self.places.layer
        if layer not in prefix.target:
            with self.restored():
                prefix.target[layer] = self._tail(prefix, grad=False)
        self.cache.keep(key, prefix, last=True)
        return prefix.target[layer]

    def _prefix(self, key: bytes, batch: Batch) -> Prefix:
        """Return what comes before the first trained block, from the nearest that is known."""
        first = self.places.first
        found = self.cache.find(key)
        if found is None or min(found.hidden) > first:
            upto = self.upto or self.places.layer + 1
            calls = record_calls(self.model, self.inputs(batch), upto, parts=self._parts)
            fresh = Prefix(without_start(calls), {0: calls.hidden_BTD})
            if found is not None:
                fresh.hidden |= found.hidden
                fresh.attention, fresh.target = found.attention, found.target
            found = fresh
        if first not in found.hidden:
            below = max(block for block in found.hidden if block < first)
            found.hidden[first] = run_span(
                self.model, found.calls, found.hidden[below], below, first, grad=False
            )
        if first > 0:
            found.hidden.pop(0, None)  # the embedding costs nothing to read again
        return found

    @property
    def _parts(self) -> Any:
        """Anatomy of the blocks that are there."""
        return self.places.parts

    def _tail(self, prefix: Prefix, *, grad: bool) -> Hidden:
        """Run from the first trained block to the steered one.

        Where only the MLP of the first block is trained, its attention gives the same output
        every time; it is noted at the first run and handed back at the others.
        """
        first, stop = self.places.first, self.places.layer + 1

        def run() -> Hidden:
            return run_span(self.model, prefix.calls, prefix.hidden[first], first, stop, grad=grad)

        if not self.places.mlp_only:
            return run()
        attention = find_module(self.model, self.places.parts.attention[first])
        if first in prefix.attention:
            with _answering(attention, prefix.attention[first]):
                return run()

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            prefix.attention[first] = _first_alone(output)

        handle = attention.register_forward_hook(note)
        try:
            return run()
        finally:
            handle.remove()


def _first_alone(output: Any) -> Any:
    """Return a module's output with its first tensor detached and None for the rest."""
    if isinstance(output, Tensor):
        return output.detach()
    at = next(i for i, part in enumerate(output) if isinstance(part, Tensor))
    return tuple(part.detach() if i == at else None for i, part in enumerate(output))


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Let a module answer the same to every call while the block runs."""
    mine = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if mine is None:
            del module.forward
        else:
            module.forward = mine


@contextmanager
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values while the block runs; nothing is copied.

    Args:
        parameters: Parameters by name.
        values: Their values meanwhile.
    """
    mine = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = mine[name]
