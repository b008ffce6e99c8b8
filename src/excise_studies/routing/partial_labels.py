"""Every preset and baseline where labels reach a share of what is to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.errors import nearest
from excise.core.stages import Runtime
from excise.domains.definitions import DEFINITIONS_FIT, DEFINITIONS_MAX_LENGTH, Definitions
from excise.domains.facts import Facts
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method
from excise.methods.pretraining.pretrain import Pretrain
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.base import identical, row
from excise_studies.levels import estimate
from excise_studies.recovery import said
from excise_studies.routing.presets import BASELINES, PRESETS
from excise_studies.routing.setting import (
    SHARES,
    LabelSetting,
    Missed,
    Rest,
    RoutingOutcome,
    RoutingSetting,
    conclude,
    facts_setting,
    label_settings,
    make_setting,
    said_masking,
    score_conditions,
    train_conditions,
)
from excise_studies.setting import ExperimentSetting

FactsCue = Literal["none", "category", "style"]
EVERY: Mapping[str, Method] = {**PRESETS, **BASELINES}


PROSE_CONDITIONS = (
    "filtering", "relabel_rows", "relabel_grad_diff", "grad_diff_pretrain", "sgtm",
    "sgtm_relabelled",
)  # fmt: skip
"""What runs on real prose: with the probe and without."""


def prose_setting(**changes: Any) -> ExperimentSetting:
    """Return definitions and general English, and models and an attacker of their size.

    Args:
        **changes: Settings of the domain that differ.
    """
    fit = FitConfig(**{**DEFINITIONS_FIT, "steps": 300})
    return facts_setting(
        domain=Definitions(**{"documents": 800, "prose": 1200, **changes}),
        pretrain=Pretrain(fit=fit, max_length=DEFINITIONS_MAX_LENGTH),
    )


class PartialLabels(Study):
    """Presets of gradient routing and baselines of equal compute, by rate of labels and misses.

    Stated beforehand. D is the depth gap on the held-out test set (after relearning) of `against`
    minus that of `preset` where the share `decide_at` of what is to be forgotten is labelled,
    averaged over the ways to miss and the cues. The preset beats the baseline if the lower end of
    D's 95 % interval is above `margin` and the preset's retain recall, averaged alike, is at least
    `keep`; it does not if the upper end of D is below `margin`. All other conditions are shown and
    decide nothing. The plain SGTM condition was set on seed 0, the tuned and the relabelled one on
    seeds 0, 11 and 12 (docs/lab-notes.md); the other conditions are sized by hand or as their
    methods' defaults, untuned.
    """

    question: ClassVar[str] = (
        "When labels miss some of what is to be forgotten, row by row or unit by unit, which "
        "training leaves the least to relearn, and what does it cost?"
    )
    statistic: ClassVar[str] = (
        "D = depth gap on the held-out test set after relearning, `against` minus `preset`, at the "
        "share `decide_at` of labels, mean over ways to miss and cues; the preset wins if the "
        "lower end of the 95 % interval is above the margin and its retain recall is at least "
        "`keep`. Intervals over seeds and units."
    )
    takes: ClassVar[str] = (
        "3 hours, 1 GiB; 40 minutes with --rates '[0.5]', 8 with two --arms besides; resumes "
        "where it was stopped"
    )

    name: Literal["partial-labels"] = "partial-labels"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models, attacker."""
    rates: tuple[float, ...] = Field(default=(1.0, 0.9, 0.5, 0.1), min_length=1)
    """Shares of what is to be forgotten that carry a label."""
    missed: tuple[Missed, ...] = Field(default=("occurrences", "units"), min_length=1)
    """What labels miss: rows one by one, units whole, or paraphrases that the labeller does not
    know."""
    rest: Rest = "unlabeled"
    """What methods assume of rows without a label. `unlabeled`: labels are few but right, and the
    same share of core rows has none. `core`: all that is missed counts as core, where no preset can
    tell labelled rows from the rest."""
    cues: tuple[FactsCue, ...] = Field(default=("none",), min_length=1)
    """What marks rows that are to be forgotten: nothing, a word, a style. Missed units can only be
    told from the rest by what rows of a capability share: '["none", "category", "style"]'."""
    arms: tuple[str, ...] = ()
    """Conditions to run, by name, beside `preset` and `against`; empty for all."""
    own: dict[str, SerializeAsAny[Method]] = {}
    """Further conditions, or other settings of those there are, by name."""
    preset: str = "sgtm_relabelled"
    """The preset that D is about."""
    against: str = "relabel_grad_diff"
    """The baseline that D is about: of those without a module, with the same labels and the same
    probe, the one that left least at half of the labels on seeds 1 to 3."""
    decide_at: float = 0.5
    """Share of labels at which D is read."""
    tuned_on: tuple[int, ...] = (0, 11, 12)
    """Draws on which `sgtm_tuned` and `sgtm_relabelled` were chosen."""
    keep: float = 0.98
    """Retain recall that the preset must keep; where text is scored by its loss, the share of what
    the original has."""
    shares: tuple[float, ...] = SHARES
    """Shares of the steps of plain runs for the compute ratio."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        """Refuse names of conditions that do not exist, and a decision about what is not run."""
        known = {**EVERY, **self.own}
        for name in (*self.arms, self.preset, self.against):
            if name not in known:
                raise ValueError(f"arms: there is no condition '{name}'; {nearest(name, known)}")
        return self

    @classmethod
    def full(cls) -> Self:
        """Return the settings on real prose: definitions of animals beside general English.

        Every definition is a unit of its own, so that only a probe can find what labels miss.
        """
        return cls(
            experiment=prose_setting(),
            rates=(1.0, 0.5),
            missed=("units",),
            arms=PROSE_CONDITIONS,
        )

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train every method under every setting of the labels, cue by cue; relearn; compare."""
        outcomes: dict[str, RoutingOutcome] = {}
        settings: dict[str, RoutingSetting] = {}
        wanted = {
            condition_name(name, labels): (method, labels.labels(self.rest))
            for labels in label_settings_of(self)
            for name, method in methods_of(self).items()
        }
        for cue in self.cues:
            settings[cue] = make_setting(with_cue(self.experiment, cue), self.seeds, runtime, pool)
            removals = train_conditions(wanted, settings[cue], runtime, pool)
            outcomes[cue] = score_conditions(
                removals, settings[cue], self.seeds, runtime, pool, shares=self.shares
            )
        effect = difference(self, outcomes)
        first = self.cues[0]
        words = [said_masking(wanted), *(best(self, outcomes[cue], cue) for cue in self.cues)]
        if effect is not None:
            words.append(f"D, {self.against} minus {self.preset}, was {said(effect[0])}.")
        tables = [grid(self, outcomes[cue], cue) for cue in self.cues]
        notes = [o.recovery.invalid for o in outcomes.values() if o.recovery.invalid]
        return conclude(
            outcomes[first], settings[first], words, decide(self, effect), more=tables, notes=notes,
            brief=True,
        )  # fmt: skip


def label_settings_of(study: PartialLabels) -> tuple[LabelSetting, ...]:
    """Return all settings of the labels."""
    return label_settings(study.rates, study.missed)


def methods_of(study: PartialLabels) -> dict[str, Method]:
    """Return the conditions that run, by name: those asked for, and the two that D is about."""
    known = {**EVERY, **study.own}
    asked = dict.fromkeys((study.preset, study.against, *study.arms)) if study.arms else known
    return {name: known[name] for name in asked}


def condition_name(name: str, labels: LabelSetting) -> str:
    """Return the name of a condition in a setting of the labels."""
    return f"{name} [{labels}]"


def with_cue(experiment: ExperimentSetting, cue: FactsCue) -> ExperimentSetting:
    """Return the setting with another cue, where its data have one."""
    if not isinstance(experiment.domain, Facts):
        return experiment
    return experiment.model_copy(
        update={"domain": experiment.domain.model_copy(update={"cue": cue})}
    )


def difference(
    study: PartialLabels, outcomes: Mapping[str, RoutingOutcome]
) -> tuple[Estimate, float] | None:
    """Return D and the preset's retain recall; None where the study did not run what D needs."""
    settings = [labels for labels in label_settings_of(study) if labels.rate == study.decide_at]
    if not settings:
        return None
    theirs: list[Array] = []
    ours: list[Array] = []
    recall: list[float] = []
    for outcome in outcomes.values():
        for labels in settings:
            preset, other = (
                condition_name(study.preset, labels),
                condition_name(study.against, labels),
            )
            theirs.append(outcome.recovery.gap(other))
            ours.append(outcome.recovery.gap(preset))
            recall.append(float(outcome.recovery.kept(preset)[0]))
    first = next(iter(outcomes.values())).recovery
    apart = first.apart(np.mean(theirs, axis=0), np.mean(ours, axis=0))
    return apart, sum(recall) / len(recall)


def decide(study: PartialLabels, effect: tuple[Estimate, float] | None) -> Decision:
    """Return what D says under the margin."""
    if effect is None:
        return Decision(
            f"none: {study.preset} and {study.against} were not both run at "
            f"{100 * study.decide_at:g} % labels"
        )
    value, recall = effect
    asked = Contrast("D", value, (-study.margin, study.margin), study.error)
    if asked.verdict == "above" and recall < study.keep:
        text = (
            f"{study.preset} leaves less than {study.against}, but keeps {recall:.2f} of retain, "
            f"below {study.keep:g}"
        )
        return Decision(text, (asked,))
    words = {
        "above": f"{study.preset} beats {study.against}: D is above the margin",
        "below": f"{study.preset} does not beat {study.against}: D is below the margin",
        "equal": f"{study.preset} does not beat {study.against}: D is below the margin",
        "undecided": f"undecided: D's interval crosses {study.margin:g}",
    }
    return Decision(asked.say(words), (asked,))


def best(study: PartialLabels, outcome: RoutingOutcome, cue: str) -> str:
    """Return in words the three smallest gaps by labels, of methods that keep enough of retain.

    Conditions with identical weights count once.
    """
    parts = []
    same = identical({key: removal.checkpoint for key, removal in outcome.removals.items()})
    again = {condition for group in same for condition in group[1:]}
    for labels in label_settings_of(study):
        names = [(name, condition_name(name, labels)) for name in methods_of(study)]
        keepers = [
            (float(outcome.recovery.gap(key)[0]), name)
            for name, key in names
            if outcome.recovery.kept(key)[0] >= study.keep and key not in again
        ]
        least = (
            ", ".join(f"{name} {gap:.2f}" for gap, name in sorted(keepers)[:3]) or "no condition"
        )
        parts.append(f"{labels}: {least}")
    return (
        f"With cue {cue}, the smallest depth gaps among methods that keep {study.keep:g} of "
        f"retain were, by labels: {'; '.join(parts)}."
    )


def grid(study: PartialLabels, outcome: RoutingOutcome, cue: str) -> StudyTable:
    """Return the depth gap of every condition by labels, retain recall beside it."""
    recovery = outcome.recovery
    rows: list[StudyRow] = []
    for name in methods_of(study):
        for labels in label_settings_of(study):
            key = condition_name(name, labels)
            rows.append(row(name, f"depth gap, {labels}", recovery.value(key)))
            recall = estimate(recovery.kept(key), recovery.retain)
            rows.append(row(name, f"retain recall, {labels}", recall))
            if study.shares:
                ratio = estimate(outcome.ratio(key), outcome.loss)
                rows.append(row(name, f"compute ratio, {labels}", ratio))
    return StudyTable(
        title=f"Depth gap by labels, cue {cue}",
        note="Depth gap after relearning: 0 is the oracle, 1 the original before any attack.",
        rows=tuple(rows),
    )
