"""Does the alignment tax of routing shrink with size, under one rule for hyper-parameters?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.levels import estimate
from excise_studies.recovery import said
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
    of_masking,
    routed,
    score_conditions,
    train_conditions,
)
from excise_studies.setting import ExperimentSetting

ROUTED = "routed"


class RoutingScale(Study):
    """Plain, filtered and routed models of several widths on the same data.

    Stated beforehand. The tax of a condition is one minus its compute ratio, the share of plain
    steps that reaches its loss on retain. S is the compute ratio of the routed condition at the
    largest width minus that at the smallest. The tax shrinks if the lower end of S's 95 % interval
    is above `margin`, grows if the upper end is below minus it, and stays if the interval lies
    between. One rule sets everything: the learning rate is that of `experiment` times (its width /
    width) to the power `power`; steps, batch and the module's share of a block stay. Nothing is
    retuned.
    """

    question: ClassVar[str] = (
        "Does the share of compute that routing costs shrink in larger models, if one rule sets "
        "the hyper-parameters of all sizes?"
    )
    statistic: ClassVar[str] = (
        "S = compute ratio of the routed condition at the largest width minus that at the "
        "smallest; the tax shrinks if the lower end of the 95 % interval is above the margin, "
        "grows if the upper end is below minus it. Intervals over seeds and units, the same "
        "samples at all sizes."
    )
    takes: ClassVar[str] = "15 minutes, 1 GiB"

    name: Literal["routing-scale"] = "routing-scale"
    """Name on the command line."""
    margin: float = 0.05
    """Compute ratio."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models, attacker; its width is where the rule starts."""
    routed: SerializeAsAny[Method] = routed()
    """The routed condition."""
    widths: tuple[int, ...] = Field(default=(32, 48, 64, 96), min_length=2)
    """Widths of the models, ascending."""
    power: float = 0.5
    """How fast the learning rate falls with width."""
    rate: float = Field(default=0.5, gt=0, le=1)
    """Share of what is to be forgotten that carries a label."""
    missed: Missed = "occurrences"
    """What labels miss."""
    rest: Rest = "unlabeled"
    """What methods assume of rows without a label."""
    shares: tuple[float, ...] = Field(default=SHARES, min_length=2)
    """Shares of the steps of plain runs for the compute ratio."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        """Refuse widths out of order."""
        if sorted(set(self.widths)) != list(self.widths):
            raise ValueError("widths: give different ones in ascending order")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train all sizes, read the taxes, compare the ends."""
        outcomes: dict[int, RoutingOutcome] = {}
        settings: dict[int, RoutingSetting] = {}
        labels = misses(self.rate, self.missed, self.rest)
        for width in self.widths:
            settings[width] = make_setting(setting_at(self, width), self.seeds, runtime, pool)
            removals = train_conditions(
                {ROUTED: (self.routed, labels)}, settings[width], runtime, pool
            )
            outcomes[width] = score_conditions(
                removals, settings[width], self.seeds, runtime, pool, shares=self.shares
            )
        effect = shrinkage(self, outcomes)
        ratios = ", ".join(f"{w}: {outcomes[w].ratio(ROUTED)[0]:.2f}" for w in self.widths)
        deep = ", ".join(f"{w}: {outcomes[w].recovery.gap(ROUTED)[0]:.2f}" for w in self.widths)
        words = [
            f"The compute ratio of the routed condition was by width {ratios}; its depth gap "
            f"{deep}.",
            f"S was {said(effect)}.",
        ]
        size = {
            w: settings[w].replicates[self.seeds[0]].original.num_parameters for w in self.widths
        }
        last = self.widths[-1]
        voids = [
            f"width {w}: {o.recovery.invalid}" for w, o in outcomes.items() if o.recovery.invalid
        ]
        return conclude(
            outcomes[last],
            settings[last],
            words,
            of_masking(decide(self, effect), self.routed, labels),
            more=(_table(self, outcomes, size),),
            notes=[f"reference models and curves are those of width {last}", *voids],
            brief=True,
        )


def setting_at(study: RoutingScale, width: int) -> ExperimentSetting:
    """Return the setting at a width, its learning rate set by the rule."""
    experiment = study.experiment
    fit = experiment.pretrain.fit
    lr = fit.lr * (experiment.model.width / width) ** study.power
    pretrain = experiment.pretrain.model_copy(update={"fit": fit.model_copy(update={"lr": lr})})
    model = experiment.model.model_copy(update={"width": width})
    return experiment.model_copy(update={"model": model, "pretrain": pretrain})


def shrinkage(study: RoutingScale, outcomes: Mapping[int, RoutingOutcome]) -> Estimate:
    """Return S: units are the same at all sizes, and so are the samples."""
    first, last = outcomes[study.widths[0]], outcomes[study.widths[-1]]
    moved: Array = last.ratio(ROUTED) - first.ratio(ROUTED)
    return estimate(moved, last.loss)


def decide(study: RoutingScale, effect: Estimate) -> Decision:
    """Return what S says under the margin."""
    words = {
        "above": "the tax shrinks with size: S is above the margin",
        "below": "the tax grows with size: S is below minus the margin",
        "equal": f"the tax stays: S lies within {study.margin:g}",
        "undecided": f"undecided: S's interval crosses {study.margin:g}",
    }
    asked = Contrast("S", effect, (-study.margin, study.margin), study.error)
    return Decision(asked.say(words), (asked,))


def _table(
    study: RoutingScale, outcomes: Mapping[int, RoutingOutcome], size: Mapping[int, int]
) -> StudyTable:
    """Return ratio, gap and recall of the conditions by width."""
    rows: list[StudyRow] = []
    for width, outcome in outcomes.items():
        condition = f"width {width}"
        rows.append(StudyRow(condition=condition, metric="parameters", value=float(size[width])))
        for name in (ROUTED, "oracle"):
            ratio = estimate(outcome.ratio(name), outcome.loss)
            rows.append(row(condition, f"compute ratio, {name}", ratio))
        rows.append(row(condition, f"depth gap, {ROUTED}", outcome.recovery.value(ROUTED)))
        for name in ("original", ROUTED):
            recall = estimate(outcome.recovery.retain.at(name), outcome.recovery.retain)
            rows.append(row(condition, f"retain recall, {name}", recall))
    return StudyTable(title="By size", note=study.statistic, rows=tuple(rows))
