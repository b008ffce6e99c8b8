"""Which unlearned model is the best teacher, once all forget and retain alike?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny

from excise.core.stages import Runtime
from excise.evals.replicates import Decision, contrasts
from excise.evals.stats import Estimate
from excise.methods.base import Method
from excise.methods.distillation.undo import Undo
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.distillation.presets import BARE, student, teachers
from excise_studies.matching import deepest, matched, stronger
from excise_studies.recovery import RECOVERY, RecoveryScores, gaps, said
from excise_studies.setting import (
    ExperimentSetting,
    checkpoints,
    conditions_of,
    make_conditions,
    make_replicates,
    measure_conditions,
    result,
)


def compared() -> dict[str, Method]:
    """Return the teachers that are compared, at their middle strength."""
    known = teachers()
    return {name: known[name] for name in ("maxent", "grad_diff", "rmu", BARE)}


class UndoTeachers(Study):
    """Students of GradDiff, MaxEnt, RMU, and RMU without its retain term.

    Stated beforehand. The strength of every teacher is its learning rate, chosen on the tuned seed:
    among the factors of `sweep`, the one with the lowest exact match on `dev_forget` of those whose
    exact match on `dev_retain` is at most `retain_cost` below the original's; where none is, the
    one that keeps most of retain. Students from random weights imitate each. What decides is the
    depth gap on the held-out test set of RMU's student minus that of MaxEnt's after relearning: RMU
    is the worse teacher if the 95 % interval over seeds and units lies above `margin`, the better
    if below, alike if within. RMU by its forget term alone is compared to RMU in the same way, and
    the levels of forgetting and retaining that were matched stand in a table.
    """

    question: ClassVar[str] = (
        "At matched forgetting and retaining, do some unlearned models make better teachers, and "
        "is RMU's fault its missing retain term?"
    )
    statistic: ClassVar[str] = (
        "Depth gap on the held-out test set after relearning of the student of RMU minus that of "
        "MaxEnt's, and of RMU's forget term alone minus RMU, against the margin from both sides; "
        "strengths chosen on dev of the tuned seed; intervals over seeds and units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["undo-teachers"] = "undo-teachers"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    teachers: dict[str, SerializeAsAny[Method]] = Field(default=compared(), min_length=2)
    """The unlearned models at their middle strength; `maxent` and `rmu` decide."""
    student: Undo = student()
    """The student; its teacher is replaced."""
    tuned_on: tuple[int, ...] = (0, 11, 12)
    """Draws on whose dev rows strengths are chosen."""
    sweep: tuple[float, ...] = (0.3, 1.0, 2.0)
    """Factors on the teachers' learning rates."""
    retain_cost: float = Field(default=0.1, gt=0)
    """Exact match on `dev_retain` that a teacher may cost."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Choose strengths on the tuned seeds, distil, relearn, compare."""
        tuned = self.tuned_on or self.seeds
        replicates = make_replicates(self.experiment, (*tuned, *self.seeds), runtime, pool)
        factors = matched(
            self.teachers,
            self.sweep,
            self.experiment,
            {seed: replicates[seed] for seed in tuned},
            deepest(self.retain_cost),
            runtime,
            pool,
        )
        methods: dict[str, Method] = {}
        for name, method in self.teachers.items():
            teacher = stronger(method, factors[name])
            methods[f"{name}: no student"] = teacher
            methods[name] = self.student.model_copy(update={"unlearn": teacher})
        models = checkpoints(
            make_conditions(conditions_of(methods, replicates, self.seeds), runtime, pool)
        )
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        apart = differences(self, recovery)
        words = [f"{name}: {said(e)}." for name, e in apart.items()]
        words.append(gaps(recovery))
        tables = (_table(apart), _matched(self, factors, recovery))
        return result(recovery, words, decide(self, apart), replicates, models, tables=tables)


def differences(study: UndoTeachers, recovery: RecoveryScores) -> dict[str, Estimate]:
    """Return the differences in depth gap by name; the first decides."""
    pairs = [("rmu", "maxent"), (BARE, "rmu"), ("grad_diff", "maxent")]
    return {
        f"{first} - {second}": recovery.contrast([first], [second])
        for first, second in pairs
        if first in study.teachers and second in study.teachers
    }


def decide(study: UndoTeachers, apart: Mapping[str, Estimate]) -> Decision:
    """Return what the differences say under the margin."""
    words = {
        "above": "a worse teacher",
        "below": "a better teacher",
        "equal": "as good a teacher",
        "undecided": "undecided",
    }
    parts = []
    asked = contrasts(apart, (-study.margin, study.margin), study.error)
    for name, contrast in asked.items():
        first, _, second = name.partition(" - ")
        parts.append(f"{first} against {second}: {contrast.say(words)}")
    return Decision("; ".join(parts), tuple(asked.values()))


def _table(apart: Mapping[str, Estimate]) -> StudyTable:
    """Return the differences."""
    return StudyTable(
        title="Students of one teacher against another's",
        note="Depth gap on the held-out test set; above 0 the first is the worse teacher.",
        rows=tuple(row(name, "depth gap", e) for name, e in apart.items()),
    )


def _matched(
    study: UndoTeachers, factors: Mapping[str, float], recovery: RecoveryScores
) -> StudyTable:
    """Return strengths and what the teachers forget and keep on the reported seeds."""
    rows: list[StudyRow] = []
    for name, method in study.teachers.items():
        fit: Any = method.fit  # type: ignore[attr-defined]
        condition = f"{name}: no student"
        rate = fit.lr * factors[name]
        rows.append(StudyRow(condition=name, metric="learning rate", value=rate, n=1))
        for metric, levels in (("V", recovery.before), ("retain", recovery.retain)):
            value = float(levels.at(condition)[0])
            rows.append(
                StudyRow(condition=name, metric=f"{metric} of the teacher", value=value, n=levels.n)
            )
    return StudyTable(
        title="What was matched",
        note="Rates chosen on dev of the tuned seed; exact match on the reported seeds.",
        rows=tuple(rows),
    )
