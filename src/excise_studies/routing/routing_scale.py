"""Does the alignment tax of routing shrink with size, under one rule for hyper-parameters?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from excise.core.stages import Runtime
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.levels import estimate, verdict
from excise_studies.recovery import said
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
    routed,
    score_arms,
    train_arms,
)
from excise_studies.setting import ExperimentSetting

ARM = "routed"


class RoutingScale(Study):
    """Plain, filtered and routed models of several widths on the same data.

    Stated beforehand. The tax of an arm is one minus its compute ratio, the share of plain steps
    that reaches its loss on retain. S is the compute ratio of the routed arm at the largest width
    minus that at the smallest. The tax shrinks if the lower end of S's 95 % interval is above
    `margin`, grows if the upper end is below minus it, and stays if the interval lies between.
    One rule sets everything: the learning rate is that of `bench` times (its width / width) to
    the power `power`; steps, batch and the module's share of a block stay. Nothing is retuned.
    """

    question: ClassVar[str] = (
        "Does the share of compute that routing costs shrink in larger models, if one rule sets "
        "the hyper-parameters of all sizes?"
    )
    statistic: ClassVar[str] = (
        "S = compute ratio of the routed arm at the largest width minus that at the smallest; the "
        "tax shrinks if the lower end of the 95 % interval is above the margin, grows if the "
        "upper end is below minus it. Bootstrap over draws and units, the same samples at all "
        "sizes."
    )
    takes: ClassVar[str] = "15 minutes, 1 GiB"

    name: Literal["routing-scale"] = "routing-scale"
    """Name on the command line."""
    margin: float = 0.05
    """Compute ratio."""
    bench: ExperimentSetting = facts_bench()
    """Data, models, attacker; its width is where the rule starts."""
    routed: SerializeAsAny[Method] = routed()
    """The routed arm."""
    widths: tuple[int, ...] = Field(default=(32, 48, 64, 96), min_length=2)
    """Widths of the models, ascending."""
    power: float = 0.5
    """How fast the learning rate falls with width."""
    rate: float = Field(default=1.0, gt=0, le=1)
    """Share of what is to be forgotten that carries a label."""
    missed: Missed = "occurrences"
    """What labels miss."""
    rest: Rest = "unlabeled"
    """What is told of rows without a label."""
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
        worlds: dict[int, RoutingSetting] = {}
        labels = misses(self.rate, self.missed, self.rest)
        for width in self.widths:
            worlds[width] = make_world(bench_at(self, width), self.seeds, runtime, pool)
            made = train_arms({ARM: (self.routed, labels)}, worlds[width], runtime, pool)
            outcomes[width] = score_arms(
                made, worlds[width], self.seeds, runtime, pool, shares=self.shares
            )
        found = shrinkage(self, outcomes)
        ratios = ", ".join(f"{w}: {outcomes[w].ratio(ARM)[0]:.2f}" for w in self.widths)
        deep = ", ".join(f"{w}: {outcomes[w].found.gap(ARM)[0]:.2f}" for w in self.widths)
        words = [
            f"The compute ratio of the routed arm was by width {ratios}; its depth gap {deep}.",
            f"S was {said(found)}.",
        ]
        size = {w: worlds[w].draws[self.seeds[0]].original.num_parameters for w in self.widths}
        last = self.widths[-1]
        voids = [f"width {w}: {o.found.void}" for w, o in outcomes.items() if o.found.void]
        return conclude(
            outcomes[last],
            worlds[last],
            words,
            decide(self, found),
            more=(_table(self, outcomes, size),),
            notes=[f"rails and curves are those of width {last}", *voids],
            brief=True,
        )


def bench_at(study: RoutingScale, width: int) -> ExperimentSetting:
    """Return the bench at a width, its learning rate set by the rule."""
    bench = study.bench
    fit = bench.pretrain.fit
    lr = fit.lr * (bench.model.width / width) ** study.power
    pretrain = bench.pretrain.model_copy(update={"fit": fit.model_copy(update={"lr": lr})})
    model = bench.model.model_copy(update={"width": width})
    return bench.model_copy(update={"model": model, "pretrain": pretrain})


def shrinkage(study: RoutingScale, outcomes: Mapping[int, RoutingOutcome]) -> Estimate:
    """Return S: units are the same at all sizes, and so are the samples."""
    first, last = outcomes[study.widths[0]], outcomes[study.widths[-1]]
    moved: Array = last.ratio(ARM) - first.ratio(ARM)
    return estimate(moved, last.loss.n)


def decide(study: RoutingScale, found: Estimate) -> str:
    """Return what S says under the margin."""
    return {
        "above": "the tax shrinks with size: S is above the margin",
        "below": "the tax grows with size: S is below minus the margin",
        "equal": f"the tax stays: S lies within {study.margin:g}",
        "undecided": f"undecided: S's interval crosses {study.margin:g}",
    }[verdict(found, study.margin)]


def _table(
    study: RoutingScale, outcomes: Mapping[int, RoutingOutcome], size: Mapping[int, int]
) -> StudyTable:
    """Return ratio, gap and recall of the arms by width."""
    rows: list[StudyRow] = []
    for width, outcome in outcomes.items():
        arm = f"width {width}"
        rows.append(StudyRow(condition=arm, metric="parameters", value=float(size[width])))
        for name in (ARM, "oracle"):
            ratio = estimate(outcome.ratio(name), outcome.loss.n)
            rows.append(row(arm, f"compute ratio, {name}", ratio))
        rows.append(row(arm, f"depth gap, {ARM}", outcome.found.value(ARM)))
        for name in ("original", ARM):
            kept = estimate(outcome.found.retain.at(name), outcome.found.retain.n)
            rows.append(row(arm, f"retain recall, {name}", kept))
    return StudyTable(title="By size", note=study.statistic, rows=tuple(rows))
