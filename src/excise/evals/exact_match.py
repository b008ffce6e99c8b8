"""Exact match: whether greedy decoding would say exactly what it should."""

from __future__ import annotations

from collections.abc import Sequence

from excise.data.domain import Row
from excise.evals.tokens import Answer

DEFINITION = (
    "exact_match@1: 1 if every scored token of a row is the most probable one in one "
    "teacher-forced forward, else 0"
)


def exact_match(answers: Sequence[Answer]) -> list[float]:
    """Return 1.0 for every row whose scored tokens are all the most probable ones, else 0.0."""
    return [float(all(a.hits)) for a in answers]


def chance_of(rows: Sequence[Row]) -> float | None:
    """Return the score of naming an object at random.

    Args:
        rows: The rows that are scored, or better all rows of their kind.

    Returns:
        One over the number of distinct completions; None where rows have none to draw from.
    """
    texts = {row.completion.strip() for row in rows if row.kind == "completion"}
    return 1 / len(texts) if len(texts) > 1 else None
