"""Which method removes most at equal cost, after an equal search, and what survives attack?"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from excise.core.errors import UserError
from excise.core.events import Emit
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.data.labels import LabelNoise, relabelled
from excise.data.spec import DomainSpec
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL, Facts
from excise.fetch.model import open_model
from excise.methods import METHODS
from excise.methods.base import ApplyMethod, Method, Removal, completed
from excise.methods.choosing import check_dev
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.search import RATE, Range, changed
from excise.models.checkpoint import Checkpoint
from excise.models.spec import ModelSpec, Scratch
from excise.record import ModelRef, Record
from excise.requests.lengths import fit_lengths
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe, check_names, starts_from
from excise.run.results import Models, method_run, model_refs, reference_names
from excise.run.steps import ARMS, audit_models, label, prepare
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.auditing.auditor_roc import Examined
from excise_studies.leaderboard.repair import RetainTuning
from excise_studies.leaderboard.tables import BOARD, FINAL, TRIED, Board, Entry, conclude
from excise_studies.leaderboard.trials import ScoreDev, Searched, TrySetting, made, search
from excise_studies.routing.setting import LabelSetting, Missed, Rest, label_settings, labelled

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SEARCH = 0.5
"""Share of the time that the search may take; the rest is for the table."""


def posthoc() -> dict[str, Method]:
    """Return every method of the library that edits a trained model, with published settings."""
    return {
        name: cls()
        for name, cls in METHODS.items()
        if cls.__module__.startswith("excise.methods.posthoc")
        and not any(field.is_required() for field in cls.model_fields.values())
    }


SMALL: Mapping[str, Mapping[str, Any]] = {
    "rmu": {"layer": 1, "blocks": (0, 1)},
    "rmu_lat": {"layer": 1, "blocks": (0, 1), "fit.steps": 160},
    "circuit_breakers": {"layers": (0, 1)},
    "elm": {"layers": (0, 1), "fit.steps": 150},
    "seam": {"fit.steps": 150, "fit.warmup": 15},
    "tar": {
        "fit.steps": 30, "inner_steps": 16, "inner_lr": (1e-4, 1e-3), "fit.warmup": 3,
        "mapping.fit.steps": 100,
    },
    # Forget rows are a third of all rows here: no ratio reaches the published 10 against all.
    "ssd": {"against": "retain"},
    "lfssd": {"against": "retain"},
}  # fmt: skip
"""What published settings need that name a block which a model of two blocks does not have, or
schedules that are made for models a thousand times as large."""

SMALL_RANGES: Mapping[str, Range] = {RATE: Range(low=1e-4, high=1e-2, absolute=True)}
"""Where models that are trained here are searched for settings that are published for models a
thousand times as large."""

SMALL_OWN: Mapping[str, Mapping[str, Range]] = {
    "repselect": {RATE: Range(low=0.5, high=50.0, absolute=True)}
}
"""The same, for methods whose rate is in units of its own."""


class Leaderboard(Study):
    """Compares methods that edit a model: search, choice on dev, fresh seeds, attack.

    Stated beforehand. Every method has `trials` settings: the published ones, then points of a
    sequence over its own search space. Of those whose loss on `dev` retain rows rises by at most
    `retain_budget`, the one with the highest loss on `dev` forget rows is chosen; no attack is
    seen. The chosen setting is applied again at the reported seeds and attacked, and so is what
    fine-tuning on retain rows makes of it (`repaired`). *Left* is the largest depth gap of a
    candidate over every score before an attack and after every attack (the share of what the
    original knows and the oracle does not); of a method it is the larger one of the two rows. A
    method leads if *left* is lower than that of every other method by more than `margin`, at the
    lower end of the 95 % interval over seeds (Student's t, paired); else none does. A method that
    trains from scratch, as filtering does, stands beside those that edit a model.
    """

    question: ClassVar[str] = (
        "After an equal search and at equal cost to the retain set, which method leaves least "
        "behind under the worst attack?"
    )
    statistic: ClassVar[str] = (
        "Left: largest depth gap over every score before and after every attack, of the chosen "
        "setting and of the same after fine-tuning on retain rows, the larger one; a method leads "
        "if its left is lower than every other's by more than the margin at the lower end of the "
        "95 % interval over fresh seeds (paired). Settings chosen on dev without an attack."
    )
    takes: ClassVar[str] = "minutes to days: methods x (trials + 2 seeds x audit)"
    quoted: ClassVar[tuple[str, ...]] = (BOARD, FINAL, TRIED)

    name: Literal[
        "leaderboard", "leaderboard-facts", "leaderboard-glosses", "routing-against-posthoc"
    ] = "leaderboard"
    """Name on the command line."""
    margin: float = 0.1
    """Difference in *left* between the first and every other method."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Seeds of the table: of the removal, and without a `model` of data and models too."""
    tuned_on: tuple[int, ...] | None = (0,)
    """The seed at which settings are searched for."""
    model: str = ""
    """Folder, hub id, GGUF file, or a name that `excise fetch` knows; empty to train one."""
    oracle_paths: tuple[str, ...] = ()
    """Models retrained without the forget set, where a `model` is named."""
    domain: SerializeAsAny[DomainSpec] = Facts(subjects=84, objects=32, forget_share=0.34)
    """What is removed and what stays; without a `model`, drawn anew for every seed."""
    methods: dict[str, SerializeAsAny[Method]] = Field(default_factory=posthoc)
    """Methods by name, with the settings of the first trial: `--methods rmu,npo`."""
    trials: int = Field(default=12, ge=1)
    """Settings of every method; the first is as published."""
    time_budget: str = ""
    """Time this call may take, as in 36h: half for the search; then seeds as long as it lasts. Run
    again, it goes on from there."""
    ranges: dict[str, Range] = {}
    """Ranges by path of a setting, for every method that has it, in place of its own; without a
    `model` the learning rate has one, 1e-4 to 1e-2, for models of that size."""
    small: dict[str, dict[str, Any]] = {}
    """Settings by method that a model trained here needs instead of the published ones."""
    retain_budget: float = Field(default=0.05, ge=0)
    """Nats per token by which the loss on `dev` retain rows may rise."""
    frontier: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Further budgets at which methods are compared on dev."""
    dev_rows: int = Field(default=64, ge=1)
    """Rows of `dev` scored per role and topic at most."""
    rates: tuple[float, ...] = Field(default=(1.0,), min_length=1)
    """Shares of the forget rows that carry a label. Settings are chosen at the first."""
    missed: tuple[Missed, ...] = Field(default=("occurrences",), min_length=1)
    """What labels miss: rows one by one, units whole, or paraphrases that the labeller does not
    know."""
    rest: Rest = "core"
    """`core`: what is missed is among the retain rows. `unlabeled`: it has no label, nor has the
    same share of the retain rows."""
    repair: FitConfig | None = RetainTuning.model_fields["fit"].default
    """Fine-tuning on retain rows that makes the repaired rows; empty for none."""
    audit: AuditSpec = AuditSpec(budget="smoke")
    """The audit of every candidate."""
    finalists: int = Field(default=0, ge=0)
    """Methods that are audited again by `final`, the first ones of the table, at the first rate."""
    final: AuditSpec = AuditSpec(budget="standard")
    """The audit of finalists and reference models."""
    evaluate: EvalSpec = EvalSpec(samples=0)
    """How models are scored."""
    scratch: Scratch = Scratch(**FACTS_MODEL)
    """Architecture, where no `model` is named."""
    pretrain: Pretrain = Pretrain(
        fit=FitConfig(**{**FACTS_FIT, "steps": 350, "batch_size": 96, "micro_size": 24}),
        max_length=FACTS_MAX_LENGTH,
        pack=(1, 1, 2, 4),
    )
    """How it is trained."""
    oracles: int = Field(default=2, ge=0)
    """Models trained without the forget units, where no `model` is named."""

    @field_validator("time_budget")
    @classmethod
    def _time(cls, value: str) -> str:
        """Refuse what is no time."""
        if value and not re.fullmatch(r"\d+(\.\d+)?[smhd]", value):
            raise ValueError(f"'{value}' is no time; write 30m, 36h or 2d")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what cannot be compared, before anything runs."""
        if not self.methods:
            raise ValueError("methods: name at least one, as in --methods rmu,grad_diff")
        check_names(self.methods, "methods.")
        if self.tuned_on is None or len(self.tuned_on) != 1:
            raise ValueError("tuned_on: needs one seed")
        if "none" in (self.audit.budget, self.final.budget):
            raise ValueError("audit: 'none' attacks nothing; choose smoke, standard or strong")
        for rate in self.rates:
            if not 0 < rate <= 1:
                raise ValueError(f"rates: {rate:g} is no share of rows above 0 and up to 1")
        for name, method in self.methods.items():
            if self.model and starts_from(method) == "scratch":
                raise ValueError(
                    f"methods.{name}: trains from scratch, and this leaderboard edits a model that "
                    "exists; leave it out, or leave out 'model' to train all models here"
                )
        return self

    def first(self) -> dict[str, Method]:
        """Return the methods with the settings of their first trial."""
        small = {} if self.model else {**SMALL, **self.small}
        return {name: changed(m, small.get(name, {})) for name, m in self.methods.items()}

    def ranges_of(self, name: str) -> dict[str, Range]:
        """Return where the settings of a method are searched for, beside what it says itself."""
        if self.model:
            return self.ranges
        return {**SMALL_RANGES, **SMALL_OWN.get(name, {}), **self.ranges}

    def seconds(self) -> float:
        """Return the time budget in seconds; infinity for none."""
        text = self.time_budget
        return float(text[:-1]) * SECONDS[text[-1]] if text else math.inf

    def recipe(self, seed: int, emit: Emit) -> Recipe:
        """Return what makes data and models of a seed; rows cut to the positions of the model.

        Args:
            seed: Of data and models where they are made here.
            emit: Told of what is cut.
        """
        spec = self.domain
        if not self.model and "seed" in type(spec).model_fields:
            spec = spec.model_copy(update={"seed": seed})
        asked = Recipe(
            name=self.name,
            domain=spec,
            model=ModelSpec(path=self.model, scratch=None if self.model else self.scratch),
            pretrain=None if self.model else self.pretrain,
            arms=self.first(),
            audit=self.audit,
            evaluate=self.evaluate,
            oracles=self.oracles,
            seed=seed,
            dtype=self.dtype,
            device=self.device,
        )
        return fit_lengths(asked, emit)

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Search, choose, apply at fresh seeds, attack, compare."""
        began = time.time()
        assert self.tuned_on is not None
        pool.emit("phase", {"text": "reading the model and the data"})
        tuning = make_world(self, self.tuned_on[0], runtime, pool)
        check_dev(tuning.domain, "the leaderboard")
        pool.emit("phase", {"text": "searching for settings, on dev"})
        limit = began + SEARCH * self.seconds()
        searched = search(
            tuning.methods, tuning.trial, self.trials, self.tuned_on[0],
            self.ranges_of, limit, runtime, pool,
        )  # fmt: skip
        original = runtime.run(tuning.dev_score(tuning.models.original))
        allowed = original[1] + self.retain_budget
        chosen = {n: s.best(allowed) for n, s in searched.items() if s.usable}
        if not chosen:
            raise UserError(f"no method made a model: {'; '.join(_why(tuning, searched))}")
        settings = label_settings(self.rates, self.missed)
        entries = [Entry(n, labels) for labels in settings for n in chosen]
        if self.repair is not None:
            entries += [Entry(n, settings[0], repaired=True) for n in chosen]
        board = Board(self, searched, chosen, original, tuple(entries))
        scratch = tuple(n for n in chosen if starts_from(tuning.methods[n]) == "scratch")
        board = replace(
            board,
            beside=() if len(scratch) == len(chosen) else scratch,
            notes=tuple(_why(tuning, searched)),
            refs=tuning.refs(),
        )
        for at, seed in enumerate(self.seeds):
            if at and time.time() - began >= self.seconds():
                note = f"seeds {', '.join(map(str, self.seeds[at:]))} were not reached in time"
                board = replace(board, notes=(*board.notes, note))
                break
            pool.emit("phase", {"text": f"seed {seed}: applying the chosen settings, attacking"})
            world = make_world(self, seed, runtime, pool)
            board = board.add(world.domain, seed, *world.audited(board, self.audit, runtime, pool))
        finalists = board.contest()[: self.finalists]
        if finalists:
            pool.emit("phase", {"text": f"attacking the first {len(finalists)} again"})
            keep = tuple(
                e for e in board.entries if e.method in finalists and e.labels == settings[0]
            )
            last = replace(board, entries=keep, records={}, notes=())
            for seed in board.records:
                world = make_world(self, seed, runtime, pool)
                last = last.add(world.domain, seed, *world.audited(last, self.final, runtime, pool))
            return self.conclude(board, last)
        return self.conclude(board)

    def conclude(self, board: Board, final: Board | None = None) -> StudyResult:
        """Return what was found; see `tables.conclude`."""
        return conclude(board, final)


def _why(world: World, searched: Mapping[str, Searched]) -> list[str]:
    """Return what a reader should know of the search, one sentence each."""
    notes = []
    for name in world.methods:
        if name not in searched:
            notes.append(f"{name} was not tried: the time was up before its first trial")
        elif searched[name].failed:
            notes.append(f"{name} made no model: {searched[name].failed}")
    rounds = max((len(s.trials) for s in searched.values()), default=0)
    if rounds < max((s.asked for s in searched.values()), default=0):
        notes.append(f"the time was up after {rounds} trials of every method; run again for more")
    alone = [n for n, s in searched.items() if s.asked == 1 and world.study.trials > 1]
    if alone:
        notes.append(f"nothing to search in {', '.join(alone)}: one trial, as published")
    return notes


# -- one seed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Data and models of one seed.

    Attributes:
        study: The study.
        seed: The seed.
        recipe: What made it, lengths cut to the model.
        domain: The data.
        models: Original, oracles, and where models are trained here the untrained one.
    """

    study: Leaderboard
    seed: int
    recipe: Recipe
    domain: Domain
    models: Models

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods with the settings of their first trial."""
        return self.recipe.arms

    def removal(self, method: Method, given: LabelSetting) -> ApplyMethod:
        """Return the stage that applies a method to data that are labelled so."""
        scratch = starts_from(method) == "scratch"
        start = self.models.init if scratch else self.models.original
        assert start is not None
        known = {"pretrain": self.recipe.pretrain, "pretrain_tokens": self.models.tokens}
        labels = given.labels(self.study.rest)
        method, domain = with_labels(completed(method, known), self.domain, labels, self.seed)
        return ApplyMethod(method, start, domain, self.seed + (ARMS if scratch else 0))

    def trial(self, method: Method) -> TrySetting:
        """Return the stage that tries a setting on dev."""
        first, *_ = label_settings(self.study.rates, self.study.missed)
        stage = self.removal(method, first)
        rows, length = self.study.dev_rows, self.recipe.evaluate.max_length
        return TrySetting(
            stage.method, stage.start, stage.domain, self.domain, stage.seed, rows, length
        )

    def dev_score(self, model: Checkpoint) -> ScoreDev:
        """Return the stage that scores a model on dev."""
        return ScoreDev(model, self.domain, self.study.dev_rows, self.recipe.evaluate.max_length)

    def refs(self) -> tuple[ModelRef, ...]:
        """Return the reference models for the record."""
        refs = model_refs(self.models, self.study.model)
        return tuple(r.model_copy(update={"name": f"{r.name}, seed {self.seed}"}) for r in refs)

    def apply(
        self, board: Board, runtime: Runtime, pool: Pool
    ) -> tuple[dict[Entry, ApplyMethod], dict[Entry, Removal], dict[Entry, str]]:
        """Apply the chosen settings at this seed, then repair what that made.

        Returns:
            Stages and removals by entry, and why there is none.
        """
        stages = {
            e: self.removal(
                changed(self.methods[e.method], board.chosen[e.method].settings), e.labels
            )
            for e in board.entries
            if not e.repaired
        }
        removals: dict[Entry, Removal] = {}
        failed: dict[Entry, str] = {}
        self._made(stages, removals, failed, runtime, pool)
        fit = self.study.repair
        repairs = {}
        for e in board.entries:
            first = removals.get(replace(e, repaired=False))
            if e.repaired and fit is not None and first is not None:
                tuning = RetainTuning(fit=fit, max_length=self.recipe.evaluate.max_length)
                repairs[e] = ApplyMethod(tuning, first.checkpoint, self.domain, self.seed)
        self._made(repairs, removals, failed, runtime, pool)
        return {**stages, **repairs}, removals, failed

    def _made(
        self,
        stages: Mapping[Entry, ApplyMethod],
        removals: dict[Entry, Removal],
        failed: dict[Entry, str],
        runtime: Runtime,
        pool: Pool,
    ) -> None:
        """Run stages, and sort what they gave into removals and failures."""
        label(list(stages.values()), [e.name for e in stages], runtime, pool)
        score = self.dev_score(self.models.original)
        found = pool.map(made, [(runtime, stage, score) for stage in stages.values()])
        known = {m.fingerprint for m in reference_names(self.models).values()}
        for entry, one in zip(stages, found, strict=True):
            if isinstance(one, str):
                failed[entry] = one
            elif one.checkpoint.fingerprint in known:
                failed[entry] = "it changed nothing"
            else:
                removals[entry] = one

    def audited(
        self, board: Board, audit: AuditSpec, runtime: Runtime, pool: Pool
    ) -> tuple[Record, dict[Entry, Removal], dict[Entry, str]]:
        """Apply the chosen settings at this seed and attack what they made, as the command would.

        Args:
            board: What was chosen.
            audit: How hard to attack.
            runtime: Where stages are kept.
            pool: Worker processes.
        """
        stages, removals, failed = self.apply(board, runtime, pool)
        # Reference models that exist are the same at every seed, and attacked once for all.
        seed = self.seed if not self.study.model else (self.study.tuned_on or (0,))[0]
        record = Record(kind="audit", config={"audit": audit.model_dump(mode="json")})
        if removals:
            runs = tuple(
                method_run(e.name, stages[e].method, removals[e], self.seed, {}) for e in removals
            )
            models = {e.name: removals[e].checkpoint for e in removals}
            asked = Examined(self.recipe.evaluate, audit, seed)
            record, _ = audit_models(
                record, asked, self.domain, self.models, models, runtime, pool, runs
            )
        return record, removals, failed


def make_world(study: Leaderboard, seed: int, runtime: Runtime, pool: Pool) -> World:
    """Make or open the models of a seed."""
    recipe = study.recipe(seed, pool.emit)
    domain, models = prepare(recipe, runtime, pool)
    if study.model and study.oracle_paths:
        oracles = tuple(open_model(ModelSpec(path=path)) for path in study.oracle_paths)
        models = replace(models, oracles=oracles)
    return World(study, seed, recipe, domain, models)


def with_labels(
    method: Method, domain: Domain, labels: LabelNoise | None, seed: int
) -> tuple[Method, Domain]:
    """Return a method and its data where labels miss some of the forget rows.

    A method that takes labels is given them; of any other the data is changed.

    Args:
        method: A method.
        domain: Rows by role.
        labels: How labels differ from the truth; None for not at all.
        seed: Seed of the labeller.
    """
    given = labelled(method, labels)
    if given == method:
        domain, _ = relabelled(domain, labels, seed=seed)
    return given, domain
