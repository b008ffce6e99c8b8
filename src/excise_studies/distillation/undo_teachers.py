"""Which unlearned model is the best teacher, once all forget and retain alike?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, SerializeAsAny

from excise.core.stages import Runtime
from excise.evals.replicates import Decision, contrasts
from excise.evals.stats import Estimate
from excise.methods.base import Method
from excise.methods.distillation.undo import Undo
from excise.models.checkpoint import Checkpoint
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import row
from excise_studies.distillation.presets import BARE, student, teachers
from excise_studies.matching import (
    CHOSEN_BY_SEED,
    Search,
    matched_by_seed,
    matched_table,
    mean_factors,
    stronger,
)
from excise_studies.recovery import RECOVERY, RecoveryScores, gaps, said
from excise_studies.setting import (
    ExperimentSetting,
    Make,
    checkpoints,
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

    Stated beforehand. The strength of every teacher is its learning rate, matched in every seed on
    its own dev: of those that a bisection tried, the one whose exact match on `dev_forget` is
    nearest to `search.level` among those whose exact match on `dev_retain` is at most
    `search.retain_cost` below the original's; where none is, the one that keeps most of retain.
    Students from random weights imitate each. What decides is the depth gap on the held-out test
    set of RMU's student minus that of MaxEnt's after relearning: RMU is the worse teacher if the
    95 % interval over seeds and units lies above `margin`, the better if below, alike if within.
    RMU by its forget term alone is compared to RMU in the same way, and the levels of forgetting
    and retaining that were matched stand in a table.
    """

    question: ClassVar[str] = (
        "At matched forgetting and retaining, do some unlearned models make better teachers, and "
        "is RMU's fault its missing retain term?"
    )
    statistic: ClassVar[str] = (
        "Depth gap on the held-out test set after relearning of the student of RMU minus that of "
        "MaxEnt's, and of RMU's forget term alone minus RMU, against the margin from both sides; "
        "strengths matched on dev of every seed; intervals over seeds and units."
    )
    takes: ClassVar[str] = "25 minutes of one core (extrapolated), 1 GiB"
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
    seeds: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """Draws of the data."""
    tuned_on: tuple[int, ...] = ()
    """Strengths are chosen on dev of the reported seeds."""
    search: Search = Search(level=0.1, retain_cost=0.1)
    """How strengths are matched; an oracle has about 0.05 of `dev_forget`."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Match strengths, distil, relearn, compare."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        chosen = matched_by_seed(
            self.teachers, self.search, self.experiment, replicates, runtime, pool
        )
        pupils: dict[RunKey, Make] = {}
        for (name, seed), trial in chosen.items():
            teacher = stronger(self.teachers[name], trial.factor)
            pupil = self.student.model_copy(update={"unlearn": teacher})
            replicate = replicates[seed]
            pupils[name, seed] = Make(pupil, replicate.original, replicate.domain)
        students = checkpoints(make_conditions(pupils, runtime, pool))
        models: dict[RunKey, Checkpoint] = {}
        for (name, seed), trial in chosen.items():
            models[f"{name}: no student", seed] = trial.removal.checkpoint
            models[name, seed] = students[name, seed]
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        apart = differences(self, recovery)
        words = [f"{name}: {said(e)}." for name, e in apart.items()]
        words.append(gaps(recovery))
        tables = (
            _table(apart),
            matched_table(
                mean_factors(chosen),
                recovery,
                {name: f"{name}: no student" for name in self.teachers},
                "Factor: geometric mean of those that dev chose seed by seed.",
            ),
        )
        return result(
            recovery,
            words,
            decide(self, apart),
            replicates,
            models,
            tables=tables,
            chosen=CHOSEN_BY_SEED,
        )


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
