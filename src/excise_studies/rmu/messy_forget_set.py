"""Does RMU only look better because the forget corpus is messy?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.auditor.base import Budget, Subject
from excise.auditor.budget import budget_of
from excise.auditor.scoring import evaluation_set
from excise.auditor.tuning import Part, train
from excise.core.stages import Store
from excise.data.domain import Domain
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL, Facts
from excise.methods.base import Method
from excise.methods.posthoc.grad_diff import GradDiff
from excise.methods.posthoc.maxent import MaxEnt
from excise.methods.posthoc.rmu import RMU
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.record import write_text
from excise.run.jobs import RemovalJob, Setting, make_removal
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool, emit
from excise_studies.base import Draw, train_draws
from excise_studies.rmu import messy_tables
from excise_studies.rmu.statements import Mess, as_statements, forget_set
from excise_studies.scoring import average, read, rubric

LENGTH = 48
"""Tokens of a text of several statements at most."""

VERSION = 1
"""Raised when what a stage computes changes."""


class MessyForgetSet(Study):
    """RMU, GradDiff and MaxEnt on forget sets that isolate the facts more and less well.

    Stated beforehand. Strength is the learning rate. On the tuned draw every method is swept on
    every forget set, and the rate is found at which the loss on `dev_retain` has risen by
    `retain_cost` nats. On the reported draws that rate and those around it are run, and the exact
    match on V, at once and after relearning T, is interpolated to the same rise of the loss on
    `retain_test`. Methods are ranked by it, 1 for the least that is left. The statistic is the
    rank of RMU on the messy set minus its rank on the clean one, averaged over draws, with a
    bootstrap over draws and, jointly for all methods, over units. The suspicion is supported if
    the upper end of its 95 % interval is below -`margin` (RMU gains at least that much from the
    mess), contradicted if the lower end is above -`margin`.
    """

    question: ClassVar[str] = (
        "Does RMU rank better against GradDiff and MaxEnt when the forget set isolates the "
        "knowledge badly?"
    )
    statistic: ClassVar[str] = (
        "Rank of RMU among three methods (1: least exact match left on V, after relearning T, at "
        "matched retain loss) on the messy forget set minus that on the clean one, averaged over "
        "draws; bootstrap over draws and units. Supported if the upper end is below minus the "
        "margin, contradicted if the lower end is above minus the margin."
    )
    takes: ClassVar[str] = "10 minutes, 1 GiB"

    name: Literal["messy-forget-set"] = "messy-forget-set"
    """Name on the command line."""
    margin: float = 0.5
    """Ranks that RMU must gain."""
    domain: Facts = Facts(subjects=96, objects=32, relations=4, cue="category")
    """The data, drawn anew for every seed."""
    model: Scratch = Scratch(**FACTS_MODEL)
    """Architecture."""
    pretrain: Pretrain = Pretrain(
        fit=FitConfig(**{**FACTS_FIT, "steps": 500, "batch_size": 96}),
        max_length=FACTS_MAX_LENGTH,
        pack=(1, 1, 2, 4),
    )
    """How original and oracle are trained, on whole statements."""
    sets: tuple[Mess, ...] = ("clean", "diluted", "off_topic", "messy")
    """Forget sets; the first and the last are compared."""
    filler: int = Field(default=3, ge=1)
    """Retained statements around each forget statement of a diluted set."""
    off_topic: float = Field(default=0.5, gt=0, lt=1)
    """Share of the rows of an off-topic set that only share topic words."""
    methods: dict[str, SerializeAsAny[Method]] = {
        "rmu": RMU(
            layer=1,
            blocks=(0, 1),
            steering=50.0,
            alpha=20.0,
            fit=FitConfig(steps=60, lr=1e-2, batch_size=32),
            max_length=LENGTH,
        ),
        "grad_diff": GradDiff(
            alpha=4.0,
            fit=FitConfig(steps=60, lr=4e-4, batch_size=32, clip=1.0),
            max_length=LENGTH,
        ),
        "maxent": MaxEnt(
            alpha=1.0,
            fit=FitConfig(steps=60, lr=1e-3, batch_size=32, clip=1.0),
            max_length=LENGTH,
        ),
    }
    """The removals at their middle strength; RMU is called `rmu`."""
    sweep: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Factors on the learning rate that are tried on the tuned draw."""
    around: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on the rate found there that are run on the reported draws."""
    retain_cost: float = Field(default=0.2, gt=0)
    """Nats by which the loss on retain has risen where methods are compared."""
    relearn_steps: int = Field(default=8, ge=1)
    """Steps of relearning."""
    relearn_rate: float = 1e-3
    """Rate of relearning, the same for all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what cannot be ranked."""
        if "rmu" not in self.methods or len(self.methods) < 2:
            raise ValueError("methods: needs 'rmu' and at least one to rank it against")
        for name, method in self.methods.items():
            if not isinstance(getattr(method, "fit", None), FitConfig):
                raise ValueError(f"methods.{name}: has no 'fit' whose rate could be swept")
        if len(self.sets) < 2 or len(set(self.sets)) < len(self.sets):
            raise ValueError("sets: name at least two, each once")
        return self

    def run(self, setting: Setting, pool: Pool) -> StudyResult:
        """Answer the question; see `run`."""
        return run(self, setting, pool)


Point = dict[str, Any]
"""Scores of one run by unit: `V`, `relearned`, `retain`, `dev_retain`."""
Cell = tuple[int, Mess, str]
"""Draw, forget set, method."""


def run(study: MessyForgetSet, setting: Setting, pool: Pool) -> StudyResult:
    """Sweep on the tuned draw, run around what was found on the others, compare."""
    draws = make_draws(study, setting, pool)
    cells = [(s, m) for s in study.sets for m in study.methods]
    sweep = {(seed, *cell): study.sweep for seed in study.tuned_on for cell in cells}
    tried = run_cells(study, draws, sweep, setting, pool, relearn=False)
    base = {seed: scored_originals(study, draw, setting) for seed, draw in draws.items()}
    found: dict[tuple[Mess, str], float] = {}
    for cell in cells:
        logs = []
        for seed in study.tuned_on:
            before = average(base[seed]["dev_retain"])
            runs = tried[seed, cell[0], cell[1]]
            costs = [average(p["dev_retain"]) - before for p in runs]
            logs.append(strength_at(study.sweep, costs, study.retain_cost))
        found[cell] = float(np.exp(np.mean(logs)))
    around = {
        (seed, *cell): tuple(found[cell] * f for f in study.around)
        for seed in study.seeds
        for cell in cells
    }
    points = run_cells(study, draws, around, setting, pool, relearn=True)
    result = messy_tables.summarise(study, base, points, found)
    domain = draws[study.seeds[0]].domain
    models = tuple(ref for seed in study.seeds for ref in draws[seed].refs())
    return StudyResult(*result, domain=domain, models=models)


def make_draws(study: MessyForgetSet, setting: Setting, pool: Pool) -> dict[int, Draw]:
    """Train the original and the oracle of every draw, on statements."""
    drawn: dict[int, tuple[Domain, Any]] = {}
    for seed in dict.fromkeys((*study.tuned_on, *study.seeds)):
        spec = study.domain.model_copy(update={"seed": seed})
        drawn[seed] = (as_statements(spec.build()), spec.tokenizer())
    return train_draws(drawn, study.model, study.pretrain, setting, pool)


def strength_at(factors: Sequence[float], costs: Sequence[float], wanted: float) -> float:
    """Return the logarithm of the strength at which retain costs what is wanted.

    Args:
        factors: Strengths that were tried.
        costs: What each cost; made to rise by taking the largest so far.
        wanted: Between the ends it is interpolated in log strength; beyond, the end is taken.
    """
    order = sorted(range(len(factors)), key=lambda i: factors[i])
    xs = [math.log(factors[i]) for i in order]
    ys = np.maximum.accumulate([costs[i] for i in order])
    return float(np.interp(wanted, ys + 1e-9 * np.arange(len(ys)), xs))


@dataclass(frozen=True)
class RunJob:
    """One removal at one strength, scored, and relearned where asked."""

    setting: Setting
    method: Method
    original: Checkpoint
    domain: Domain
    seed: int
    budget: Budget
    relearn_rate: float
    relearn: bool


def run_cells(
    study: MessyForgetSet,
    draws: Mapping[int, Draw],
    strengths: Mapping[Cell, Sequence[float]],
    setting: Setting,
    pool: Pool,
    *,
    relearn: bool,
) -> dict[Cell, list[Point]]:
    """Run every cell at its strengths."""
    keys, jobs = [], []
    for (seed, mess, method), factors in strengths.items():
        domain = forget_set(
            draws[seed].domain, mess, filler=study.filler, off_topic=study.off_topic, seed=seed
        )
        for factor in factors:
            keys.append((seed, mess, method))
            jobs.append(
                RunJob(
                    setting,
                    stronger(study.methods[method], factor),
                    draws[seed].original,
                    domain,
                    seed,
                    relearn_budget(study),
                    study.relearn_rate,
                    relearn,
                )
            )
    out: dict[Cell, list[Point]] = {}
    for key, point in zip(keys, pool.map(make_run, jobs), strict=True):
        out.setdefault(key, []).append(point)
    return out


def stronger(method: Method, factor: float) -> Method:
    """Return the method with its learning rate multiplied."""
    fit: FitConfig = method.fit  # type: ignore[attr-defined]
    rate = float(f"{fit.lr * factor:.6g}")
    return method.model_copy(update={"fit": fit.model_copy(update={"lr": rate})})


def make_run(job: RunJob) -> Point:
    """Remove, score V and retain, relearn T and score V again."""
    removal = make_removal(RemovalJob(job.setting, job.method, job.original, job.domain, job.seed))
    return scored(job, removal.checkpoint)


def scored(job: RunJob, model: Checkpoint) -> Point:
    """Return the scores of a model, before and after relearning, as a stage."""
    key = job.setting.key(
        version=VERSION,
        model=model.fingerprint,
        domain=job.domain.fingerprint,
        budget=job.budget.model_dump(mode="json"),
        rate=job.relearn_rate,
        relearn=job.relearn,
        seed=job.seed,
    )

    def make(work: Path) -> None:
        ctx = job.setting.context(work, job.seed)
        net, tokenizer = model.load(dtype=ctx.dtype, device=ctx.device), model.tokenizer()
        what = rubric(job.domain, tokenizer, max_rows=0, max_length=job.budget.max_length)
        found = read(net, tokenizer, what)
        point: Point = {
            "V": found["exact_match"],
            "retain": found["retain_loss"],
            "dev_retain": found["dev_retain_loss"],
        }
        if job.relearn:
            evaluation = evaluation_set(job.domain, job.budget, tokenizer)
            rows = tuple(row for rows in job.domain.relearn.values() for row in rows)
            part = Part("full", job.relearn_rate, job.seed)
            subject = Subject("candidate", model)
            done = train(part, subject, evaluation, ctx, rows=rows, benign_share=0.5)
            point["relearned"] = done.measurements[-1].units
        write_text(work / "point.json", json.dumps(point))

    folder = Store(job.setting.store, emit).stage("messy-run", key, make)
    data: Point = json.loads((folder / "point.json").read_text(encoding="utf-8"))
    return data


def scored_originals(study: MessyForgetSet, draw: Draw, setting: Setting) -> Point:
    """Return the scores of the original of a draw, and of its oracle under `oracle`."""
    job = RunJob(
        setting,
        next(iter(study.methods.values())),
        draw.original,
        draw.domain,
        draw.seed,
        relearn_budget(study),
        study.relearn_rate,
        True,
    )
    assert draw.oracle is not None
    return {**scored(job, draw.original), "oracle": scored(job, draw.oracle)}


def relearn_budget(study: MessyForgetSet) -> Budget:
    """Return the budget of relearning."""
    steps = study.relearn_steps
    update = {"steps": steps, "checkpoints": (0, steps), "max_length": LENGTH}
    return budget_of("smoke").model_copy(update=update)
