"""How often rows are read, and how many stand in one text.

This module imports no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from excise.core.errors import UserError
from excise.data.domain import Row, Rows, Span, text_of
from excise.data.spans import pieces, with_pieces


def mixed(rows: Sequence[Row], share: float) -> Rows:
    """Repeat rows until a given share of the words is of what is to be forgotten.

    No row is dropped. The side of which there is too little is read a whole number of times, and
    as many of its rows once more as the share takes, chosen by a hash of their content. In
    `facts` a word is a token, so the share is that of the tokens, BOS aside.

    Args:
        rows: Rows with their true `capability`.
        share: Share of the words of one epoch, exact to half of the longest row.

    Returns:
        The rows in their order, then the repetitions.

    Raises:
        UserError: If the share is not between 0 and 1, there are no rows of one side, or a row has
            spans.
    """
    if not 0 < share < 1:
        raise UserError(f"mix_share is {share:g}; choose a share between 0 and 1")
    if spanned := next((row for row in rows if row.spans), None):
        raise UserError(
            f"mix_share repeats whole rows, and unit '{spanned.unit}' has spans of both sides; "
            "leave it out"
        )
    sides = [[row for row in rows if bool(row.capability) == side] for side in (True, False)]
    if not all(sides):
        lacking = "to be forgotten" if not sides[0] else "to keep"
        raise UserError(
            f"mix_share needs rows of both sides, and no row is {lacking}; leave it out"
        )
    forget, rest = (sum(words(row) for row in side) for side in sides)
    wanted = forget * (1 - share) / share
    if wanted >= rest:
        return (*rows, *_more(sides[1], rest, wanted))
    return (*rows, *_more(sides[0], forget, rest * share / (1 - share)))


def in_texts(rows: Sequence[Row], count: int) -> Rows:
    """Return texts of several rows each, of whatever kind: every row once, in one of them.

    Which rows meet depends on their content alone. No text holds two rows of one unit, of which
    the second could be read off the first. What is scored of a row alone is scored of it in a text,
    and a row of a capability is a span, so that nothing but the company changes.

    Args:
        rows: Texts, completions or questions, whose right option stands behind the prompt.
        count: Rows per text; the last texts may have fewer.

    Raises:
        UserError: If a row is a conversation.
    """
    if count == 1:
        return tuple(rows)
    texts: list[list[Row]] = []
    texts_of: dict[str, int] = {}  # the first text that a unit may still enter
    first = 0  # the first text with room
    for row in _shuffled(rows):
        at = max(first, texts_of.get(row.unit, 0))
        while at < len(texts) and len(texts[at]) == count:
            at += 1
        if at == len(texts):
            texts.append([])
        texts[at].append(row)
        texts_of[row.unit] = at + 1
        while first < len(texts) and len(texts[first]) == count:
            first += 1
    return tuple(_text_of_rows(f"text/{i}", text) for i, text in enumerate(texts))


def _text_of_rows(unit: str, rows: Sequence[Row]) -> Row:
    """Return one text of several rows, one blank between two."""
    text = ""
    spans: list[Span] = []
    targets: list[tuple[int, int]] = []
    for row in rows:
        head, tail = _halves(row)
        text += " " * bool(text)
        start = len(text)
        text += head + tail
        targets.append((len(text) - len(tail.lstrip()), len(text)))
        own = row.spans or pieces(replace(row, text=head + tail, choices=()))
        spans += [
            replace(span, start=span.start + start, end=span.end + start)
            for span in own
            if span.capability or span.label
        ]
    whole = Row(unit=unit, text=text, spans=tuple(spans), targets=tuple(targets))
    whole = with_pieces(whole, pieces(whole))
    named = {span.label: span.capability for span in whole.spans}
    return replace(whole, capability=named.get(whole.label, ""))


def _halves(row: Row) -> tuple[str, str]:
    """Return what is read of a row, and what of it is scored."""
    if row.kind == "chat":
        raise UserError(
            f"unit '{row.unit}' is a conversation, which is no part of a text; leave out "
            "rows_per_text"
        )
    if row.kind == "choice":
        return row.prompt, f" {row.choices[row.answer]}"
    return row.prompt, row.text or row.completion


def words(row: Row) -> int:
    """Return the number of words of a row, at least one."""
    return max(1, len(text_of(row).split()))


def _more(side: Sequence[Row], have: int, wanted: float) -> list[Row]:
    """Return the repetitions that bring `have` words as near to `wanted` as rows allow."""
    whole = int(wanted // have)
    out = list(side) * (whole - 1)
    left = wanted - whole * have
    for row in sorted(side, key=_rank):
        if words(row) / 2 >= left:
            break
        out.append(row)
        left -= words(row)
    return out


def _shuffled(rows: Sequence[Row]) -> list[Row]:
    """Return rows in an order by content, repetitions of a row far from each other."""
    seen: Counter[bytes] = Counter()
    ranked = []
    for row in rows:
        rank = _rank(row)
        again = seen[rank].to_bytes(8)
        seen[rank] += 1
        ranked.append((hashlib.sha256(rank + again).digest(), row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def _rank(row: Row) -> bytes:
    """Return a rank by content alone."""
    return hashlib.sha256(f"{row.unit}\x1f{row.wording}\x1f{text_of(row)}".encode()).digest()
