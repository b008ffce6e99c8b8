"""E6: which texts should a student read?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.core.stages import Runtime
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
from excise_studies.levels import verdict
from excise_studies.recovery import RecoveryScores, gaps, said
from excise_studies.setting import (
    ExperimentSetting,
    arms_of,
    checkpoints,
    make_arms,
    make_draws,
    measure_arms,
    result,
)

FULL = "the mix"
"""The arm that others are held against."""


def corpora() -> dict[str, AnyCorpus]:
    """Return the corpora of the study, sized for the bench; three new tokens are an answer."""
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
    from the original once it refuses what is harmful, or their own texts (reverse KL). What
    decides is the depth gap on V after T was relearned minus that on the mix: a corpus is deeper
    if the 95 % interval over draws and units lies below minus `margin`, shallower if above it,
    alike if within. A corpus counts only if the student's exact match on retain is at most
    `retain_margin` below that on the mix; the paragraph names those that fail.
    """

    question: ClassVar[str] = (
        "Does it matter for depth whether a student reads forget text at all, and whose texts it "
        "reads?"
    )
    statistic: ClassVar[str] = (
        "Depth gap on V after relearning T of a corpus minus that of the full mix, against the "
        "margin from both sides, for corpora whose student keeps retain; bootstrap over draws and "
        "units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"

    name: Literal["distil-corpus"] = "distil-corpus"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the rails."""
    retain_margin: float = Field(default=0.1, gt=0)
    """Exact match on retain that a corpus may cost against the mix."""
    bench: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    student: Undo = student()
    """The student; its corpus is replaced."""
    corpora: dict[str, AnyCorpus] = corpora()
    """What is read; the first is what others are held against."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Distil on every corpus, relearn, compare."""
        draws = make_draws(self.bench, self.seeds, runtime, pool)
        methods = {
            name: self.student.model_copy(update={"corpus": corpus})
            for name, corpus in self.corpora.items()
        }
        made = make_arms(arms_of(methods, draws, self.seeds), runtime, pool)
        models = checkpoints(made)
        found = measure_arms(self.bench, models, draws, runtime, pool)
        apart = differences(self, found)
        lost = [name for name in apart if retain_lost(self, found, name)]
        words = [f"Against {next(iter(self.corpora))}: {_list(apart)}.", gaps(found)]
        if lost:
            words.append(f"Retain was lost, so that these do not count: {', '.join(lost)}.")
        counted = {name: e for name, e in apart.items() if name not in lost}
        tables = (_table(apart), _read(made, self.seeds))
        return result(found, words, decide(self, counted), draws, models, tables=tables)


def differences(study: DistilCorpus, found: RecoveryScores) -> dict[str, Estimate]:
    """Return each corpus's gap minus that of the first."""
    first, *others = study.corpora
    return {name: found.contrast([name], [first]) for name in others}


def retain_lost(study: DistilCorpus, found: RecoveryScores, name: str) -> bool:
    """Return whether a corpus costs more of retain than allowed."""
    first = next(iter(study.corpora))
    cost = float(found.retain.at(first)[0] - found.retain.at(name)[0])
    return cost > study.retain_margin


def decide(study: DistilCorpus, counted: Mapping[str, Estimate]) -> str:
    """Return what the differences say under the margin."""
    words = {"above": "shallower", "below": "deeper", "equal": "alike", "undecided": "undecided"}
    if not counted:
        return "undecided: no other corpus keeps retain"
    parts = [f"{name}: {words[verdict(e, study.margin)]}" for name, e in counted.items()]
    return "; ".join(parts)


def _list(apart: Mapping[str, Estimate]) -> str:
    """Return the differences in words."""
    return ", ".join(f"{name} {said(e)}" for name, e in apart.items())


def _table(apart: Mapping[str, Estimate]) -> StudyTable:
    """Return the differences."""
    return StudyTable(
        title="Depth against the full mix",
        note="Depth gap on V minus that of the student that read the mix; below 0 is deeper.",
        rows=tuple(row(name, "depth gap", e) for name, e in apart.items()),
    )


def _read(made: Mapping[RunKey, Removal], seeds: tuple[int, ...]) -> StudyTable:
    """Return what was read: forget tokens in the corpus, refusals, retain per distilled token."""
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in made):
        held = [dict(made[arm, seed].extras) for seed in seeds]
        for metric, value in _facts(held).items():
            rows.append(StudyRow(condition=arm, metric=metric, value=value, n=len(held)))
        tokens = sum(made[arm, seed].cost.tokens for seed in seeds) / len(seeds)
        rows.append(
            StudyRow(condition=arm, metric="tokens, teachers included", value=tokens, n=len(held))
        )
    return StudyTable(
        title="What was read", note="Means over draws; n counts draws.", rows=tuple(rows)
    )


def _facts(held: list[dict[str, Any]]) -> dict[str, float]:
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
        for facts in held:
            found: Any = facts
            for name in path:
                found = found.get(name) if isinstance(found, dict) else None
            if isinstance(found, int | float):
                values.append(float(found))
        if len(values) == len(held):
            out[metric] = sum(values) / len(values)
    return out
