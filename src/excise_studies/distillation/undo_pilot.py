"""E7: does a small UNDO say how robust a large one will be?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, SerializeAsAny

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision, SeedEstimate, correlation
from excise.evals.stats import Array
from excise.methods.base import Method
from excise.methods.distillation.undo import Undo
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.distillation.presets import graddiff, maxent, rmu, student, with_fit
from excise_studies.recovery import RecoveryScores, listed
from excise_studies.setting import (
    ExperimentSetting,
    checkpoints,
    conditions_of,
    make_conditions,
    make_replicates,
    measure_conditions,
    result,
)

LARGE = "large"
"""The run that the pilots are to foretell."""


def teachers() -> dict[str, Method]:
    """Return the pool of teachers: three methods, each at two strengths."""
    return {
        "maxent": maxent(),
        "maxent, weak": with_fit(maxent(), lr=3e-4),
        "grad_diff": graddiff(),
        "grad_diff, weak": with_fit(graddiff(), lr=1e-4),
        "rmu": rmu(),
        "rmu, weak": with_fit(rmu(), lr=1e-3),
    }


def pilots() -> dict[str, Undo]:
    """Return the small runs: a quarter of the weights replaced, or a tenth of the tokens."""
    short = student().fit
    quarter = short.model_copy(update={"steps": 125, "warmup": 10})
    tenth = short.model_copy(update={"steps": 50, "warmup": 5})
    return {
        "alpha 0.25": student(alpha=0.25, beta=0.1, fit=quarter),
        "a tenth of the tokens": student(fit=tenth),
    }


class UndoPilot(Study):
    """Small and large UNDO from one pool of teachers.

    Stated beforehand. From every teacher a large student (all weights replaced) and small ones are
    distilled, and the relearn set is learned again with all. What decides for a pilot is the rank
    correlation over teachers between its score on the held-out test set and that of the large
    student, both averaged over seeds: the pilot foretells if the 95 % interval over seeds and units
    lies above `margin`, and does not if it lies below. The first pilot decides. The same
    correlation for the teachers themselves, no student at all, stands beside it as the cheapest
    pilot.
    """

    question: ClassVar[str] = (
        "Does the order of teachers by a small UNDO foretell their order by a large one?"
    )
    statistic: ClassVar[str] = (
        "Spearman correlation over teachers of the held-out test set after relearning between a "
        "small student and the large one, averaged over seeds first; foretells if the 95 % "
        "interval lies above the margin, does not if it lies below. Intervals over seeds and "
        "units."
    )
    takes: ClassVar[str] = "15 minutes, 1 GiB"

    name: Literal["undo-pilot"] = "undo-pilot"
    """Name on the command line."""
    margin: float = 0.5
    """Rank correlation."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    teachers: dict[str, SerializeAsAny[Method]] = Field(default=teachers(), min_length=3)
    """The pool."""
    large: Undo = student()
    """What is to be foretold; its teacher is replaced."""
    pilots: dict[str, Undo] = Field(default=pilots(), min_length=1)
    """The small runs; the first decides."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Distil small and large from every teacher, relearn, correlate."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        methods: dict[str, Method] = {}
        for name, teacher in self.teachers.items():
            methods[condition_name(name, "no student")] = teacher
            for size, method in {**self.pilots, LARGE: self.large}.items():
                methods[condition_name(name, size)] = method.model_copy(update={"unlearn": teacher})
        models = checkpoints(
            make_conditions(conditions_of(methods, replicates, self.seeds), runtime, pool)
        )
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        rho = correlations(self, recovery)
        words = [f"Rank correlation with the large student: {listed(rho)}."]
        order = sorted(
            self.teachers, key=lambda name: recovery.value(condition_name(name, LARGE)).value
        )
        words.append(f"Teachers by depth of the large student: {', '.join(order)}.")
        return result(recovery, words, decide(self, rho), replicates, models, tables=(_table(rho),))


def condition_name(teacher: str, size: str) -> str:
    """Return the name of a condition."""
    return f"{teacher}: {size}"


def correlations(study: UndoPilot, recovery: RecoveryScores) -> dict[str, SeedEstimate]:
    """Return the rank correlation with the large student by pilot; the first decides."""

    def left(size: str) -> Array:
        names = [condition_name(name, size) for name in study.teachers]
        return np.array([recovery.after.at(name)[0] for name in names])

    large = left(LARGE)
    return {
        size: correlation(left(size), large, error=study.error)
        for size in (*study.pilots, "no student")
    }


def decide(study: UndoPilot, rho: Mapping[str, SeedEstimate]) -> Decision:
    """Return what the first pilot's correlation says under the margin."""
    name, value = next(iter(rho.items()))
    asked = Contrast(
        f"The pilot's ({name}) correlation", value, (study.margin,), study.error, "teachers"
    )
    text = f"undecided: the interval of the pilot ({name}) crosses {study.margin:g}"
    if asked.above(study.margin):
        text = f"the pilot ({name}) foretells: its correlation is above {study.margin:g}"
    elif asked.below(study.margin):
        text = f"the pilot ({name}) does not foretell: its correlation is below {study.margin:g}"
    return Decision(text, (asked,))


def _table(rho: Mapping[str, SeedEstimate]) -> StudyTable:
    """Return the correlations."""
    return StudyTable(
        title="Small against large",
        note=(
            "Rank correlation over teachers of the held-out test set after relearning; n counts "
            "teachers."
        ),
        rows=tuple(row(name, "Spearman correlation", e) for name, e in rho.items()),
    )
