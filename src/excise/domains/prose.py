"""Texts in passages, and the general English that ships: two novels and public addresses.

All of it is in the public domain; `shipped/LICENSE-prose.txt` says where it comes from. A document
(a chapter, an address) is never split between parts. This module imports no torch.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Final, Literal, get_args

from excise.core.errors import UserError, nearest
from excise.data.domain import Row, Rows, Span
from excise.data.split import hashed_order, portions

ProsePart = Literal["test", "dev", "benign", "retain"]
"""The parts; `retain` is the rest, about two thirds."""

PASSAGE: Final = 100
"""Words per passage unless a domain says otherwise."""

SHARES: Final = (0.12, 0.06, 0.15)
"""Shares of the documents of each source for `test`, `dev` and `benign`."""

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[.!?;][\"')\]])\s+")

_BORDER = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')]))"""
    r"""(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)\s+(?=["'(]*[A-Z])"""
)
"""Blanks between two sentences, titles and initials aside."""


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


def load_prose(part: ProsePart, *, words: int = PASSAGE, limit: int = 0) -> Rows:
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


def sentences(passage: str) -> list[str]:
    """Return the whole sentences of a passage, without what is left of one at either end."""
    parts = _BORDER.split(passage)
    if not re.match(r"""["'(]*[A-Z]""", parts[0]):
        parts = parts[1:]
    if parts and not re.search(r"""[.!?]["')]?$""", parts[-1]):
        parts = parts[:-1]
    return parts


def _runs(parts: Sequence[str], words: int) -> list[list[str]]:
    """Return sentences that follow each other, as many together as make up to so many words."""
    runs: list[list[str]] = [[]]
    for sentence in parts:
        if sum(len(s.split()) for s in (*runs[-1], sentence)) > words:
            runs.append([])
        if len(sentence.split()) <= words:
            runs[-1].append(sentence)
    return runs


def within_prose(rows: Sequence[Row], words: int, *, passage: int, skip: int, seed: int) -> Rows:
    """Return every row inside a passage of general English, between two sentences or at an end.

    Passages are some that `load_prose("retain")` leaves out: a model that reads the rows reads no
    retained passage once more. What was the row is a span with its capability and label.

    Args:
        rows: Text rows of capabilities.
        words: Words of the passage around each at most: whole sentences, two at least.
        passage: Words per passage that retain is cut into.
        skip: Passages that retain takes.
        seed: Which row meets which passage, and where it stands.

    Raises:
        UserError: If no passage is left, or none has two sentences of so few words.
    """
    left = load_prose("retain", words=passage)[skip:]
    around = [run for row in left for run in _runs(sentences(row.text), words) if len(run) > 1]
    if not around:
        raise UserError(
            f"prose_around: no passage beside the {skip} of retain has two sentences of at most "
            f"{words} words; raise it, or lower 'prose'"
        )
    keys = [f"{row.unit}:{row.wording}:{row.text}" for row in rows]
    at = {id(row): i for i, row in enumerate(hashed_order(rows, keys, seed))}
    out = []
    for row, key in zip(rows, keys, strict=True):
        some = around[at[id(row)] % len(around)]
        border = random.Random(f"prose:{seed}:{key}").randrange(len(some) + 1)
        start = len(" ".join([*some[:border], ""]))
        text = " ".join([*some[:border], row.text, *some[border:]])
        span = Span(start, start + len(row.text), row.capability, row.label)
        out.append(replace(row, text=text, spans=(span,)))
    return tuple(out)
