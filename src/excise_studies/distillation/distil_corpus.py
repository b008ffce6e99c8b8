"""E6: which texts should a student read?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.core.stages import Runtime
from excise.evals.replicates import Decision, contrasts
from excise.evals.stats import Estimate
from excise.methods.base import Removal
from excise.methods.distillation.corpora import (
    AnyCorpus,
    FullMix,
    OnPolicy,
    RefusingSamples,
    TeacherSamples,
    WithoutForget,
)
from excise.methods.distillation.undo import Undo
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
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

FULL = "the mix"
"""The condition that others are held against."""


def corpora() -> dict[str, AnyCorpus]:
    """Return the corpora of the study, sized for tiny models; three new tokens are an answer."""
    refuse = FitConfig(steps=60, lr=1e-3, batch_size=48, clip=1.0)
    return {
        FULL: FullMix(),
        "the mix without forget": WithoutForget(),
        "drawn from the teacher": TeacherSamples(rows=2000, new_tokens=3),
        "drawn from a refuser": RefusingSamples(
            rows=2000, new_tokens=3, refusal=" = = =", fit=refuse
        ),
        "drawn from the student": OnPolicy(new_tokens=3),
    }


class DistilCorpus(Study):
    """The same unlearned teacher and steps, five corpora.

    Stated beforehand. Students from random weights imitate the unlearned model for equal steps on
    the mix as it is, the mix without its forget rows, texts drawn from the teacher, texts drawn
    from the original once it refuses what is harmful, or their own texts (reverse KL). What decides
    is the depth gap on the held-out test set after relearning minus that on the mix: a corpus is
    deeper if the 95 % interval over seeds and units lies below minus `margin`, shallower if above
    it, alike if within. A corpus counts only if the student's exact match on retain is at most
    `retain_margin` below that on the mix; the paragraph names those that fail.
    """

    question: ClassVar[str] = (
        "Does it matter for depth whether a student reads forget text at all, and whose texts it "
        "reads?"
    )
    statistic: ClassVar[str] = (
        "Depth gap on the held-out test set after relearning of a corpus minus that of the full "
        "mix, against the margin from both sides, for corpora whose student keeps retain; "
        "intervals over seeds and units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["distil-corpus"] = "distil-corpus"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    retain_margin: float = Field(default=0.1, gt=0)
    """Exact match on retain that a corpus may cost against the mix."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    student: Undo = student()
    """The student; its corpus is replaced."""
    corpora: dict[str, AnyCorpus] = corpora()
    """What is read; the first is what others are held against."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Distil on every corpus, relearn, compare."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        methods = {
            name: self.student.model_copy(update={"corpus": corpus})
            for name, corpus in self.corpora.items()
        }
        removals = make_conditions(conditions_of(methods, replicates, self.seeds), runtime, pool)
        models = checkpoints(removals)
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        apart = differences(self, recovery)
        lost = [name for name in apart if retain_lost(self, recovery, name)]
        words = [f"Against {next(iter(self.corpora))}: {listed(apart)}.", gaps(recovery)]
        if lost:
            words.append(f"Retain was lost, so that these do not count: {', '.join(lost)}.")
        counted = {name: e for name, e in apart.items() if name not in lost}
        tables = (_table(apart), _read(removals, self.seeds))
        return result(recovery, words, decide(self, counted), replicates, models, tables=tables)


def differences(study: DistilCorpus, recovery: RecoveryScores) -> dict[str, Estimate]:
    """Return each corpus's gap minus that of the first."""
    first, *others = study.corpora
    return {name: recovery.contrast([name], [first]) for name in others}


def retain_lost(study: DistilCorpus, recovery: RecoveryScores, name: str) -> bool:
    """Return whether a corpus costs more of retain than allowed."""
    first = next(iter(study.corpora))
    cost = float(recovery.retain.at(first)[0] - recovery.retain.at(name)[0])
    return cost > study.retain_margin


def decide(study: DistilCorpus, counted: Mapping[str, Estimate]) -> Decision:
    """Return what the differences say under the margin."""
    words = {"above": "shallower", "below": "deeper", "equal": "alike", "undecided": "undecided"}
    if not counted:
        return Decision("undecided: no other corpus keeps retain")
    asked = contrasts(counted, (-study.margin, study.margin), study.error)
    text = "; ".join(f"{name}: {contrast.say(words)}" for name, contrast in asked.items())
    return Decision(text, tuple(asked.values()))


def _table(apart: Mapping[str, Estimate]) -> StudyTable:
    """Return the differences."""
    return StudyTable(
        title="Depth against the full mix",
        note=(
            "Depth gap on the held-out test set minus that of the student that read the mix; below "
            "0 is deeper."
        ),
        rows=tuple(row(name, "depth gap", e) for name, e in apart.items()),
    )


def _read(removals: Mapping[RunKey, Removal], seeds: tuple[int, ...]) -> StudyTable:
    """Return what was read: forget tokens in the corpus, refusals, retain per distilled token."""
    rows = []
    for condition in dict.fromkeys(condition for condition, _ in removals):
        extras = [dict(removals[condition, seed].extras) for seed in seeds]
        for metric, value in _facts(extras).items():
            rows.append(StudyRow(condition=condition, metric=metric, value=value, n=len(extras)))
        tokens = sum(removals[condition, seed].cost.tokens for seed in seeds) / len(seeds)
        rows.append(
            StudyRow(
                condition=condition, metric="tokens, teachers included", value=tokens, n=len(extras)
            )
        )
    return StudyTable(
        title="What was read", note="Means over seeds; n counts seeds.", rows=tuple(rows)
    )


def _facts(extras: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means of what removals say about their corpus, where all of them say it."""
    out: dict[str, float] = {}
    places = {
        "forget tokens in the corpus": ("corpus", "forget_tokens"),
        "tokens in the corpus": ("corpus", "tokens"),
        "refusals of forget prompts": ("corpus", "refusal", "rate_harmful"),
        "refusals of other prompts": ("corpus", "refusal", "rate_benign"),
        "depth of refusals, tokens": ("corpus", "refusal", "depth_tokens"),
        "retain gained per million tokens": ("retain_per_million_tokens",),
    }
    for metric, path in places.items():
        values = []
        for facts in extras:
            value: Any = facts
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                values.append(float(value))
        if len(values) == len(extras):
            out[metric] = sum(values) / len(values)
    return out
