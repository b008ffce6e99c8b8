"""What a study is, what it hands back, and how it becomes a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.evals.replicates import SeedEstimate
from excise.evals.stats import Estimate
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
from excise_studies.levels import estimate, levels

ScoreByUnit = Mapping[str, float]
"""Score by unit."""

ScoreBySeed = Mapping[int, ScoreByUnit]
"""Score by seed and unit."""

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


def identical(models: Mapping[tuple[str, int], Checkpoint]) -> tuple[tuple[str, ...], ...]:
    """Return conditions whose models are the same weights at every seed, in groups of two or more.

    Args:
        models: By condition and seed.
    """
    marks: dict[str, dict[int, str]] = {}
    for (condition, seed), model in models.items():
        marks.setdefault(condition, {})[seed] = model.fingerprint
    groups: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for condition, by_seed in marks.items():
        groups.setdefault(tuple(sorted(by_seed.items())), []).append(condition)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def said_identical(groups: Sequence[Sequence[str]]) -> str:
    """Return in a sentence which conditions count as one; nothing where each is its own."""
    named = "; ".join(" = ".join(group) for group in groups)
    return f"Identical weights at every seed, which count as one: {named}." if named else ""


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


def mean_over_seeds(scores: ScoreBySeed) -> SeedEstimate:
    """Return the mean of a score with its interval over seeds."""
    one = levels({"": scores}, {})
    return estimate(one.at(""), one)


def row(condition: str, metric: str, estimate: Estimate, seed: int | None = None) -> StudyRow:
    """Return an estimate as a row of a table; what is NaN stays empty."""
    value, low, high = (
        None if math.isnan(x) else x for x in (estimate.value, estimate.low, estimate.high)
    )
    return StudyRow(
        condition=condition, seed=seed, metric=metric, value=value, low=low, high=high, n=estimate.n
    )


def share(
    top: tuple[ScoreBySeed, ScoreBySeed], bottom: tuple[ScoreBySeed, ScoreBySeed]
) -> SeedEstimate:
    """Return (top 0 - top 1) / (bottom 0 - bottom 1) over seeds, all four on the same units.

    Args:
        top: Two scores whose means are subtracted.
        bottom: Two more.

    Returns:
        The ratio; NaN where the bottom is not above zero.
    """
    four = levels({str(i): scores for i, scores in enumerate((*top, *bottom))}, {})
    above, below = four.at("0") - four.at("1"), four.at("2") - four.at("3")
    usable = below > max(0.0, float(below[0]) / 10)
    return estimate(np.where(usable, above / np.where(usable, below, 1.0), np.nan), four)
