"""What a row says, as one text, and long texts in chunks.

This module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from excise.core.errors import UserError
from excise.data.domain import Row, Rows


def text_of(row: Row) -> str:
    """Return everything a reader sees of a row, in any of its shapes, system turns left out."""
    if row.kind == "chat":
        return "\n".join(content for role, content in row.messages if role != "system")
    if row.kind == "choice":
        return f"{row.prompt}\n{row.choices[row.answer]}"
    return row.text or f"{row.prompt}{row.completion}"


def chunk_rows(rows: Iterable[Row], words: int) -> Rows:
    """Cut long plain texts into chunks of even length that keep their unit.

    A document is one unit with many chunks; rows of other shapes stay as they are.

    Args:
        rows: Rows.
        words: Words (runs of non-blank characters) per chunk at most.

    Returns:
        The chunks, in reading order; joined, those of a row hold all its words.
    """
    if words < 1:
        raise UserError(f"chunks of {words} words are not possible; ask for at least one")
    out: list[Row] = []
    for row in rows:
        spans = [m.span() for m in re.finditer(r"\S+", row.text)] if row.kind == "text" else []
        if len(spans) <= words:
            out.append(row)
            continue
        count = -(-len(spans) // words)
        edges = [i * len(spans) // count for i in range(count + 1)]
        for a, b in pairwise(edges):
            out.append(replace(row, text=row.text[spans[a][0] : spans[b - 1][1]]))
    return tuple(out)
