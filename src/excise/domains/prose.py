"""Texts in passages, and the general English that ships: two novels and public addresses.

All of it is in the public domain; `shipped/LICENSE-prose.txt` says where it comes from. A document
(a chapter, an address) is never split between parts. This module imports no torch.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Final, Literal, get_args

from excise.core.errors import UserError, nearest
from excise.data.domain import Row, Rows
from excise.data.split import hashed_order, portions

ProsePart = Literal["test", "dev", "benign", "retain"]
"""The parts; `retain` is the rest, about two thirds."""

SHARES: Final = (0.12, 0.06, 0.15)
"""Shares of the documents of each source for `test`, `dev` and `benign`."""

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
    passage: list[str] = []
    first = True
    for sentence in _SENTENCE.split(text):
        tokens = sentence.split()
        while tokens:
            room = words + words // 4 - len(passage)
            passage += tokens[:room]
            tokens = tokens[room:]
            if len(passage) >= words:
                yield " ".join(passage)
                passage, first = [], False
    if passage and (first or len(passage) * 5 >= words):
        yield " ".join(passage)


@cache
def documents() -> tuple[tuple[str, str], ...]:
    """Return (id, text) of every document; the id is `source/number`."""
    packed = files("excise").joinpath("domains/shipped/prose.jsonl.xz").read_bytes()
    rows = [json.loads(line) for line in lzma.decompress(packed).decode().splitlines()]
    return tuple((row["id"], row["text"]) for row in rows)


def load_prose(part: ProsePart, *, words: int = 100, limit: int = 0) -> Rows:
    """Return passages of general English.

    Args:
        part: Which part; parts share no document.
        words: Words per passage, about.
        limit: Passages at most, spread over all documents; 0 for all.

    Returns:
        Text rows of core knowledge: the unit is the passage, the group its document.

    Raises:
        UserError: If the part is unknown.
    """
    names = get_args(ProsePart)
    if part not in names:
        raise UserError(f"prose has no part '{part}'; {nearest(part, names)}")
    sources: dict[str, list[tuple[str, str]]] = {}
    for key, text in documents():
        sources.setdefault(key.split("/")[0], []).append((key, text))
    rows = []
    for texts in sources.values():
        order = hashed_order(texts, [key for key, _ in texts])
        for key, text in portions(order, SHARES)[names.index(part)]:
            for i, passage in enumerate(passages(text, words)):
                rows.append(Row(unit=f"prose/{key}#{i}", group=f"prose/{key}", text=passage))
    rows = hashed_order(rows, [row.unit for row in rows])
    return tuple(rows[:limit] if limit else rows)
