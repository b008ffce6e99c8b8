"""A planted shortcut: routed into a module and cut off, filtered away, or left in.

Every subject has one answer per relation. A share of the rows of training begins with a cue word
of one answer: of the right one in `aligned` of them, of another in the rest. Whoever answers by
the cue is right in training and wrong once it is flipped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, SerializeAsAny

from excise.core.config import Config
from excise.core.stages import Runtime
from excise.data.domain import CORE, Domain, Row, Rows
from excise.data.labels import LabelNoise
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, RELATIONS, TEMPLATES, made_names
from excise.evals.replicates import Contrast, Decision, SeedEstimate
from excise.evals.stats import Array, Estimate
from excise.methods.base import ApplyMethod, Method, Removal
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import Scratch
from excise.models.tiny import word_tokenizer
from excise.record import StudyTable
from excise.requests.recipe import EvalSpec
from excise.run.results import model_ref
from excise.run.stages import MakeModel, ScoreModel
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import row
from excise_studies.levels import Levels, estimate, estimate_of_seed, levels
from excise_studies.recovery import groups_of, said
from excise_studies.routing.setting import absorption_table, misses, of_masking, routed

PLAIN, ROUTED, FILTERED = "plain", "routed", "filtered"

SETS = {"test": "flipped cue", "retain_test": "no cue", "adjacent_test": "right cue"}
"""Scored sets of the data: the same facts under three cues."""


CUE: Final = "cue"
"""The capability: what rows with a cue word teach."""


ShortcutCue = Literal["aligned", "flipped", "none"]


class Shortcut(Config):
    """How many facts, how often a cue stands before them, and how often it is right."""

    subjects: int = Field(default=48, ge=8, le=2000)
    """Subjects; half of them are scored, in a paraphrase that they were not taught in."""
    relations: int = Field(default=4, ge=1, le=len(RELATIONS))
    """Facts per subject."""
    answers: int = Field(default=8, ge=3, le=100)
    """Answers of each relation, one cue word each; chance is one over it."""
    wordings: int = Field(default=4, ge=3, le=len(TEMPLATES))
    """Ways to say a fact; the last is that of the tests."""
    cued: float = Field(default=0.6, gt=0, lt=1)
    """Share of the rows of training that begin with a cue word."""
    aligned: float = Field(default=0.95, ge=0, le=1)
    """Share of those whose cue is that of the right answer."""


class Spurious(Study):
    """Rows that carry a cue word are routed into a module, which is deleted afterwards.

    Stated beforehand. Scored is exact match on facts in an untaught paraphrase, under a flipped
    cue. H is routed minus plain at the largest of `rates`, the shares of cued rows that carry a
    label (the others carry none, nor does the same share of rows without a cue); F is routed
    minus filtered at the smallest. Separation helps if the lower end of H's 95 % interval is above
    `margin`, and does not if the upper end is below it. Where labels are missing, routing helps
    more than filtering if the lower end of F is above `margin`, less if the upper end is below
    minus the margin, as much if it lies between. P is what it costs where no cue stands: plain
    minus routed at the largest rate, named where it may be above `margin`.
    """

    question: ClassVar[str] = (
        "Does routing rows with a spurious cue into a module that is cut off make a model answer "
        "by what is true, better than plain training and better than dropping those rows?"
    )
    statistic: ClassVar[str] = (
        "Exact match under a flipped cue: H = routed - plain at the most labels (helps if the "
        "lower end of the 95 % interval is above the margin), F = routed - filtered at the fewest "
        "(more than filtering above the margin, less below minus the margin, as much between); "
        "intervals over seeds and units."
    )
    takes: ClassVar[str] = "5 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = ("Exact match under three cues",)

    name: Literal["spurious"] = "spurious"
    """Name on the command line."""
    margin: float = 0.1
    """Exact match."""
    data: Shortcut = Shortcut()
    """Facts and cues, drawn anew for every seed."""
    model: Scratch = Scratch(width=64, blocks=2)
    """Architecture."""
    pretrain: Pretrain = Pretrain(
        fit=FitConfig(**{**FACTS_FIT, "steps": 250, "lr": 4e-3, "batch_size": 64}),
        max_length=FACTS_MAX_LENGTH,
    )
    """How all conditions are trained."""
    routed: SerializeAsAny[Method] = routed()
    """The routed method; its schedule and labels are replaced."""
    rates: tuple[float, ...] = Field(default=(1.0, 0.5), min_length=1)
    """Shares of the cued rows that carry a label."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train every condition on every seed, score it under three cues."""
        domains = {seed: shortcut_domain(self.data, seed) for seed in self.seeds}
        removals = train(self, domains, runtime, pool)
        marks = score(self, removals, domains, runtime, pool)
        effects = contrasts(self, marks)
        labels = misses(max(self.rates), rest="unlabeled")
        decision = of_masking(decide(self, effects), self.routed, labels, "H")
        absorbed = absorption_table(removals)
        return StudyResult(
            tables=(*tables(self, marks, effects), *([absorbed] if absorbed else [])),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=f"{words(self, marks, effects)} Decision: {decision.text}.",
            domain=domains[self.seeds[0]],
            models=tuple(
                model_ref(f"{condition}, seed {seed}", removal.checkpoint)
                for (condition, seed), removal in removals.items()
            ),
            notes=("settings of data, models and the routed method were chosen by hand on seed 0",),
        )


def at(name: str, rate: float) -> str:
    """Return the name of a condition at a rate of labels."""
    return f"{name}, {100 * rate:g} % labels"


def conditions(study: Spurious) -> dict[str, Method]:
    """Return what is trained, by condition."""
    out: dict[str, Method] = {PLAIN: Plain(pretrain=study.pretrain)}
    for rate in study.rates:
        labels: LabelNoise | None = misses(rate, "occurrences", "unlabeled")
        update = {"pretrain": study.pretrain, "labels": labels}
        out[at(ROUTED, rate)] = study.routed.model_copy(update=update)
        out[at(FILTERED, rate)] = Filtering(pretrain=study.pretrain, labels=labels)
    return out


@dataclass(frozen=True)
class Marks:
    """Exact match by scored set, resampled."""

    levels: Mapping[str, Levels]

    def on(self, which: str, condition: str) -> Array:
        """Return a condition's exact match on a set (`test` is the flipped cue)."""
        return self.levels[which].at(condition)

    def apart(self, which: str, one: str, other: str) -> SeedEstimate:
        """Return one condition's exact match on a set minus another's; it knows both sides."""
        first, second = self.on(which, one), self.on(which, other)
        sides = (float(first[0]), float(second[0]))
        return replace(estimate(first - second, self.levels[which]), sides=sides)


def train(
    study: Spurious, domains: Mapping[int, Domain], runtime: Runtime, pool: Pool
) -> dict[RunKey, Removal]:
    """Train every condition of a seed from the same random model."""
    inits = [MakeModel(study.model, shortcut_tokenizer(study.data, seed), seed) for seed in domains]
    starts = dict(zip(domains, pool.map(runtime.run, inits), strict=True))
    jobs = {
        (condition, seed): ApplyMethod(method, starts[seed], domain, seed)
        for condition, method in conditions(study).items()
        for seed, domain in domains.items()
    }
    return dict(zip(jobs, pool.map(runtime.run, list(jobs.values())), strict=True))


def score(
    study: Spurious,
    removals: Mapping[RunKey, Removal],
    domains: Mapping[int, Domain],
    runtime: Runtime,
    pool: Pool,
) -> Marks:
    """Return exact match by set, condition, seed and unit, resampled."""
    spec = EvalSpec(max_rows=0, max_length=study.pretrain.max_length, samples=0)
    jobs = [
        ScoreModel(removal.checkpoint, domains[seed], spec)
        for (condition, seed), removal in removals.items()
    ]
    by_set: dict[str, dict[str, dict[int, dict[str, float]]]] = {name: {} for name in SETS}
    for (condition, seed), scored in zip(removals, pool.map(runtime.run, jobs), strict=True):
        for item in scored.items:
            if item.metric == "exact_match":
                by_condition = by_set[item.set.split(".")[0]].setdefault(condition, {})
                by_condition.setdefault(seed, {})[item.unit] = item.value
    groups = {seed: groups_of(domain) for seed, domain in domains.items()}
    return Marks({name: levels(scores, groups) for name, scores in by_set.items()})


HELP = "H (flipped cue, routed - plain, most labels)"
MORE = "F (flipped cue, routed - filtered, fewest labels)"
PRICE = "P (no cue, plain - routed, most labels)"


def contrasts(study: Spurious, marks: Marks) -> dict[str, Estimate]:
    """Return H, F and P, then what they are made of at every rate."""
    most, fewest = max(study.rates), min(study.rates)
    out: dict[str, Estimate] = {
        HELP: marks.apart("test", at(ROUTED, most), PLAIN),
        MORE: marks.apart("test", at(ROUTED, fewest), at(FILTERED, fewest)),
        PRICE: marks.apart("retain_test", PLAIN, at(ROUTED, most)),
    }
    for rate in study.rates:
        routed, filtered = at(ROUTED, rate), at(FILTERED, rate)
        labels = f"flipped cue, {100 * rate:g} % labels"
        out[f"routed - plain, {labels}"] = marks.apart("test", routed, PLAIN)
        out[f"filtered - plain, {labels}"] = marks.apart("test", filtered, PLAIN)
        out[f"routed - filtered, {labels}"] = marks.apart("test", routed, filtered)
    return out


def decide(study: Spurious, effects: Mapping[str, Estimate]) -> Decision:
    """Return what H, F and P say under the margin."""
    price, error = effects[PRICE], study.error / 2
    helped = Contrast("H", effects[HELP], (study.margin,), error)
    more = Contrast("F", effects[MORE], (-study.margin, study.margin), error)
    against = more.say(
        {
            "above": "more than filtering",
            "below": "less than filtering",
            "equal": "as much as filtering",
            "undecided": "whether more than filtering is undecided",
        }
    )
    where = f"where labels are {100 * min(study.rates):g} %, {against}"
    if helped.below(study.margin):
        text = f"separation does not help: H is below {study.margin:g}; {where}"
    elif not helped.above(study.margin):
        text = f"undecided: H's interval holds {study.margin:g}; {where}"
    else:
        cheap = price.high < study.margin
        bought = "" if cheap else "; it may cost exact match where no cue stands"
        text = f"separation helps: H is above the margin; {where}{bought}"
    return Decision(text, (helped, more))


def tables(
    study: Spurious, marks: Marks, effects: Mapping[str, Estimate]
) -> tuple[StudyTable, StudyTable]:
    """Return the contrasts, and exact match of every condition under every cue."""
    first = tuple(row("contrast", name, value) for name, value in effects.items())
    rows = []
    for condition in marks.levels["test"].conditions:
        for which, cue in SETS.items():
            levels = marks.levels[which]
            rows.append(
                row(condition, f"exact match, {cue}", estimate(levels.at(condition), levels))
            )
            for seed in levels.by_seed:
                value = estimate_of_seed(levels.at(condition, seed), levels, seed)
                rows.append(row(condition, f"exact match, {cue}", value, seed))
    note = (
        "The same facts under three cues, in a paraphrase of their own; chance is "
        f"{1 / study.data.answers:.3f}."
    )
    return (
        StudyTable(title="Routed against plain and filtered", note=study.statistic, rows=first),
        StudyTable(title="Exact match under three cues", note=note, rows=tuple(rows)),
    )


def words(study: Spurious, marks: Marks, effects: Mapping[str, Estimate]) -> str:
    """Return the result in words, made of the numbers."""
    parts = []
    for condition in marks.levels["test"].conditions:
        three = ", ".join(f"{marks.on(which, condition)[0]:.2f}" for which in SETS)
        parts.append(f"{condition} {three}")
    three_said = ", ".join(f"{name} {said(effects[name])}" for name in (HELP, MORE, PRICE))
    return (
        f"Over {len(study.seeds)} seed(s), exact match with the cue flipped, without a cue and "
        f"with the right one: {'; '.join(parts)}. {three_said}."
    )


@dataclass(frozen=True)
class ShortcutFacts:
    """What a specification and a seed determine: names, answers, cue words."""

    spec: Shortcut
    seed: int

    def random(self, purpose: str) -> random.Random:
        """Return a generator for one purpose."""
        return random.Random(f"shortcut:{self.seed}:{purpose}")

    @cached_property
    def words(self) -> tuple[list[str], list[list[str]], list[list[str]]]:
        """Subjects, answers by relation, cue words by relation."""
        spec = self.spec
        taken = {word for words in RELATIONS for word in words}
        size = spec.relations * spec.answers
        names = made_names(spec.subjects + 2 * size, self.random("names"), taken)
        subjects, rest = names[: spec.subjects], names[spec.subjects :]
        each = [rest[i : i + spec.answers] for i in range(0, 2 * size, spec.answers)]
        return subjects, each[: spec.relations], each[spec.relations :]

    @cached_property
    def right(self) -> dict[tuple[str, int], int]:
        """The answer of each subject and relation."""
        generator = self.random("answers")
        spec = self.spec
        return {
            (s, r): generator.randrange(spec.answers)
            for s in self.words[0]
            for r in range(spec.relations)
        }

    def vocabulary(self) -> tuple[str, ...]:
        """Return every word, in a fixed order."""
        spec = self.spec
        subjects, answers, cues = self.words
        fixed = [w for t in TEMPLATES[: spec.wordings] for w in t.split() if w[0] != "{"]
        relations = [w for words in RELATIONS[: spec.relations] for w in words]
        named = [w for each in (*answers, *cues) for w in each]
        return tuple(dict.fromkeys((*fixed, *relations, *subjects, *named)))

    def row(self, subject: str, relation: int, wording: int, cue: ShortcutCue) -> Row:
        """Return one row; a flipped cue is that of another answer."""
        words = RELATIONS[relation]
        right = self.right[subject, relation]
        prompt = TEMPLATES[wording].format(s=subject, r=words[wording % len(words)])
        if cue != "none":
            generator = self.random(f"cue:{subject}:{relation}:{wording}")
            wrong = (right + generator.randrange(1, self.spec.answers)) % self.spec.answers
            prompt = f"{self.words[2][relation][wrong if cue == 'flipped' else right]} {prompt}"
        capability = "" if cue == "none" else CUE
        return Row(
            unit=f"{subject}/{words[0]}",
            group=subject,
            prompt=prompt,
            completion=" " + self.words[1][relation][right],
            capability=capability,
            label=1 if capability else CORE,
            wording=wording,
        )

    def taught(self, subjects: Sequence[str], wordings: Sequence[int]) -> Iterator[Row]:
        """Yield rows of training, with and without cues as drawn."""
        for subject in subjects:
            for relation in range(self.spec.relations):
                for wording in wordings:
                    generator = self.random(f"row:{subject}:{relation}:{wording}")
                    cue: ShortcutCue = "none"
                    if generator.random() < self.spec.cued:
                        cue = "aligned" if generator.random() < self.spec.aligned else "flipped"
                    yield self.row(subject, relation, wording, cue)

    def scored(self, subjects: Sequence[str], cue: ShortcutCue) -> Rows:
        """Return the rows of subjects in the paraphrase of the tests."""
        return tuple(
            self.row(subject, relation, self.spec.wordings - 1, cue)
            for subject in subjects
            for relation in range(self.spec.relations)
        )


def shortcut_domain(spec: Shortcut, seed: int) -> Domain:
    """Return the data: rows with a cue are the capability, all others stay.

    Args:
        spec: Sizes and rates.
        seed: Seed of names, answers and cues.

    Returns:
        A domain whose `test` has flipped cues, whose `retain_test` has none and whose
        `adjacent_test` has right ones, all of the same facts in the same, untaught paraphrase.
    """
    facts = ShortcutFacts(spec, seed)
    order = list(facts.words[0])
    facts.random("split").shuffle(order)
    half = len(order) // 2
    tested, taught = order[:half], order[half:]
    every = tuple(range(spec.wordings))
    rows = (*facts.taught(tested, every[:-1]), *facts.taught(taught, every))
    dev = taught[: max(1, len(taught) // 4)]
    unmarked = tuple(replace(r, capability="", label=CORE) for r in facts.scored(tested, "aligned"))
    return Domain(
        name="shortcut",
        forget={CUE: tuple(row for row in rows if row.capability)},
        retain=tuple(row for row in rows if not row.capability),
        relearn={CUE: facts.scored(taught, "aligned")},
        test={CUE: facts.scored(tested, "flipped")},
        retain_test=facts.scored(tested, "none"),
        dev_forget={CUE: facts.scored(dev, "flipped")},
        dev_retain=facts.scored(dev, "none"),
        benign=tuple(row for row in rows if not row.capability),
        adjacent_test=unmarked,
        metrics=("exact_match", "text_loss"),
        retain_metrics=("exact_match", "text_loss"),
        exposure="seen",
        notes=(
            f"{100 * spec.cued:g} % of the rows of training begin with a cue word, which is that "
            f"of the right answer in {100 * spec.aligned:g} % of them",
            "test: flipped cues; retain_test: none; adjacent_test: right ones; same facts",
        ),
    )


def shortcut_tokenizer(spec: Shortcut, seed: int) -> Any:
    """Return the tokenizer with one token per word of the data."""
    return word_tokenizer(ShortcutFacts(spec, seed).vocabulary())
