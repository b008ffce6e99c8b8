"""Every preset and baseline where labels reach a share of what is to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.errors import nearest
from excise.core.stages import Runtime
from excise.data.labels import LabelNoise
from excise.domains.facts import Facts
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.levels import estimate, verdict
from excise_studies.recovery import said
from excise_studies.routing.presets import BASELINES, PRESETS
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
    score_arms,
    train_arms,
)
from excise_studies.setting import ExperimentSetting

FactsCue = Literal["none", "category", "style"]
EVERY: Mapping[str, Method] = {**PRESETS, **BASELINES}


class PartialLabels(Study):
    """Presets of gradient routing and baselines of equal compute, by rate of labels and misses.

    Stated beforehand. D is the depth gap on V (after T was relearned) of `against` minus that of
    `preset` where the share `decide_at` of what is to be forgotten is labelled, averaged over the
    ways to miss and the cues. The preset beats the baseline if the lower end of D's 95 % interval
    is above `margin` and the preset's retain recall, averaged alike, is at least `keep`; it does
    not if the upper end of D is below `margin`. All other cells are shown and decide nothing.
    The plain SGTM arm was set on draw 0, the tuned and the relabelled one on draws 0, 11 and 12
    (docs/lab-notes.md); the other arms are sized by hand or as their methods' defaults, untuned.
    """

    question: ClassVar[str] = (
        "When labels miss some of what is to be forgotten, row by row or unit by unit, which "
        "training leaves the least to relearn, and what does it cost?"
    )
    statistic: ClassVar[str] = (
        "D = depth gap on V after relearning T, `against` minus `preset`, at the share `decide_at` "
        "of labels, mean over ways to miss and cues; the preset wins if the lower end of the 95 % "
        "interval is above the margin and its retain recall is at least `keep`. Bootstrap over "
        "draws and units."
    )
    takes: ClassVar[str] = (
        "3 hours, 1 GiB; 40 minutes with --rates '[0.5]', 8 with two --arms besides; goes on "
        "where it was stopped"
    )

    name: Literal["partial-labels"] = "partial-labels"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the rails."""
    bench: ExperimentSetting = facts_bench()
    """Data, models, attacker."""
    rates: tuple[float, ...] = Field(default=(1.0, 0.9, 0.5, 0.1), min_length=1)
    """Shares of what is to be forgotten that carry a label."""
    missed: tuple[Missed, ...] = Field(default=("occurrences", "units"), min_length=1)
    """What labels miss: rows one by one, or units whole."""
    rest: Rest = "unlabeled"
    """What is told of rows without a label. `unlabeled`: labels are few but sure, and the same
    share of core rows has none. `core`: all that is missed counts as core, where no preset can
    tell sure rows from the rest."""
    cues: tuple[FactsCue, ...] = Field(default=("none",), min_length=1)
    """What marks rows that are to be forgotten: nothing, a word, a style. Missed units can only be
    told from the rest by what rows of a capability share: '["none", "category", "style"]'."""
    arms: tuple[str, ...] = ()
    """Arms to run, by name; empty for all."""
    own: dict[str, SerializeAsAny[Method]] = {}
    """Further arms, or other settings of those there are, by name."""
    preset: str = "sgtm_relabelled"
    """The preset that D is about."""
    against: str = "filtering"
    """The baseline that D is about."""
    decide_at: float = 0.5
    """Share of labels at which D is read."""
    tuned_on: tuple[int, ...] = (0, 11, 12)
    """Draws on which `sgtm_tuned` and `sgtm_relabelled` were chosen."""
    keep: float = 0.98
    """Retain recall that the preset must keep."""
    shares: tuple[float, ...] = SHARES
    """Shares of the steps of plain runs for the compute ratio."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        """Refuse names of arms that do not exist, and a decision about what is not run."""
        known = {**EVERY, **self.own}
        for name in (*self.arms, self.preset, self.against):
            if name not in known:
                raise ValueError(f"arms: there is no arm '{name}'; {nearest(name, known)}")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train every arm in every cell, cue by cue; relearn; compare."""
        outcomes: dict[str, RoutingOutcome] = {}
        worlds: dict[str, RoutingSetting] = {}
        wanted = {
            arm(name, cell): (method, cell.labels(self.rest))
            for cell in cells_of(self)
            for name, method in methods_of(self).items()
        }
        for cue in self.cues:
            worlds[cue] = make_world(with_cue(self.bench, cue), self.seeds, runtime, pool)
            made = train_arms(wanted, worlds[cue], runtime, pool)
            outcomes[cue] = score_arms(
                made, worlds[cue], self.seeds, runtime, pool, shares=self.shares
            )
        found = difference(self, outcomes)
        first = self.cues[0]
        words = [best(self, outcomes[cue], cue) for cue in self.cues]
        if found is not None:
            words.append(f"D, {self.against} minus {self.preset}, was {said(found[0])}.")
        tables = [grid(self, outcomes[cue], cue) for cue in self.cues]
        notes = [o.found.void for o in outcomes.values() if o.found.void]
        return conclude(
            outcomes[first], worlds[first], words, decide(self, found), more=tables, notes=notes,
            brief=True,
        )  # fmt: skip


@dataclass(frozen=True)
class LabelSetting:
    """One setting of the labels.

    Attributes:
        rate: Share that is labelled.
        missed: What labels miss; empty at a rate of 1.
    """

    rate: float
    missed: Missed | Literal[""]

    def __str__(self) -> str:
        """Return its name."""
        return f"{100 * self.rate:g} %" + (f", missed {self.missed}" if self.missed else "")

    def labels(self, rest: Rest) -> LabelNoise | None:
        """Return the labels of this runtime, given what is told of the rest."""
        return misses(self.rate, self.missed or "occurrences", rest)


def cells_of(study: PartialLabels) -> tuple[LabelSetting, ...]:
    """Return all settings of the labels; nothing is missed at a rate of 1, so that is one."""
    cells = [
        LabelSetting(rate, kind if rate < 1 else "")
        for rate in study.rates
        for kind in study.missed
    ]
    return tuple(dict.fromkeys(cells))


def methods_of(study: PartialLabels) -> dict[str, Method]:
    """Return the arms that run, by name."""
    known = {**EVERY, **study.own}
    return {name: known[name] for name in study.arms or known}


def arm(name: str, cell: LabelSetting) -> str:
    """Return the name of an arm in a setting of the labels."""
    return f"{name} [{cell}]"


def with_cue(bench: ExperimentSetting, cue: FactsCue) -> ExperimentSetting:
    """Return the bench with another cue, where its data have one."""
    if not isinstance(bench.domain, Facts):
        return bench
    return bench.model_copy(update={"domain": bench.domain.model_copy(update={"cue": cue})})


def difference(
    study: PartialLabels, outcomes: Mapping[str, RoutingOutcome]
) -> tuple[Estimate, float] | None:
    """Return D and the preset's retain recall; None where the study did not run what D needs."""
    cells = [cell for cell in cells_of(study) if cell.rate == study.decide_at]
    names = methods_of(study)
    if not cells or study.preset not in names or study.against not in names:
        return None
    gaps: list[Array] = []
    kept: list[float] = []
    for outcome in outcomes.values():
        for cell in cells:
            mine, other = arm(study.preset, cell), arm(study.against, cell)
            gaps.append(outcome.found.gap(other) - outcome.found.gap(mine))
            kept.append(float(outcome.found.retain.at(mine)[0]))
    n = min(outcome.found.after.n for outcome in outcomes.values())
    return estimate(np.mean(gaps, axis=0), n), sum(kept) / len(kept)


def decide(study: PartialLabels, found: tuple[Estimate, float] | None) -> str:
    """Return what D says under the margin."""
    if found is None:
        return (
            f"none: {study.preset} and {study.against} were not both run at "
            f"{100 * study.decide_at:g} % labels"
        )
    value, kept = found
    held = verdict(value, study.margin)
    if held == "above" and kept < study.keep:
        return (
            f"{study.preset} leaves less than {study.against}, but keeps {kept:.2f} of retain, "
            f"below {study.keep:g}"
        )
    return {
        "above": f"{study.preset} beats {study.against}: D is above the margin",
        "below": f"{study.preset} does not beat {study.against}: D is below the margin",
        "equal": f"{study.preset} does not beat {study.against}: D is below the margin",
        "undecided": f"undecided: D's interval crosses {study.margin:g}",
    }[held]


def best(study: PartialLabels, outcome: RoutingOutcome, cue: str) -> str:
    """Return in words the three smallest gaps of every cell among arms that keep enough."""
    parts = []
    for cell in cells_of(study):
        names = [(name, arm(name, cell)) for name in methods_of(study)]
        kept = [
            (float(outcome.found.gap(key)[0]), name)
            for name, key in names
            if outcome.found.retain.at(key)[0] >= study.keep
        ]
        least = ", ".join(f"{name} {gap:.2f}" for gap, name in sorted(kept)[:3]) or "no arm"
        parts.append(f"{cell}: {least}")
    return (
        f"With cue {cue}, the smallest depth gaps among arms that keep {study.keep:g} of retain "
        f"were, by labels: {'; '.join(parts)}."
    )


def grid(study: PartialLabels, outcome: RoutingOutcome, cue: str) -> StudyTable:
    """Return the depth gap of every arm by labels, retain recall beside it."""
    found = outcome.found
    rows: list[StudyRow] = []
    for name in methods_of(study):
        for cell in cells_of(study):
            key = arm(name, cell)
            rows.append(row(name, f"depth gap, {cell}", found.value(key)))
            kept = estimate(found.retain.at(key), found.retain.n)
            rows.append(row(name, f"retain recall, {cell}", kept))
            if study.shares:
                ratio = estimate(outcome.ratio(key), outcome.loss.n)
                rows.append(row(name, f"compute ratio, {cell}", ratio))
    return StudyTable(
        title=f"Depth gap by labels, cue {cue}",
        note="Depth gap after relearning T: 0 is the oracle, 1 the original before any attack.",
        rows=tuple(rows),
    )
