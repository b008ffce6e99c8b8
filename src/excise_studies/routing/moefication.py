"""Dense training and MoE-fication by turns: what the split costs and what it buys, by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.core.stages import Runtime
from excise.domains.facts import Facts
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method, Removal
from excise.methods.pretraining.moefy import Moefy
from excise.record import StudyRow, StudyTable
from excise.run.results import model_ref
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import row
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import arms_table, gaps, said
from excise_studies.routing.setting import (
    SHARES,
    RoutingOutcome,
    RoutingSetting,
    facts_bench,
    groups_of,
    make_world,
    score_arms,
    tax_table,
    text_losses,
    train_arms,
)
from excise_studies.setting import ExperimentSetting, checkpoints, rails

MEASURED, RANDOM, DENSE = "measured neurons", "random neurons", "dense, measured neurons"

CONTROLS = (RANDOM, DENSE)


class Moefication(Study):
    """Neurons given by measured attribution and routed, against chance and against no routing.

    Stated beforehand. N, the net separation of an arm whose modules were emptied, is the rise of
    its loss on V over the original's minus the same rise on `retain_test`, in nats. S is N of the
    measured neurons minus N of random neurons, C is N of the measured neurons minus N of the same
    steps dense. Moefication separates if the lower ends of the 95 % intervals of both S and C are
    above `margin`; it does not if the upper end of either is below it.
    """

    question: ClassVar[str] = (
        "Does training dense and routing by turns split a network along its domains better than "
        "random neurons or dense training do, and at what cost by round?"
    )
    statistic: ClassVar[str] = (
        "N = loss on V minus loss on retain, each above the original's, modules emptied, in nats. "
        "Moefication separates if N of measured neurons exceeds that of random neurons (S) and of "
        "the same steps dense (C), both with the lower end of the 95 % interval above the margin; "
        "bootstrap over draws and units."
    )
    takes: ClassVar[str] = "5 minutes, 1 GiB"

    name: Literal["moefication"] = "moefication"
    """Name on the command line."""
    margin: float = 0.5
    """Nats."""
    bench: ExperimentSetting = facts_bench(
        domain=Facts(subjects=48, relations=4, objects=32, forget_share=0.34, cue="category")
    )
    """Data, models, attacker; rows of the domain carry its name."""
    moefy: Moefy = Moefy(rounds=3, neurons=0.25, p_off=0.5)
    """The method; `control` is replaced."""
    shares: tuple[float, ...] = Field(default=SHARES, min_length=1)
    """Shares of the steps of plain runs for the compute ratio."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train every arm, empty its modules, compare."""
        world = make_world(self.bench, self.seeds, runtime, pool)
        methods = {name: (method, None) for name, method in arms(self).items()}
        made = train_arms(methods, world, runtime, pool)
        outcome = score_arms(made, world, self.seeds, runtime, pool, shares=self.shares)
        found = measured(made, world, runtime, pool)
        contrasts = {
            "S (net separation, measured - random)": found.estimate(
                found.net(MEASURED) - found.net(RANDOM)
            ),
            "C (net separation, measured - dense)": found.estimate(
                found.net(MEASURED) - found.net(DENSE)
            ),
        }
        decision = decide(self, list(contrasts.values()))
        tables = (
            contrast_table(self, contrasts, found),
            rounds_table(made),
            tax_table(outcome),
            arms_table(outcome.found),
        )
        models = {**rails(world.draws, self.seeds), **checkpoints(made)}
        return StudyResult(
            tables=tables,
            decision=decision,
            paragraph=paragraph(self, contrasts, found, outcome, made, decision),
            domain=world.draws[self.seeds[0]].domain,
            models=tuple(model_ref(f"{arm}, draw {seed}", m) for (arm, seed), m in models.items()),
            notes=(
                "the method's settings were chosen by hand on draw 0",
                "relearning T is reported beside the statistic and decides nothing here"
                + (f"; on its own it is {outcome.found.void}" if outcome.found.void else ""),
            ),
        )


def arms(study: Moefication) -> dict[str, Method]:
    """Return the method and its controls."""
    controls = {MEASURED: "none", RANDOM: "random", DENSE: "dense"}
    return {
        name: study.moefy.model_copy(update={"control": control})
        for name, control in controls.items()
    }


@dataclass(frozen=True)
class SeparationLosses:
    """Losses by unit, resampled: on V and on `retain_test`."""

    v: Levels
    retain: Levels

    def net(self, arm: str) -> Array:
        """Return the net separation of an arm, of the data and of the samples."""
        rise_v = self.v.at(arm) - self.v.at("original")
        found: Array = rise_v - (self.retain.at(arm) - self.retain.at("original"))
        return found

    def estimate(self, values: Array) -> Estimate:
        """Return the estimate of values that rest on V."""
        return estimate(values, self.v.n)


def measured(
    made: Mapping[RunKey, Removal], world: RoutingSetting, runtime: Runtime, pool: Pool
) -> SeparationLosses:
    """Return losses on V and retain of rails and arms, resampled."""
    models = {**rails(world.draws, tuple(world.draws)), **checkpoints(made)}
    groups = groups_of(world.draws)
    v = levels(text_losses(models, world, runtime, pool, on="test"), groups)
    return SeparationLosses(v, levels(text_losses(models, world, runtime, pool), groups))


def decide(study: Moefication, contrasts: Sequence[Estimate]) -> str:
    """Return what S and C say under the margin."""
    against = dict(zip(("random neurons", "the same steps dense"), contrasts, strict=True))
    if all(found.low > study.margin for found in against.values()):
        return "moefication separates: S and C are above the margin"
    short = [name for name, found in against.items() if found.high < study.margin]
    if short:
        return f"it does not separate: no {study.margin:g} nats better than {' or '.join(short)}"
    return f"undecided: an interval crosses {study.margin:g} nats"


def contrast_table(
    study: Moefication, contrasts: Mapping[str, Estimate], found: SeparationLosses
) -> StudyTable:
    """Return S, C and the net separation of every arm, overall and by draw."""
    rows = [row("contrast", name, value) for name, value in contrasts.items()]
    for arm in (MEASURED, *CONTROLS):
        rows.append(row(arm, "net separation", found.estimate(found.net(arm))))
        rows.append(row(arm, "loss on V", found.estimate(found.v.at(arm))))
        rows.append(row(arm, "loss on retain", estimate(found.retain.at(arm), found.retain.n)))
        for seed in found.v.by_draw:
            rise = found.v.at(arm, seed) - found.v.at("original", seed)
            kept = found.retain.at(arm, seed) - found.retain.at("original", seed)
            rows.append(row(arm, "net separation", found.estimate(rise - kept), seed))
    return StudyTable(
        title="Separation without the modules", note=study.statistic, rows=tuple(rows)
    )


def by_round(made: Mapping[RunKey, Removal]) -> dict[tuple[str, int, str], list[float]]:
    """Return what was measured after every round: by arm, round and metric, one value a draw."""
    out: dict[tuple[str, int, str], list[float]] = {}
    for (arm, _), removal in made.items():
        for held in removal.extras["rounds"]:
            for metric, value in facts_of(held).items():
                out.setdefault((arm, held["round"], metric), []).append(value)
    return out


def facts_of(held: Mapping[str, Any]) -> dict[str, float]:
    """Return utility, separation and size of one round."""
    on, off = held["losses"]["on"], held["losses"]["off"]
    facts = {
        "retain loss, modules on": on["retain"],
        "utility: retain loss, modules emptied": off["retain"],
        "forget loss, modules on": on["labelled"],
        "separation: rise of the forget loss": held["separation"],
    }
    for whose in ("own", "core"):
        shares = [each[whose] for each in held["captured"].values()]
        name = {"own": "the domain's attribution captured", "core": "the core's"}[whose]
        facts[name] = sum(shares) / len(shares)
    core, both = held["active"]["core"], max(held["active"].values())
    facts["active parameters: core"] = float(core)
    facts["active parameters: core and module"] = float(both)
    return facts


def rounds_table(made: Mapping[RunKey, Removal]) -> StudyTable:
    """Return utility, separation and active parameters by arm and round, means over draws."""
    rows = [
        StudyRow(
            condition=f"{arm}, round {number}",
            metric=metric,
            value=sum(values) / len(values),
            low=min(values),
            high=max(values),
            n=len(values),
        )
        for (arm, number, metric), values in by_round(made).items()
    ]
    note = (
        "On rows of training, after each round. Interval: smallest and largest draw; n counts "
        "draws. Captured: share of the attribution to the domain, and to the core, that lies in "
        "the module's neurons."
    )
    return StudyTable(title="Utility, separation and size by round", note=note, rows=tuple(rows))


def paragraph(
    study: Moefication,
    contrasts: Mapping[str, Estimate],
    found: SeparationLosses,
    outcome: RoutingOutcome,
    made: Mapping[RunKey, Removal],
    decision: str,
) -> str:
    """Return the result in words, made of the numbers."""
    parts = by_round(made)

    def course(arm: str, metric: str) -> str:
        rounds = sorted({number for name, number, _ in parts if name == arm})
        means = [parts[arm, number, metric] for number in rounds]
        return ", ".join(f"{sum(values) / len(values):.2f}" for values in means)

    words = [
        f"Over {len(study.seeds)} draw(s) and {study.moefy.rounds} round(s), emptying the modules "
        f"cost {arm_course(MEASURED, course)}, {arm_course(RANDOM, course)}, "
        f"{arm_course(DENSE, course)}."
    ]
    words.append(
        "Net separation: "
        + ", ".join(
            f"{arm} {said(found.estimate(found.net(arm)))}" for arm in (MEASURED, *CONTROLS)
        )
        + "."
    )
    words += [f"{name} was {said(value)}." for name, value in contrasts.items()]
    core = parts[MEASURED, study.moefy.rounds, "active parameters: core"][0]
    both = parts[MEASURED, study.moefy.rounds, "active parameters: core and module"][0]
    words.append(
        f"At the end {core / both:.2f} of the parameters were active without the module, at "
        f"compute ratio {outcome.ratio(MEASURED)[0]:.2f} on retain. {gaps(outcome.found)}"
    )
    return " ".join([*words, f"Decision: {decision}."])


def arm_course(arm: str, course: Any) -> str:
    """Return the rises of the forget loss by round of one arm, with the retain loss behind."""
    rise = course(arm, "separation: rise of the forget loss")
    kept = course(arm, "utility: retain loss, modules emptied")
    return f"{arm} {rise} nats of the domain by round (retain then at {kept})"
