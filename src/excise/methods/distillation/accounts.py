"""What the record keeps of a distillation: why it ended, what it kept, what it took."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from excise.methods.base import Cost, Removal
from excise.methods.distillation.corpora import Texts
from excise.methods.distillation.distil import StopRule, Told

if TYPE_CHECKING:
    from excise.methods.distillation.undo import Undo


def stopping(rule: StopRule, told: Told, scores: tuple[float, float]) -> dict[str, Any]:
    """Return why and when the loop ended."""
    return {
        "steps": told.steps,
        "rule": "none" if rule.tolerance is None else "retain",
        "met": told.stopped,
        "metric": rule.metric,
        "retain_teacher": known(rule.goal),
        "retain_before": known(scores[0]),
        "retain_after": known(scores[1]),
        "checks": rule.checks,
    }


def known(value: float) -> float | None:
    """Return a number, or None for NaN, which JSON has no word for."""
    return None if math.isnan(value) else value


def gain(rule: StopRule, scores: tuple[float, float], tokens: int) -> float | None:
    """Return how much retain score a million distilled tokens gave; losses fall, scores rise."""
    sign = -1.0 if rule.metric == "text_loss" else 1.0
    return known(sign * (scores[1] - scores[0]) * 1e6 / tokens) if tokens else None


def without_files(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts without the files of the teachers' folders, which are not this method's."""
    teachers = {
        name: {k: v for k, v in extras.items() if k != "files"}
        for name, extras in facts["teachers"].items()
    }
    return {**facts, "teachers": teachers}


def costed(
    method: Undo,
    removal: Removal,
    texts: Texts,
    told: Told,
    rule: StopRule,
    made: Mapping[str, Removal],
    parameters: int,
    began: float,
) -> Removal:
    """Return the removal with what teachers, corpus and checks took in its cost.

    A token costs the student 6 FLOPs per parameter, and 2 where a model only reads it.
    """
    read = told.read + texts.read + len(rule.checks) * rule.tokens
    student = told.progress.tokens
    flops = parameters * (6.0 * student + 2.0 * read)
    own = Cost(told.steps, round(student + read), flops, time.monotonic() - began)
    total = own + texts.cost
    for teacher in made.values():
        total = total + teacher.cost
    facts: dict[str, Any] = {
        "student_tokens": student,
        "teacher_tokens": round(told.read),
        "corpus_tokens": texts.read,
        "distil_flops": 6.0 * parameters * student,
        "teacher_flops": 2.0 * parameters * told.read,
        "unlearn_flops": sum(teacher.cost.flops for teacher in made.values()),
        "flops": total.flops,
        "share_of_pretraining": None,
    }
    if method.pretrain_tokens:
        facts["share_of_pretraining"] = total.flops / (6.0 * parameters * method.pretrain_tokens)
    extras = {**removal.extras, "cost": facts}
    return replace(removal, cost=total, extras=extras)
