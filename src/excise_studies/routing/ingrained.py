"""Post-hoc against routed removal of what is ever more deeply ingrained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.domains.facts import Facts
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method
from excise.methods.pretraining.pretrain import Pretrain, taught
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.levels import estimate
from excise_studies.matching import deepest, matched, stronger
from excise_studies.recovery import said
from excise_studies.routing.presets import grad_diff, maxent, rmu
from excise_studies.routing.setting import (
    Missed,
    Rest,
    RoutingOutcome,
    RoutingSetting,
    conclude,
    facts_setting,
    make_setting,
    misses,
    routed,
    said_masking,
    score_conditions,
    train_conditions,
)
from excise_studies.setting import ExperimentSetting, make_replicates

ROUTED = "routed"


class Ingrained(Study):
    """The same facts, read ever more often in training, and removed afterwards or by routing.

    Stated beforehand. Levels of exposure begin where facts are only half learned: the original's
    recall of the held-out test set at the fewest must be at most `most_recall`, or the study is
    invalid for want of headroom. At every level the strength of every post-hoc method is its
    learning rate, chosen on dev of `tuned_on`: among the factors of `sweep`, the lowest exact match
    on `dev_forget` of those whose exact match on `dev_retain` is at most `retain_cost` below the
    original's; where none is, the best keeper of retain. I is the depth gap on the held-out test
    set (after relearning) of the post-hoc methods, averaged, at the most exposures minus the same
    at the fewest. The gap is measured from the oracle of the same level, so that what exposures do
    to that is taken out. What is deeper ingrained is harder to remove afterwards if the lower end
    of I's 95 % interval is above `margin`, easier if the upper end is below minus it, and it makes
    no difference if the interval lies between. Exposures grow with the share of the training tokens
    that is to be forgotten; steps of all methods stay. J, I minus the same change of the routed
    model, stands beside it and decides nothing.

    Until seeds 1 to 3 had been run J decided, at 0.1: the routed model's noise came on top, and 98
    seeds would have been needed. With right labels for every row the routed condition is loss
    masking by construction, and is named so.
    """

    question: ClassVar[str] = (
        "Do post-hoc methods leave more, the more often the facts were read in training, and do "
        "they fall behind routing?"
    )
    statistic: ClassVar[str] = (
        "I = mean depth gap of post-hoc methods at the most exposures per fact minus the same at "
        "the fewest, on the held-out test set after relearning; deeper ingrained "
        "is harder to remove afterwards if the lower end of the 95 % interval is above the margin. "
        "Strengths of post-hoc methods chosen on dev of the tuned seeds at every level. Intervals "
        "over seeds and units, the same samples at all levels."
    )
    takes: ClassVar[str] = "40 minutes of one core, 1 GiB"

    name: Literal["ingrained"] = "ingrained"
    """Name on the command line."""
    seeds: tuple[int, ...] = Field(default=(4, 5, 6, 7, 8, 9, 10, 13), min_length=1)
    """Draws of the data; on seeds 1 to 3 statistic and margin were set."""
    margin: float = 0.05
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models, attacker."""
    mix: tuple[float, ...] = Field(default=(0.02, 0.04, 0.12, 0.5), min_length=2)
    """Shares of the tokens that are to be forgotten, ascending; the readings of a fact go with
    them."""
    most_recall: float = Field(default=0.9, gt=0, le=1)
    """Recall of the held-out test set that the original may have at the fewest readings."""
    tuned_on: tuple[int, ...] = Field(default=(0, 11, 12), min_length=1)
    """Draws on whose dev rows strengths are chosen, at every level."""
    sweep: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Factors on the learning rates of post-hoc methods."""
    retain_cost: float = Field(default=0.05, gt=0)
    """Exact match on `dev_retain` that a post-hoc method may cost."""
    routed: SerializeAsAny[Method] = routed()
    """Routed removal."""
    after: dict[str, SerializeAsAny[Method]] = {
        "grad_diff": grad_diff(),
        "maxent": maxent(),
        "rmu": rmu(),
    }
    """Post-hoc removal at its middle strength, by name."""
    rate: float = Field(default=1.0, gt=0, le=1)
    """Share of what is to be forgotten that carries a label, for routing."""
    missed: Missed = "occurrences"
    """What labels miss."""
    rest: Rest = "unlabeled"
    """What methods assume of rows without a label."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse shares out of order, data without shares, and no post-hoc method."""
        if sorted(set(self.mix)) != list(self.mix):
            raise ValueError("mix: give different shares in ascending order")
        if not isinstance(self.experiment.domain, Facts):
            raise ValueError(
                "experiment.domain: exposures are set by 'mix_share', which facts have"
            )
        if not self.after:
            raise ValueError("after: name at least one post-hoc method")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train, remove in both ways at every level, relearn, compare."""
        outcomes: dict[float, RoutingOutcome] = {}
        settings: dict[float, RoutingSetting] = {}
        factors: dict[float, dict[str, float]] = {}
        labels = misses(self.rate, self.missed, self.rest)
        for share in self.mix:
            experiment = setting_at(self, share)
            factors[share] = matched(
                self.after,
                self.sweep,
                experiment,
                make_replicates(experiment, self.tuned_on, runtime, pool),
                deepest(self.retain_cost),
                runtime,
                pool,
            )
            conditions = {
                name: (stronger(method, factors[share][name]), None)
                for name, method in self.after.items()
            }
            settings[share] = make_setting(experiment, self.seeds, runtime, pool)
            removals = train_conditions(
                {ROUTED: (self.routed, labels), **conditions}, settings[share], runtime, pool
            )
            outcomes[share] = score_conditions(
                removals, settings[share], self.seeds, runtime, pool, shares=()
            )
        first = self.seeds[0]
        seen = {
            share: exposures(setting.replicates[first].domain, setting.experiment.pretrain)
            for share, setting in settings.items()
        }
        effect, beside = grown(self, outcomes), grown(self, outcomes, beyond=(ROUTED,))
        voids = [
            f"{seen[s]:.0f} exposures: {o.recovery.invalid}"
            for s, o in outcomes.items()
            if o.recovery.invalid
        ]
        voids += no_headroom(self, outcomes[self.mix[0]])
        words = [spoken(self, outcomes, seen), f"I was {said(effect)}, J {said(beside)}."]
        words.append(said_masking({ROUTED: (self.routed, labels)}))
        last = self.mix[-1]
        return conclude(
            outcomes[last],
            settings[last],
            words,
            Decision(f"invalid: {'; '.join(voids)}") if voids else decide(self, effect),
            more=(_table(self, outcomes, seen, factors),),
            notes=(
                f"reference models and curves are those of {seen[last]:.0f} exposures per fact",
            ),
            brief=True,
        )


def setting_at(study: Ingrained, share: float) -> ExperimentSetting:
    """Return the setting with a share of tokens that are to be forgotten."""
    domain = study.experiment.domain.model_copy(update={"mix_share": share})
    return study.experiment.model_copy(update={"domain": domain})


def exposures(domain: Domain, pretrain: Pretrain) -> float:
    """Return how often training reads a fact that is to be forgotten, in any paraphrase.

    Args:
        domain: The data, with the share of the mix.
        pretrain: Steps and rows of a step.
    """
    rows = taught(domain)
    forget = [row for row in rows if row.capability]
    texts = pretrain.fit.steps * pretrain.fit.batch_size
    read = texts * domain.rows_per_text * len(forget) / len(rows)
    return read / len({row.unit for row in forget})


def no_headroom(study: Ingrained, fewest: RoutingOutcome) -> tuple[str, ...]:
    """Return why more readings could add nothing; nothing where they could."""
    recall = float(fewest.recovery.before.at("original")[0])
    if recall <= study.most_recall:
        return ()
    return (
        f"no headroom, the original recalls {recall:.2f} at the fewest exposures, above "
        f"{study.most_recall:g}",
    )


def grown(
    study: Ingrained, outcomes: Mapping[float, RoutingOutcome], beyond: Sequence[str] = ()
) -> Estimate:
    """Return I: units are the same at all levels, and so are the samples.

    Args:
        study: Names the post-hoc methods and the levels.
        outcomes: By share of the tokens.
        beyond: A condition whose own change is taken off; of the routed one it leaves J.
    """
    few, many = (outcomes[share].recovery for share in (study.mix[0], study.mix[-1]))

    def change(names: Iterable[str]) -> Array:
        at_most: Array = np.mean([many.gap(name) - few.gap(name) for name in names], axis=0)
        return at_most

    left = change(study.after)
    return estimate(left - change(beyond) if beyond else left, many.after)


def decide(study: Ingrained, effect: Estimate) -> Decision:
    """Return what I says under the margin."""
    words = {
        "above": "deeper ingrained is harder to remove afterwards: I is above the margin",
        "below": "deeper ingrained is easier to remove afterwards: I is below minus the margin",
        "equal": f"exposures make no difference: I lies within {study.margin:g}",
        "undecided": f"undecided: I's interval crosses {study.margin:g}",
    }
    asked = Contrast("I", effect, (-study.margin, study.margin), study.error)
    return Decision(asked.say(words), (asked,))


def spoken(
    study: Ingrained, outcomes: Mapping[float, RoutingOutcome], seen: Mapping[float, float]
) -> str:
    """Return the gaps at every level in words."""
    parts = []
    for share, outcome in outcomes.items():
        gaps = [f"{name} {outcome.recovery.gap(name)[0]:.2f}" for name in (ROUTED, *study.after)]
        known = outcome.recovery.before.at("original")[0]
        parts.append(
            f"at {seen[share]:.0f} exposures per fact (original {known:.2f}) {', '.join(gaps)}"
        )
    return f"Depth gaps were {'; '.join(parts)}."


def _table(
    study: Ingrained,
    outcomes: Mapping[float, RoutingOutcome],
    seen: Mapping[float, float],
    factors: Mapping[float, Mapping[str, float]],
) -> StudyTable:
    """Return gaps, recall and chosen strengths by exposures."""
    rows: list[StudyRow] = []
    for share, outcome in outcomes.items():
        level = f"{seen[share]:.0f} exposures"
        before = outcome.recovery.before
        known = estimate(before.at("original"), before)
        rows.append(row("original", f"held-out test set, {level}", known))
        for name in (ROUTED, *study.after):
            rows.append(row(name, f"depth gap, {level}", outcome.recovery.value(name)))
            recall = estimate(outcome.recovery.retain.at(name), outcome.recovery.retain)
            rows.append(row(name, f"retain recall, {level}", recall))
            before_attack = estimate(before.at(name), before)
            rows.append(row(name, f"held-out test set before the attack, {level}", before_attack))
            if name in factors[share]:
                rows.append(
                    StudyRow(
                        condition=name,
                        metric=f"factor on the learning rate, {level}",
                        value=factors[share][name],
                    )
                )
    return StudyTable(title="By exposures per fact", note=study.statistic, rows=tuple(rows))
