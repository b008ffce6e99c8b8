"""Is RMU shallow? Arditi and Chughtai (2024) end to end, with the controls the note lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from excise.auditor.budget import Budget, budget_of
from excise.core.errors import UserError
from excise.core.stages import Runtime
from excise.data.spec import DomainSpec
from excise.domains.cyber import Cyber
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL, Facts
from excise.evals.replicates import Contrast, Decision, SeedEstimate, p_value
from excise.evals.stats import Estimate, bootstrap_difference, holm
from excise.fetch.model import open_model
from excise.methods.base import ApplyMethod
from excise.methods.posthoc.rmu import RMU
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import ModelSpec, Scratch
from excise.record import StudyRow, StudyTable
from excise.run.results import model_ref
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.base import (
    Replicate,
    ScoreBySeed,
    mean_over_seeds,
    row,
    share,
    train_replicates,
)
from excise_studies.levels import estimate, levels
from excise_studies.recovery import said
from excise_studies.rmu.clear_stage import BARE, ClearingPlan, ClearModels, RelearnCleared, fitted
from excise_studies.rmu.clearing import Clearing
from excise_studies.rmu.scoring import average


class RMUIsShallow(Study):
    """RMU floods the residual stream on forget text: what is left once that is cleared?

    Stated beforehand. R, the share of knowledge that clearing brings back, is (EM(edited, cleared)
    - EM(edited)) / (EM(original, cleared the same way) - EM(edited)), EM the exact match on the
    held-out test set over all reported seeds (for plain text minus the loss). The clearing is the
    one with the lowest loss on `dev_forget` among those that raise the edited model's loss on
    `dev_retain` by at most `retain_budget`, chosen on the tuned seed. RMU is called shallow if the
    lower end of R's 95 % interval is above `margin`, and not shallow if the upper end is below it.
    G, the knowledge that is gone, is one minus the share of the original's excess over the oracle
    that the edited model reaches after it is cleared and relearned for 8 steps, all three treated
    alike: gone if its lower end is above `gone_margin`, merely uncleared if its upper end is below
    it.
    """

    question: ClassVar[str] = (
        "How much of what RMU removed answers again once the junk it adds to the residual stream "
        "is cleared, and is the rest cleared incompletely or gone?"
    )
    statistic: ClassVar[str] = (
        "R = (EM(edited, cleared) - EM(edited)) / (EM(original, cleared alike) - EM(edited)) on "
        "the held-out test set (EM exact match; for plain text, minus the loss), over seeds "
        "and their units; clearing chosen by dev loss on the tuned seed. Shallow if "
        "the lower end of R is above the margin, not shallow if the upper end is below."
    )
    takes: ClassVar[str] = "4 minutes, 1 GiB; --full: 15 minutes, 4 GiB, after fetching the model"
    quoted: ClassVar[tuple[str, ...]] = ("Clearing, all reported seeds",)

    name: Literal["rmu-is-shallow"] = "rmu-is-shallow"
    """Name on the command line."""
    margin: float = 0.5
    """RMU is shallow where clearing alone brings back more than this share."""
    tuned_on: tuple[int, ...] = (0,)
    """Seeds on which settings are chosen, on `dev`; no number is reported from them."""
    gone_margin: float = 0.1
    """Knowledge counts as gone where relearning after clearing leaves more than this share."""
    domain: SerializeAsAny[DomainSpec] = Facts(subjects=96, objects=32, relations=4, cue="category")
    """The data; a generated one is drawn anew for every seed."""
    model: ModelSpec = ModelSpec(scratch=Scratch(**FACTS_MODEL))
    """The original."""
    pretrain: Pretrain | None = Pretrain(
        fit=FitConfig(**{**FACTS_FIT, "steps": 300, "batch_size": 96}),
        max_length=FACTS_MAX_LENGTH,
        pack=(1, 1, 2, 4),
    )
    """How original and oracle are trained."""
    rmu: RMU = RMU(
        layer=1,
        blocks=(0, 1),
        steering=50.0,
        alpha=20.0,
        fit=FitConfig(steps=100, lr=1e-2, batch_size=64),
        max_length=FACTS_MAX_LENGTH,
    )
    """The removal."""
    dims: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Sizes of the subspaces."""
    random_directions: int = Field(default=8, ge=1)
    """Random directions cleared as controls."""
    only: tuple[str, ...] = ()
    """Score only conditions whose name holds one of these; empty for all."""
    retain_budget: float = 0.1
    """Nats by which the chosen clearing may raise the loss on `dev_retain`."""
    relearn_steps: int = Field(default=8, ge=1)
    """Steps of relearning."""
    rates: tuple[float, ...] = ()
    """Rates of relearning to choose from; empty for those of the smoke budget."""
    relearn_batch: int = 32
    """Rows per step of relearning, half of them harmless."""
    max_rows: int = 0
    """Rows of each scored set at most; 0 for all."""
    max_length: int = 16
    """Tokens per row that is scored."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse a model that is neither trained here nor named."""
        if self.model.scratch is not None and self.pretrain is None:
            raise ValueError("pretrain: is required with 'model.scratch'")
        if bool(self.model.path) == (self.model.scratch is not None):
            raise ValueError("model: give either 'path' or 'scratch'; see --full")
        return self

    @classmethod
    def full(cls) -> Self:
        """Return the settings for SmolLM2-135M and cyber text, a few rows, in bfloat16."""
        return cls(
            seeds=(0,),
            tuned_on=(),
            dtype="bfloat16",
            domain=Cyber(),
            model=ModelSpec(path="smollm2-135m"),
            pretrain=None,
            rmu=RMU(
                layer=7,
                steering=300.0,
                alpha=100.0,
                fit=FitConfig(steps=60, lr=1e-3, batch_size=4, optimizer="adamw"),
                max_length=64,
            ),
            dims=(1, 4, 16),
            random_directions=2,
            only=(
                BARE,
                "original, per block",
                "original, one",
                "retain, per block",
                "retain, least squares, per block",
                "retain, to the retain mean, per block",
                "generic, per block",
                "components of edited - original, k=1, per block",
                "components of edited - original, k=4, per block",
                "components of edited - original, k=16, per block",
                "original, least squares, per block",
                "retain, least squares, first token spared, per block",
                "original, first token spared, per block",
                "original, least squares, first token spared, per block",
                "split halves, per block",
                "random",
            ),
            max_rows=12,
            max_length=64,
            relearn_batch=4,
        )

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train, remove, clear, relearn, and put the numbers into tables."""
        replicates = make_replicates(self, runtime, pool)
        jobs = [ApplyMethod(self.rmu, d.original, d.domain, d.seed) for d in replicates.values()]
        removals = pool.map(runtime.run, jobs)
        edited = {seed: r.checkpoint for seed, r in zip(replicates, removals, strict=True)}
        cleared = clear_replicates(self, replicates, edited, runtime, pool)
        tuned = list(self.tuned_on) or list(self.seeds)
        name = choose(cleared, tuned, self.retain_budget)
        relearned = relearn_replicates(self, replicates, edited, name, runtime, pool)
        reported = {seed: cleared[seed] for seed in self.seeds}
        summary = summarise(self, reported, name, relearned)
        return StudyResult(
            tables=summary.tables,
            decision=summary.decision.text,
            contrasts=summary.decision.contrasts,
            paragraph=summary.paragraph,
            domain=replicates[self.seeds[0]].domain,
            models=tuple(
                ref
                for seed in self.seeds
                for ref in (*replicates[seed].refs(), model_ref(f"rmu, seed {seed}", edited[seed]))
            ),
            notes=summary.notes,
        )


def make_replicates(study: RMUIsShallow, runtime: Runtime, pool: Pool) -> dict[int, Replicate]:
    """Return the models of every seed: trained here, or one given model under several seeds."""
    seeds = tuple(dict.fromkeys((*study.tuned_on, *study.seeds)))
    if study.model.scratch is None:
        original = open_model(study.model)
        domain = study.domain.build(original)
        return {seed: Replicate(seed, domain, original) for seed in seeds}
    domains = {}
    for seed in seeds:
        reseeded = "seed" in type(study.domain).model_fields
        spec = study.domain.model_copy(update={"seed": seed}) if reseeded else study.domain
        domains[seed] = (spec.build(None), spec.tokenizer())
    assert study.pretrain is not None
    return train_replicates(domains, study.model.scratch, study.pretrain, runtime, pool)


def clear_jobs(
    study: RMUIsShallow, replicates: Mapping[int, Replicate], edited: Mapping[int, Checkpoint]
) -> list[ClearModels]:
    """Return the jobs of clearing; those of a lone seed are cut in two, for two workers."""
    real = study.model.scratch is None
    plan = ClearingPlan(
        study.dims,
        study.random_directions,
        study.only,
        study.max_rows,
        study.max_length,
        generic="prose" if real else "benign",
    )
    parts = 2 if len(replicates) == 1 else 1
    return [
        ClearModels(d.domain, d.original, edited[seed], plan, seed, part, parts)
        for seed, d in replicates.items()
        for part in range(parts)
    ]


def clear_replicates(
    study: RMUIsShallow,
    replicates: Mapping[int, Replicate],
    edited: Mapping[int, Checkpoint],
    runtime: Runtime,
    pool: Pool,
) -> dict[int, dict[str, Any]]:
    """Clear the models of every seed in every way, and return `{arms, residual}` by seed."""
    jobs = clear_jobs(study, replicates, edited)
    out: dict[int, dict[str, Any]] = {}
    for job, cleared in zip(jobs, pool.map(runtime.run, jobs), strict=True):
        scores = out.setdefault(job.seed, {"arms": {}, "residual": cleared["residual"]})
        scores["arms"] |= cleared["arms"]
    return out


def choose(cleared: Mapping[int, Mapping[str, Any]], seeds: Sequence[int], budget: float) -> str:
    """Return the condition that is chosen on `dev`: lowest forget loss within the budget on retain.

    Conditions written into weights repeat others and controls know nothing: neither is chosen.
    Where no condition is within the budget, the one that raises the loss on retain least is.

    Args:
        cleared: What `clear_draws` returned.
        seeds: Draws that choices may be made on.
        budget: Nats.

    Raises:
        UserError: If there is nothing to choose from.
    """
    first = cleared[seeds[0]]["arms"]
    names: list[str] = [
        name
        for name, condition in first.items()
        if name != BARE and not condition["facts"]["control"] and not name.endswith("weights")
    ]
    if not names:
        raise UserError(
            "only: leaves no condition that clears a direction and is no control, so that none can "
            "be chosen; name one that does"
        )

    def mean(name: str, score: str) -> float:
        return sum(average(cleared[s]["arms"][name]["edited"][score]) for s in seeds) / len(seeds)

    bare = mean(BARE, "dev_retain_loss")
    cost = {name: mean(name, "dev_retain_loss") - bare for name in names}
    within = [name for name in names if cost[name] <= budget]
    if not within:
        return min(names, key=lambda name: cost[name])
    return min(within, key=lambda name: mean(name, "dev_loss"))


Relearned = dict[str, dict[int, dict[str, Any]]]
"""What relearning gave, by treatment (`edited`, `edited, cleared` ...) and seed."""


def relearn_replicates(
    study: RMUIsShallow,
    replicates: Mapping[int, Replicate],
    edited: Mapping[int, Checkpoint],
    name: str,
    runtime: Runtime,
    pool: Pool,
) -> Relearned:
    """Relearn the edited model, the original and the oracle, each as it is and cleared.

    The rate of each treatment is the one with the lowest dev loss on the tuned seeds.
    """
    jobs = clear_jobs(study, replicates, edited)
    by_seed: dict[int, Clearing] = {}
    for job in jobs[:: jobs[0].parts]:
        ctx = runtime.context(runtime.store, seed=job.seed)
        by_seed[job.seed] = next(one for one in fitted(job, ctx)[1] if one.name == name)
    budget = relearn_budget(study, next(iter(replicates.values())).original.num_parameters)
    wanted: dict[tuple[str, int, float], RelearnCleared] = {}
    for seed, replicate in replicates.items():
        models = {"edited": edited[seed], "original": replicate.original}
        models |= {"oracle": replicate.oracle} if replicate.oracle is not None else {}
        for side, model in models.items():
            for treatment, one in ((side, None), (f"{side}, cleared", by_seed[seed])):
                for lr in budget.rates:
                    wanted[treatment, seed, lr] = RelearnCleared(
                        model, replicate.domain, budget.without(("rates",)), lr, seed, one
                    )
    tuned = study.tuned_on or study.seeds
    first = {key: job for key, job in wanted.items() if key[1] in tuned}
    tried = dict(zip(first, pool.map(runtime.run, list(first.values())), strict=True))
    rates: dict[str, float] = {}
    for treatment in dict.fromkeys(key[0] for key in wanted):
        loss = {lr: sum(tried[treatment, s, lr]["dev_loss"] for s in tuned) for lr in budget.rates}
        rates[treatment] = min(loss, key=lambda lr: loss[lr])
    last = {k: job for k, job in wanted.items() if k[1] in study.seeds and k[2] == rates[k[0]]}
    out: Relearned = {}
    for key, scores in zip(last, pool.map(runtime.run, list(last.values())), strict=True):
        out.setdefault(key[0], {})[key[1]] = {**scores, "lr": key[2]}
    return out


def relearn_budget(study: RMUIsShallow, parameters: int) -> Budget:
    """Return the smoke budget cut to the steps of the study."""
    named = budget_of("smoke", parameters)
    steps = study.relearn_steps
    rows = {"max_test_rows": study.max_rows, "max_other_rows": study.max_rows}
    return named.model_copy(
        update={
            "steps": steps,
            "checkpoints": (0, steps),
            "rates": study.rates or named.rates,
            "batch_size": study.relearn_batch,
            "max_length": study.max_length,
            **(rows if study.max_rows else {}),
        }
    )


ClearingScores = Mapping[int, Mapping[str, Any]]
"""By seed: `{arms, residual}`."""


@dataclass(frozen=True)
class Summary:
    """What goes into the result."""

    tables: tuple[StudyTable, ...]
    decision: Decision
    paragraph: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """Scores of all reported seeds together."""

    scores: ClearingScores

    @property
    def conditions(self) -> list[str]:
        """Names of the conditions, the bare one first."""
        return list(dict.fromkeys(n for s in self.scores.values() for n in s["arms"]))

    def units(self, condition: str, side: str, metric: str) -> ScoreBySeed:
        """Return one score by seed and unit."""
        return {s: v["arms"][condition][side][metric] for s, v in self.scores.items()}

    def has(self, metric: str) -> bool:
        """Return whether the rows allowed a score."""
        return all(metric in v["arms"][BARE]["edited"] for v in self.scores.values())

    def back(self, condition: str, metric: str) -> SeedEstimate:
        """Return the share of a score that clearing brings back; see the study's statistic."""
        bare = self.units(BARE, "edited", metric)
        sides = [self.units(condition, side, metric) for side in ("edited", "original")]
        if metric in ("coherence", "text_loss"):
            return share((bare, sides[0]), (bare, sides[1]))
        return share((sides[0], bare), (sides[1], bare))

    def control(self, condition: str) -> bool:
        """Return whether a condition is a control."""
        return bool(next(iter(self.scores.values()))["arms"][condition]["facts"]["control"])


def summarise(
    study: RMUIsShallow, scores: ClearingScores, chosen: str, relearned: Mapping[str, Any]
) -> Summary:
    """Return tables, decision and paragraph.

    Args:
        study: Margins.
        scores: What clearing gave, by reported seed.
        chosen: The condition chosen on `dev`.
        relearned: What relearning gave, by treatment and seed.
    """
    reader = Reader(scores)
    key = "exact_match" if reader.has("exact_match") else "text_loss"
    p = tests(reader, key)
    back = reader.back(chosen, key)
    parts = split(relearned, back, text=key == "text_loss")
    controls = {
        condition: reader.back(condition, key)
        for condition in reader.conditions
        if reader.control(condition)
    }
    tables = (
        _residual(scores),
        _conditions(reader, key, p),
        _by_seed(reader, chosen, key),
        _relearned(relearned),
        StudyTable(
            title="What the rest is",
            note="Shares of the original's knowledge under the same treatment, over the oracle's.",
            rows=tuple(row(chosen, name, value) for name, value in parts.items()),
        ),
    )
    decision = decide(study, back, parts)
    return Summary(
        tables,
        decision,
        _paragraph(reader, chosen, key, p, back, parts, controls, decision.text),
        (f"clearing chosen on dev: {chosen}",),
    )


def tests(reader: Reader, key: str) -> dict[str, float]:
    """Return by condition the p-value of clearing against not clearing, corrected after Holm.

    Paired differences of the means of seeds, by Student's t.
    """
    bare = reader.units(BARE, "edited", key)
    conditions = [condition for condition in reader.conditions if condition != BARE]
    raw = []
    for condition in conditions:
        both = levels({"after": reader.units(condition, "edited", key), "bare": bare}, {})
        raw.append(p_value(estimate(both.at("after") - both.at("bare"), both)))
    return dict(zip(conditions, holm(raw), strict=True))


def split(
    relearned: Mapping[str, Mapping[int, Mapping[str, Any]]], back: SeedEstimate, *, text: bool
) -> dict[str, SeedEstimate]:
    """Split what clearing does not bring back into what relearning reaches and what is gone.

    Args:
        relearned: By treatment and seed.
        back: Share that clearing alone brings back.
        text: Whether the held-out test set is scored by loss, lower being better.

    Returns:
        Shares by name; those that need the oracle only where there is one.
    """

    def after(treatment: str) -> ScoreBySeed:
        return {seed: scores["V"][1] for seed, scores in relearned[treatment].items()}

    def reached(kind: str) -> SeedEstimate:
        low = after(f"oracle{kind}") if f"oracle{kind}" in relearned else None
        top, bottom = after(f"edited{kind}"), after(f"original{kind}")
        if low is None:
            low = {s: f["V"][0] for s, f in relearned["edited"].items()}
        pairs = ((low, top), (low, bottom)) if text else ((top, low), (bottom, low))
        return share(*pairs)

    bare, cleared = reached(""), reached(", cleared")
    out = {
        "back by clearing alone": back,
        "back by relearning alone": bare,
        "back by clearing and relearning": cleared,
        "cleared incompletely": _minus(cleared, back),
        "gone": replace(
            cleared, value=1 - cleared.value, low=1 - cleared.high, high=1 - cleared.low
        ),
    }
    return out


def _minus(first: SeedEstimate, second: SeedEstimate) -> SeedEstimate:
    """Return a difference of shares of other treatments, with independent intervals."""
    value = first.value - second.value
    half = math.hypot(first.half, second.half)
    return replace(first, value=value, low=value - half, high=value + half)


def decide(study: RMUIsShallow, back: Estimate, parts: Mapping[str, Estimate]) -> Decision:
    """Return what the statistic says under the margins."""
    if math.isnan(back.value):
        return Decision("invalid: the removal left nothing to bring back")
    gone = parts["gone"]
    error = study.error if math.isnan(gone.value) else study.error / 2
    asked = Contrast("R", back, (study.margin,), error)
    first = f"undecided: the interval of R holds {study.margin:g}"
    if asked.above(study.margin):
        first = f"shallow: R is above {study.margin:g}"
    elif asked.below(study.margin):
        first = f"not shallow: R is below {study.margin:g}"
    if math.isnan(gone.value):
        return Decision(first, (asked,))
    rest = Contrast("G", gone, (study.gone_margin,), error)
    second = f"whether the rest is gone is undecided: G's interval holds {study.gone_margin:g}"
    if rest.above(study.gone_margin):
        second = f"some knowledge is gone: G is above {study.gone_margin:g}"
    elif rest.below(study.gone_margin):
        second = f"the rest was cleared incompletely: G is below {study.gone_margin:g}"
    return Decision(f"{first}; {second}", (asked, rest))


def _residual(scores: ClearingScores) -> StudyTable:
    """Return norms and the likeness of changes by block, averaged over seeds."""
    blocks = len(next(iter(scores.values()))["residual"])
    rows = []
    for i in range(blocks):
        by_seed = [s["residual"][i] for s in scores.values()]
        rows += [
            StudyRow(
                condition=f"block {i}",
                metric=m,
                value=sum(f[m] for f in by_seed) / len(by_seed),
                n=len(by_seed),
            )
            for m in by_seed[0]
        ]
    return StudyTable(
        title="The residual stream on dev rows",
        note="Means over tokens but the first of each row, then over seeds.",
        rows=tuple(rows),
    )


METRICS = {
    "coherence": "coherence, nats",
    "text_loss": "text loss",
    "exact_match": "exact match",
    "multiple_choice": "multiple choice",
    "retain_loss": "retain loss",
    "retain_exact_match": "retain exact match",
}
"""Scores of the table of conditions, and how they are called."""


def _conditions(reader: Reader, key: str, p: Mapping[str, float]) -> StudyTable:
    """Return every condition: scores, the original's under the same clearing, shares, p-values."""
    rows: list[StudyRow] = []
    metrics = [m for m in METRICS if reader.has(m)]
    original = {m: reader.units(BARE, "original", m) for m in metrics}
    rows += [row("original", METRICS[m], mean_over_seeds(v)) for m, v in original.items()]
    for condition in reader.conditions:
        for m in metrics:
            rows.append(
                row(condition, METRICS[m], mean_over_seeds(reader.units(condition, "edited", m)))
            )
        if condition == BARE:
            continue
        paired = reader.units(condition, "original", key)
        rows.append(row(condition, f"original alike, {METRICS[key]}", mean_over_seeds(paired)))
        rows.append(row(condition, "coherence back", reader.back(condition, "coherence")))
        rows.append(row(condition, "knowledge back", reader.back(condition, key)))
        rows.append(
            StudyRow(
                condition=condition, metric="p after Holm", value=p[condition], n=len(reader.scores)
            )
        )
    return StudyTable(
        title="Clearing, all reported seeds",
        note=(
            "On the held-out test set unless retain is named. 'Back' is read against the original "
            "cleared alike; "
            "controls are called split halves and random. p: Student's t over seeds against not "
            "clearing, Holm over all conditions; n counts seeds."
        ),
        rows=tuple(rows),
    )


def _by_seed(reader: Reader, chosen: str, key: str) -> StudyTable:
    """Return the chosen condition, seed by seed."""
    rows: list[StudyRow] = []
    for seed, scores in reader.scores.items():
        reader_of_seed = Reader({seed: scores})
        rows += [
            row(chosen, "coherence back", reader_of_seed.back(chosen, "coherence"), seed),
            row(chosen, "knowledge back", reader_of_seed.back(chosen, key), seed),
        ]
        for m in ("retain_loss", "retain_exact_match"):
            if reader_of_seed.has(m):
                sides = [
                    reader_of_seed.units(condition, "edited", m)[seed]
                    for condition in (chosen, BARE)
                ]
                name = f"{METRICS[m]}, change"
                rows.append(row(chosen, name, bootstrap_difference(*sides), seed))
    return StudyTable(title="The chosen clearing, seed by seed", rows=tuple(rows))


def _relearned(relearned: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> StudyTable:
    """Return scores on the held-out test set and on retain before and after relearning."""
    rows = []
    for treatment, by_seed in relearned.items():
        for what in ("V", "retain"):
            for i, when in enumerate(("before", "after")):
                units = {seed: scores[what][i] for seed, scores in by_seed.items()}
                rows.append(row(treatment, f"{what}, {when}", mean_over_seeds(units)))
        rates = [scores["lr"] for scores in by_seed.values()]
        rows.append(StudyRow(condition=treatment, metric="rate", value=rates[0], n=len(rates)))
    return StudyTable(
        title="Relearning, cleared or not",
        note=(
            "The headline score of the held-out test set and of retain; the rate was chosen on dev."
        ),
        rows=tuple(rows),
    )


def _paragraph(
    reader: Reader,
    chosen: str,
    key: str,
    p: Mapping[str, float],
    back: Estimate,
    parts: Mapping[str, Estimate],
    controls: Mapping[str, Estimate],
    decision: str,
) -> str:
    """Return the result in words."""

    def mean(condition: str, side: str, metric: str) -> float:
        return mean_over_seeds(reader.units(condition, side, metric)).value

    name = METRICS[key]
    best = max(controls, key=lambda condition: controls[condition].value) if controls else ""
    count = "1 seed" if len(reader.scores) == 1 else f"{len(reader.scores)} seeds"
    words = [
        f"Over {count} the {name} on the held-out test set was {mean(BARE, 'original', key):.2f} "
        f"in the original, {mean(BARE, 'edited', key):.2f} after RMU and "
        f"{mean(chosen, 'edited', key):.2f} after clearing ({chosen}; the original cleared alike: "
        f"{mean(chosen, 'original', key):.2f}; p after Holm {p[chosen]:.2g}).",
        f"R = {said(back)} of the loss came back; plain text has coherence and knowledge in one."
        if key == "text_loss"
        else f"Of coherence {said(reader.back(chosen, 'coherence'))} came back, of knowledge "
        f"R = {said(back)}.",
    ]
    if best:
        words.append(f"The best of {len(controls)} controls ({best}) gave {said(controls[best])}.")
    cost = [mean(condition, "edited", "retain_loss") for condition in (BARE, chosen)]
    words.append(f"The loss on retain went from {cost[0]:.2f} to {cost[1]:.2f}.")
    words.append(
        f"Relearning brought back {said(parts['back by relearning alone'])} without clearing and "
        f"{said(parts['back by clearing and relearning'])} with it, so that "
        f"{said(parts['cleared incompletely'])} had been cleared incompletely and G = "
        f"{said(parts['gone'])} is gone."
    )
    return " ".join([*words, f"Decision: {decision}."])
