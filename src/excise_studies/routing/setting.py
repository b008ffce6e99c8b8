"""What the studies of gradient routing share: setting, labels, the alignment tax, tables.

Every trained model, score and attack is a stage, so that a study resumes where it was stopped, and
studies that lie side by side share originals, oracles, conditions and attacks.

The alignment tax is a compute ratio: the share of plain training that reaches a condition's loss on
`retain_test`, read off plain runs with shorter schedules.

Shape legend: S samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, Facts
from excise.evals.replicates import Decision, SeedEstimate
from excise.evals.stats import Array
from excise.methods import GRAM, Chain
from excise.methods.base import Method, Removal
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain, cut_to
from excise.methods.pretraining.routed.modules import Module
from excise.methods.pretraining.sgtm import SGTM
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.record import StudyRow, StudyTable
from excise.requests.recipe import EvalSpec
from excise.run.stages import ScoreModel
from excise.run.study import StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.attacking import Attacker, RunKey
from excise_studies.base import Replicate, row
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import RecoveryScores
from excise_studies.setting import (
    ExperimentSetting,
    Make,
    checkpoints,
    make_conditions,
    make_inits,
    make_replicates,
    measure_conditions,
    reference_models,
    result,
)

Missed = Literal["occurrences", "units", "structured"]
"""What labels miss: rows one by one, all rows of a unit, or first the paraphrases of which the
labeller does not know that they say the same."""

FOREIGN = (1, 2)
"""Those paraphrases: of the three in which facts are taught the labeller knows the first."""

Rest = Literal["core", "unlabeled"]
"""What methods assume of rows without a label."""

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the steps at which plain training is scored for the compute ratio."""

FLAT = 1e-4
"""Nats that the last plain run must gain on the one before it for its line to be followed."""

LENGTH = FACTS_MAX_LENGTH


def facts_setting(**changes: Any) -> ExperimentSetting:
    """Return the setting of the routing studies: 48 subjects, width 64, two blocks.

    Args:
        **changes: Fields of `Bench` that differ.
    """
    steps = {**FACTS_FIT, "steps": 300, "lr": 4e-3, "batch_size": 96, "micro_size": 24}
    chosen = {
        "domain": Facts(subjects=48, relations=4, objects=32, forget_share=0.34),
        "model": Scratch(width=64, blocks=2),
        "pretrain": Pretrain(fit=FitConfig(**steps), max_length=LENGTH, pack=(1, 1, 2, 4)),
        "attacker": Attacker(
            steps=60, rates=(1e-3, 3e-3), batch_size=32, checkpoints=(0, 10, 20, 40)
        ),
    }
    return ExperimentSetting(**{**chosen, **changes})


def routed(**changes: Any) -> SGTM:
    """Return the routed method of the studies: SGTM with neurons grown beside the model's own.

    Sure core rows always run without the modules, so that all that is drawn into them comes from
    labelled rows and from rows that nobody has looked at. Chosen on seed 0 (docs/lab-notes.md).

    Args:
        **changes: Settings that differ.
    """
    module = Module(width=0.5, heads=0, grow=True)
    return SGTM(**{"module": module, "ablate": "delete", "joint": (), "p_off": 1.0, **changes})


def misses(rate: float, kind: Missed = "occurrences", rest: Rest = "core") -> LabelNoise | None:
    """Return labels that reach a share of what is to be forgotten; None for all of it.

    Args:
        rate: Share that is labelled.
        kind: Whether rows are missed one by one, units whole, or paraphrases: those as far as they
            go, and beyond them rows one by one.
        rest: `core`: what is missed is labelled core, as by a labeller that only looks for the
            capability. `unlabeled`: labels are few but right; what is missed has none, nor has
            the same share of core rows, lest a missing label give rows away.
    """
    if rate >= 1:
        return None
    left = round(1 - rate, 6)
    which: dict[str, Any] = {"missed_occurrences": left}
    if kind == "units":
        which = {"missed_units": left}
    elif kind == "structured":
        share = len(FOREIGN) / (len(FOREIGN) + 1)
        which = {"missed_wordings": FOREIGN, "structured_rate": min(1.0, left / share)}
        which["missed_occurrences"] = max(0.0, (left - share) / (1 - share))
    if rest == "core":
        return LabelNoise.model_validate(which)
    return LabelNoise.model_validate({**which, "missed_as": "unlabeled", "unread_core": left})


@dataclass(frozen=True)
class LabelSetting:
    """One setting of the labels.

    Attributes:
        rate: Share of what is to be forgotten that is labelled.
        missed: What labels miss; empty at a rate of 1.
    """

    rate: float = 1.0
    missed: Missed | Literal[""] = ""

    def __str__(self) -> str:
        """Return its name."""
        return f"{100 * self.rate:g} %" + (f", missed {self.missed}" if self.missed else "")

    def labels(self, rest: Rest) -> LabelNoise | None:
        """Return the labels of this setting, given what is assumed of the rest."""
        return misses(self.rate, self.missed or "occurrences", rest)


ALL = LabelSetting()
"""Every row of what is to be forgotten carries a label."""


def label_settings(rates: Sequence[float], missed: Sequence[Missed]) -> tuple[LabelSetting, ...]:
    """Return all settings of the labels; nothing is missed at a rate of 1, so that is one."""
    settings = [LabelSetting(rate, kind if rate < 1 else "") for rate in rates for kind in missed]
    return tuple(dict.fromkeys(settings))


def masks_loss(method: Method, labels: LabelNoise | None = None) -> bool:
    """Return whether a routed method is loss masking by construction, so that it tells nothing.

    Core rows neither read nor write the module, labelled rows write it alone, and no row is without
    a label: what is left after the ablation has learned from the core rows as if the others bore no
    loss, whatever the module does.

    Args:
        method: Any method; others than `sgtm` and `gram` never are.
        labels: The given labels; None for right ones.
    """
    given = method.labels if isinstance(method, SGTM | GRAM) and method.labels else labels
    if given is not None:
        left_out = (given.missed_as == "unlabeled", given.unread_core, given.confidence, given.file)
        if any(left_out):
            return False
    if not isinstance(method, SGTM | GRAM) or method.joint or method.joint_down:
        return False
    apart = method.p_off == 1 if isinstance(method, SGTM) else method.p_cr == 0
    return apart and not method.p_as and not method.p_push


def said_masking(conditions: Mapping[str, tuple[Method, LabelNoise | None]]) -> str:
    """Return in a sentence which conditions are loss masking; nothing where none is."""
    names = [name for name, (method, labels) in conditions.items() if masks_loss(method, labels)]
    if not names:
        return ""
    return (
        f"Loss masking by construction, no evidence about routing: {'; '.join(names)} (all rows "
        "are labelled, core rows run without the module, and labelled rows write it alone)."
    )


def of_masking(
    decision: Decision, method: Method, labels: LabelNoise | None = None, about: str = "this"
) -> Decision:
    """Return a decision that says so where its routed condition is loss masking by construction.

    Args:
        decision: What the statistic says.
        method: The routed method.
        labels: Its labels.
        about: What of the decision rests on it.
    """
    if not masks_loss(method, labels):
        return decision
    why = (
        f"{about} is of loss masking, which the routed condition is by construction, not of routing"
    )
    return replace(decision, text=f"{decision.text} ({why})")


def labelled(method: Method, labels: LabelNoise | None) -> Method:
    """Return a method with the labels one has; of a chain, every link.

    A method whose own labels spread over units or groups keeps that. One that takes none is left
    alone.
    """
    if isinstance(method, Chain):
        links = tuple(labelled(link, labels) for link in method.methods)
        return method.model_copy(update={"methods": links})
    if labels is None or "labels" not in type(method).model_fields:
        return method
    given: LabelNoise | None = getattr(method, "labels", None)
    spread = given.spread if given is not None else labels.spread
    return method.model_copy(update={"labels": labels.model_copy(update={"spread": spread})})


def prepared(
    method: Method, experiment: ExperimentSetting, labels: LabelNoise | None = None
) -> Method:
    """Return a method with the schedule of the study and the labels one has; see `labelled`.

    Args:
        method: Any method; of a chain, every link.
        experiment: Gives the schedule of what trains from scratch and has none.
        labels: The given labels.
    """
    if isinstance(method, Chain):
        links = tuple(prepared(link, experiment, labels) for link in method.methods)
        return method.model_copy(update={"methods": links})
    fields = type(method).model_fields
    if "pretrain" in fields and getattr(method, "pretrain", None) is None:
        method = method.model_copy(update={"pretrain": experiment.pretrain})
    return labelled(method, labels)


@dataclass(frozen=True)
class RoutingSetting:
    """Everything trained before the conditions of a study, and what they start from.

    Attributes:
        experiment: Data, models, attacker.
        replicates: Data, original and oracle by seed.
        inits: A further random model by seed: what conditions from scratch start from.
    """

    experiment: ExperimentSetting
    replicates: Mapping[int, Replicate]
    inits: Mapping[int, Checkpoint]

    def make(self, method: Method, seed: int, labels: LabelNoise | None = None) -> Make:
        """Return what makes one condition of one seed, from scratch or from the original."""
        ready = prepared(method, self.experiment, labels)
        first = ready.methods[0] if isinstance(ready, Chain) else ready
        scratch = first.starts_from == "scratch"
        start = self.inits[seed] if scratch else self.replicates[seed].original
        return Make(ready, start, self.replicates[seed].domain)


def make_setting(
    experiment: ExperimentSetting, seeds: Sequence[int], runtime: Runtime, pool: Pool
) -> RoutingSetting:
    """Train original and oracle of every seed, and make the random models of its conditions."""
    replicates = make_replicates(experiment, seeds, runtime, pool)
    return RoutingSetting(experiment, replicates, make_inits(experiment, replicates, runtime, pool))


def train_conditions(
    methods: Mapping[str, tuple[Method, LabelNoise | None]],
    setting: RoutingSetting,
    runtime: Runtime,
    pool: Pool,
) -> dict[RunKey, Removal]:
    """Train every condition on every seed, one stage each.

    Args:
        methods: By condition: the method and its labels, None for right ones.
        setting: Data and models by seed.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    wanted = {
        (name, seed): setting.make(method, seed, labels)
        for name, (method, labels) in methods.items()
        for seed in setting.replicates
    }
    return make_conditions(wanted, runtime, pool)


# -- scores ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutingOutcome:
    """All conditions of a setting, scored.

    Attributes:
        recovery: Recall of the held-out test set, the relearn set and retain before and after
            relearning, reference models among the conditions.
        loss: Loss on `retain_test`, conditions, reference models and plain runs of shorter
            schedules.
        shares: Shares of the steps of those plain runs; empty where the tax is not asked for.
        removals: What methods left behind, by condition and seed.
    """

    recovery: RecoveryScores
    loss: Levels
    shares: tuple[float, ...] = ()
    removals: Mapping[RunKey, Removal] = field(default_factory=dict)

    def ratio(self, condition: str) -> Array:
        """Return a condition's compute ratio, in the layout of `levels`.

        Raises:
            AssertionError: If no plain run was made.
        """
        assert self.shares, "no plain run to read the ratio from"
        plain = [self.loss.at(shorter(share)) for share in self.shares]
        return compute_ratio(self.loss.at(condition), self.shares, np.stack(plain))

    def estimate(self, values: Array) -> SeedEstimate:
        """Return values in the layout of `levels` as an estimate with its interval."""
        return estimate(values, self.recovery.after)


def shorter(share: float) -> str:
    """Return the name of the plain run with a share of the steps."""
    return f"plain, {100 * share:g} % of the steps"


def compute_ratio(
    loss: Array, shares: Sequence[float], plain: Array, *, beyond: bool = False
) -> Array:
    """Return the share of plain compute that reaches a loss.

    Linear in the logarithm of the share between neighbouring runs; a run that is worse than a
    shorter one counts as equal to it.

    Source: GRAM (arXiv 2607.08077) calls compute ratio the share of the baseline's compute that
    reaches the same loss, read off a fitted power law; here neighbouring runs are interpolated.

    Args:
        loss: [1 + K + S] losses.
        shares: Shares of the steps, ascending.
        plain: [shares, 1 + K + S] losses of the plain runs.
        beyond: Whether the lines of the two runs at either end go on beyond them; else a loss
            beyond the ends has the share of the end.

    Returns:
        [1 + K + S] shares; NaN beyond an end at which more steps lower the loss no further.
    """
    best = np.minimum.accumulate(plain, axis=0)
    logs = np.log(np.asarray(shares, dtype=np.float64))
    out = np.empty_like(loss)
    for i, value in enumerate(loss):
        # np.interp wants ascending losses; of equal ones the shortest run must win.
        falling = best[:, i] - 1e-12 * np.arange(len(logs))
        at = np.interp(value, falling[::-1], logs[::-1])
        ends = ((0, 1),) if value > falling[0] else ((-2, -1),) if value < falling[-1] else ()
        for a, b in ends if beyond else ():
            fall = best[a, i] - best[b, i]
            slope = (logs[b] - logs[a]) / fall if fall > FLAT else math.nan
            at = logs[a] + slope * (best[a, i] - value)
        out[i] = np.exp(at)
    return out


def text_losses(
    models: Mapping[RunKey, Checkpoint],
    setting: RoutingSetting,
    runtime: Runtime,
    pool: Pool,
    on: str = "retain_test",
) -> dict[str, dict[int, dict[str, float]]]:
    """Return the loss on a scored set by condition, seed and unit, in nats.

    Args:
        models: By condition and seed.
        setting: Their data.
        runtime: Where stages are kept.
        pool: Worker processes.
        on: `retain_test`, `adjacent_test`, or `test` for the held-out test set of all capabilities.
    """
    domains = {seed: replicate.domain for seed, replicate in setting.replicates.items()}
    length = setting.experiment.pretrain.max_length
    return losses_by_unit(models, domains, (on,), runtime, pool, max_length=length)


def losses_by_unit(
    models: Mapping[RunKey, Checkpoint],
    domains: Mapping[int, Domain],
    on: Sequence[str],
    runtime: Runtime,
    pool: Pool,
    *,
    max_length: int,
) -> dict[str, dict[int, dict[str, float]]]:
    """Return the loss on the units of scored sets by condition, seed and unit, in nats.

    Args:
        models: By condition and seed.
        domains: Their data by seed.
        on: Scored sets, as in `text_losses`.
        runtime: Where stages are kept.
        pool: Worker processes.
        max_length: Tokens per row.
    """
    spec = EvalSpec(max_rows=0, max_length=max_length, samples=0)
    jobs = [ScoreModel(model, domains[seed], spec) for (_, seed), model in models.items()]
    out: dict[str, dict[int, dict[str, float]]] = {}
    for (name, seed), scored in zip(models, pool.map(runtime.run, jobs), strict=True):
        units: dict[str, list[float]] = {}
        for item in scored.items:
            if item.set.split(".")[0] in on and item.metric == "text_loss":
                units.setdefault(item.unit, []).append(item.value)
        out.setdefault(name, {})[seed] = {u: sum(v) / len(v) for u, v in units.items()}
    return out


def plain_curve(
    setting: RoutingSetting, shares: Sequence[float], runtime: Runtime, pool: Pool
) -> dict[RunKey, Checkpoint]:
    """Train plainly with shares of the steps, from the random models of the conditions."""
    full = setting.experiment.pretrain
    runs: dict[str, tuple[Method, LabelNoise | None]] = {
        shorter(share): (
            Plain(pretrain=cut_to(full, max(1, round(share * full.fit.steps)), "plain")),
            None,
        )
        for share in shares
    }
    return {k: r.checkpoint for k, r in train_conditions(runs, setting, runtime, pool).items()}


def score_conditions(
    removals: Mapping[RunKey, Removal],
    setting: RoutingSetting,
    seeds: Sequence[int],
    runtime: Runtime,
    pool: Pool,
    *,
    shares: Sequence[float] = SHARES,
) -> RoutingOutcome:
    """Score conditions and reference models, relearn with each, and measure the tax.

    The tax is read off shorter plain runs.

    Args:
        removals: By condition and seed.
        setting: Data and models, of `seeds` among others.
        seeds: Draws that are reported.
        runtime: Where stages are kept.
        pool: Worker processes.
        shares: Shares of the steps of the plain runs; empty for no tax.
    """
    replicates = {seed: setting.replicates[seed] for seed in seeds}
    conditions = {key: removal for key, removal in removals.items() if key[1] in replicates}
    models = checkpoints(conditions)
    recovery = measure_conditions(setting.experiment, models, replicates, runtime, pool)
    here = RoutingSetting(setting.experiment, replicates, setting.inits)
    curve = plain_curve(here, shares, runtime, pool) if shares else {}
    losses = text_losses(
        {**reference_models(replicates, seeds), **models, **curve}, here, runtime, pool
    )
    return RoutingOutcome(
        recovery, levels(losses, groups_of(replicates)), tuple(shares), conditions
    )


def groups_of(replicates: Mapping[int, Replicate]) -> dict[int, dict[str, str]]:
    """Return by seed the group of every unit of `retain_test` and the held-out test set."""
    return {
        seed: {
            row.unit: row.group
            for rows in (replicate.domain.retain_test, *replicate.domain.test.values())
            for row in rows
            if row.group
        }
        for seed, replicate in replicates.items()
    }


def tax_table(
    outcome: RoutingOutcome, title: str = "Loss on retain and the alignment tax"
) -> StudyTable:
    """Return losses on retain and compute ratios of conditions, reference models and plain runs."""
    rows: list[StudyRow] = []
    loss = outcome.loss
    for condition in loss.conditions:
        rows.append(row(condition, "retain loss", estimate(loss.at(condition), loss)))
        if outcome.shares and not condition.startswith("plain, "):
            rows.append(row(condition, "compute ratio", estimate(outcome.ratio(condition), loss)))
    ends = f" It is cut at {min(outcome.shares):g} and 1." if outcome.shares else ""
    return StudyTable(
        title=title,
        note=(
            "Compute ratio: the share of plain training's steps that reaches the condition's loss "
            f"on retained facts in a paraphrase of their own; 1 is no tax.{ends}"
        ),
        rows=tuple(rows),
    )


def conclude(
    outcome: RoutingOutcome,
    setting: RoutingSetting,
    words: Sequence[str],
    decision: Decision,
    *,
    more: Sequence[StudyTable] = (),
    notes: Sequence[str] = (),
    brief: bool = False,
) -> StudyResult:
    """Return the result of a study of one setting: tables, decision, one paragraph.

    Args:
        outcome: The conditions.
        setting: Their data and models.
        words: Sentences between those on the reference models and on retain, and the decision.
        decision: What the statistic says; without power of the attacker it is invalid.
        more: Tables that come first.
        notes: What a reader should know.
        brief: Whether the paragraph leaves out what every single condition kept.
    """
    absorption = absorption_table(outcome.removals)
    tables = [*more, tax_table(outcome), *([absorption] if absorption else [])]
    return result(
        outcome.recovery,
        [*words, *([] if brief else [said_retain(outcome)])],
        decision,
        setting.replicates,
        checkpoints(outcome.removals),
        tables=tables,
        notes=notes,
        chosen="settings of data, models and methods were chosen by hand on the seeds named above",
    )


def said_retain(outcome: RoutingOutcome) -> str:
    """Return what conditions kept, and the share of compute at which plain training does."""
    recovery, parts = outcome.recovery, []
    for condition in recovery.conditions:
        ratio = f" at compute ratio {outcome.ratio(condition)[0]:.2f}" if outcome.shares else ""
        parts.append(f"{condition} {recovery.retain.at(condition)[0]:.2f}{ratio}")
    original = f"Retain recall, the original's {recovery.retain.at('original')[0]:.2f}"
    return f"{original}: {', '.join(parts)}."


def absorption_table(removals: Mapping[RunKey, Removal]) -> StudyTable | None:
    """Return where rows write and what the ablation did, means over seeds; None where unknown."""
    sums: dict[tuple[str, str], list[float]] = {}
    for (condition, _), removal in removals.items():
        for metric, value in absorbed(removal).items():
            sums.setdefault((condition, metric), []).append(value)
    if not sums:
        return None
    rows = [
        StudyRow(condition=condition, metric=metric, value=sum(values) / len(values), n=len(values))
        for (condition, metric), values in sums.items()
    ]
    return StudyTable(
        title="Absorption",
        note=(
            "Share of the squared gradient that rows of a kind would write into the modules before "
            "the ablation, and their loss before and after it; `missed` are forget rows without a "
            "label. n counts seeds."
        ),
        rows=tuple(rows),
    )


def absorbed(removal: Removal) -> dict[str, float]:
    """Return absorption and losses of one removal, as far as it tells them."""
    out: dict[str, float] = {}
    for kind, values in removal.extras.get("absorption", {}).items():
        modules = [v for name, v in values["share"].items() if name.startswith("module_")]
        out[f"{kind} rows into modules"] = sum(modules)
    for when, values in removal.extras.get("losses", {}).items():
        for kind, value in values.items():
            out[f"loss of {kind} rows, {when}"] = value
    return out
