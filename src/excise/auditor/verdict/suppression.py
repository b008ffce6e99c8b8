"""Broken is not ignorant: naming suppression and damage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from excise.auditor.base import ORIGINAL
from excise.auditor.verdict.bits import LN2, kinds, losses_of
from excise.auditor.verdict.case import Case
from excise.auditor.verdict.rails import Units
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.evals.score import direction_of
from excise.evals.stats import bootstrap_difference, bootstrap_mean
from excise.record import Score

NEAR = 0.9
"""Share of log V from which on a token loss is that of guessing among all tokens."""


@dataclass(frozen=True)
class _Loss:
    """A mean token loss on V in nats, with its 95 % interval."""

    value: float
    low: float
    high: float


def suppression_notes(case: Case, scores: Sequence[Score], vocabulary: int) -> list[str]:
    """Say that a candidate is broken on V instead of ignorant, or nothing.

    With oracles a loss counts as suppression only where it lies clearly beyond theirs: a model
    that was never taught may well guess near log V. Without any, near log V is what there is.

    Args:
        case: The candidate.
        scores: Scores without an attack; the token loss on `test.*` is read.
        vocabulary: Number of tokens of the model; 0 for unknown.

    Returns:
        At most one sentence.
    """
    ours = _token_loss(case, case.arm, scores)
    found = [_token_loss(case, name, scores) for name in case.oracles]
    rails = [rail for rail in found if rail is not None]
    near = ours is not None and vocabulary > 1 and ours.value >= NEAR * math.log(vocabulary)
    beside = _beside(ours.value, vocabulary) if near and ours is not None else ""
    if ours is not None and rails:
        least, most = min(r.value for r in rails), max(r.value for r in rails)
        if ours.low <= max(r.high for r in rails) + (most - least):
            return []
        return [
            f"Its token loss on V is {ours.value:.2f} nats before any attack{beside}, models "
            f"never taught {least:.2f} to {most:.2f}: broken, not ignorant; this is suppression."
        ]
    if ours is not None and near:
        return [
            f"Its token loss on V is {ours.value:.2f} nats before any attack{beside}: broken, "
            "not ignorant; this is suppression."
        ]
    worse = _worse_than_ignorant(case)
    if worse is not None:
        return [
            f"Before any attack V costs it {worse:.1f} bits per unit more than a model that was "
            "never taught: suppressed, not ignorant."
        ]
    return []


def _beside(loss: float, vocabulary: int) -> str:
    """Say how a loss that is high stands to that of a uniform guess."""
    uniform = math.log(vocabulary)
    where = "above" if loss > (2 - NEAR) * uniform else "near"
    return f", {where} log V = {uniform:.2f}"


def _token_loss(case: Case, subject: str, scores: Sequence[Score]) -> _Loss | None:
    """Return the nats per scored token on V before any attack."""
    found = [
        s
        for s in scores
        if s.model == subject and s.metric == "text_loss" and s.set.startswith("test.")
    ]
    if found:
        n = sum(s.n for s in found)
        values = [[s.value, s.low, s.high] for s in found]
        return _Loss(*(sum(v[i] * s.n for v, s in zip(values, found, strict=True)) / n
                       for i in range(3)))  # fmt: skip
    start = case.start(subject) if case.metric == "text_loss" else {}
    if not start:
        return None
    mean = bootstrap_mean(start, seed=case.seed, groups=case.groups)
    return _Loss(mean.value, mean.low, mean.high)


def _worse_than_ignorant(case: Case) -> float | None:
    """Return by how many bits per unit V costs more than it costs any oracle, beyond doubt."""
    ours = _start_nats(case, case.arm)
    rails = [_start_nats(case, name) for name in case.oracles]
    if not ours or not rails or not all(any(u in rail for u in ours) for rail in rails):
        return None
    found = [bootstrap_difference(ours, rail, groups=case.groups, seed=case.seed) for rail in rails]
    bits = min(one.value for one in found) / LN2
    return bits if all(one.low > 0 for one in found) and bits >= 2 else None


def _start_nats(case: Case, subject: str) -> Units:
    """Return nats by unit on V before any attack, as a relearning attack noted them."""
    for attack in case.attacks(subject):
        for arms in kinds(case, attack, subject).values():
            losses = losses_of(arms[0], start=True)
            if losses is not None:
                return losses[0]
    return {}


def retain_note(case: Case, domain: Domain) -> list[str]:
    """Say how the retain score changed against the original.

    Args:
        case: The candidate; its arms carry `extras["retain_start"]`.
        domain: For the retain metric.

    Returns:
        At most one sentence; positive changes are improvements.
    """
    ours, top = _retain(case, case.arm), _retain(case, ORIGINAL)
    if not ours or not top:
        return []
    metric = domain.retain_metrics[0]
    try:
        found = bootstrap_difference(ours, top, seed=case.seed)
    except UserError:
        return []
    sign = 1 if direction_of(metric) == "higher" else -1
    low, high = sorted((sign * found.low, sign * found.high))
    change = sign * found.value
    head = (
        f"What was to stay ({metric.replace('_', ' ')} on retain) changed by {change:+.3f} "
        f"[{low:+.3f}, {high:+.3f}] against the original, positive is better"
    )
    return [head + (": retain is damaged." if high < 0 else ".")]


def _retain(case: Case, subject: str) -> Units:
    """Return the retain score by unit before any attack."""
    for attack in case.attacks(subject):
        result = case.result(attack, subject)
        for arm in result.variants if result else ():
            found = arm.extras.get("retain_start")
            if found:
                return dict(found)
    return {}
