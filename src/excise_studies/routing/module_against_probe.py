"""Does a module absorb what a probe cannot find?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError, nearest
from excise.core.stages import Runtime
from excise.data.domain import CORE, Domain
from excise.data.labels import LabelNoise
from excise.domains.definitions import DEFINITIONS_FIT, Definitions
from excise.evals.replicates import Contrast, Decision, contrasts
from excise.evals.stats import Estimate
from excise.methods import GRAM, Filtering, GradDiffPretrain, Relabel
from excise.methods.base import Method, Removal
from excise.methods.choosing import better
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.relabel import Judged
from excise.methods.pretraining.routed.modules import Module
from excise.models.checkpoint import Checkpoint
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.attacking import Attacker, RunKey
from excise_studies.base import ScoreByUnit, row
from excise_studies.leaderboard.trials import ScoreDev, Tried, TrySetting
from excise_studies.levels import estimate, levels
from excise_studies.recovery import RECOVERY, RecoveryScores, groups_of, listed
from excise_studies.routing.setting import (
    RoutingOutcome,
    RoutingSetting,
    conclude,
    facts_setting,
    make_setting,
    routed,
    score_conditions,
    train_conditions,
)
from excise_studies.setting import ExperimentSetting

PROBE, PUSH = "probe + filter", "probe + push"
ROUTED: Final = ("sgtm", "gram")
AGAINST = f"Against {PROBE}"
GIVEN, TRUE = "filter, given labels", "filter, true labels"

EVERY: Final = 100_000
"""More rows than dev has."""

Part = Literal["labelled", "found", "not found"]
"""What is known of a unit: it carries a label; the probe labels all its rows; or it does not."""

PARTS: Final[tuple[Part, ...]] = ("labelled", "found", "not found")


def rare_prose() -> ExperimentSetting:
    """Return animals' definitions, 5 % of the tokens, among plants' and general English."""
    fit = FitConfig(**{**DEFINITIONS_FIT, "lr": 4e-3})
    return facts_setting(
        domain=Definitions(documents=200, prose=2500, words=20, exposure="seen"),
        pretrain=Pretrain(fit=fit, max_length=48),
        attacker=Attacker(
            steps=60, rates=(1e-3, 3e-3), batch_size=32, checkpoints=(0, 5, 10, 20, 40)
        ),
    )


def gram(**changes: Any) -> GRAM:
    """Return GRAM as under partial labels: labelled rows write their module alone."""
    module = Module(width=0.5, grow=True)
    return GRAM(**{"p_as": 0.0, "p_cr": 0.2, "module": module, **changes})


def probe(**changes: Any) -> Relabel:
    """Return the probe; every definition is a unit of its own, so rows may be folded one by one."""
    return Relabel(fold_by="row", **changes)


def contestants() -> dict[str, tuple[Method, ...]]:
    """Return the arms that are tuned, each with as many settings."""
    pushed = routed(p_push=0.5, read=0.5)
    return {
        PROBE: (probe(), probe(l2=0.1), probe(rule="pu")),
        PUSH: tuple(
            probe(then=GradDiffPretrain(**how))
            for how in ({}, {"weight": 0.3}, {"push": "uniform"})
        ),
        "sgtm": (routed(), routed(p_push=0.5), pushed),
        "gram": (gram(), gram(p_cr=0.0), gram(p_push=0.5)),
        "probe + sgtm": (
            probe(then=routed()), probe(then=pushed), probe(then=pushed, clear=1.0),
        ),
        "probe + gram": (
            probe(then=gram()), probe(then=gram(p_push=0.5)), probe(then=gram(), clear=1.0),
        ),
    }  # fmt: skip


class ModuleAgainstProbe(Study):
    """A probe that filters or pushes against modules that absorb, at the same partial labels.

    Definitions of animals are 5 % of the tokens that a model is trained on from scratch, among
    definitions of plants and general English. Nobody has looked at half of the definitions to
    forget, each a unit of its own, nor at half of the rest. A probe that learned from the labels
    labels further rows, which are left out or pushed away; modules get the gradient of labelled
    rows and share that of rows nobody has looked at. All arms start from the same random weights,
    have the same labels and take the same steps.

    Stated beforehand. Every arm has the same number of settings; the one that counts has the
    highest loss on `dev_forget` among those whose loss on `dev_retain` is at most `retain_margin`
    nats a token above the original's, on the seeds `tuned_on`. The gap is (arm - oracle) /
    (original before the attack - oracle), knowledge being exp(-loss), on the held-out test set
    after the relearn set was learned again at the rate and step that dev chose: other definitions,
    which the arm was given too. D of a routed arm is the gap of the probe that filters minus its
    own. U is the same over the units of the test set without a label which the probe did not find
    all rows of. The module leaves less where an interval lies above `margin`, more where below,
    no less where within; the four contrasts share the error rate. "Less" counts only if the arm's
    loss on retain is shown to lie less than `retain_margin` nats a token above that of the probe
    that filters, and if the attacker teaches the arm the relearn set to the share
    `experiment.attacker.power` of what it teaches the oracle: what costs more, or resists the
    attacker, may leave less for that alone. "More" counts only if its loss is shown to lie less
    than `retain_margin` below, and if the attacker teaches the probe that filters; anything else
    needs all four. Everything else is shown and decides nothing.

    The rule on what counts was made one-sided after seeds 1 to 5 had been seen, where both arms
    left more and cost more, and all four had been asked for; the seeds reported are others.
    """

    question: ClassVar[str] = (
        "Half of the units to forget have no label: does a routed module leave less of them than a "
        "probe that finds and filters, and does it absorb those the probe does not find?"
    )
    statistic: ClassVar[str] = (
        "D = depth gap on the held-out test set after relearning, probe and filter minus SGTM or "
        "GRAM; U = the same on unlabelled units that the probe did not find; each against the "
        "margin from both sides, corrected for four contrasts. Leaving less counts at a retain "
        "loss less than `retain_margin` nats above, leaving more at one less than that below, and "
        "where the attacker teaches the side that leaves less the relearn set."
    )
    takes: ClassVar[str] = "long: 100 minutes of one core, 1 GiB; resumes where it was stopped"
    quoted: ClassVar[tuple[str, ...]] = (AGAINST, RECOVERY)
    pictured: ClassVar[str] = "depth gap"

    name: Literal["module-against-probe"] = "module-against-probe"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    seeds: tuple[int, ...] = Field(default=tuple(range(6, 14)), min_length=1)
    """Draws that are reported."""
    tuned_on: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Draws on whose dev rows the setting of every arm is chosen."""
    experiment: ExperimentSetting = Field(default_factory=rare_prose)
    """Data, models, attacker."""
    labels: LabelNoise = LabelNoise(missed_units=0.5, missed_as="unlabeled", unread_core=0.5)
    """What labels miss: right where they are, and absent alike on what is to be forgotten and on
    the rest, so that having none gives nothing away."""
    arms: dict[str, tuple[SerializeAsAny[Method], ...]] = Field(default_factory=contestants)
    """Settings of every arm, equally many."""
    retain_margin: float = Field(default=0.1, gt=0)
    """Nats a token by which losses on retain may differ."""

    @model_validator(mode="after")
    def _equal(self) -> Self:
        """Refuse unequal searches, an arm that decides and is missing, a probe that is none."""
        for name in (PROBE, *ROUTED):
            if name not in self.arms:
                raise ValueError(f"arms: '{name}' decides; {nearest(name, self.arms)}")
        if len({len(settings) for settings in self.arms.values()}) > 1 or not self.arms[PROBE]:
            raise ValueError("arms: give every arm as many settings, one at least")
        if not all(isinstance(each, Relabel) for each in self.arms[PROBE]):
            raise ValueError(f"arms: '{PROBE}' takes settings of relabel, which finds rows")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Choose settings, train all arms, read what the probe found, relearn, compare."""
        setting = make_setting(self.experiment, (*self.tuned_on, *self.seeds), runtime, pool)
        chosen, search = choose_settings(self, setting, runtime, pool)
        mine = {s: setting.replicates[s] for s in self.seeds}
        setting = replace(setting, replicates=mine)
        wanted: dict[str, tuple[Method, LabelNoise | None]] = {
            TRUE: (Filtering(), None),
            GIVEN: (Filtering(), self.labels),
            **{name: (method, self.labels) for name, method in chosen.items()},
        }
        removals = train_conditions(wanted, setting, runtime, pool)
        outcome = score_conditions(removals, setting, self.seeds, runtime, pool, shares=())
        parts = find_parts(self, chosen[PROBE], setting, runtime, pool)
        found = compare(self, outcome, setting, parts)
        tables = (
            against_table(self, found),
            parts_table(outcome.recovery, setting, parts),
            probe_table(removals, parts),
            power_table(outcome.recovery),
            search,
        )
        return conclude(
            outcome,
            setting,
            sentences(outcome.recovery, setting, parts, found),
            decide(self, found),
            more=tables,
            notes=(f"arms were chosen on dev of seeds {', '.join(map(str, self.tuned_on))}",),
            brief=True,
        )


# -- settings --------------------------------------------------------------------------------------


def choose_settings(
    study: ModuleAgainstProbe, setting: RoutingSetting, runtime: Runtime, pool: Pool
) -> tuple[dict[str, Method], StudyTable]:
    """Return the setting of every arm that dev of the tuned seeds chose, and what was tried.

    Raises:
        UserError: If no setting of an arm gives a model.
    """
    length = study.experiment.pretrain.max_length
    jobs: dict[tuple[str, int, int], TrySetting] = {}
    for name, methods in study.arms.items():
        for i, method in enumerate(methods):
            for seed in study.tuned_on:
                make = setting.make(method, seed, study.labels)
                jobs[name, i, seed] = TrySetting(
                    make.method, make.start, make.domain, make.domain, seed, EVERY, length
                )
    tried = dict(zip(jobs, pool.map(runtime.run, list(jobs.values())), strict=True))
    plain = [
        ScoreDev(setting.replicates[s].original, setting.replicates[s].domain, EVERY, length)
        for s in study.tuned_on
    ]
    limit = mean(retain for _, retain in pool.map(runtime.run, plain)) + study.retain_margin
    chosen: dict[str, Method] = {}
    rows = [StudyRow(condition="limit", metric="loss on dev retain", value=limit)]
    for name, methods in study.arms.items():
        best: tuple[int, Tried] | None = None
        why = ""
        for i in range(len(methods)):
            each = [tried[name, i, seed] for seed in study.tuned_on]
            why = next((one.failed for one in each if one.failed), "")
            if why:
                continue
            now = Tried(mean(one.forget for one in each), mean(one.retain for one in each))
            rows += [
                StudyRow(condition=f"{name}, setting {i + 1}", metric=metric, value=value)
                for metric, value in (
                    ("loss on dev forget", now.forget), ("loss on dev retain", now.retain),
                )
            ]  # fmt: skip
            if better(now, best and best[1], limit):
                best = (i, now)
        if best is None:
            raise UserError(f"arm '{name}' has no setting that gives a model: {why}")
        chosen[name] = methods[best[0]]
        rows.append(StudyRow(condition=name, metric="setting chosen", value=best[0] + 1))
    return chosen, StudyTable(
        title="Settings on dev of the tuned seeds",
        note="The highest loss on dev forget within the limit; no attack is seen. Nats a token.",
        rows=tuple(rows),
    )


# -- what the probe found --------------------------------------------------------------------------


@dataclass(frozen=True)
class FindUnits(Stage[dict[str, Part]]):
    """What becomes of every unit to forget: labelled, found by the probe, or not found.

    Attributes:
        method: The probe; its labels and folds are drawn as where it is applied.
        start: What it was applied to.
        domain: The data.
        seed: Its seed.
    """

    version: ClassVar[int] = 1

    method: Relabel
    start: Checkpoint
    domain: Domain
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "found-units"

    def make(self, ctx: Context) -> None:
        """Judge the rows again, and write the part of every unit."""
        units = part_of_units(self.method.judged(self.start, self.domain, ctx))
        write_text(ctx.work / "units.json", json.dumps(units))

    def read(self, folder: Path) -> dict[str, Part]:
        """Return what was written."""
        data: dict[str, Part] = json.loads((folder / "units.json").read_text(encoding="utf-8"))
        return data


def part_of_units(judged: Judged) -> dict[str, Part]:
    """Return the part of every unit to forget; one with a row that nothing labels is not found."""
    out: dict[str, Part] = {}
    for given, now in zip(judged.given, judged.relabelled, strict=True):
        if given.capability:
            part: Part = "labelled"
            if given.label <= CORE:
                part = "found" if now.label > CORE else "not found"
            out[given.unit] = max(part, out.get(given.unit, part), key=PARTS.index)
    return out


def find_parts(
    study: ModuleAgainstProbe,
    method: Method,
    setting: RoutingSetting,
    runtime: Runtime,
    pool: Pool,
) -> dict[int, dict[str, Part]]:
    """Return the part of every unit by seed."""
    jobs = []
    for seed in study.seeds:
        make = setting.make(method, seed, study.labels)
        assert isinstance(make.method, Relabel)
        jobs.append(FindUnits(make.method, make.start, make.domain, seed))
    return dict(zip(study.seeds, pool.map(runtime.run, jobs), strict=True))


def of_part(
    recovery: RecoveryScores,
    setting: RoutingSetting,
    parts: Mapping[int, Mapping[str, Part]],
    part: Part,
) -> RecoveryScores | None:
    """Return scores of the units of a part alone, over the seeds that have some; None of none."""
    attacked = recovery.attacked

    def kept(units: ScoreByUnit, seed: int) -> dict[str, float]:
        return {unit: x for unit, x in units.items() if parts[seed].get(unit) == part}

    seeds = tuple(s for s in recovery.seeds if kept(attacked["oracle", s].after, s))
    if not seeds:
        return None
    groups = {s: groups_of(setting.replicates[s].domain) for s in seeds}
    names = dict.fromkeys(name for name, _ in attacked)
    before, after = (
        levels(
            {n: {s: kept(getattr(attacked[n, s], when), s) for s in seeds} for n in names}, groups
        )
        for when in ("before", "after")
    )
    return replace(recovery, seeds=seeds, before=before, after=after)


# -- comparison ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A routed arm against the probe that filters.

    Attributes:
        gaps: D, and U where units were not found, by name.
        retain: Its loss on retain minus the probe's, nats a token.
        weak: Those of the two that the attacker does not teach.
    """

    gaps: Mapping[str, Estimate]
    retain: Estimate
    weak: tuple[str, ...] = ()


def taught(recovery: RecoveryScores, name: str) -> float:
    """Return what the attacker teaches a condition of the relearn set, as a share of the oracle."""
    return float(recovery.t.at(name)[0] / recovery.t.at("oracle")[0])


def compare(
    study: ModuleAgainstProbe,
    outcome: RoutingOutcome,
    setting: RoutingSetting,
    parts: Mapping[int, Mapping[str, Part]],
) -> dict[str, Compared]:
    """Return every routed arm against the probe that filters."""
    recovery, loss = outcome.recovery, outcome.loss
    missed = of_part(recovery, setting, parts, "not found")
    out: dict[str, Compared] = {}
    for name in ROUTED:
        gaps: dict[str, Estimate] = {f"D, {name}": recovery.contrast([PROBE], [name])}
        if missed is not None:
            gaps[f"U, {name}"] = missed.contrast([PROBE], [name])
        retain = estimate(loss.at(name) - loss.at(PROBE), loss)
        power = study.experiment.attacker.power
        weak = tuple(each for each in (PROBE, name) if taught(recovery, each) < power)
        out[name] = Compared(gaps, retain, weak)
    return out


def decide(study: ModuleAgainstProbe, found: Mapping[str, Compared]) -> Decision:
    """Return what D and U say of every routed arm, or why they count for nothing."""
    values = {key: value for each in found.values() for key, value in each.gaps.items()}
    asked = contrasts(values, (-study.margin, study.margin), study.error)
    words = {
        "above": "the module leaves less",
        "below": "the module leaves more",
        "equal": f"the module leaves no less within {study.margin:g}",
        "undecided": "undecided",
    }
    parts: list[str] = []
    used: list[Contrast] = []
    for name, each in found.items():
        said: list[str] = []
        needed: set[float] = set()
        for key in each.gaps:
            verdict = asked[key].verdict
            sides = {"above": (1,), "below": (-1,), "undecided": ()}.get(verdict, (-1, 1))
            needed |= {side * study.retain_margin for side in sides}
            against = hindrance(study, name, each, sides)
            text = f"{'all units' if key.startswith('D') else 'units not found'}: "
            text += asked[key].say(words)
            said.append(f"{text}, which counts for nothing, for {against}" if against else text)
        if len(said) == 1:
            said.append("the probe found every unit, so nothing says what a module absorbs")
        parts.append(f"{name}: {', '.join(said)}")
        if needed:
            retain = f"Retain of {name} minus {PROBE}"
            used.append(Contrast(retain, each.retain, tuple(sorted(needed)), study.error))
        used += [asked[key] for key in each.gaps]
    return Decision("; ".join(parts), tuple(used))


def hindrance(study: ModuleAgainstProbe, name: str, each: Compared, sides: tuple[int, ...]) -> str:
    """Return why a verdict counts for nothing; empty where it counts.

    Args:
        study: The margin on retain.
        name: The routed arm.
        each: How it compares.
        sides: 1 where the arm must cost no more and be taught by the attacker, -1 where the probe
            that filters must; none of what is undecided.
    """
    margin = study.retain_margin
    retain = Contrast("", each.retain, (-margin, margin), study.error)
    for side, arm in ((1, name), (-1, PROBE)):
        if side not in sides:
            continue
        if arm in each.weak:
            return f"the attacker does not teach {arm}"
        if not (retain.below(margin) if side > 0 else retain.above(-margin)):
            return f"{arm} is not shown to cost less than {margin:g} nats more on retain"
    return ""


def sentences(
    recovery: RecoveryScores,
    setting: RoutingSetting,
    parts: Mapping[int, Mapping[str, Part]],
    found: Mapping[str, Compared],
) -> list[str]:
    """Return the result in sentences, made of the numbers."""
    names = recovery.conditions
    out = [f"Depth gaps: {listed({name: recovery.value(name) for name in names})}."]
    counts = Counter(part for units in parts.values() for part in units.values())
    missed = counts["found"] + counts["not found"]
    if missed:
        out.append(f"The probe found {counts['found']} of {missed} units without a label.")
    for part in PARTS:
        some = of_part(recovery, setting, parts, part)
        if some is not None:
            gaps = listed({name: some.value(name) for name in (PROBE, *ROUTED)})
            out.append(f"On units {part}: {gaps}.")
    for name, each in found.items():
        out.append(f"{name}: {listed({**each.gaps, 'retain in nats': each.retain})}.")
    return out


# -- tables ----------------------------------------------------------------------------------------


def against_table(study: ModuleAgainstProbe, found: Mapping[str, Compared]) -> StudyTable:
    """Return D, U and the difference on retain of every routed arm."""
    rows = [
        row(name, metric, value)
        for name, each in found.items()
        for metric, value in {**each.gaps, "retain loss minus the probe's": each.retain}.items()
    ]
    return StudyTable(title=AGAINST, note=study.statistic, rows=tuple(rows))


def parts_table(
    recovery: RecoveryScores, setting: RoutingSetting, parts: Mapping[int, Mapping[str, Part]]
) -> StudyTable:
    """Return the gap of every arm by what is known of a unit."""
    rows: list[StudyRow] = []
    for part in PARTS:
        some = of_part(recovery, setting, parts, part)
        if some is not None:
            rows += [row(name, f"gap, {part}", some.value(name)) for name in some.conditions]
    return StudyTable(
        title="Depth gap by what the probe found",
        note=(
            "Units of the held-out test set after relearning, each part between its own reference "
            "models: labelled; without a label and found whole by the probe; not found."
        ),
        rows=tuple(rows),
    )


def probe_table(
    removals: Mapping[RunKey, Removal], parts: Mapping[int, Mapping[str, Part]]
) -> StudyTable:
    """Return how many rows without a label the probe of every arm found, and units by part."""
    rows: list[StudyRow] = []
    for (name, seed), removal in removals.items():
        # What filters by itself has these facts without a method behind it.
        quality = removal.extras.get("relabel", removal.extras).get("probe", {})
        rows += [
            StudyRow(condition=name, seed=seed, metric=metric, value=quality[metric])
            for metric in ("recall", "precision")
            if quality.get(metric) is not None
        ]
    for seed, units in parts.items():
        counts = Counter(units.values())
        rows += [
            StudyRow(condition=PROBE, seed=seed, metric=f"units {part}", value=counts[part])
            for part in PARTS
        ]
    return StudyTable(
        title="What the probe found",
        note="Recall: of the rows to forget without a label; precision: of the rows it labels.",
        rows=tuple(rows),
    )


def power_table(recovery: RecoveryScores) -> StudyTable:
    """Return what the attacker teaches every condition."""
    return StudyTable(
        title="Power of the attacker",
        note="Knowledge of the relearn set after relearning, as a share of the oracle's.",
        rows=tuple(
            StudyRow(condition=name, metric="taught", value=taught(recovery, name), n=recovery.t.n)
            for name in recovery.conditions
        ),
    )
