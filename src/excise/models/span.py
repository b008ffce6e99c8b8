"""Running only blocks [a, b) of an unmodified `transformers` decoder.

What a block is called with beside the residual stream (masks by layer type, sliding windows,
rotary embeddings, positions) is decided by the model's own forward. So that forward is run once
with every block replaced by a recorder, which costs the embedding alone; later each block is
called with what was recorded for it, and no family is rewritten.

Shape legend: B rows, T tokens, D width of the residual stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.anatomy import Backbone, backbone
from excise.models.hooks import eager, first_tensor
from excise.models.names import find_module, unwrap


@dataclass(frozen=True)
class Call:
    """What one block is called with.

    Attributes:
        args: Positional arguments; None stands where the residual stream goes.
        kwargs: Keyword arguments, likewise.
        slot: Where the residual stream goes: a position, or a keyword.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: int | str

    def run(self, block: nn.Module, hidden_BTD: Float[Tensor, "B T D"]) -> Tensor:
        """Call `block` on `hidden_BTD` and return the new residual stream."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.slot, int):
            args[self.slot] = hidden_BTD
        else:
            kwargs[self.slot] = hidden_BTD
        output = first_tensor(block(*args, **kwargs))
        assert output is not None, "a block put out no tensor"
        return output


@dataclass(frozen=True)
class SpanInputs:
    """What the first blocks of a model are called with on one batch.

    Attributes:
        hidden_BTD: The residual stream before block 0.
        calls: One per block.
        container: Canonical path of the list of blocks.
    """

    hidden_BTD: Float[Tensor, "B T D"]
    calls: tuple[Call, ...]
    container: str


class _Stop(Exception):
    """Everything wanted was recorded."""


class _Unlike(Exception):
    """The model does not hand the residual stream from block to block."""


def _no_cache(value: Any, index: int) -> None:
    """Refuse a cache: a block called twice would see its own past."""
    if hasattr(value, "get_seq_length"):
        raise UserError(
            f"block {index} is called with a cache although use_cache is False, so its calls "
            "cannot be repeated; run this model whole"
        )


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and hands the stream on unchanged.

    Hooks on the block do not run; any other attribute is the block's.
    """

    def __init__(self, block: nn.Module, index: int, record: Callable[..., Any]) -> None:
        super().__init__()
        self._instead_of = [block]  # in a list, so that it is no child of this module
        self._index, self._record = index, record

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._instead_of[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call."""
        return self._record(self._index, args, kwargs)


class _Tape:
    """The calls of the first `upto` blocks, in order."""

    def __init__(self, upto: int, as_tuple: bool) -> None:
        self.upto, self.as_tuple = upto, as_tuple
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None

    def record(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note a call; stop the forward after the last one wanted."""
        if index != len(self.calls):
            raise _Unlike(f"block {index} was called as number {len(self.calls)}")
        for value in (*args, *kwargs.values()):
            _no_cache(value, index)
        slot = self._slot(index, args, kwargs)
        rest = tuple(None if i == slot else value for i, value in enumerate(args))
        self.calls.append(Call(rest, {k: v for k, v in kwargs.items() if k != slot}, slot))
        if len(self.calls) == self.upto:
            raise _Stop
        return (self.hidden,) if self.as_tuple else self.hidden

    def _slot(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
        """Return where the stream is among the arguments, and keep it if it is the first."""
        slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        if self.hidden is None:
            slots.sort(key=lambda pair: pair[0] != "hidden_states")
            for slot, value in slots:
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
                    self.hidden = value
                    return slot
            raise _Unlike("block 0 was given no tensor of rows x tokens x width")
        for slot, value in slots:
            if value is self.hidden:
                return slot
        raise _Unlike(f"block {index} was not given what block {index - 1} put out")


@contextmanager
def _recorded(container: nn.Module, tape: _Tape) -> Iterator[None]:
    """Replace all blocks by recorders for as long as the block lasts."""
    before = dict(container.named_children())
    try:
        for index, (name, block) in enumerate(before.items()):
            container._modules[name] = _Recorder(block, index, tape.record)
        yield
    finally:
        for name, block in before.items():
            container._modules[name] = block


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run the model's forward, without a cache where it knows the word."""
    known = inspect.signature(unwrap(model)[1].forward).parameters.values()
    if any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in known):
        inputs = {**inputs, "use_cache": False}
    model(**inputs)


def record_calls(
    model: nn.Module,
    inputs: Mapping[str, Any],
    upto: int,
    *,
    grad: bool = False,
    parts: Backbone | None = None,
) -> SpanInputs:
    """Record what the first blocks are called with, without running any block.

    Args:
        model: A decoder, wrapped or not; only its embedding runs.
        inputs: Keyword arguments of its forward, as `Batch.inputs`.
        upto: Number of blocks, from the first.
        grad: Whether the residual stream before block 0 keeps its graph.
        parts: The backbone of the model, if at hand.

    Returns:
        The calls, and the residual stream before block 0.

    Raises:
        UserError: If there are fewer blocks, or the model does more between two blocks than hand
            the residual stream on, or keeps a cache.
    """
    parts = parts or backbone(model)
    if not 1 <= upto <= parts.num_blocks:
        raise UserError(f"the model has {parts.num_blocks} blocks; ask for 1 to that many")
    path = parts.blocks[0].rpartition(".")[0]
    container = find_module(model, path)
    reasons = []
    for as_tuple in (False, True):
        tape = _Tape(upto, as_tuple)
        try:
            with _recorded(container, tape), eager(model), torch.set_grad_enabled(grad):
                _call(model, inputs)
            reasons.append(f"only {len(tape.calls)} of {upto} blocks were called")
        except _Stop:
            assert tape.hidden is not None
            return SpanInputs(tape.hidden, tuple(tape.calls), path)
        except _Unlike as error:
            reasons.append(str(error))
        except Exception as error:
            if not tape.calls:
                raise
            # The forward reads more from a block's output than the residual stream.
            reasons.append(f"{type(error).__name__} after block {len(tape.calls) - 1}: {error}")
    raise UserError(
        f"blocks of a {parts.family} model cannot be run apart: looked for a residual stream that "
        f"goes from block to block of '{path}' unchanged, as a tensor or the first of a tuple, "
        f"but {reasons[0]}"
    )


def run_span(
    model: nn.Module,
    calls: SpanInputs,
    hidden_BTD: Float[Tensor, "B T D"],
    a: int,
    b: int,
    *,
    grad: bool = True,
) -> Float[Tensor, "B T D"]:
    """Run blocks a, ..., b - 1.

    Args:
        model: The model the calls were recorded on (or one of the same shape).
        calls: What `record_calls` returned for this batch.
        hidden_BTD: The residual stream before block a; for a = 0, `calls.hidden_BTD`.
        a: First block.
        b: Block to stop before.
        grad: Whether to build a graph.

    Returns:
        The residual stream after block b - 1, bit for bit that of the full forward (equal to
        `hidden_BTD` for a = b).

    Raises:
        UserError: If a and b do not lie within the recorded blocks.
    """
    if not 0 <= a <= b <= len(calls.calls):
        raise UserError(f"blocks {a} to {b} were not recorded; only 0 to {len(calls.calls)} were")
    blocks = list(find_module(model, calls.container).children())
    with torch.set_grad_enabled(grad):
        for call, block in zip(calls.calls[a:b], blocks[a:b], strict=True):
            hidden_BTD = call.run(block, hidden_BTD)
    return hidden_BTD


def hidden_after(
    model: nn.Module, inputs: Mapping[str, Any], block: int, *, parts: Backbone | None = None
) -> Float[Tensor, "B T D"]:
    """Return the residual stream after a block without running those above, without gradients.

    Args:
        model: A decoder.
        inputs: Keyword arguments of its forward.
        block: Number of the block.
        parts: The backbone of the model, if at hand.

    Returns:
        Its output.

    Raises:
        UserError: As `record_calls`.
    """
    calls = record_calls(model, inputs, block + 1, parts=parts)
    return run_span(model, calls, calls.hidden_BTD, 0, block + 1, grad=False)


def without_start(calls: SpanInputs) -> SpanInputs:
    """Return the calls without the residual stream before block 0, which frees its memory."""
    return replace(calls, hidden_BTD=calls.hidden_BTD.new_empty(0, 0, 0))
