"""What a study is, what it hands back, and how it becomes a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.evals.stats import Estimate, quantiles, resampled_means
from excise.methods.base import ApplyMethod, Method
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.record import ModelRef, StudyRow
from excise.run.results import model_ref
from excise.run.stages import MakeModel
from excise.train.pool import Pool

ScoreByUnit = Mapping[str, float]
"""Score by unit."""

APART = 1000
"""The oracle starts from the seed plus this."""


@dataclass(frozen=True)
class Replicate:
    """One replicate: the data of a seed and the models before any removal.

    Attributes:
        seed: Its seed.
        domain: Its data.
        original: A model that learned all of it.
        oracle: One that never saw the forget units, from another initialisation; None where the
            original was not trained here.
    """

    seed: int
    domain: Domain
    original: Checkpoint
    oracle: Checkpoint | None = None

    def refs(self) -> tuple[ModelRef, ...]:
        """Return the models for the record."""
        named = {f"original, seed {self.seed}": self.original}
        if self.oracle is not None:
            named[f"oracle, seed {self.seed}"] = self.oracle
        return tuple(model_ref(name, model) for name, model in named.items())


def train_replicates(
    domains: Mapping[int, tuple[Domain, Any]],
    scratch: Scratch,
    schedule: Pretrain,
    runtime: Runtime,
    pool: Pool,
) -> dict[int, Replicate]:
    """Train the original and the oracle of every seed.

    Args:
        domains: Domain and tokenizer by seed.
        scratch: Architecture.
        schedule: How they are trained.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    jobs = [
        MakeModel(scratch, tokenizer, seed + apart)
        for seed, (_, tokenizer) in domains.items()
        for apart in (0, APART)
    ]
    inits = pool.map(runtime.run, jobs)
    methods: tuple[Method, ...] = (
        Plain(pretrain=schedule),
        Filtering(pretrain=schedule, drop="spans"),
    )
    removals = [
        ApplyMethod(methods[i % 2], init, domains[job.seed - APART * (i % 2)][0], job.seed)
        for i, (job, init) in enumerate(zip(jobs, inits, strict=True))
    ]
    models = [removal.checkpoint for removal in pool.map(runtime.run, removals)]
    return {
        seed: Replicate(seed, domain, models[2 * i], models[2 * i + 1])
        for i, (seed, (domain, _)) in enumerate(domains.items())
    }


def pooled(by_seed: Mapping[int, ScoreByUnit]) -> dict[str, float]:
    """Return the units of several seeds in one mapping, named after their seed."""
    return {f"{seed}:{unit}": v for seed, units in by_seed.items() for unit, v in units.items()}


def row(condition: str, metric: str, estimate: Estimate, seed: int | None = None) -> StudyRow:
    """Return an estimate as a row of a table; what is NaN stays empty."""
    value, low, high = (
        None if math.isnan(x) else x for x in (estimate.value, estimate.low, estimate.high)
    )
    return StudyRow(
        condition=condition, seed=seed, metric=metric, value=value, low=low, high=high, n=estimate.n
    )


def share(top: Sequence[ScoreByUnit], bottom: Sequence[ScoreByUnit], *, seed: int = 0) -> Estimate:
    """Return (top 0 - top 1) / (bottom 0 - bottom 1), resampled by unit, jointly.

    Args:
        top: Two mappings whose means are subtracted.
        bottom: Two more.
        seed: Seed of the bootstrap.

    Returns:
        The ratio; NaN where the bottom is not above zero.
    """
    means, samples = resampled_means([*top, *bottom], seed=seed)
    below = means[2] - means[3]
    if below <= 0:
        return Estimate(float("nan"), float("nan"), float("nan"), len(top[0]))
    usable = samples[samples[:, 2] - samples[:, 3] > below / 10]
    ratios = (usable[:, 0] - usable[:, 1]) / (usable[:, 2] - usable[:, 3])
    low, high = quantiles(ratios, 0.95)
    return Estimate(float((means[0] - means[1]) / below), low, high, len(top[0]))
