"""Edits of weights that add no information: each is made on a fresh copy, and scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from excise.auditor.base import Attack, AttackResult, Subject, name_of
from excise.auditor.budget import Budget
from excise.auditor.conditioning import rebalance
from excise.auditor.evaluation_set import EvaluationSet, UnitScores, evaluation_set
from excise.auditor.results import BOUND, decided, with_loss
from excise.auditor.scoring import Measurement, read, try_variant
from excise.core.context import Context
from excise.data.domain import Domain


@dataclass(frozen=True)
class WeightEdit:
    """One edit of a whole model.

    Attributes:
        variant: Its name in the record.
        apply: Changes a loaded model in place, and returns what is to be noted about it.
        trained_on: Role of the rows that told which weights to change, empty for none.
        again: The same on rebalanced weights; None where it makes no difference.
    """

    variant: str
    apply: Callable[[Any], dict[str, Any]]
    trained_on: str = ""
    again: Callable[[Any], dict[str, Any]] | None = None


def score_edits(
    attack: Attack,
    subject: Subject,
    domain: Domain,
    budget: Budget,
    ctx: Context,
    edits: Iterable[WeightEdit],
) -> AttackResult:
    """Make every edit on weights as they are on disk and score V; damage shows in retain.

    Args:
        attack: The attack.
        subject: The model; its folder is only read.
        domain: Rows by role.
        budget: Rows and lengths.
        ctx: Device, and the dtype that edited models are scored in.
        edits: Asked for one after the other, so that what one needs is held as long as it is.

    Returns:
        One variant per edit, and beside one that broke the model the same on rebalanced weights,
        where the edit has such a form.
    """
    start = time.perf_counter()
    evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
    model = subject.checkpoint.load(dtype=ctx.dtype, device=ctx.device)
    bare = read(model, evaluation)
    del model
    variants = []

    def tried(name: str, apply: Callable[[Any], dict[str, Any]], edit: WeightEdit) -> bool:
        """Add a variant; return whether it broke the model."""
        # Edited in float32: a coarser dtype would round a second time, on its own grid.
        wide = subject.checkpoint.load(device=ctx.device)
        facts = apply(wide)
        one = try_variant(
            attack,
            subject,
            evaluation.metric,
            partial(_scores, wide.to(ctx.dtype), evaluation),
            bare=bare,
            variant=name,
            trained_on=edit.trained_on,
            facts=facts,
        )
        lost = evaluation.retain_lost(bare.retain, one.extras["retain"])
        variants.append(with_loss(one, lost))
        return lost > BOUND

    for edit in edits:
        if tried(edit.variant, edit.apply, edit) and edit.again is not None:
            again = partial(_rebalanced, apply=edit.again)
            tried(f"rebalanced, {edit.variant}", again, edit)
    marked, chosen = decided(variants, higher=evaluation.higher)
    return AttackResult(name_of(attack), subject.name, marked, chosen, time.perf_counter() - start)


def _rebalanced(model: Any, *, apply: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Put the scales of a model back in place and edit it, and return what both note."""
    return rebalance(model) | apply(model)


def _scores(model: Any, evaluation: EvaluationSet) -> tuple[Measurement, UnitScores]:
    """Return V and retain, and dev."""
    return read(model, evaluation), evaluation.units(model, evaluation.all_dev)
