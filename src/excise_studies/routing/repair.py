"""The fine-tune after the ablation: what it mends, and what it brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from excise.core.stages import Runtime
from excise.evals.replicates import Decision, contrasts
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
from excise_studies.recovery import RECOVERY, gaps, listed
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

    Stated beforehand. A repair takes a share of the steps of training, from 1 % on. For each share,
    L is the depth gap on the held-out test set (after relearning) after the repair on retained rows
    minus that without repair; the shares share the error. A repair is a light touch if L's interval
    lies between plus and minus `margin`; it brings knowledge back if the lower end is above
    `margin`, and removes some if the upper end is below minus it. A share at which relearning did
    not teach its set to the repaired model, or to the one without repair, in every seed is invalid
    and decides nothing. M is the same for the repair on all rows, minus what the oracle gains by
    it: what mixing forget rows in brings back beyond what they teach anyone. It decides nothing.
    """

    question: ClassVar[str] = (
        "Is a short fine-tune after an ablation a light touch, or does it do part of the removing "
        "or the bringing back?"
    )
    statistic: ClassVar[str] = (
        "L = depth gap on the held-out test set after relearning, repair on retained rows minus no "
        "repair, for every length of the repair; a light touch if its interval lies within the "
        "margin on both sides. Every model must have been taught the relearn set. Intervals over "
        "seeds and units."
    )
    takes: ClassVar[str] = "15 minutes of one core, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["repair"] = "repair"
    """Name on the command line."""
    seeds: tuple[int, ...] = Field(default=(4, 5, 6, 7, 8, 9, 10, 13), min_length=1)
    """Draws of the data; on seeds 1 to 3 lengths were set."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models, attacker."""
    routed: SerializeAsAny[Method] = era(coherence=None)
    """What is trained and ablated, without a repair of its own."""
    lengths: tuple[float, ...] = Field(default=(0.01, 0.03), min_length=1)
    """Steps of the repairs, as shares of those of training. A tenth, which was asked of seeds 1 to
    3 too, is no short fine-tune."""
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

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        """Refuse lengths out of order, and those that are the same number of steps."""
        if sorted(set(self.lengths)) != list(self.lengths) or not 0 < self.lengths[0] <= 1:
            raise ValueError("lengths: give different shares above 0 in ascending order")
        if len({steps_of(self, length) for length in self.lengths}) < len(self.lengths):
            raise ValueError(
                "lengths: two of them are the same number of steps; give shares farther apart"
            )
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train and ablate, repair, relearn, compare."""
        setting = make_setting(self.experiment, self.seeds, runtime, pool)
        labels = misses(self.rate, self.missed, self.rest)
        removals = train_conditions({NONE: (self.routed, labels)}, setting, runtime, pool)
        removals |= make_conditions(repairs(self, removals, setting), runtime, pool)
        outcome = score_conditions(removals, setting, self.seeds, runtime, pool, shares=self.shares)
        measured = effects(self, outcome)
        words = [
            f"{name} was, by length, "
            f"{listed({f'{100 * length:g} %': value for length, value in values.items()})}."
            for name, values in measured.items()
        ]
        words.append(gaps(outcome.recovery))
        rows = tuple(
            row(f"{100 * length:g} % of training", name, value)
            for name, values in measured.items()
            for length, value in values.items()
        )
        table = StudyTable(title="What repairs change", note=self.statistic, rows=rows)
        decision = decide(self, measured[RETAIN], outcome.recovery.weak)
        return conclude(outcome, setting, words, decision, more=(table,))


def steps_of(study: Repair, length: float) -> int:
    """Return the steps of a repair, at least one."""
    return max(1, round(length * study.experiment.pretrain.fit.steps))


def named(side: str, length: float) -> str:
    """Return the name of a repaired condition."""
    return f"{side}, {100 * length:g} % of training"


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
        for length in study.lengths:
            short = schedule(study, length)
            conditions: dict[str, tuple[Method, Checkpoint]] = {
                "retain": (prepared(Filtering(pretrain=short), study.experiment, labels), ablated),
                "mixture": (Plain(pretrain=short), ablated),
                "oracle on the mixture": (Plain(pretrain=short), replicate.oracle),
            }
            for side, (method, start) in conditions.items():
                wanted[named(side, length), seed] = Make(method, start, replicate.domain)
    return wanted


def schedule(study: Repair, length: float) -> Pretrain:
    """Return the schedule of a repair: constant rate, the rows and batches of training."""
    full = study.experiment.pretrain
    fit: FitConfig = full.fit.model_copy(
        update={
            "steps": steps_of(study, length),
            "lr": study.lr,
            "warmup": 0,
            "schedule": "constant",
        }
    )
    return full.model_copy(update={"fit": fit})


RETAIN = "L (depth gap, repair on retain - none)"
MIXTURE = "M (the same on all rows, beyond the oracle's)"
WON = "retain recall won on retain"


def effects(study: Repair, outcome: RoutingOutcome) -> dict[str, dict[float, Estimate]]:
    """Return L, M and what the repair gives retain, by name and length."""
    recovery = outcome.recovery
    found: dict[str, dict[float, Estimate]] = {RETAIN: {}, MIXTURE: {}, WON: {}}
    for length in study.lengths:
        retain, mixture = named("retain", length), named("mixture", length)
        mixed = recovery.gap(mixture) - recovery.gap(NONE)
        mixed = mixed - recovery.gap(named("oracle on the mixture", length))
        recall = recovery.retain.at(retain) - recovery.retain.at(NONE)
        found[RETAIN][length] = recovery.apart(recovery.gap(retain), recovery.gap(NONE))
        found[MIXTURE][length] = outcome.estimate(mixed)
        found[WON][length] = outcome.estimate(recall)
    return found


def decide(
    study: Repair, apart: Mapping[float, Estimate], weak: Mapping[str, Sequence[int]]
) -> Decision:
    """Return what L says under the margin, length by length.

    Args:
        study: Margin and error.
        apart: L by length.
        weak: By condition the seeds in which relearning did not teach it the relearn set.
    """
    words = {
        "above": "brings knowledge back",
        "below": "removes",
        "equal": "a light touch",
        "undecided": f"undecided, L's interval crosses {study.margin:g}",
    }
    asked = contrasts(
        {f"L at {100 * length:g} %": value for length, value in apart.items()},
        (-study.margin, study.margin),
        study.error,
    )
    parts, deciding = [], []
    for length, contrast in zip(apart, asked.values(), strict=True):
        powerless = [name for name in (NONE, named("retain", length)) if weak.get(name)]
        text = f"invalid, relearning did not teach its set to {' and '.join(powerless)}"
        if not powerless:
            text = contrast.say(words)
            deciding.append(contrast)
        parts.append(f"{100 * length:g} % of training: {text}")
    return Decision("; ".join(parts), tuple(deciding))
