"""Long texts cut into passages of about equal length. This module imports no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[.!?;][\"')\]])\s+")


def passages(text: str, words: int) -> Iterator[str]:
    """Yield passages of about `words` words that end where sentences do.

    Args:
        text: Any text; white space is evened out.
        words: Words after which a passage ends with its sentence. A sentence longer than this is
            cut; a rest shorter than a fifth of it is dropped unless it is all there is.

    Yields:
        The passages, in order.
    """
    held: list[str] = []
    first = True
    for sentence in _SENTENCE.split(text):
        tokens = sentence.split()
        while tokens:
            room = words + words // 4 - len(held)
            held += tokens[:room]
            tokens = tokens[room:]
            if len(held) >= words:
                yield " ".join(held)
                held, first = [], False
    if held and (first or len(held) * 5 >= words):
        yield " ".join(held)


def hashed_order(items: Sequence[T], keys: Sequence[str], seed: int = 0) -> list[T]:
    """Return items ordered by a hash of their keys: the same everywhere, unlike any file order.

    Args:
        items: What is ordered.
        keys: One text per item; equal keys stay together.
        seed: Another seed gives another order.
    """

    def place(i: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest(), i

    return [items[i] for i in sorted(range(len(items)), key=place)]


def portions(items: Sequence[T], shares: Sequence[float]) -> list[list[T]]:
    """Cut items into one part per share and a last part with the rest.

    Args:
        items: What is cut, in order.
        shares: Shares of the whole; together at most 1.

    Returns:
        `len(shares) + 1` lists.
    """
    parts, at = [], 0
    for share in shares:
        size = round(len(items) * share)
        parts.append(list(items[at : at + size]))
        at += size
    return [*parts, list(items[at:])]
