"""Errors a user can cause. Each is one sentence: what, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave us; the command prints it and exits with 2."""


class DiskFull(UserError):
    """The disk filled up; finished work is kept and the same command resumes (exit code 1)."""


class Diverged(RuntimeError):
    """Training produced a non-finite loss; the last good weights are kept (exit code 1)."""


class ProcessLost(RuntimeError):
    """A process of several is gone and left no word; the same command resumes (exit code 1)."""


class NotFinite(UserError):
    """A model whose scores are NaN or infinite: nothing can be said of it."""

    def __init__(self, model: str, metric: str, broken: int, total: int) -> None:
        """Say which model and metric, and of how many rows the score is no number."""
        super().__init__(
            f"{model} has no finite {metric} on {broken:,} of {counted(total, 'row')}; its weights "
            "or activations hold NaN or infinity: load it in a wider dtype, or lower the learning "
            "rate it was trained with"
        )
        self.found = (metric, broken, total)
        self.model = model

    def __reduce__(self) -> tuple[type[NotFinite], tuple[str, str, int, int]]:
        """Travel to another process as what it was made of."""
        return NotFinite, (self.model, *self.found)

    def of(self, model: str) -> NotFinite:
        """Return the same about a model by the name that a reader knows it by."""
        return NotFinite(model, *self.found)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a phrase naming the entries of `known` closest to `name`, for the end of an error.

    Args:
        name: What the user wrote.
        known: What would have been right.
        count: How many to name at most.

    Returns:
        `"did you mean 'a' or 'b'?"`, or `"known: a, b, c"` when nothing is close.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "known: " + ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def first_line(error: BaseException) -> str:
    """Return an error's first line that says something, short enough for a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError):
        lines = [f"{error} is missing"]
    if len(lines) > 1 and lines[0].endswith(":"):
        del lines[0]  # a heading
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, which gets an s unless there is one: `1 unit`, `3 units`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
