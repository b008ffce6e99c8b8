"""E3: do an unlearned model's small differences on benign text carry what is removed?"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import ClassVar, Final, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.errors import nearest
from excise.core.stages import Runtime
from excise.evals.replicates import Decision, SeedEstimate, contrasts
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method, Removal
from excise.methods.distillation.harmful import Implicit
from excise.methods.distillation.targets import (
    FromOracle,
    FromOriginal,
    HardLabels,
    Splice,
    Targets,
)
from excise.methods.distillation.undo import Undo
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import row
from excise_studies.distillation.noise_like import NoiseLike
from excise_studies.distillation.presets import student, teachers
from excise_studies.levels import estimate
from excise_studies.matching import level_with, matched, matched_table, stronger
from excise_studies.recovery import RECOVERY, RecoveryScores, gaps, said
from excise_studies.setting import (
    ExperimentSetting,
    Make,
    checkpoints,
    conditions_of,
    make_conditions,
    make_replicates,
    measure_conditions,
    result,
)

BenignTarget = Literal["original", "unlearned", "noise"]
HarmfulTarget = Literal["unlearned", "uniform", "skip", "shuffled"]

BENIGN: Final[tuple[BenignTarget, ...]] = ("original", "unlearned")

FILTERED = "benign original, harmful skip"
"""The condition that no teacher has a part in."""


class SpliceFactorial(Study):
    """Students of pairs of a benign and a harmful target, from random weights, by teacher.

    Stated beforehand. The outcome of a condition is its depth gap on the held-out test set:
    (condition - oracle) / (original before the attack - oracle) after relearning. Teachers are
    matched: of each the learning rate is taken, among the factors of `sweep`, whose exact match on
    `dev_forget` of the seeds `tuned_on` is nearest to `forget_level` among those that cost at most
    `retain_cost` on `dev_retain`. Three contrasts of the first teacher decide, each against
    `margin` from both sides, sharing the error rate. The benign effect: the mean gap of the
    conditions whose benign target is the unlearned model minus that of those whose benign target is
    the original. Beyond noise: the gap with the unlearned model on benign tokens and nothing on
    harmful ones, minus the same with the original under random noise of equal KL on benign text.
    Beyond others: its benign effect minus the mean of those of `against`, as far as they are
    matched: exact match on the held-out test set and on retain, before the attack, within
    `match_margin` of the first's. What it says on benign text carries what is removed if the first
    two lie above the margin; it does not if one of them lies within or below. Harmful effects
    (target unlearned minus skip) and the other teachers are shown and decide nothing.

    The margin of 0.05 was set after three seeds (21 to 23) had shown 0.12 for RMU and 0.03 for
    others.
    """

    question: ClassVar[str] = (
        "Do the small differences of RMU's predictions on benign text carry what is removed into "
        "a student, more than other unlearned models' and more than noise of equal size?"
    )
    statistic: ClassVar[str] = (
        "On the depth gap on the held-out test set after relearning, for the first teacher: benign "
        "effect (target unlearned minus original, over harmful targets); the same minus noise of "
        "equal benign KL; the benign effect minus the mean of other matched teachers'. Each "
        "against the margin from both sides, corrected for three; intervals over seeds and units."
    )
    takes: ClassVar[str] = (
        "long: about 3 hours of one core, 1 GiB, by what earlier conditions took: 31 models a seed "
        "and ten seeds; --teachers and --seeds cut it; resumes where it was stopped"
    )
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)
    pictured: ClassVar[str] = "depth gap"

    name: Literal["splice-factorial"] = "splice-factorial"
    """Name on the command line."""
    margin: float = 0.05
    """Share of the distance between the reference models."""
    seeds: tuple[int, ...] = Field(default=tuple(range(1, 11)), min_length=1)
    """Draws that are reported."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    teachers: dict[str, SerializeAsAny[Method]] = Field(default=teachers(), min_length=1)
    """The unlearned models at their middle strength; the first decides."""
    against: tuple[str, ...] = ("maxent", "grad_diff", "npo")
    """Teachers that the first is held against."""
    student: Undo = student()
    """The student; its teacher and targets are replaced."""
    harmful: tuple[HarmfulTarget, ...] = ("unlearned", "skip")
    """Targets of harmful tokens."""
    others: bool = True
    """Whether to run four conditions that stand beside the factorial: noise by the first teacher's
    implicit labels, cross-entropy on filtered text, the oracle's logits, the original's
    everywhere."""
    tau: float = Field(default=0.5, gt=0)
    """Nats from which on the teacher's implicit label is harmful."""
    tuned_on: tuple[int, ...] = Field(default=(0, 11, 12), min_length=1)
    """Draws on whose dev rows strengths are chosen."""
    sweep: tuple[float, ...] = Field(default=(0.3, 0.5, 0.7, 1.0, 1.4, 2.0), min_length=1)
    """Factors on the teachers' learning rates."""
    forget_level: float = Field(default=0.2, ge=0, le=1)
    """Exact match on `dev_forget` that all teachers are brought to."""
    retain_cost: float = Field(default=0.2, gt=0)
    """Exact match on `dev_retain` that a teacher may cost."""
    match_margin: float = Field(default=0.1, gt=0)
    """Exact match on the held-out test set and on retain by which matched teachers may differ."""

    @model_validator(mode="after")
    def _runs(self) -> Self:
        """Refuse to compare with what is not run."""
        for name in self.against:
            if name not in self.teachers:
                raise ValueError(
                    f"against: no teacher is called '{name}'; {nearest(name, self.teachers)}"
                )
        if self.first in self.against:
            raise ValueError(f"against: '{self.first}' is the first teacher; name others")
        if "skip" not in self.harmful:
            raise ValueError("harmful: 'skip' is what effects are measured against; name it too")
        return self

    @property
    def first(self) -> str:
        """The teacher that decides."""
        return next(iter(self.teachers))

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Match the teachers, distil every condition, relearn, and compare."""
        replicates = make_replicates(self.experiment, (*self.tuned_on, *self.seeds), runtime, pool)
        factors = matched(
            self.teachers,
            self.sweep,
            self.experiment,
            {seed: replicates[seed] for seed in self.tuned_on},
            level_with(self.forget_level, self.retain_cost),
            runtime,
            pool,
        )
        strong = {name: stronger(m, factors[name]) for name, m in self.teachers.items()}
        wanted = conditions_of(conditions(self, strong), replicates, self.seeds)
        if self.others:
            for seed in self.seeds:
                oracle = replicates[seed].oracle
                assert oracle is not None
                method = given(self.student, FromOracle(path=str(oracle.path)))
                wanted["oracle's logits", seed] = Make(
                    method, replicates[seed].original, replicates[seed].domain
                )
        removals = make_conditions(wanted, runtime, pool)
        models = checkpoints(removals)
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        effects = effects_of(self, recovery)
        words = [f"The {name} was {said(effect)}." for name, effect in effects.items()]
        words.append(gaps(recovery))
        tables = (
            _effects(effects),
            matched_table(
                factors,
                recovery,
                {name: alone(name) for name in self.teachers},
                "Chosen on dev of the tuned seeds; exact match before the attack on the reported "
                f"ones. Matched with {self.first}: "
                f"{', '.join(levels_with(self, recovery)) or 'none'}.",
            ),
            _noise(self, removals),
        )
        return result(recovery, words, decide(self, effects), replicates, models, tables=tables)


def condition_name(teacher: str, benign: BenignTarget, harmful: str) -> str:
    """Return the name of a condition; the one without a part of the teacher is all teachers'."""
    name = f"benign {benign}, harmful {harmful}"
    return name if name == FILTERED else f"{teacher}: {name}"


def conditions(study: SpliceFactorial, strong: Mapping[str, Method]) -> dict[str, Method]:
    """Return every condition by name, those whose teacher is noise last."""
    out: dict[str, Method] = {}
    last: dict[str, Method] = {}
    for teacher, method in strong.items():
        pupil = study.student.model_copy(update={"unlearn": method})
        out[alone(teacher)] = method
        for harmful in study.harmful:
            for benign in ("original", "unlearned"):
                name = condition_name(teacher, benign, harmful)
                out.setdefault(name, given(pupil, Splice(benign=benign, harmful=harmful)))
        noise = NoiseLike(like=method, max_length=study.student.max_length)
        pupil = pupil.model_copy(update={"unlearn": noise})
        name = condition_name(teacher, "noise", "skip")
        last[name] = given(pupil, Splice(benign="unlearned", harmful="skip"))
    if study.others:
        pupil = study.student.model_copy(update={"unlearn": strong[study.first]})
        implicit = Splice(harmful="uniform", by=Implicit(tau=study.tau))
        out["implicit labels, harmful uniform"] = given(pupil, implicit)
        out["filtered text, no teacher"] = given(pupil, HardLabels())
        out["original everywhere"] = given(pupil, FromOriginal())
    return {**out, **last}


def alone(teacher: str) -> str:
    """Return the name of a teacher without a student."""
    return f"{teacher}: no student"


def given(method: Undo, targets: Targets) -> Undo:
    """Return a student with other targets."""
    return method.model_copy(update={"targets": targets})


def levels_with(study: SpliceFactorial, recovery: RecoveryScores) -> list[str]:
    """Return the teachers of `against` that know as much of test set and retain as the first."""

    def known(teacher: str) -> tuple[float, float]:
        name = alone(teacher)
        return float(recovery.before.at(name)[0]), float(recovery.retain.at(name)[0])

    mine = known(study.first)
    return [
        name
        for name in study.against
        if all(abs(a - b) <= study.match_margin for a, b in zip(known(name), mine, strict=True))
    ]


def effects_of(study: SpliceFactorial, recovery: RecoveryScores) -> dict[str, SeedEstimate]:
    """Return all effects by name; the first three, of two where nobody is matched, decide."""
    first = study.first

    def named(teacher: str, at: int, target: str) -> list[str]:
        pairs = [(b, h) for b in BENIGN for h in study.harmful]
        return [condition_name(teacher, *pair) for pair in pairs if pair[at] == target]

    def benign(teacher: str) -> Array:
        each = (named(teacher, 0, target) for target in ("unlearned", "original"))
        ours, theirs = (np.mean([recovery.gap(n) for n in names], axis=0) for names in each)
        effect: Array = ours - theirs
        return effect

    def beyond_noise(teacher: str) -> SeedEstimate:
        pair = [condition_name(teacher, target, "skip") for target in ("unlearned", "noise")]
        return recovery.contrast(pair[:1], pair[1:])

    def over(teacher: str, at: int, target: str, other: str) -> SeedEstimate:
        return recovery.contrast(named(teacher, at, target), named(teacher, at, other))

    out = {
        f"benign effect of {first}": over(first, 0, "unlearned", "original"),
        f"benign effect of {first} beyond noise": beyond_noise(first),
    }
    if alike := levels_with(study, recovery):
        theirs = np.mean([benign(name) for name in alike], axis=0)
        name = f"benign effect of {first} beyond {', '.join(alike)}"
        out[name] = estimate(benign(first) - theirs, recovery.after)
    for teacher in study.teachers:
        if teacher != first:
            out[f"benign effect of {teacher}"] = over(teacher, 0, "unlearned", "original")
            out[f"benign effect of {teacher} beyond noise"] = beyond_noise(teacher)
        for harmful in study.harmful:
            if harmful != "skip":
                name = f"harmful effect of {teacher} ({harmful} - skip)"
                out[name] = over(teacher, 1, harmful, "skip")
    return out


def decide(study: SpliceFactorial, effects: Mapping[str, Estimate]) -> Decision:
    """Return what the effects of the first teacher say under the margin."""
    first = study.first
    own = f"benign effect of {first}"
    mine = {n: e for n, e in effects.items() if n == own or n.startswith(f"{own} beyond ")}
    asked = contrasts(mine, (-study.margin, study.margin), study.error)
    words = {
        "above": f"above {study.margin:g}",
        "below": f"below -{study.margin:g}",
        "equal": f"within {study.margin:g}",
        "undecided": f"undecided at {study.margin:g}",
    }
    both = [contrast.verdict for contrast in asked.values()][:2]
    matched = [
        other
        for other, verdict in zip(("the original", "noise"), both, strict=True)
        if verdict in ("equal", "below")
    ]
    if all(verdict == "above" for verdict in both):
        text = f"what {first} says on benign text carries what is removed"
    elif matched:
        text = f"what {first} says on benign text carries no more than {' or '.join(matched)} does"
    elif "undecided" in both:
        text = f"undecided whether what {first} says on benign text carries what is removed"
    else:
        text = "nothing tells the conditions apart"
    said_of = "; ".join(f"{name} {contrast.say(words)}" for name, contrast in asked.items())
    return Decision(f"{text}: {said_of}", tuple(asked.values()))


def _effects(effects: Mapping[str, SeedEstimate]) -> StudyTable:
    """Return all effects."""
    return StudyTable(
        title="Effects on the depth gap",
        note=(
            "Benign and harmful effects are means over the levels of the other target; 0 is no "
            "difference."
        ),
        rows=tuple(row(name, "depth gap", effect) for name, effect in effects.items()),
    )


def _noise(study: SpliceFactorial, removals: Mapping[RunKey, Removal]) -> StudyTable:
    """Return how much each teacher and its noise change benign text, means over seeds."""
    rows: list[StudyRow] = []
    for teacher in study.teachers:
        name = condition_name(teacher, "noise", "skip")
        facts = [
            removal.extras["teachers"]["unlearned"]["noise"]
            for (condition, _), removal in removals.items()
            if condition == name
        ]
        rows += [
            StudyRow(
                condition=teacher, metric=metric, value=mean(f[key] for f in facts), n=len(facts)
            )
            for metric, key in (
                ("KL of the unlearned model", "wanted"), ("KL of its noise", "kl"),
                ("noise over weights", "factor"),
            )
        ]  # fmt: skip
    return StudyTable(
        title="Noise of equal size",
        note="KL to the original on retain rows of dev, nats a scored token; n counts seeds.",
        rows=tuple(rows),
    )
