"""The fine-tune after the ablation: what it mends, and what it brings back."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SerializeAsAny

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Estimate
from excise.methods.base import Method, Removal
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import row
from excise_studies.recovery import RECOVERY, gaps, said
from excise_studies.routing.presets import era
from excise_studies.routing.setting import (
    SHARES,
    Missed,
    Rest,
    RoutingOutcome,
    RoutingSetting,
    conclude,
    facts_setting,
    make_setting,
    misses,
    prepared,
    score_conditions,
    train_conditions,
)
from excise_studies.setting import ExperimentSetting, Make, make_conditions

NONE = "no repair"


class Repair(Study):
    """One ablated model, repaired on retained rows or on all rows, for equal numbers of steps.

    Stated beforehand. L is the depth gap on the held-out test set (after relearning) after the
    longest repair on retained rows minus that without repair. The repair is a light touch if L's 95
    % interval lies between plus and minus `margin`; it brings knowledge back if the lower end is
    above `margin`, and removes some if the upper end is below minus it. M is the same for the
    repair on all rows, minus what the oracle gains by it: what mixing forget rows in brings back
    beyond what they teach anyone. It decides nothing.
    """

    question: ClassVar[str] = (
        "Is the fine-tune after an ablation a light touch, or does it do part of the removing or "
        "the bringing back?"
    )
    statistic: ClassVar[str] = (
        "L = depth gap on the held-out test set after relearning, longest repair on retained rows "
        "minus no repair; a light touch if its 95 % interval lies within the margin on both sides. "
        "Intervals over seeds and units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["repair"] = "repair"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models, attacker."""
    routed: SerializeAsAny[Method] = era(coherence=None)
    """What is trained and ablated, without a repair of its own."""
    steps: tuple[int, ...] = Field(default=(10, 40, 160), min_length=1)
    """Steps of the repairs."""
    lr: float = Field(default=5e-4, gt=0)
    """Their learning rate, an eighth of training's."""
    rate: float = Field(default=1.0, gt=0, le=1)
    """Share of what is to be forgotten that carries a label."""
    missed: Missed = "occurrences"
    """What labels miss."""
    rest: Rest = "unlabeled"
    """What methods assume of rows without a label."""
    shares: tuple[float, ...] = SHARES
    """Shares of the steps of plain runs for the compute ratio."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train and ablate, repair, relearn, compare."""
        setting = make_setting(self.experiment, self.seeds, runtime, pool)
        labels = misses(self.rate, self.missed, self.rest)
        removals = train_conditions({NONE: (self.routed, labels)}, setting, runtime, pool)
        removals |= make_conditions(repairs(self, removals, setting), runtime, pool)
        outcome = score_conditions(removals, setting, self.seeds, runtime, pool, shares=self.shares)
        measured = effects(self, outcome)
        words = [f"{name} was {said(value)}." for name, value in measured.items()]
        words.append(gaps(outcome.recovery))
        rows = tuple(row("effect", name, value) for name, value in measured.items())
        table = StudyTable(title="What repairs change", note=self.statistic, rows=rows)
        return conclude(outcome, setting, words, decide(self, measured), more=(table,))


def named(side: str, steps: int) -> str:
    """Return the name of a repaired condition."""
    return f"{side}, {steps} steps"


def repairs(
    study: Repair, removals: dict[RunKey, Removal], setting: RoutingSetting
) -> dict[RunKey, Make]:
    """Return the repairs of the ablated models, and of the oracles on all rows."""
    labels = misses(study.rate, study.missed, study.rest)
    wanted: dict[RunKey, Make] = {}
    for seed in study.seeds:
        replicate = setting.replicates[seed]
        assert replicate.oracle is not None
        ablated = removals[NONE, seed].checkpoint
        for steps in study.steps:
            short = schedule(study, steps)
            conditions: dict[str, tuple[Method, Checkpoint]] = {
                "retain": (prepared(Filtering(pretrain=short), study.experiment, labels), ablated),
                "mixture": (Plain(pretrain=short), ablated),
                "oracle on the mixture": (Plain(pretrain=short), replicate.oracle),
            }
            for side, (method, start) in conditions.items():
                wanted[named(side, steps), seed] = Make(method, start, replicate.domain)
    return wanted


def schedule(study: Repair, steps: int) -> Pretrain:
    """Return the schedule of a repair: constant rate, the rows and batches of training."""
    full = study.experiment.pretrain
    fit: FitConfig = full.fit.model_copy(
        update={"steps": steps, "lr": study.lr, "warmup": 0, "schedule": "constant"}
    )
    return full.model_copy(update={"fit": fit})


RETAIN = "L (depth gap, repair on retain - none)"
MIXTURE = "M (the same on all rows, beyond the oracle's)"


def effects(study: Repair, outcome: RoutingOutcome) -> dict[str, Estimate]:
    """Return L and M at the most steps, and what the repair gives retain."""
    recovery, last = outcome.recovery, max(study.steps)
    mixed = recovery.gap(named("mixture", last)) - recovery.gap(NONE)
    mixed = mixed - recovery.gap(named("oracle on the mixture", last))
    recall = recovery.retain.at(named("retain", last)) - recovery.retain.at(NONE)
    return {
        RETAIN: recovery.apart(recovery.gap(named("retain", last)), recovery.gap(NONE)),
        MIXTURE: outcome.estimate(mixed),
        "Retain recall won on retain": outcome.estimate(recall),
    }


def decide(study: Repair, measured: dict[str, Estimate]) -> Decision:
    """Return what L says under the margin."""
    words = {
        "above": "the repair brings knowledge back: L is above the margin",
        "below": "the repair removes: L is below minus the margin",
        "equal": f"a light touch: L lies within {study.margin:g}",
        "undecided": f"undecided: L's interval crosses {study.margin:g}",
    }
    asked = Contrast("L", measured[RETAIN], (-study.margin, study.margin), study.error)
    return Decision(asked.say(words), (asked,))
