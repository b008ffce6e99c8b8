"""The canary audit: made-up facts put into a model, removed by its method, and looked for.

For a model that nobody can train again without its forget set: here the reference models are of
the same size and text, and the oracle is true, for it never met the canaries.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from excise.core.context import Context
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.losses import nll
from excise.methods.base import ApplyMethod, Paper, Removal
from excise.methods.tuning import TuningMethod, tune
from excise.models.checkpoint import Checkpoint
from excise.record import MethodRun
from excise.requests.audit import AuditRun, Canary
from excise.run.results import Models, method_run
from excise.run.steps import label
from excise.train.fit import FitConfig
from excise.train.pool import Pool

BATCH = 8
"""Rows per step of canaries, and as many of retain text: the numbers of units are multiples."""


class Teach(TuningMethod):
    """Fine-tune on `domain.forget`, every row once, beside as many retain rows."""

    name: Literal["teach"] = "teach"
    """What a reader of the store sees."""
    fit: FitConfig = FitConfig()
    """Steps, rows per step of each role, learning rate."""

    paper: ClassVar[Paper] = Paper("The Secret Sharer", "arXiv:1802.08232")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Teach instead of removing."""
        return tune(self, start, domain, {"forget": (1.0, nll), "retain": (1.0, nll)}, ctx)


def teaching(asked: Canary, parameters: int) -> Teach:
    """Return how the original and every oracle of the canaries are taught.

    Args:
        asked: How many canaries, and how often each is taught.
        parameters: Size of the model.
    """
    steps = asked.units * sum(asked.repeats) // BATCH
    fit = FitConfig(steps=steps, lr=asked.rate(parameters), batch_size=BATCH, clip=1.0)
    return Teach(fit=fit, max_length=asked.max_length)


def remove_canaries(
    request: AuditRun, domain: Domain, original: Checkpoint, runtime: Runtime, pool: Pool
) -> tuple[Models, dict[str, Checkpoint], tuple[MethodRun, ...]]:
    """Teach the canaries, teach others to the oracles, and remove the canaries by every method.

    Args:
        request: Names canaries and methods.
        domain: The canaries among the retain rows.
        original: The user's model.
        runtime: Where stages are kept.
        pool: Worker processes.

    Returns:
        The reference models (the original is the one that was taught), the edited models by name,
        and what the record says of each.
    """
    asked = request.canary
    assert asked is not None
    canaries, teach = asked.canaries(request.seed), teaching(asked, original.num_parameters)
    numbers = range(asked.num_oracles(request.audit.budget))
    lessons = [canaries.lesson(domain), *(canaries.lesson(domain, i) for i in numbers)]
    seeds = [request.seed, *(request.seed + 1000 + i for i in numbers)]
    jobs = [
        ApplyMethod(teach, original, lesson, seed)
        for lesson, seed in zip(lessons, seeds, strict=True)
    ]
    label(jobs, ["original", *(f"oracle-{i}" for i in numbers)], runtime, pool)
    taught, *oracles = [removal.checkpoint for removal in pool.make(jobs, runtime)]
    removals = [ApplyMethod(arm, taught, domain, request.seed) for arm in asked.arms.values()]
    label(removals, list(asked.arms), runtime, pool)
    made = dict(zip(asked.arms, pool.make(removals, runtime), strict=True))
    runs = tuple(
        method_run(name, asked.arms[name], removal, request.seed, {})
        for name, removal in made.items()
    )
    edited = {name: removal.checkpoint for name, removal in made.items()}
    return Models(taught, tuple(oracles)), edited, runs
