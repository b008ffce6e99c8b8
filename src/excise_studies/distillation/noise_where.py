"""E9: where in the model does the noise of UNDO matter?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from excise.core.stages import Runtime
from excise.evals.replicates import Decision, contrasts
from excise.evals.stats import Estimate
from excise.methods.distillation.perturb import LayerGroup
from excise.methods.distillation.undo import Undo
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.distillation.presets import student
from excise_studies.recovery import RECOVERY, RecoveryScores, gaps, listed
from excise_studies.setting import (
    ExperimentSetting,
    checkpoints,
    conditions_of,
    make_conditions,
    make_replicates,
    measure_conditions,
    result,
)

NOWHERE = "nowhere"
"""The condition that is distilled without noise."""

SNIP, RANDOM = "weights that forget rows lean on", "as many weights at random"
"""Conditions whose noise goes into a share of all matrices' weights."""


class NoiseWhere(Study):
    """The same teacher, alpha and steps; noise in one group of layers at a time.

    Stated beforehand. The student starts from the unlearned model, one group of whose layers was
    shrunk and perturbed, and imitates it for equal steps. What decides for a group is its depth gap
    on the held-out test set after relearning minus that with noise everywhere: the group suffices
    if the 95 % interval over seeds and units lies within `margin` or below it, and does not if it
    lies above. Beside the groups stand noise in the weights with the largest |weight x gradient| on
    forget rows, and in as many drawn at random. Without noise the student stays the teacher.
    """

    question: ClassVar[str] = "Which group of layers must be damaged for distillation to go deep?"
    statistic: ClassVar[str] = (
        "Depth gap on the held-out test set after relearning with noise in one group minus that "
        "with noise everywhere, at equal steps; the group suffices if the upper end of the 95 % "
        "interval lies below the margin, not if the lower end lies above it. Intervals over seeds "
        "and units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["noise-where"] = "noise-where"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    student: Undo = student(alpha=0.6, beta=0.1)
    """The student; its groups are replaced."""
    groups: tuple[LayerGroup, ...] = Field(default=("mlp", "attention", "embed"), min_length=1)
    """Groups of layers."""
    share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the matrices' weights that forget rows lean on most."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Perturb one group at a time, distil, relearn, compare."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        base = self.student
        methods = {"everywhere": base.model_copy(update={"groups": ("all",)})}
        for group in self.groups:
            methods[group] = base.model_copy(update={"groups": (group,)})
        for name, kind in ((SNIP, "forget_snip"), (RANDOM, "random")):
            methods[name] = base.model_copy(update={"weights": kind, "share": self.share})
        methods[NOWHERE] = base.model_copy(update={"alpha": 0.0})
        models = checkpoints(
            make_conditions(conditions_of(methods, replicates, self.seeds), runtime, pool)
        )
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        apart = differences(self, recovery)
        words = [f"Against noise everywhere, depth gap: {listed(apart)}.", gaps(recovery)]
        return result(
            recovery, words, decide(self, apart), replicates, models, tables=(_table(apart),)
        )


def differences(study: NoiseWhere, recovery: RecoveryScores) -> dict[str, Estimate]:
    """Return each group's gap, and that without noise, minus that of noise everywhere."""
    conditions = (*study.groups, SNIP, RANDOM, NOWHERE)
    return {name: recovery.contrast([name], ["everywhere"]) for name in conditions}


def decide(study: NoiseWhere, apart: Mapping[str, Estimate]) -> Decision:
    """Return which groups suffice."""
    # All share the error, though the one without noise only says whether groups can be told.
    asked = contrasts(apart, (study.margin,), study.error)
    if asked[NOWHERE].below(study.margin):
        return Decision(
            "undecided: distillation without noise goes as deep, so that no group can be told"
        )
    parts = []
    for group in (*study.groups, SNIP, RANDOM):
        contrast = asked[group]
        otherwise = "does not suffice" if contrast.above(study.margin) else "undecided"
        parts.append(f"{group}: {'suffices' if contrast.below(study.margin) else otherwise}")
    return Decision("; ".join(parts), tuple(asked.values()))


def _table(apart: Mapping[str, Estimate]) -> StudyTable:
    """Return the differences."""
    return StudyTable(
        title="Noise in one group against noise everywhere",
        note=(
            "Depth gap on the held-out test set; above 0 the student stayed shallower. Equal alpha "
            "and steps."
        ),
        rows=tuple(row(name, "depth gap", e) for name, e in apart.items()),
    )
