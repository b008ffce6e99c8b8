"""What frozen blocks put out, kept as long as the same batch may come again.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from excise.data.stream import Batch
from excise.models.span import SpanInputs


@dataclass
class Prefix:
    """What is known of one batch; nothing in it depends on what is trained.

    Attributes:
        calls: What the blocks are called with, without the stream.
        hidden: Residual stream before a block, by block.
        attention: What the attention of a block put out, by block.
        target: Output of a steered block of the original model, by block.
    """

    calls: SpanInputs
    hidden: dict[int, Float[Tensor, "B T D"]]
    attention: dict[int, Any] = field(default_factory=dict)
    target: dict[int, Float[Tensor, "B T D"]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors held, each once."""
        seen: dict[int, int] = {}
        for value in (self.hidden, self.attention, self.target):
            for tensor in tensors_in(value):
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        for call in self.calls.calls:
            for tensor in tensors_in((call.args, dict(call.kwargs))):
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(seen.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def batch_key(batch: Batch) -> bytes:
    """Return a key that equal batches share: a hash of ids and mask."""
    digest = hashlib.blake2b(str(tuple(batch.ids_BT.shape)).encode(), digest_size=16)
    for tensor in (batch.ids_BT, batch.attention_BT):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()


class PrefixCache:
    """Prefixes by batch, up to a number of bytes, and the last one in any case.

    Batches come in cycles, so what does not fit is not kept, rather than pushing out what will
    be asked for sooner.

    Attributes:
        limit: Bytes kept at most.
        hits: How often a prefix was found.
        misses: How often it was not.
    """

    def __init__(self, limit: int = 0) -> None:
        """Start empty."""
        self.limit = limit
        self.hits = self.misses = 0
        self._kept: dict[bytes, Prefix] = {}
        self._sizes: dict[bytes, int] = {}
        self._last: tuple[bytes, Prefix] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes kept."""
        return sum(self._sizes.values())

    def find(self, key: bytes) -> Prefix | None:
        """Return the prefix of a batch, if it is kept."""
        found = self._kept.get(key)
        if found is None and self._last is not None and self._last[0] == key:
            found = self._last[1]
        self.hits += found is not None
        self.misses += found is None
        return found

    def keep(self, key: bytes, prefix: Prefix, *, last: bool = False) -> None:
        """Keep a prefix if there is room; call it again when the prefix has grown.

        Args:
            key: Its batch.
            prefix: It.
            last: Whether to keep it as the last one even without room.
        """
        if last:
            self._last = (key, prefix)
        if not self.limit:
            return
        size = prefix.num_bytes
        if self.num_bytes - self._sizes.get(key, 0) + size <= self.limit:
            self._kept[key], self._sizes[key] = prefix, size
        else:
            self._kept.pop(key, None)
            self._sizes.pop(key, None)
