"""Facts as statements: what models of a study read, and forget sets that are less than clean.

Models that learn whole statements have an opinion about every token, so that being coherent (the
words of a question) and knowing (its answer) can be scored apart.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from excise.data.domain import Domain, Row, Rows

Mess = Literal["clean", "diluted", "off_topic", "messy"]
"""What a forget set is made of; see `forget_set`."""


def said(row: Row) -> str:
    """Return a row as one text: a question with its right answer."""
    if row.kind == "text":
        return row.text
    answer = row.completion if row.completion else " " + row.choices[row.answer]
    return row.prompt + answer


def as_text(row: Row) -> Row:
    """Return the row as plain text, every token a target."""
    return replace(row, text=said(row), prompt="", completion="", choices=(), answer=-1)


def asked(row: Row) -> Row:
    """Return the question of a row as plain text; a text row as it is."""
    return row if row.kind == "text" else replace(as_text(row), text=row.prompt)


def as_statements(domain: Domain) -> Domain:
    """Return a domain whose models and methods read statements; what is scored stays.

    Args:
        domain: A domain of completions or questions.

    Returns:
        The domain with `forget`, `retain`, `adjacent`, `unlabeled` and `benign` as plain text.
    """
    texts: dict[str, Rows] = {
        role: tuple(as_text(row) for row in getattr(domain, role))
        for role in ("retain", "adjacent", "unlabeled", "benign")
    }
    return with_forget(
        replace(domain, **texts),  # type: ignore[arg-type]
        {name: tuple(map(as_text, rows)) for name, rows in domain.forget.items()},
    )


def with_forget(domain: Domain, forget: Mapping[str, Rows]) -> Domain:
    """Return the domain with another forget set for the method; its fingerprint follows."""
    return replace(domain, forget=dict(forget))


def forget_set(domain: Domain, mess: Mess, *, filler: int, off_topic: float, seed: int) -> Domain:
    """Return the domain with a forget set that isolates the facts less well.

    Every variant holds every fact once in every wording, so that none lacks what is to go.

    Args:
        domain: A domain of statements.
        mess: `clean`: the statements; `diluted`: each between `filler` statements that are to be
            retained, in one text; `off_topic`: besides the statements, texts that name the same
            subjects and say nothing true; `messy`: both.
        filler: Retained statements per text.
        off_topic: Share of the rows that only share topic words.
        seed: Seed of the draws.

    Returns:
        The domain; all that is scored is the same.
    """
    draw = random.Random(f"forget_set:{mess}:{seed}")
    pool = [row.text for row in domain.retain]
    made: dict[str, Rows] = {}
    for name, rows in domain.forget.items():
        kept = list(rows)
        if mess in ("off_topic", "messy"):
            count = round(len(rows) * off_topic / (1 - off_topic))
            kept += _off_topic(rows, pool, count, draw)
        if mess in ("diluted", "messy"):
            kept = [_diluted(row, pool, filler, draw) for row in kept]
        made[name] = tuple(kept)
    return with_forget(domain, made)


def _diluted(row: Row, pool: Sequence[str], filler: int, draw: random.Random) -> Row:
    """Return the row's text somewhere between `filler` others."""
    texts = draw.sample(pool, filler)
    texts.insert(draw.randrange(filler + 1), row.text)
    return replace(row, text=" ".join(texts))


def _off_topic(
    rows: Sequence[Row], pool: Sequence[str], count: int, draw: random.Random
) -> list[Row]:
    """Return texts that name a subject of `rows` and then say what is said of somebody else."""
    made = []
    for i in range(count):
        row = draw.choice(rows)
        made.append(
            replace(row, unit=f"off-topic/{i}", text=f"{row.group} {draw.choice(pool)}", wording=0)
        )
    return made
