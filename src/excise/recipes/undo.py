"""What the recipes of UNDO share: a student of one teacher, and the arms by strength of damage."""

from __future__ import annotations

from typing import Any

from excise.methods import Undo
from excise.methods.base import Method
from excise.train.fit import FitConfig


def student(teacher: Method, fit: FitConfig, length: int, **changes: Any) -> Undo:
    """Return a student that takes all steps.

    Args:
        teacher: How the unlearned model is made.
        fit: The student's schedule.
        length: Tokens per row.
        **changes: Settings of `Undo` that differ.
    """
    return Undo(**{"unlearn": teacher, "fit": fit, "max_length": length, **changes})


def strengths(teacher: Method, fit: FitConfig, length: int) -> dict[str, Method]:
    """Return the teacher alone and students of four strengths of damage, by arm."""
    arms: dict[str, Method] = {"unlearn_only": teacher}
    for name, changes in (
        ("undo_03", {"alpha": 0.3}),
        ("undo_06", {"alpha": 0.6}),
        ("undo_08", {"alpha": 0.8}),
        ("undo_1", {"alpha": 1.0, "beta": 1.0}),
    ):
        arms[name] = student(teacher, fit, length, **changes)
    return arms
