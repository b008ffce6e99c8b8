"""Does RMU only look better because the forget corpus is messy?

Models of this study read whole statements, so that they have an opinion about every token, and
being coherent (the words of a question) and knowing (its answer) can be scored apart.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.auditor.base import Subject
from excise.auditor.budget import Budget, budget_of
from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.tuning import Training, relearn_rows, train
from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.stages import Runtime
from excise.data.domain import Domain, Row, Rows
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL, Facts
from excise.evals.replicates import Contrast, Decision, SeedEstimate, over_replicates, ranks
from excise.evals.stats import Array, Estimate, interval
from excise.methods.base import ApplyMethod, Method
from excise.methods.posthoc.grad_diff import GradDiff
from excise.methods.posthoc.maxent import MaxEnt
from excise.methods.posthoc.rmu import RMU
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.base import Replicate, mean_over_seeds, row, train_replicates
from excise_studies.levels import of_seeds
from excise_studies.recovery import said as with_interval
from excise_studies.rmu.scoring import average, read, rubric

LENGTH = 48
"""Tokens of a text of several statements at most."""


Mess = Literal["clean", "diluted", "off_topic", "messy"]
"""What a forget set is made of; see `forget_set`."""


class MessyForgetSet(Study):
    """RMU, GradDiff and MaxEnt on forget sets that isolate the facts more and less well.

    Stated beforehand. Strength is the learning rate. On the tuned seed every method is swept on
    every forget set, and the rate is found at which the loss on `dev_retain` has risen by
    `retain_cost` nats. On the reported seeds that rate and those around it are run, and the exact
    match on the held-out test set, at once and after relearning, is interpolated to the same rise
    of the loss on `retain_test`. Methods are ranked by it, 1 for the least that is left. The
    statistic is the rank of RMU on the messy set minus its rank on the clean one, averaged over
    seeds, with a intervals over seeds and, jointly for all methods, over units. The suspicion is
    supported if the upper end of its 95 % interval is below -`margin` (RMU gains at least that much
    from the mess), contradicted if the lower end is above -`margin`.
    """

    question: ClassVar[str] = (
        "Does RMU rank better against GradDiff and MaxEnt when the forget set isolates the "
        "knowledge badly?"
    )
    statistic: ClassVar[str] = (
        "Rank of RMU among three methods (1: least exact match left on the held-out test set, "
        "after relearning, at matched retain loss) on the messy forget set minus that on the clean "
        "one, averaged over seeds; intervals over seeds and units. Supported if the upper end is "
        "below minus the margin, contradicted if the lower end is above minus the margin."
    )
    takes: ClassVar[str] = "10 minutes, 1 GiB"

    name: Literal["messy-forget-set"] = "messy-forget-set"
    """Name on the command line."""
    margin: float = 0.5
    """Ranks that RMU must gain."""
    tuned_on: tuple[int, ...] = (0,)
    """Seeds on which settings are chosen, on `dev`; no number is reported from them."""
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
    """Factors on the learning rate that are tried on the tuned seed."""
    around: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on the rate found there that are run on the reported seeds."""
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

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Sweep on the tuned seed, run around what was found on the others, compare."""
        replicates = make_replicates(self, runtime, pool)
        conditions = [(s, m) for s in self.sets for m in self.methods]
        sweep = {
            (seed, *condition): self.sweep for seed in self.tuned_on for condition in conditions
        }
        tried = run_conditions(self, replicates, sweep, runtime, pool, relearn=False)
        base = {
            seed: scored_originals(self, replicate, runtime)
            for seed, replicate in replicates.items()
        }
        factors: dict[tuple[Mess, str], float] = {}
        for condition in conditions:
            logs = []
            for seed in self.tuned_on:
                before = average(base[seed]["dev_retain"])
                runs = tried[seed, condition[0], condition[1]]
                costs = [average(p["dev_retain"]) - before for p in runs]
                logs.append(strength_at(self.sweep, costs, self.retain_cost))
            factors[condition] = float(np.exp(np.mean(logs)))
        around = {
            (seed, *condition): tuple(factors[condition] * f for f in self.around)
            for seed in self.seeds
            for condition in conditions
        }
        points = run_conditions(self, replicates, around, runtime, pool, relearn=True)
        tables, decision, paragraph = summarise(self, base, points, factors)
        domain = replicates[self.seeds[0]].domain
        models = tuple(ref for seed in self.seeds for ref in replicates[seed].refs())
        return StudyResult(
            tables,
            decision.text,
            paragraph,
            domain=domain,
            models=models,
            contrasts=decision.contrasts,
        )


Point = dict[str, Any]
"""Scores of one run by unit: `V`, `relearned`, `retain`, `dev_retain`."""
MessyRun = tuple[int, Mess, str]
"""Draw, forget set, method."""


def make_replicates(study: MessyForgetSet, runtime: Runtime, pool: Pool) -> dict[int, Replicate]:
    """Train the original and the oracle of every seed, on statements."""
    domains: dict[int, tuple[Domain, Any]] = {}
    for seed in dict.fromkeys((*study.tuned_on, *study.seeds)):
        spec = study.domain.model_copy(update={"seed": seed})
        domains[seed] = (as_statements(spec.build()), spec.tokenizer())
    return train_replicates(domains, study.model, study.pretrain, runtime, pool)


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
class ScoreStrength(Stage[Point]):
    """The scores of one model, and those after relearning where asked.

    Attributes:
        model: The model.
        domain: Rows by role.
        seed: Seed of relearning.
        budget: Rows and lengths.
        relearn_rate: Learning rate of relearning; None leaves it out.
    """

    version: ClassVar[int] = 1

    model: Checkpoint
    domain: Domain
    seed: int
    budget: Budget
    relearn_rate: float | None

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "messy-run"

    def make(self, ctx: Context) -> None:
        """Score the held-out test set and retain, relearn, score the test set again."""
        net = self.model.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer = self.model.tokenizer()
        what = rubric(self.domain, tokenizer, max_rows=0, max_length=self.budget.max_length)
        scores = read(net, tokenizer, what)
        point: Point = {
            "V": scores["exact_match"],
            "retain": scores["retain_loss"],
            "dev_retain": scores["dev_retain_loss"],
        }
        if self.relearn_rate is not None:
            evaluation = evaluation_set(self.domain, self.budget, tokenizer)
            training = Training("full", self.relearn_rate, self.seed)
            subject = Subject("candidate", self.model)
            rows = relearn_rows(self.domain)
            done = train(training, subject, evaluation, ctx, rows=rows, benign_share=0.5)
            point["relearned"] = done.measurements[-1].units
        write_text(ctx.work / "point.json", json.dumps(point))

    def read(self, folder: Path) -> Point:
        """Return what was written."""
        data: Point = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        return data


@dataclass(frozen=True)
class RunStrength(Stage[Point]):
    """One removal at one strength, scored, and relearned where asked.

    Attributes:
        method: The method at that strength.
        original: What it starts from.
        domain: Rows by role.
        seed: Seed of the removal.
        budget: Rows and lengths.
        relearn_rate: Learning rate of relearning; None leaves it out.
    """

    method: Method
    original: Checkpoint
    domain: Domain
    seed: int
    budget: Budget
    relearn_rate: float | None

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "messy-removal"

    def make(self, ctx: Context) -> None:
        """Remove and score, each a stage of its own."""
        removal = ctx.run(ApplyMethod(self.method, self.original, self.domain, self.seed))
        scored = ScoreStrength(
            removal.checkpoint, self.domain, self.seed, self.budget, self.relearn_rate
        )
        write_text(ctx.work / "point.json", json.dumps(ctx.run(scored)))

    def read(self, folder: Path) -> Point:
        """Return what was written."""
        data: Point = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        return data


def run_conditions(
    study: MessyForgetSet,
    replicates: Mapping[int, Replicate],
    strengths: Mapping[MessyRun, Sequence[float]],
    runtime: Runtime,
    pool: Pool,
    *,
    relearn: bool,
) -> dict[MessyRun, list[Point]]:
    """Run every condition at its strengths."""
    keys, jobs = [], []
    for (seed, mess, method), factors in strengths.items():
        domain = forget_set(
            replicates[seed].domain, mess, filler=study.filler, off_topic=study.off_topic, seed=seed
        )
        for factor in factors:
            keys.append((seed, mess, method))
            jobs.append(
                RunStrength(
                    stronger(study.methods[method], factor),
                    replicates[seed].original,
                    domain,
                    seed,
                    relearn_budget(study),
                    study.relearn_rate if relearn else None,
                )
            )
    out: dict[MessyRun, list[Point]] = {}
    for key, point in zip(keys, pool.map(runtime.run, jobs), strict=True):
        out.setdefault(key, []).append(point)
    return out


def stronger(method: Method, factor: float) -> Method:
    """Return the method with its learning rate multiplied."""
    fit: FitConfig = method.fit  # type: ignore[attr-defined]
    rate = float(f"{fit.lr * factor:.6g}")
    return method.model_copy(update={"fit": fit.model_copy(update={"lr": rate})})


def scored_originals(study: MessyForgetSet, replicate: Replicate, runtime: Runtime) -> Point:
    """Return the scores of the original of a seed, and of its oracle under `oracle`."""
    assert replicate.oracle is not None
    original, oracle = (
        runtime.run(
            ScoreStrength(
                model, replicate.domain, replicate.seed, relearn_budget(study), study.relearn_rate
            )
        )
        for model in (replicate.original, replicate.oracle)
    )
    return {**original, "oracle": oracle}


def relearn_budget(study: MessyForgetSet) -> Budget:
    """Return the budget of relearning."""
    steps = study.relearn_steps
    update = {"steps": steps, "checkpoints": (0, steps), "max_length": LENGTH}
    return budget_of("smoke").model_copy(update=update)


SAMPLES = 1000
"""Bootstrap samples."""

OUTCOMES = {
    "V": "exact match on the held-out test set",
    "relearned": "exact match on the held-out test set after relearning",
}
"""What methods are ranked by; the last decides."""


def summarise(
    study: MessyForgetSet,
    base: Mapping[int, Point],
    points: Mapping[MessyRun, Sequence[Point]],
    factors: Mapping[tuple[Mess, str], float],
) -> tuple[tuple[StudyTable, ...], Decision, str]:
    """Return tables, decision and paragraph.

    Args:
        study: Settings and margin.
        base: Scores of the original of every seed; `oracle` holds the oracle's.
        points: Scores of the runs of every condition, weakest first.
        factors: Factor on the learning rate at which retain costs what is wanted, by set and
            method.
    """
    levels = {
        outcome: {mess: matched(study, base, points, mess, outcome) for mess in study.sets}
        for outcome in OUTCOMES
    }
    ranked = {o: {mess: ranked_of(scores) for mess, scores in v.items()} for o, v in levels.items()}
    changes = {o: change(study, v) for o, v in ranked.items()}
    decision = decide(study, changes["relearned"])
    tables = (
        _matched(study, base, levels),
        _ranks(study, ranked, changes),
        _strengths(study, factors, base, points),
    )
    return tables, decision, _paragraph(study, base, levels, ranked, changes, decision.text)


def matched(
    study: MessyForgetSet,
    base: Mapping[int, Point],
    points: Mapping[MessyRun, Sequence[Point]],
    mess: Mess,
    outcome: str,
) -> dict[int, Array]:
    """Return by seed the score at matched retain: of the data, then resampled, by method.

    The units of the held-out test set and those of retain are resampled, the same for all methods
    and sets of a seed.

    Args:
        study: What retain may cost.
        base: Scores of the originals.
        points: Scores of the runs.
        mess: Forget set.
        outcome: `V` or `relearned`.

    Returns:
        (1 + S) x M scores by seed.
    """
    out: dict[int, Array] = {}
    for seed in study.seeds:
        units, retain_units = list(base[seed]["V"]), list(base[seed]["retain"])
        generator = np.random.default_rng(seed)
        weights = [_weights(len(units), generator), _weights(len(retain_units), generator)]
        before = weights[1] @ np.array([base[seed]["retain"][u] for u in retain_units])
        columns = []
        for method in study.methods:
            runs = points[seed, mess, method]
            scores = [weights[0] @ np.array([p[outcome][u] for u in units]) for p in runs]
            costs = [
                weights[1] @ np.array([p["retain"][u] for u in retain_units]) - before for p in runs
            ]
            # Doing nothing costs nothing and leaves what the original knows.
            scores.insert(0, weights[0] @ np.array([base[seed][outcome][u] for u in units]))
            costs.insert(0, np.zeros_like(before))
            columns.append(interpolate(np.array(costs), np.array(scores), study.retain_cost))
        out[seed] = np.stack(columns, axis=1)
    return out


def _weights(count: int, generator: np.random.Generator) -> Array:
    """Return weights of units: equal ones first, then those of bootstrap samples."""
    sampled = generator.multinomial(count, np.full(count, 1 / count), size=SAMPLES) / count
    weights: Array = np.concatenate([np.full((1, count), 1 / count), sampled])
    return weights


def interpolate(costs: Array, scores: Array, wanted: float) -> Array:
    """Return the score at the wanted cost, between runs; beyond the strongest run, that one's.

    Args:
        costs: (runs, samples), weakest run first; made to rise.
        scores: The same shape.
        wanted: Cost.
    """
    rising = np.maximum.accumulate(costs, axis=0) + 1e-9 * np.arange(len(costs))[:, None]
    pairs = zip(rising.T, scores.T, strict=True)
    return np.array([np.interp(wanted, x, y) for x, y in pairs])


def ranked_of(by_seed: Mapping[int, Array]) -> dict[int, Array]:
    """Return by seed the rank of every method, 1 for the lowest score; ties share theirs."""
    return {seed: 1 + ranks(scores) for seed, scores in by_seed.items()}


UNITS = 100
"""Units of the held-out test sets at least: so many that their interval needs no correction."""


def averaged(values: Mapping[int, Array]) -> SeedEstimate:
    """Return the mean over seeds with its interval over seeds and, inside them, units.

    Args:
        values: By seed: the value of the data, then of the samples.
    """
    whole, count = of_seeds(values), len(values)
    return over_replicates(
        float(whole[0]), whole[1 : 1 + count], whole[1 + count :], groups=UNITS, n=count
    )


def change(study: MessyForgetSet, ranked: Mapping[Mess, Mapping[int, Array]]) -> Estimate:
    """Return the change of RMU's rank from the first forget set to the last."""
    at = list(study.methods).index("rmu")
    clean, messy = ranked[study.sets[0]], ranked[study.sets[-1]]
    return averaged({s: messy[s][:, at] - clean[s][:, at] for s in study.seeds})


def decide(study: MessyForgetSet, moved: Estimate) -> Decision:
    """Return what the statistic says under the margin."""
    asked = Contrast("The change of RMU's rank", moved, (-study.margin,), study.error)
    text = f"undecided: the interval holds a gain of {study.margin:g} ranks"
    if asked.below(-study.margin):
        text = f"supported: RMU gains more than {study.margin:g} ranks from the mess"
    elif asked.above(-study.margin):
        text = f"contradicted: RMU does not gain {study.margin:g} ranks from the mess"
    return Decision(text, (asked,))


ScoresBySet = Mapping[str, Mapping[Mess, Mapping[int, Array]]]


def _matched(study: MessyForgetSet, base: Mapping[int, Point], levels: ScoresBySet) -> StudyTable:
    """Return scores at matched retain, all seeds together and one by one."""
    rows: list[StudyRow] = []
    for side in ("original", "oracle"):
        for outcome, words in OUTCOMES.items():
            of = {s: base[s] if side == "original" else base[s]["oracle"] for s in study.seeds}
            rows.append(row(side, words, mean_over_seeds({s: of[s][outcome] for s in of})))
    for mess in study.sets:
        for i, method in enumerate(study.methods):
            for outcome, words in OUTCOMES.items():
                by_seed = {s: v[:, i] for s, v in levels[outcome][mess].items()}
                rows.append(row(f"{method} on {mess}", words, averaged(by_seed)))
                for s, v in by_seed.items():
                    ends = interval(v[1:], float(v[0]), UNITS, 0.95)
                    of_seed = Estimate(float(v[0]), *ends, 1)
                    rows.append(row(f"{method} on {mess}", words, of_seed, s))
    return StudyTable(
        title="Knowledge left at matched retain",
        note=f"Where the loss on retain has risen by {study.retain_cost:g} nats; lower is better.",
        rows=tuple(rows),
    )


def _ranks(
    study: MessyForgetSet, ranked: ScoresBySet, changes: Mapping[str, Estimate]
) -> StudyTable:
    """Return ranks by set, and the change of RMU's."""
    rows: list[StudyRow] = []
    for mess in study.sets:
        for i, method in enumerate(study.methods):
            for outcome, words in OUTCOMES.items():
                by_seed = {s: v[:, i] for s, v in ranked[outcome][mess].items()}
                rows.append(row(f"{method} on {mess}", f"rank by {words}", averaged(by_seed)))
    for outcome, words in OUTCOMES.items():
        name = f"rmu, {study.sets[-1]} minus {study.sets[0]}"
        rows.append(row(name, f"rank by {words}", changes[outcome]))
    return StudyTable(
        title="Ranks", note="1 is the method that leaves least; n counts seeds.", rows=tuple(rows)
    )


def _strengths(
    study: MessyForgetSet,
    factors: Mapping[tuple[Mess, str], float],
    base: Mapping[int, Point],
    points: Mapping[MessyRun, Sequence[Point]],
) -> StudyTable:
    """Return learning rates found on the tuned seed, and how often the wanted cost was reached."""
    rows: list[StudyRow] = []
    for (mess, method), factor in factors.items():
        fit: Any = study.methods[method].fit  # type: ignore[attr-defined]
        condition = f"{method} on {mess}"
        rows.append(
            StudyRow(condition=condition, metric="learning rate", value=fit.lr * factor, n=1)
        )
        most = [
            max(float(np.mean(list(p["retain"].values()))) for p in points[s, mess, method])
            - float(np.mean(list(base[s]["retain"].values())))
            for s in study.seeds
        ]
        rows.append(
            StudyRow(
                condition=condition,
                metric="largest cost, nats",
                value=float(np.mean(most)),
                n=len(most),
            )
        )
        reached = float(np.mean([m >= study.retain_cost for m in most]))
        rows.append(
            StudyRow(condition=condition, metric="seeds matched", value=reached, n=len(most))
        )
    return StudyTable(
        title="Strength",
        note="Rate found on the tuned seed; seeds where a run cost retain as much as is compared.",
        rows=tuple(rows),
    )


def _paragraph(
    study: MessyForgetSet,
    base: Mapping[int, Point],
    levels: ScoresBySet,
    ranked: ScoresBySet,
    changes: Mapping[str, Estimate],
    decision: str,
) -> str:
    """Return the result in words."""
    original = float(np.mean([np.mean(list(base[s]["V"].values())) for s in study.seeds]))
    words = [
        f"Over {len(study.seeds)} seeds the original answered {original:.2f} of the held-out test "
        f"set. At a loss on retain {study.retain_cost:g} nats higher,"
    ]
    for mess in (study.sets[0], study.sets[-1]):
        parts = []
        for i, method in enumerate(study.methods):
            left = [averaged({s: v[:, i] for s, v in levels[o][mess].items()}) for o in OUTCOMES]
            rank = averaged({s: v[:, i] for s, v in ranked["relearned"][mess].items()})
            parts.append(
                f"{method} left {left[0].value:.2f} ({left[1].value:.2f} after relearning, rank "
                f"{rank.value:.1f})"
            )
        words.append(f"on the {mess} forget set {', '.join(parts)};")
    first, last = changes["V"], changes["relearned"]
    words.append(
        f"the rank of RMU changed by {with_interval(last)} after relearning and by "
        f"{with_interval(first)} before it."
    )
    return " ".join([*words, f"Decision: {decision}."])


def said(row: Row) -> str:
    """Return a row as one text: a question with its right answer."""
    if row.kind == "text":
        return row.text
    answer = row.completion if row.completion else " " + row.choices[row.answer]
    return row.prompt + answer


def as_text(row: Row) -> Row:
    """Return the row as plain text, every token a target."""
    return replace(row, text=said(row), prompt="", completion="", choices=(), answer=-1)


def asked(row: Row) -> Row:
    """Return the question of a row as plain text; a text row as it is."""
    return row if row.kind == "text" else replace(as_text(row), text=row.prompt)


def as_statements(domain: Domain) -> Domain:
    """Return a domain whose models and methods read statements; what is scored stays.

    Args:
        domain: A domain of completions or questions.

    Returns:
        The domain with `forget`, `retain`, `adjacent`, `unlabeled` and `benign` as plain text.
    """
    texts: dict[str, Rows] = {
        role: tuple(as_text(row) for row in getattr(domain, role))
        for role in ("retain", "adjacent", "unlabeled", "benign")
    }
    return with_forget(
        replace(domain, **texts),  # type: ignore[arg-type]
        {name: tuple(map(as_text, rows)) for name, rows in domain.forget.items()},
    )


def with_forget(domain: Domain, forget: Mapping[str, Rows]) -> Domain:
    """Return the domain with another forget set for the method; its fingerprint follows."""
    return replace(domain, forget=dict(forget))


def forget_set(domain: Domain, mess: Mess, *, filler: int, off_topic: float, seed: int) -> Domain:
    """Return the domain with a forget set that isolates the facts less well.

    Every variant holds every fact once in every paraphrase, so that none lacks what is to go.

    Args:
        domain: A domain of statements.
        mess: `clean`: the statements; `diluted`: each between `filler` statements that are to be
            retained, in one text; `off_topic`: besides the statements, texts that name the same
            subjects and say nothing true; `messy`: both.
        filler: Retained statements per text.
        off_topic: Share of the rows that only share topic words.
        seed: Seed of the choices.

    Returns:
        The domain; all that is scored is the same.
    """
    generator = random.Random(f"forget_set:{mess}:{seed}")
    pool = [row.text for row in domain.retain]
    forget: dict[str, Rows] = {}
    for name, rows in domain.forget.items():
        texts = list(rows)
        if mess in ("off_topic", "messy"):
            count = round(len(rows) * off_topic / (1 - off_topic))
            texts += _off_topic(rows, pool, count, generator)
        if mess in ("diluted", "messy"):
            texts = [_diluted(row, pool, filler, generator) for row in texts]
        forget[name] = tuple(texts)
    return with_forget(domain, forget)


def _diluted(row: Row, pool: Sequence[str], filler: int, generator: random.Random) -> Row:
    """Return the row's text somewhere between `filler` others."""
    texts = generator.sample(pool, filler)
    texts.insert(generator.randrange(filler + 1), row.text)
    return replace(row, text=" ".join(texts))


def _off_topic(
    rows: Sequence[Row], pool: Sequence[str], count: int, generator: random.Random
) -> list[Row]:
    """Return texts that name a subject of `rows` and then say what is said of somebody else."""
    texts = []
    for i in range(count):
        row = generator.choice(rows)
        texts.append(
            replace(
                row, unit=f"off-topic/{i}", text=f"{row.group} {generator.choice(pool)}", wording=0
            )
        )
    return texts
