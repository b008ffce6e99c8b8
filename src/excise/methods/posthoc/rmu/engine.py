"""Three ways to the same activations: whole forwards, a span of blocks, a span with a memory.

`Full` is the published loop: every forward runs the whole model, and a second model stands for
the original. `TrainedSpan` runs the frozen blocks once without gradients and only the blocks
between the first trained matrix and the steered layer after that; copies of the trained matrices,
put in for one pass, stand for the second model. What it remembers is a `PrefixCache`: the last
batch (retain text is read twice in a step, and again for every topic) or, for `cached`, all that
fit.
All three call the same modules with the same tensors in the same shapes, so that bits agree.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.methods.posthoc.rmu.parameters import TargetParameters
from excise.models.hooks import active_stream, capture
from excise.models.names import find_module
from excise.models.span import SpanInputs, record_calls, run_span, without_start

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
        steered: Path of the steered block.
        inputs: How the model is called.
        restored: Context in which `frozen` is the original model.
    """

    model: nn.Module
    frozen: nn.Module
    steered: str
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
        with capture(model, [self.steered], grad=torch.is_grad_enabled()) as seen:
            model(**self.inputs(batch), use_cache=False)
        return active_stream(seen[self.steered][-1])


@dataclass
class CachedPrefix:
    """What is known of one batch; nothing in it depends on what is trained.

    Attributes:
        calls: What the blocks are called with, without the stream.
        hidden: Residual stream before a block, by block.
        attention: What the attention of a block put out, by block.
        original: Output of a steered block of the original model, by block.
    """

    calls: SpanInputs
    hidden: dict[int, Hidden]
    attention: dict[int, Any] = field(default_factory=dict)
    original: dict[int, Hidden] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in it, each once."""
        values = (self.hidden, self.attention, self.original)
        arguments = ((call.args, dict(call.kwargs)) for call in self.calls.calls)
        sizes = {
            tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for value in (*values, *arguments)
            for tensor in _tensors_in(value)
        }
        return sum(sizes.values())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors_in(part)


def _batch_key(batch: Batch) -> bytes:
    """Return a key that equal batches share: a hash of ids and mask."""
    digest = hashlib.blake2b(str(tuple(batch.ids_BT.shape)).encode(), digest_size=16)
    for tensor in (batch.ids_BT, batch.attention_BT):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()


class PrefixCache:
    """Prefixes by batch, up to a number of bytes, and the last one in any case.

    Batches come in cycles, so what does not fit is not stored, rather than pushing out what will
    be asked for sooner.

    Attributes:
        limit: Bytes stored at most.
        hits: How often a prefix was there.
        misses: How often it was not.
    """

    def __init__(self, limit: int = 0) -> None:
        """Start empty."""
        self.limit = limit
        self.hits = self.misses = 0
        self._prefixes: dict[bytes, CachedPrefix] = {}
        self._sizes: dict[bytes, int] = {}
        self._last: tuple[bytes, CachedPrefix] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes stored."""
        return sum(self._sizes.values())

    def get(self, key: bytes) -> CachedPrefix | None:
        """Return the prefix of a batch, if it is there."""
        prefix = self._prefixes.get(key)
        if prefix is None and self._last is not None and self._last[0] == key:
            prefix = self._last[1]
        self.hits += prefix is not None
        self.misses += prefix is None
        return prefix

    def put(self, key: bytes, prefix: CachedPrefix, *, last: bool = False) -> None:
        """Store a prefix if there is room; call it again when the prefix has grown.

        Args:
            key: Its batch.
            prefix: The prefix.
            last: Whether to store it as the last one even without room.
        """
        if last:
            self._last = (key, prefix)
        if not self.limit:
            return
        size = prefix.num_bytes
        if self.num_bytes - self._sizes.get(key, 0) + size <= self.limit:
            self._prefixes[key], self._sizes[key] = prefix, size
        else:
            self._prefixes.pop(key, None)
            self._sizes.pop(key, None)


@dataclass
class TrainedSpan:
    """Only the blocks that matter, on one model.

    Attributes:
        model: The model that is trained; blocks above the steered one may be missing.
        targets: What is trained.
        inputs: How the model is called.
        restored: Context in which the model is the original.
        cache: What is remembered.
        upto: Blocks whose calls are recorded; 0 for those up to the steered one.
    """

    model: nn.Module
    targets: TargetParameters
    inputs: Inputs
    restored: Callable[[], AbstractContextManager[object]]
    cache: PrefixCache = field(default_factory=PrefixCache)
    upto: int = 0

    def current(self, batch: Batch) -> Hidden:
        """Return the current activations."""
        key = _batch_key(batch)
        prefix = self._prefix(key, batch)
        hidden_BTD = self._tail(prefix, grad=torch.is_grad_enabled())
        self.cache.put(key, prefix)
        return hidden_BTD

    def original(self, batch: Batch) -> Hidden:
        """Return the original's activations."""
        key = _batch_key(batch)
        prefix = self._prefix(key, batch)
        layer = self.targets.layer
        if layer not in prefix.original:
            with self.restored():
                prefix.original[layer] = self._tail(prefix, grad=False)
        self.cache.put(key, prefix, last=True)
        return prefix.original[layer]

    def _prefix(self, key: bytes, batch: Batch) -> CachedPrefix:
        """Return what comes before the first trained block, from the nearest that is known."""
        first = self.targets.first
        prefix = self.cache.get(key)
        if prefix is None or min(prefix.hidden) > first:
            upto = self.upto or self.targets.layer + 1
            calls = record_calls(self.model, self.inputs(batch), upto, parts=self.targets.parts)
            fresh = CachedPrefix(without_start(calls), {0: calls.hidden_BTD})
            if prefix is not None:
                fresh.hidden |= prefix.hidden
                fresh.attention, fresh.original = prefix.attention, prefix.original
            prefix = fresh
        if first not in prefix.hidden:
            below = max(block for block in prefix.hidden if block < first)
            prefix.hidden[first] = run_span(
                self.model, prefix.calls, prefix.hidden[below], below, first, grad=False
            )
        if first > 0:
            prefix.hidden.pop(0, None)  # the embedding costs nothing to read again
        return prefix

    def _tail(self, prefix: CachedPrefix, *, grad: bool) -> Hidden:
        """Run from the first trained block to the steered one.

        Where only the MLP of the first block is trained, its attention gives the same output
        every time; it is noted at the first run and handed back at the others.
        """
        first, stop = self.targets.first, self.targets.layer + 1

        def run() -> Hidden:
            hidden = prefix.hidden[first]
            return active_stream(run_span(self.model, prefix.calls, hidden, first, stop, grad=grad))

        if not self.targets.attention:
            return run()
        attention = find_module(self.model, self.targets.attention)
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


CLOSE = 1e-3
"""How far a span may be from the whole model, as a share of its largest activation: rounding of
kernels that add up in any order."""


@torch.no_grad()
def runs_apart(model: Any, targets: TargetParameters, inputs: Inputs) -> bool:
    """Return whether a span of blocks gives what the whole model gives, by trying it.

    Blocks may hand on more than the residual stream: keys and values, a state, a mask made on the
    way. Another batch is read in between, so that what it leaves behind would show, and the first
    twice, so that its attention is handed back.

    Args:
        model: The model.
        targets: What is trained.
        inputs: How it is called.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids_BT = (torch.arange(4, 20, device=device) % vocabulary).view(2, 8)
    all_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    zeros_BT = torch.zeros_like(ids_BT)
    first, other = (
        Batch(ids, all_BT, all_BT, zeros_BT, ("", "")) for ids in (ids_BT, ids_BT.flip(0, 1))
    )
    whole_BTD = Full(model, model, targets.steered, inputs, nullcontext).current(first)
    span = TrainedSpan(model, targets, inputs, nullcontext, PrefixCache(1 << 30))
    try:
        span.current(first)
        span.current(other)
        again_BTD = span.current(first)
    except UserError:
        return False
    apart = float((again_BTD - whole_BTD).abs().max())
    return apart <= CLOSE * float(whole_BTD.abs().max())


def _first_alone(output: Any) -> Any:
    """Return a module's output with its first tensor detached and None for the rest."""
    if isinstance(output, Tensor):
        return output.detach()
    first = next(i for i, part in enumerate(output) if isinstance(part, Tensor))
    return tuple(part.detach() if i == first else None for i, part in enumerate(output))


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Let a module answer the same to every call while the block runs."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
