"""E4: what do few labels buy, spent on a filter or on unlearning?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.data.subsample import subsample
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Estimate
from excise.methods.distillation.harmful import Classifier
from excise.methods.distillation.targets import FromTeacher, Splice
from excise.methods.distillation.undo import Undo
from excise.methods.tuning import forget_rows
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.distillation.presets import student
from excise_studies.recovery import RECOVERY, RecoveryScores, gaps, listed
from excise_studies.setting import (
    ExperimentSetting,
    Make,
    checkpoints,
    make_conditions,
    make_replicates,
    measure_conditions,
    result,
)


class LabelBudget(Study):
    """The same labels, spent on a probe that filters, or on unlearning before distillation.

    Stated beforehand. With n labelled rows, half of them to forget, (a) a linear probe on the
    original's middle block says which texts are harmful, and a student from random weights imitates
    the original on the others; (b) the original is unlearned on those rows alone, and a student
    from random weights imitates the result on everything. Both read the same mix for the same
    steps. What decides is the depth gap on the held-out test set of (b) minus that of (a) after
    relearning, averaged over all n: filtering makes better use of labels if the 95 % interval over
    seeds and units lies above `margin`, unlearning if it lies below, they are alike if within.
    """

    question: ClassVar[str] = (
        "Do few labels buy more depth when they teach a filter or when they unlearn a teacher?"
    )
    statistic: ClassVar[str] = (
        "Depth gap on the held-out test set after relearning of the student of the model unlearned "
        "on n labels minus that of the student of the original on what a probe of n labels lets "
        "through, averaged over n, against the margin from both sides; intervals over seeds and "
        "units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["label-budget"] = "label-budget"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    student: Undo = student()
    """The student; targets, teacher's rows and labels are replaced."""
    labels: tuple[int, ...] = Field(default=(16, 64, 256), min_length=1)
    """Labelled rows, half of them to forget."""
    per: Literal["row", "token"] = "row"
    """Whether the probe judges texts or tokens."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Distil both ways at every budget of labels, relearn, compare."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        wanted = {}
        for seed in self.seeds:
            replicate = replicates[seed]
            for n in self.labels:
                probe = Splice(harmful="skip", by=Classifier(labels=n, per=self.per))
                # Nothing of any model is left in the student: it needs no teacher's weights.
                sieve = self.student.model_copy(update={"targets": probe, "student": "original"})
                wanted[f"filter, {n}", seed] = Make(sieve, replicate.original, replicate.domain)
                taught = self.student.model_copy(update={"targets": FromTeacher()})
                wanted[f"unlearn, {n}", seed] = Make(
                    taught, replicate.original, few(replicate.domain, n, seed)
                )
        removals = make_conditions(wanted, runtime, pool)
        models = checkpoints(removals)
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        apart = differences(self, recovery)
        words = [f"Unlearning minus filtering, depth gap: {listed(apart)}.", gaps(recovery)]
        return result(
            recovery, words, decide(self, apart), replicates, models, tables=(_table(apart),)
        )


def few(domain: Domain, labels: int, seed: int) -> Domain:
    """Return the domain with so many labelled rows, half of them to forget.

    Args:
        domain: Rows by role; the unlabelled mix stays as it is.
        labels: Rows in all.
        seed: Seed of the choice.
    """
    labelled = {row for row in subsample(forget_rows(domain), labels // 2, by="content", seed=seed)}
    forget = {name: tuple(r for r in rows if r in labelled) for name, rows in domain.forget.items()}
    retain = subsample(domain.retain, labels // 2, by="content", seed=seed)
    return replace(domain, forget=forget, retain=retain)


def differences(study: LabelBudget, recovery: RecoveryScores) -> dict[str, Estimate]:
    """Return the gap of unlearning minus that of filtering, averaged and by number of labels."""
    gaps = {n: (recovery.gap(f"unlearn, {n}"), recovery.gap(f"filter, {n}")) for n in study.labels}
    first, second = (np.mean([pair[i] for pair in gaps.values()], axis=0) for i in (0, 1))
    by_n = {f"{n} labels": recovery.apart(*pair) for n, pair in gaps.items()}
    return {"all": recovery.apart(first, second), **by_n}


def decide(study: LabelBudget, apart: Mapping[str, Estimate]) -> Decision:
    """Return what the averaged difference says under the margin."""
    words = {
        "above": "filtering makes better use of few labels",
        "below": "unlearning makes better use of few labels",
        "equal": f"alike: the difference lies within {study.margin:g}",
        "undecided": f"undecided: the interval crosses {study.margin:g}",
    }
    margin = (-study.margin, study.margin)
    asked = Contrast("Unlearning minus filtering", apart["all"], margin, study.error)
    return Decision(asked.say(words), (asked,))


def _table(apart: Mapping[str, Estimate]) -> StudyTable:
    """Return the differences."""
    return StudyTable(
        title="Unlearning minus filtering",
        note=(
            "Depth gap on the held-out test set; above 0 the filter went deeper with the same "
            "labels."
        ),
        rows=tuple(row(name, "depth gap", e) for name, e in apart.items()),
    )
