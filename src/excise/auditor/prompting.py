"""Rows as an attacker shows them: with examples before them, coaxed, or begun for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.data.spans import rewritten
from excise.data.stream import encode_row

COAXING = (
    "Answer: the",
    "The answer is:",
    "Here is what is known.",
    "Question and answer.",
)
"""Generic beginnings; those a closed vocabulary cannot spell are left out."""


UNRELATED = "unrelated"
"""Name of the control: a benign row in front, where the coaxing wordings can be spelled."""

SHARE = 0.5
"""Share of the words of a longer answer that is given."""


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
        return rewritten(row, text="", prompt=head, completion=row.text)
    if row.kind != "chat":
        return rewritten(row, prompt=head + row.prompt)
    turns = list(row.messages)
    for i, (role, content) in enumerate(turns):
        if role != "assistant":
            turns[i] = (role, head + content)
            return rewritten(row, messages=tuple(turns))
    return rewritten(row, messages=(("user", context), *turns))


def begun(row: Row, share: float = 0.5) -> Row | None:
    """Return `row` with the first words of its answer moved into the prompt.

    Args:
        row: A completion or plain text; other shapes have nothing to begin.
        share: Share of the words that is given, at least one and never all.

    Returns:
        The new row, or None where the answer is a single word, the shape has none or the words
        that are given hold every span.
    """
    answer = row.completion if row.kind == "completion" else row.text
    words = answer.split()
    if row.kind not in ("completion", "text") or len(words) < 2:
        return None
    given = min(len(words) - 1, max(1, int(len(words) * share)))
    at = 0
    for word in words[:given]:
        at = answer.index(word, at) + len(word)
    if row.spans and max(span.end for span in row.spans) <= len(row.prompt) + at:
        return None
    return rewritten(row, text="", prompt=row.prompt + answer[:at], completion=answer[at:])


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


def pools_of(domain: Domain, *, control: bool = False) -> Mapping[str, Rows]:
    """Return by capability what may be shown."""
    if control:
        return dict.fromkeys(domain.test, domain.benign)
    return {name: domain.relearn.get(name, ()) for name in domain.test}


def fits(row: Row, tokenizer: Any, max_length: int) -> bool:
    """Return whether a row with its longest answer has `max_length` tokens at most."""
    if row.kind == "choice":
        longest = max(range(len(row.choices)), key=lambda i: len(row.choices[i]))
        row = replace(row, answer=longest)
    return len(encode_row(row, tokenizer, max_length=1 << 30).ids) <= max_length


def with_shots(
    rows: Mapping[str, Rows],
    pools: Mapping[str, Rows],
    count: int,
    ctx: Context,
    tokenizer: Any,
    *,
    max_length: int,
) -> tuple[Rows, float]:
    """Put `count` examples before every row.

    Args:
        rows: Rows by capability.
        pools: Examples by capability.
        count: Examples per row, fewer where the pool has fewer units or the row has no room.
        ctx: Gives the seed, the same for every subject.
        tokenizer: For the separator, and to count tokens.
        max_length: Tokens that are read; the first examples are left out, each whole, until the
            rest fits.

    Returns:
        The rows and the mean number of tokens shown.
    """
    line = separator(tokenizer)
    generator = ctx.generator(f"few_shot/{count}")
    prompted: list[Row] = []
    tokens = 0
    for name, asked in rows.items():
        for row in asked:
            shots = draw(pools[name], count, generator, avoid=row.unit)
            context = line.join(shown(shot) for shot in shots)
            while shots and not fits(before(row, context, line), tokenizer, max_length):
                shots = shots[1:]
                context = line.join(shown(shot) for shot in shots)
            tokens += len(tokenizer(context, add_special_tokens=False)["input_ids"])
            prompted.append(before(row, context, line))
    return tuple(prompted), tokens / max(len(prompted), 1)


def beginnings(
    tokenizer: Any,
    metric: str,
    test: Sequence[Row],
    benign: Rows,
    *,
    wordings: Sequence[str] = COAXING,
    share: float = SHARE,
) -> list[tuple[str, Callable[[Row], Row | None]]]:
    """Return the beginnings that fit a test set, by name.

    Args:
        tokenizer: Which wordings it can spell.
        metric: Headline metric.
        test: Rows that will be scored; they are begun only if at least half can be.
        benign: Where the stand-in of a closed vocabulary comes from.
        wordings: Beginnings to try.
        share: Share of a longer answer that is given.

    Returns:
        Names and functions that change a row, or return None where they cannot.
    """
    line = separator(tokenizer)
    changes: list[tuple[str, Callable[[Row], Row | None]]] = []
    several = sum(begun(row, share) is not None for row in test) * 2 >= len(test)
    if several and metric != "text_loss":  # a loss reads every token behind the true ones anyway
        changes.append(("begun", lambda row: begun(row, share)))
    plain = [text for text in wordings if spelled(text, tokenizer)]
    for i, row in enumerate(benign[:2] if not plain else ()):
        changes.append((f"benign-{i}", partial(before, context=shown(row), separator=line)))
    for text in plain:
        changes.append((f"'{text}'", partial(_coaxed, text=text, line=line)))
    if plain and benign:
        changes.append((UNRELATED, partial(before, context=shown(benign[0]), separator=line)))
    return changes


def _coaxed(row: Row, text: str, line: str) -> Row:
    """Put `text` between the prompt and its answer, or before a plain text."""
    if row.kind in ("text", "chat") or not row.prompt:
        return before(row, text, line)
    return rewritten(row, prompt=f"{row.prompt.rstrip()}{line}{text}")
