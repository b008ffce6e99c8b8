"""Words of a text, the labels that rows give them, and rows with the labels that words are given.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal

from excise.data.dedup import text_hash
from excise.data.domain import CORE, UNLABELED, Row, Span, labelled_text
from excise.data.spans import label_tokens, outside, pieces, with_pieces

_MARKS: Final = r"!-/:-@\[-`{-~\u2000-\u200b\u200e-\u206f\u3000-\u303f\uff01-\uff0f"
_ALONE: Final = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD: Final = re.compile(rf"[{_MARKS}]|[{_ALONE}]|[^\s{_MARKS}{_ALONE}]{{1,32}}")
"""A mark, a character of a script that sets no blanks between words, or a run of other ones."""

LEVELS: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Probabilities that labels carry: neighbours of one level become one span."""

SplitBy = Literal["row", "unit", "group"]
"""What is never on both sides of a split."""


@dataclass(frozen=True)
class Document:
    """A row as words.

    Attributes:
        row: The row.
        words: Its words.
        offsets: First character of each in `labelled_text`, and the one behind its last.
        labels: Label that the row gives each; `UNLABELED` where it is more likely wrong.
        confidences: Confidence in each.
    """

    row: Row
    words: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    labels: tuple[int, ...]
    confidences: tuple[float, ...]


def document_of(row: Row) -> Document:
    """Return a row as words; one that holds none but blanks has none."""
    text = labelled_text(row)
    found = [*WORD.finditer(text)]
    offsets = tuple(match.span() for match in found)
    labels, confidences, _ = label_tokens(text, offsets, row.spans, outside(row))
    if not row.spans:
        confidences = [row.confidence] * len(labels)
    labels = [n if c >= 0.5 else UNLABELED for n, c in zip(labels, confidences, strict=True)]
    words = tuple(match.group() for match in found)
    return Document(row, words, offsets, tuple(labels), tuple(confidences))


def documents_of(rows: Iterable[Row]) -> list[Document]:
    """Return rows as words; of a row that is read several times, one document."""
    made: dict[Row, Document] = {}
    out = []
    for row in rows:
        if row not in made:
            made[row] = document_of(row)
        out.append(made[row])
    return out


def labelled(document: Document, labels: Sequence[int | None], confidences: Sequence[float]) -> Row:
    """Return a row whose words have these labels; blanks have that of the word before them.

    Args:
        document: The row as words.
        labels: A label per word; None for the one it has.
        confidences: Confidence in each new label.

    Returns:
        The row, its spans as few as the labels allow; its capability and theirs stay.
    """
    row = document.row
    if not document.words:
        return row
    starts = [start for start, _ in document.offsets]
    parts: list[Span] = []
    for piece in pieces(row):
        inside = starts[bisect_right(starts, piece.start) : bisect_right(starts, piece.end - 1)]
        for a, b in pairwise((piece.start, *inside, piece.end)):
            at = max(0, bisect_right(starts, a) - 1)
            part = replace(piece, start=a, end=b)
            label = labels[at]
            if label is not None:
                part = replace(part, label=label, confidence=confidences[at])
            parts.append(part)
    complete = all(part.label != UNLABELED for part in parts)
    return with_pieces(replace(row, label=CORE) if complete else row, parts)


def split_keys(rows: Sequence[Row], by: SplitBy) -> list[str]:
    """Return a key per row that is shared by all rows which must lie on one side of a split.

    Args:
        rows: The rows.
        by: What rows have in common that must: unit and text, or group beside them; with `row` the
            text alone.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in rows:
        text = f"text:{text_hash(labelled_text(row))}"
        shared = [text]
        if by != "row" and row.unit:
            shared.append(f"unit:{row.unit}")
        if by == "group" and row.group:
            shared.append(f"group:{row.group}")
        for key in shared[1:]:
            a, b = sorted((root(text), root(key)))
            parent[b] = a
    return [root(f"text:{text_hash(labelled_text(row))}") for row in rows]


def ranked(keys: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Return the distinct keys in an order that depends on them and the seed alone."""
    return sorted(
        set(keys), key=lambda k: hashlib.sha256(f"{seed}:{purpose}:{k}".encode()).digest()
    )
