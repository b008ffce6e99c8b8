"""Strengths of methods, chosen on dev."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import torch
from pydantic import Field, model_validator

from excise.core.config import Config
from excise.core.errors import UserError
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.evals.score import measure
from excise.methods.base import Method, Removal
from excise.models.checkpoint import Checkpoint
from excise.record import StudyRow, StudyTable
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import Replicate, row
from excise_studies.levels import estimate
from excise_studies.recovery import RecoveryScores
from excise_studies.setting import (
    ExperimentSetting,
    Make,
    checkpoints,
    conditions_of,
    make_conditions,
)

CHOSEN_BY_SEED = (
    "settings of data and models were chosen by hand on seed 0, strengths of methods on dev of "
    "every seed"
)
"""How studies are set that match strengths in every seed."""


@dataclass(frozen=True)
class DevJob:
    """Score a model on dev."""

    model: Checkpoint
    domain: Domain
    max_length: int
    device: str


def dev_scores(job: DevJob) -> tuple[float, float]:
    """Return the headline scores on `dev_forget` and `dev_retain`."""
    net = job.model.load(dtype=torch.float32, device=torch.device(job.device))
    tokenizer = job.model.tokenizer()
    forget = tuple(row for rows in job.domain.dev_forget.values() for row in rows)
    pairs = ((forget, job.domain.metrics[0]), (job.domain.dev_retain, job.domain.retain_metrics[0]))
    on_forget, on_retain = (
        measure(net, tokenizer, r, m, max_length=job.max_length).checked().mean for r, m in pairs
    )
    return on_forget, on_retain


def scores_on_dev(
    models: Mapping[RunKey, Checkpoint],
    replicates: Mapping[int, Replicate],
    length: int,
    runtime: Runtime,
    pool: Pool,
) -> dict[RunKey, tuple[float, float]]:
    """Return the headline scores of models on `dev_forget` and `dev_retain` of their seeds.

    Args:
        models: By condition and seed.
        replicates: Data by seed.
        length: Longest row, in tokens.
        runtime: Where models are loaded.
        pool: Worker processes.
    """
    jobs = {
        key: DevJob(model, replicates[key[1]].domain, length, runtime.device)
        for key, model in models.items()
    }
    return dict(zip(jobs, pool.map(dev_scores, list(jobs.values())), strict=True))


def stronger(method: Method, factor: float) -> Method:
    """Return a method with its learning rate multiplied.

    Raises:
        UserError: If it has none.
    """
    fit: FitConfig | None = getattr(method, "fit", None)
    if fit is None:
        raise UserError(
            f"{type(method).__name__} has no learning rate ('fit') by which to match its "
            "strength; name methods that have one"
        )
    lr = float(f"{fit.lr * factor:.6g}")
    return method.model_copy(update={"fit": fit.model_copy(update={"lr": lr})})


@dataclass(frozen=True)
class Trial:
    """A strength that was tried.

    Attributes:
        factor: On the learning rate.
        dev: Scores on `dev_forget` and `dev_retain`.
        removal: The model.
    """

    factor: float
    dev: tuple[float, float]
    removal: Removal


Rule = Callable[[Mapping[float, tuple[float, float]], float], float]
"""Chooses a strength, from scores on forget and retain by strength and the original's on retain."""


def matched(
    teachers: Mapping[str, Method],
    sweep: Sequence[float],
    experiment: ExperimentSetting,
    replicates: Mapping[int, Replicate],
    rule: Rule,
    runtime: Runtime,
    pool: Pool,
) -> dict[str, float]:
    """Return the factor of every teacher that dev of the tuned seeds chose.

    Args:
        teachers: At their middle strength, by name.
        sweep: Factors on their learning rates.
        experiment: Gives the length of rows.
        replicates: Data and originals of the tuned seeds.
        rule: What is chosen.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    methods = {
        f"{name} x {factor:g}": stronger(method, factor)
        for name, method in teachers.items()
        for factor in sweep
    }
    removals = make_conditions(conditions_of(methods, replicates, tuple(replicates)), runtime, pool)
    length = experiment.pretrain.max_length
    models = {
        **checkpoints(removals),
        **{("original", s): d.original for s, d in replicates.items()},
    }
    scores = scores_on_dev(models, replicates, length, runtime, pool)

    def mean(condition: str, side: int) -> float:
        return sum(scores[condition, seed][side] for seed in replicates) / len(replicates)

    return {
        name: rule(
            {f: (mean(f"{name} x {f:g}", 0), mean(f"{name} x {f:g}", 1)) for f in sweep},
            mean("original", 1),
        )
        for name in teachers
    }


class Search(Config):
    """A bisection for the strength that forgets to a level, in every seed on its own dev."""

    level: float = Field(default=0.2, ge=0, le=1)
    """Exact match on `dev_forget` that all methods are brought to."""
    retain_cost: float = Field(default=0.2, gt=0)
    """Exact match on `dev_retain` that a method may cost; where all cost more, the best keeper is
    taken."""
    span: tuple[float, float] = (1 / 64, 4.0)
    """Least and largest factor on the learning rates."""
    tries: int = Field(default=6, ge=1)
    """Strengths tried of a method and seed, at most."""
    near: float = Field(default=0.05, ge=0)
    """Exact match, from `level`, at which a search ends."""

    @model_validator(mode="after")
    def _ordered(self) -> Search:
        """Refuse an empty span."""
        if not 0 < self.span[0] < self.span[1]:
            raise ValueError("span: give two factors above 0, the least first")
        return self


def matched_by_seed(
    methods: Mapping[str, Method],
    search: Search,
    experiment: ExperimentSetting,
    replicates: Mapping[int, Replicate],
    runtime: Runtime,
    pool: Pool,
) -> dict[RunKey, Trial]:
    """Return every method at the strength that dev of the same seed chose, found by bisection.

    Of more strength less is left: the next factor is the geometric middle of the span, and the
    span is halved towards the level until a score lies near it or all tries are spent.

    Args:
        methods: At their middle strength, by name.
        search: Level, cost and span.
        experiment: Gives the length of rows.
        replicates: Data and originals.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    length = experiment.pretrain.max_length
    keys = [(name, seed) for name in methods for seed in replicates]
    originals = scores_on_dev(
        {("original", s): r.original for s, r in replicates.items()},
        replicates, length, runtime, pool,
    )  # fmt: skip
    spans = dict.fromkeys(keys, search.span)
    tried: dict[RunKey, dict[float, Trial]] = {key: {} for key in keys}
    for _ in range(search.tries):
        factors = {key: math.sqrt(low * high) for key, (low, high) in spans.items()}
        removals = make_conditions(
            {
                (name, seed): Make(
                    stronger(methods[name], factor),
                    replicates[seed].original,
                    replicates[seed].domain,
                )
                for (name, seed), factor in factors.items()
            },
            runtime,
            pool,
        )
        scores = scores_on_dev(checkpoints(removals), replicates, length, runtime, pool)
        for key, factor in factors.items():
            tried[key][factor] = Trial(factor, scores[key], removals[key])
            low, high = spans.pop(key)
            left = scores[key][0]
            if abs(left - search.level) > search.near:
                spans[key] = (factor, high) if left > search.level else (low, factor)
    rule = level_with(search.level, search.retain_cost)
    chosen: dict[RunKey, Trial] = {}
    for key, trials in tried.items():
        on_dev = {factor: trial.dev for factor, trial in trials.items()}
        chosen[key] = trials[rule(on_dev, originals["original", key[1]][1])]
    return chosen


def mean_factors(chosen: Mapping[RunKey, Trial]) -> dict[str, float]:
    """Return the geometric mean over seeds of the factors that were chosen, by method."""
    by_name: dict[str, list[float]] = {}
    for (name, _), trial in chosen.items():
        by_name.setdefault(name, []).append(trial.factor)
    return {name: geometric_mean(factors) for name, factors in by_name.items()}


def deepest(cost: float) -> Rule:
    """Return the rule that takes what forgets most, of what keeps enough.

    Args:
        cost: Score on retain that a method may cost; where all cost more, the best keeper is taken.
    """
    return lambda scores, original: _nearest(scores, 0.0, original - cost)


def level_with(level: float, cost: float) -> Rule:
    """Return the rule that takes what forgets to a level most nearly, of what keeps enough.

    Args:
        level: Score on forget that is wanted.
        cost: Score on retain that a method may cost; where all cost more, the best keeper is taken.
    """
    return lambda scores, original: _nearest(scores, level, original - cost)


def _nearest(scores: Mapping[float, tuple[float, float]], level: float, least: float) -> float:
    """Return the strength that forgets to a level most nearly, of those that keep enough."""
    enough = [factor for factor, (_, retained) in scores.items() if retained >= least]
    if not enough:
        return max(scores, key=lambda factor: scores[factor][1])
    return min(enough, key=lambda factor: abs(scores[factor][0] - level))


def matched_table(
    factors: Mapping[str, float], recovery: RecoveryScores, conditions: Mapping[str, str], note: str
) -> StudyTable:
    """Return strengths, and what methods leave and keep before the attack on the reported seeds.

    Args:
        factors: By method.
        recovery: Scores before the attack.
        conditions: Name of each method's condition among them.
        note: What the study says of it.
    """
    rows: list[StudyRow] = []
    for name, factor in factors.items():
        rows.append(StudyRow(condition=name, metric="factor on the learning rate", value=factor))
        for metric, scores in (
            ("held-out test set", recovery.before), ("retain", recovery.retain),
        ):  # fmt: skip
            rows.append(row(name, metric, estimate(scores.at(conditions[name]), scores)))
    return StudyTable(title="What was matched", note=note, rows=tuple(rows))
