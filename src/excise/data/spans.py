"""Labels for parts of a text: read, checked, cut, merged, and brought to tokens.

Positions count characters of `labelled_text`. A token has the label of the part that covers most
of it, blanks at its edges aside; where a part to be forgotten covers any of it, the whole token is
to be forgotten. This module imports no torch.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any, Final

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Row, Span, labelled_text

FORM: Final = "[start, end, capability] or [start, end, capability, confidence]"
"""How a file gives a span."""


def parse_spans(values: Sequence[Any], row: Row) -> tuple[Span, ...]:
    """Return the spans that a file gives a row, in order; an empty list says that all is core.

    Args:
        values: Lists of two positions, a capability and perhaps a confidence, or objects with these
            as `start`, `end`, `capability` and `confidence`.
        row: The row, which has its text.

    Raises:
        UserError: If one has another form, lies outside the text, holds no character or covers part
            of another.
    """
    if row.kind == "choice":
        raise UserError(
            "field 'spans' is read of texts, completions and conversations, and this is a "
            "multiple-choice question; give it as 'prompt' and 'completion'"
        )
    length = len(labelled_text(row))
    if not values and length:
        return (Span(0, length, ""),)
    spans = sorted(
        (_parsed(value, i, length) for i, value in enumerate(values)), key=lambda span: span.start
    )
    for a, b in pairwise(spans):
        if b.start < a.end:
            raise UserError(
                f"spans [{a.start}, {a.end}] and [{b.start}, {b.end}] overlap; give each character "
                "one label"
            )
    return tuple(spans)


def _parsed(value: Any, i: int, length: int) -> Span:
    """Return one span of a text of so many characters."""
    at = f"field 'spans[{i}]'"
    if isinstance(value, Mapping):
        lacking = [name for name in ("start", "end", "capability") if name not in value]
        if lacking:
            raise UserError(f"{at} has no '{lacking[0]}'; give {FORM}, or an object with these")
        value = [value.get(name) for name in ("start", "end", "capability", "confidence")]
    if not isinstance(value, list | tuple) or len(value) not in (3, 4):
        raise UserError(f"{at} is no {FORM}")
    start, end, capability, confidence = (*value, None)[:4]
    confidence = 1.0 if confidence is None else confidence
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in (start, end)):
        raise UserError(f"{at} has positions {start!r} and {end!r}; give whole numbers")
    if start == end:
        raise UserError(f"{at} is [{start}, {end}], which holds no character; remove it")
    if not 0 <= start < end <= length:
        raise UserError(
            f"{at} is [{start}, {end}] in a text of {length} characters; count characters from 0, "
            "the end behind the last one"
        )
    if not isinstance(capability, str | None) or capability == "core":
        raise UserError(f"{at} has the capability {capability!r}; give a name, or '' for core")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float):
        raise UserError(f"{at} has the confidence {confidence!r}; give a probability")
    if not 0 <= confidence <= 1:
        raise UserError(f"{at} has the confidence {confidence:g}; give one between 0 and 1")
    return Span(start, end, capability or "", confidence=float(confidence))


def outside(row: Row) -> int:
    """Return the label of what no span of a row covers."""
    if row.spans:
        return UNLABELED if row.label == UNLABELED else CORE
    return row.label


def labels_of(rows: Iterable[Row]) -> set[int]:
    """Return every label that some token of the rows may have."""
    return {label for row in rows for label in (outside(row), *(s.label for s in row.spans))}


def pieces(row: Row) -> tuple[Span, ...]:
    """Return spans that cover all of a row's text, in order: its own, and what lies between.

    Args:
        row: A row with spans or without, which is one piece then.
    """
    length = len(labelled_text(row))
    if not row.spans:
        return (Span(0, length, row.capability, row.label, row.confidence),) if length else ()
    edges = [0, *(at for span in row.spans for at in (span.start, span.end)), length]
    gaps = [Span(a, b, label=outside(row)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return tuple(sorted((s for s in (*gaps, *row.spans) if s.start < s.end), key=lambda s: s.start))


def word_pieces(row: Row) -> tuple[Span, ...]:
    """Return the pieces of a row cut where words begin; blanks belong to the word before them."""
    text = labelled_text(row)
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    out: list[Span] = []
    for piece in pieces(row):
        inside = starts[bisect_right(starts, piece.start) : bisect_right(starts, piece.end - 1)]
        for a, b in pairwise((piece.start, *inside, piece.end)):
            if out and text[a:b].isspace():
                out[-1] = replace(out[-1], end=b)
            else:
                out.append(replace(piece, start=a, end=b))
    return tuple(out)


def with_pieces(row: Row, parts: Iterable[Span]) -> Row:
    """Return a row labelled by pieces that cover its text, and by its document's label.

    Args:
        row: The row.
        parts: Pieces in order, without gaps; neighbours of one label become one span.

    Returns:
        The row. Its own label is the capability that most characters are given, with the highest
        confidence of theirs; core where none is, with the lowest: a document is of a capability
        where its most suspicious part is.
    """
    runs = [
        (key, [*run])
        for key, run in groupby(parts, key=lambda p: (p.capability, p.label, p.confidence))
    ]
    joined = [Span(run[0].start, run[-1].end, *key) for key, run in runs]
    characters: Counter[int] = Counter()
    for span in joined:
        characters[span.label] += span.end - span.start
    named = [number for number in sorted(characters) if number > CORE]
    label = max(named, key=lambda number: characters[number]) if named else min(row.label, CORE)
    stated = [span.confidence for span in joined if span.label == label] or [1.0]
    confidence = max(stated) if named else min(stated)
    rest = ("", min(label, CORE), 1.0)
    spans = tuple(s for s in joined if (s.capability, s.label, s.confidence) != rest)
    return replace(row, label=label, confidence=confidence, spans=spans)


def relabelled_spans(row: Row, label: int) -> tuple[Span, ...]:
    """Return a row's spans, those of capabilities given another label, as of a missed document."""
    return tuple(
        replace(span, label=label, confidence=1.0) if span.label > CORE else span
        for span in row.spans
    )


def labelled_whole(row: Row, label: int) -> Row:
    """Return a row all of whose text is given one label; what its parts truly are stays.

    Args:
        row: The row, with spans or without.
        label: The label of a document that was looked at as one.
    """
    parts = (replace(part, label=label, confidence=1.0) for part in pieces(row) if row.spans)
    spans = tuple(part for part in parts if part.capability or label > CORE)
    return replace(row, label=label, confidence=1.0, spans=spans)


def cut_spans(spans: Sequence[Span], start: int, end: int) -> tuple[Span, ...]:
    """Return what of spans lies between two characters, counted from the first of the two."""
    return tuple(
        replace(span, start=max(span.start, start) - start, end=min(span.end, end) - start)
        for span in spans
        if span.start < end and span.end > start
    )


def rewritten(row: Row, **fields: Any) -> Row:
    """Return a row with other fields, and with the spans of the text that it kept.

    What the two texts have in common at their end and at their beginning is the same text; spans
    that reach into the rest are dropped, and without any left the row counts whole.

    Args:
        row: The row.
        **fields: Fields of `Row` that change.
    """
    new = replace(row, spans=(), **fields)
    if not row.spans:
        return new
    old_text, new_text = labelled_text(row), labelled_text(new)
    after = common_length(old_text[::-1], new_text[::-1])
    before = common_length(old_text, new_text)
    by = len(new_text) - len(old_text)
    spans = []
    for span in row.spans:
        if span.start >= len(old_text) - after:
            spans.append(replace(span, start=span.start + by, end=span.end + by))
        elif span.end <= min(before, len(new_text) - after):
            spans.append(span)
    return replace(new, spans=tuple(spans))


def common_length(a: str, b: str) -> int:
    """Return the length of the common beginning."""
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def label_tokens(
    text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[Span], rest: int
) -> tuple[list[int], list[float], int]:
    """Return the label of every token of a text.

    Args:
        text: What was tokenized.
        offsets: First character of each token, and the one behind its last.
        spans: Labels of parts of the text, in order.
        rest: Label of what no span covers.

    Returns:
        Label and confidence of each token, and how many tokens have characters of another label.
    """
    starts = [span.start for span in spans]
    labels: list[int] = []
    confidences: list[float] = []
    cut = 0
    for a, b in offsets:
        first, last = _trimmed(text, a, b)
        over: dict[int, int] = {}  # characters by span
        at = max(0, bisect_right(starts, first) - 1)
        while at < len(spans) and spans[at].start < last:
            if shared := min(last, spans[at].end) - max(first, spans[at].start):
                over[at] = max(0, shared)
            at += 1
        covered = {at: shared for at, shared in over.items() if shared > 0}
        chosen = [at for at in covered if spans[at].label > CORE]
        if not chosen and 2 * sum(covered.values()) > last - first:
            chosen = [*covered]
        if not chosen:
            labels.append(rest)
            confidences.append(1.0)
            cut += any(spans[at].label != rest for at in covered)
            continue
        best = max(chosen, key=lambda at: covered[at])
        labels.append(spans[best].label)
        confidences.append(spans[best].confidence)
        same = sum(n for at, n in covered.items() if spans[at].label == spans[best].label)
        same += last - first - sum(covered.values()) if spans[best].label == rest else 0
        cut += same < last - first
    return labels, confidences, cut


def tokens_of(
    text: str, offsets: Sequence[tuple[int, int]], parts: Sequence[tuple[int, int]]
) -> list[bool]:
    """Return which tokens of a text have a character of one of its parts, blanks aside.

    Args:
        text: What was tokenized.
        offsets: First character of each token, and the one behind its last.
        parts: Parts of the text.
    """
    spans = [Span(start, end, label=CORE + 1) for start, end in parts]
    return [label > CORE for label in label_tokens(text, offsets, spans, CORE)[0]]


def without(row: Row, gone: Callable[[Span], bool]) -> Row | None:
    """Return a row without some of its spans, as its document is where nobody ever wrote them.

    Blanks behind what is cut go with it, and at the end of the text those before it.

    Args:
        row: A row with spans, or without: one piece then.
        gone: Whether a span is cut out.

    Returns:
        The row, labelled by what is left of it; None where no word is left, nothing to score, or a
        turn of a conversation without a word.
    """
    cuts = [(s.start, s.end) for s in (row.spans or pieces(row)) if gone(s)]
    if not cuts:
        return row
    if not row.spans:
        return None
    text, turns, at = labelled_text(row), [], 0
    for _, content in row.messages:
        turns.append((at, at + len(content)))
        at += len(content) + 1
    cuts = [
        cut
        for part in turns or [(0, len(text))]
        for cut in _with_blanks(text, [(max(a, part[0]), min(b, part[1])) for a, b in cuts], part)
    ]

    def now(at: int) -> int:
        """Return where a character of the text lies after the cuts."""
        return at - sum(min(at, end) - start for start, end in cuts if start < at)

    def left(start: int, end: int) -> str:
        """Return what is left of a part of the text."""
        edges = [start, *(min(max(at, start), end) for cut in cuts for at in cut), end]
        return "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))

    targets = tuple((now(a), now(b)) for a, b in row.targets if now(a) < now(b))
    spans = tuple(
        replace(s, start=now(s.start), end=now(s.end))
        for s in row.spans
        if now(s.start) < now(s.end)
    )
    messages = [(said[0], left(*turn)) for said, turn in zip(row.messages, turns, strict=True)]
    border = len(row.prompt)
    prompt, completion = left(0, border), left(border, border + len(row.completion))
    parts = [content for _, content in messages] or [left(0, len(text)) if row.text else completion]
    if (row.targets and not targets) or not all(re.search(r"\w", part) for part in parts):
        return None
    cut = replace(
        row,
        text=left(0, len(row.text)),
        prompt=prompt,
        completion=completion,
        messages=tuple(messages),
        spans=spans,
        targets=targets,
    )
    if not any(s.capability for s in spans):
        cut = replace(cut, capability="")
    if not spans:
        return replace(cut, label=outside(row), confidence=1.0)
    return with_pieces(cut, pieces(cut))


def _with_blanks(
    text: str, cuts: Sequence[tuple[int, int]], part: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return cuts in a part of a text with the blanks that would stand twice, or at its end."""
    first, last = part
    out: list[tuple[int, int]] = []
    for start, end in cuts:
        if start >= end:
            continue
        if out and not text[out[-1][1] : start].strip():
            start = out.pop()[0]
        if start == first or text[start - 1].isspace():
            end = last - len(text[end:last].lstrip())
        if end == last:
            start = first + len(text[first:start].rstrip())
        out.append((start, end))
    return out


def _trimmed(text: str, a: int, b: int) -> tuple[int, int]:
    """Return a token's characters without blanks at its edges; one at least."""
    words = text[a:b].strip()
    if not words:  # a tokenizer that trims offsets leaves of a blank its end alone
        return (a - 1, a) if a == b > 0 else (a, max(b, a + 1))
    start = text.index(words, a)
    return start, start + len(words)
