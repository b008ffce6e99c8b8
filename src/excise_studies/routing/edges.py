"""Where the mask goes: on edges that leave parameters, activations, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Estimate
from excise.methods.base import Method
from excise.methods.pretraining.sgtm import SGTM
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.recovery import RECOVERY, gaps, said
from excise_studies.routing.setting import (
    SHARES,
    Missed,
    Rest,
    RoutingOutcome,
    conclude,
    facts_setting,
    make_setting,
    masks_loss,
    misses,
    routed,
    said_masking,
    score_conditions,
    train_conditions,
)
from excise_studies.setting import ExperimentSetting

PARAMETERS, ZERO, REVERSED, BOTH, NEITHER = (
    "parameters", "activations", "activations, reversed", "both", "neither",
)  # fmt: skip


class Edges(Study):
    """The same modules and the same data; only the place of the mask differs.

    Stated beforehand. Two contrasts decide and share the error: the depth gap on the held-out test
    set (after relearning) of `activations`, and of `activations, reversed`, each minus that of
    `parameters`, averaged over the rates of labels. Edges that leave parameters hold better than
    the other if the lower end of this D's 95 % interval is above `margin`, worse if the upper end
    is below minus `margin`, and alike if it lies between. K is the same difference of retain
    recall, parameters minus the other: where parameters may cost more than `margin` of recall, no
    better hold is claimed. A rate at which the parameter condition is loss masking by construction
    is shown and does not count. Until seeds 1 to 3 had been run the better of the two was held
    against parameters.
    """

    question: ClassVar[str] = (
        "Does routing hold better and cost less where the mask is put on edges that leave "
        "parameters, on edges that leave activations, or on both?"
    )
    statistic: ClassVar[str] = (
        "D = depth gap on the held-out test set after relearning, activations (of weight 0, and "
        "`reversed`, which share the error) minus parameters, mean over the label rates at which "
        "the latter are no loss masking by construction; parameters hold better if the lower end "
        "of the 95 % interval is above the margin and their retain recall is not lower by more "
        "than it. Intervals over seeds and units."
    )
    takes: ClassVar[str] = "15 minutes of one core, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["edges"] = "edges"
    """Name on the command line."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """Draws of the data."""
    margin: float = 0.1
    """Share of the distance between the reference models, and of retain recall."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models, attacker."""
    routed: SGTM = routed()
    """Modules and shares of rows; `alpha` and `p_as` are replaced."""
    reversed: float = Field(default=-0.75, lt=0)
    """Weight of activation edges where they are reversed, as published for Expand-Route-Ablate."""
    rates: tuple[float, ...] = Field(default=(0.5,), min_length=1)
    """Shares of what is to be forgotten that carry a label; at 1 nothing can count."""
    missed: Missed = "occurrences"
    """What labels miss."""
    rest: Rest = "unlabeled"
    """What methods assume of rows without a label."""
    shares: tuple[float, ...] = SHARES
    """Shares of the steps of plain runs for the compute ratio."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train every condition at every rate, relearn, compare."""
        setting = make_setting(self.experiment, self.seeds, runtime, pool)
        conditions = {
            at(name, rate): (method, misses(rate, self.missed, self.rest))
            for rate in self.rates
            for name, method in places(self).items()
        }
        removals = train_conditions(conditions, setting, runtime, pool)
        outcome = score_conditions(removals, setting, self.seeds, runtime, pool, shares=self.shares)
        effects = contrasts(self, outcome)
        words = [f"{name} was {said(value)}." for name, value in effects.items()]
        words += [gaps(outcome.recovery), said_masking(conditions)]
        rows = tuple(row("contrast", name, value) for name, value in effects.items())
        table = StudyTable(title="Activations against parameters", note=self.statistic, rows=rows)
        return conclude(outcome, setting, words, decide(self, effects), more=(table,))


def places(study: Edges) -> dict[str, Method]:
    """Return the conditions by where the mask is.

    A labelled row that may write the core too (`p_as` 1) is masked by its activation edges alone.
    """
    settings = {
        PARAMETERS: {"p_as": 0.0, "alpha": 1.0},
        ZERO: {"p_as": 1.0, "alpha": 0.0},
        REVERSED: {"p_as": 1.0, "alpha": study.reversed},
        BOTH: {"p_as": 0.0, "alpha": 0.0},
        NEITHER: {"p_as": 1.0, "alpha": 1.0},
    }
    return {name: study.routed.model_copy(update=update) for name, update in settings.items()}


def masked_at(study: Edges, rate: float) -> bool:
    """Return whether the parameter condition is loss masking by construction at a rate."""
    return masks_loss(places(study)[PARAMETERS], misses(rate, study.missed, study.rest))


def at(name: str, rate: float) -> str:
    """Return the name of a condition at a rate of labels."""
    return f"{name}, {100 * rate:g} % labels"


def hold(name: str) -> str:
    """Return what D against one kind of activation edges is called."""
    return f"D (depth gap, {name} - parameters)"


def keep(name: str) -> str:
    """Return what K against one kind of activation edges is called."""
    return f"K (retain recall, parameters - {name})"


def contrasts(study: Edges, outcome: RoutingOutcome) -> dict[str, Estimate]:
    """Return D and K over the rates that count, where there are any, and D at each."""
    recovery = outcome.recovery
    counted = [rate for rate in study.rates if not masked_at(study, rate)]
    out: dict[str, Estimate] = {}
    for name in (ZERO, REVERSED):
        others = [at(name, rate) for rate in counted]
        own = [at(PARAMETERS, rate) for rate in counted]
        if counted:
            out[hold(name)] = recovery.contrast(others, own)
            kept = [
                recovery.retain.at(a) - recovery.retain.at(b)
                for a, b in zip(own, others, strict=True)
            ]
            out[keep(name)] = outcome.estimate(np.mean(kept, axis=0))
        for rate in study.rates:
            aside = "" if rate in counted else ", not counted"
            apart = recovery.contrast([at(name, rate)], [at(PARAMETERS, rate)])
            out[f"{hold(name)} at {100 * rate:g} % labels{aside}"] = apart
    return out


def decide(study: Edges, effects: Mapping[str, Estimate]) -> Decision:
    """Return what D and K say under the margin."""
    if hold(ZERO) not in effects:
        return Decision("none: at every rate edges that leave parameters are loss masking")
    words = {
        "above": "edges that leave parameters hold better",
        "below": "edges that leave activations hold better",
        "equal": f"alike within {study.margin:g}",
        "undecided": f"undecided, D's interval crosses {study.margin:g}",
    }
    parts: list[str] = []
    asked: list[Contrast] = []
    for name in (ZERO, REVERSED):
        held = Contrast(
            f"D against {name}", effects[hold(name)], (-study.margin, study.margin), study.error / 2
        )
        asked.append(held)
        text = held.say(words)
        if held.verdict == "above":
            # A claim of two parts errs no more often than one of them alone.
            kept = Contrast(
                f"K against {name}", effects[keep(name)], (-study.margin,), study.error / 2
            )
            if not kept.above(-study.margin):
                asked.append(kept)
                text = (
                    "undecided, edges that leave parameters hold better and may keep less of "
                    f"retain by more than {study.margin:g}"
                )
        parts.append(f"against {name}: {text}")
    return Decision("; ".join(parts), tuple(asked))
