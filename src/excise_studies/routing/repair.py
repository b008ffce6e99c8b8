"""The fine-tune after the ablation: what it mends, and what it brings back."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SerializeAsAny

from excise.core.stages import Runtime
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
from excise_studies.levels import verdict
from excise_studies.recovery import gaps, said
from excise_studies.routing.presets import era
from excise_studies.routing.setting import (
    SHARES,
    Missed,
    Rest,
    RoutingOutcome,
    RoutingSetting,
    conclude,
    facts_bench,
    make_world,
    misses,
    prepared,
    score_arms,
    train_arms,
)
from excise_studies.setting import ExperimentSetting, Make, make_arms

NONE = "no repair"


class Repair(Study):
    """One ablated model, repaired on retained rows or on all rows, for equal numbers of steps.

    Stated beforehand. L is the depth gap on V (after T was relearned) after the longest repair on
    retained rows minus that without repair. The repair is a light touch if L's 95 % interval lies
    between plus and minus `margin`; it brings knowledge back if the lower end is above `margin`,
    and removes some if the upper end is below minus it. M is the same for the repair on all rows,
    minus what the oracle gains by it: what mixing forget rows in brings back beyond what they
    teach anyone. It decides nothing.
    """

    question: ClassVar[str] = (
        "Is the fine-tune after an ablation a light touch, or does it do part of the removing or "
        "the bringing back?"
    )
    statistic: ClassVar[str] = (
        "L = depth gap on V after relearning T, longest repair on retained rows minus no repair; a "
        "light touch if its 95 % interval lies within the margin on both sides. Bootstrap over "
        "draws and units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"

    name: Literal["repair"] = "repair"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the rails."""
    bench: ExperimentSetting = facts_bench()
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
    """What is told of rows without a label."""
    shares: tuple[float, ...] = SHARES
    """Shares of the steps of plain runs for the compute ratio."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train and ablate, repair, relearn, compare."""
        world = make_world(self.bench, self.seeds, runtime, pool)
        labels = misses(self.rate, self.missed, self.rest)
        made = train_arms({NONE: (self.routed, labels)}, world, runtime, pool)
        made |= make_arms(repairs(self, made, world), runtime, pool)
        outcome = score_arms(made, world, self.seeds, runtime, pool, shares=self.shares)
        found = effects(self, outcome)
        words = [f"{name} was {said(value)}." for name, value in found.items()]
        words.append(gaps(outcome.found))
        rows = tuple(row("effect", name, value) for name, value in found.items())
        table = StudyTable(title="What repairs change", note=self.statistic, rows=rows)
        return conclude(outcome, world, words, decide(self, found), more=(table,))


def named(side: str, steps: int) -> str:
    """Return the name of a repaired arm."""
    return f"{side}, {steps} steps"


def repairs(
    study: Repair, made: dict[RunKey, Removal], world: RoutingSetting
) -> dict[RunKey, Make]:
    """Return the repairs of the ablated models, and of the oracles on all rows."""
    labels = misses(study.rate, study.missed, study.rest)
    wanted: dict[RunKey, Make] = {}
    for seed in study.seeds:
        draw = world.draws[seed]
        assert draw.oracle is not None
        ablated = made[NONE, seed].checkpoint
        for steps in study.steps:
            short = schedule(study, steps)
            arms: dict[str, tuple[Method, Checkpoint]] = {
                "retain": (prepared(Filtering(pretrain=short), study.bench, labels), ablated),
                "mixture": (Plain(pretrain=short), ablated),
                "oracle on the mixture": (Plain(pretrain=short), draw.oracle),
            }
            for side, (method, start) in arms.items():
                wanted[named(side, steps), seed] = Make(method, start, draw.domain)
    return wanted


def schedule(study: Repair, steps: int) -> Pretrain:
    """Return the schedule of a repair: constant rate, the rows and batches of training."""
    full = study.bench.pretrain
    fit: FitConfig = full.fit.model_copy(
        update={"steps": steps, "lr": study.lr, "warmup": 0, "schedule": "constant"}
    )
    return full.model_copy(update={"fit": fit})


RETAIN = "L (depth gap, repair on retain - none)"
MIXTURE = "M (the same on all rows, beyond the oracle's)"


def effects(study: Repair, outcome: RoutingOutcome) -> dict[str, Estimate]:
    """Return L and M at the most steps, and what the repair gives retain."""
    found, last = outcome.found, max(study.steps)
    light = found.gap(named("retain", last)) - found.gap(NONE)
    mixed = found.gap(named("mixture", last)) - found.gap(NONE)
    mixed = mixed - found.gap(named("oracle on the mixture", last))
    kept = found.retain.at(named("retain", last)) - found.retain.at(NONE)
    return {
        RETAIN: outcome.estimate(light),
        MIXTURE: outcome.estimate(mixed),
        "Retain recall won on retain": outcome.estimate(kept),
    }


def decide(study: Repair, found: dict[str, Estimate]) -> str:
    """Return what L says under the margin."""
    return {
        "above": "the repair brings knowledge back: L is above the margin",
        "below": "the repair removes: L is below minus the margin",
        "equal": f"a light touch: L lies within {study.margin:g} of the rails",
        "undecided": f"undecided: L's interval crosses {study.margin:g}",
    }[verdict(found[RETAIN], study.margin)]
