"""Rows as an attacker shows them: with examples before them, coaxed, or begun for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from excise.data.domain import Row, Rows

COAXING = (
    "Answer: the",
    "The answer is:",
    "Here is what is known.",
    "Question and answer.",
)
"""Generic beginnings; those a closed vocabulary cannot spell are left out."""


def shown(row: Row) -> str:
    """Return everything a row says, as one text: prompt with its answer, or all turns."""
    if row.kind == "text":
        return row.text
    if row.kind == "completion":
        return row.prompt + row.completion
    if row.kind == "choice":
        return f"{row.prompt} {row.choices[row.answer]}"
    return "\n".join(content for _, content in row.messages)


def before(row: Row, context: str, separator: str = "\n") -> Row:
    """Return `row` with `context` in front of it.

    A plain text becomes a completion, so that only the text itself is scored; of a conversation
    the first turn that is not the model's gets the context.

    Args:
        row: A row of any shape.
        context: What the attacker writes first; empty leaves the row alone.
        separator: What stands between.

    Returns:
        The new row, about the same unit.
    """
    if not context:
        return row
    head = context + separator
    if row.kind == "text":
        return replace(row, text="", prompt=head, completion=row.text)
    if row.kind != "chat":
        return replace(row, prompt=head + row.prompt)
    turns = list(row.messages)
    for i, (role, content) in enumerate(turns):
        if role != "assistant":
            turns[i] = (role, head + content)
            return replace(row, messages=tuple(turns))
    return replace(row, messages=(("user", context), *turns))


def begun(row: Row, share: float = 0.5) -> Row | None:
    """Return `row` with the first words of its answer moved into the prompt.

    Args:
        row: A completion or plain text; other shapes have nothing to begin.
        share: Share of the words that is given, at least one and never all.

    Returns:
        The new row, or None where the answer is a single word or the shape has none.
    """
    answer = row.completion if row.kind == "completion" else row.text
    words = answer.split()
    if row.kind not in ("completion", "text") or len(words) < 2:
        return None
    given = min(len(words) - 1, max(1, int(len(words) * share)))
    at = 0
    for word in words[:given]:
        at = answer.index(word, at) + len(word)
    return replace(row, text="", prompt=row.prompt + answer[:at], completion=answer[at:])


def separator(tokenizer: Any) -> str:
    """Return a line break, or a space where the vocabulary has none."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return " " if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids else "\n"


def spelled(text: str, tokenizer: Any) -> bool:
    """Return whether the vocabulary can spell `text` without its unknown token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(ids) and (tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids)


def draw(rows: Sequence[Row], count: int, generator: torch.Generator, avoid: str = "") -> Rows:
    """Draw rows of different units.

    Args:
        rows: To draw from.
        count: How many; fewer where there are not as many units.
        generator: Source of chance.
        avoid: A unit that must not be drawn.

    Returns:
        The rows, in the order they were drawn.
    """
    picked: dict[str, Row] = {}
    for i in torch.randperm(len(rows), generator=generator).tolist():
        if len(picked) >= count:
            break
        if rows[i].unit != avoid:
            picked.setdefault(rows[i].unit, rows[i])
    return tuple(picked.values())
