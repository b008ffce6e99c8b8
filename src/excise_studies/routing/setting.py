"""What the studies of gradient routing share: setting, labels, the alignment tax, tables.

Every trained model, score and attack is a stage, so that a study resumes where it was stopped, and
studies that lie side by side share originals, oracles, arms and attacks.

The alignment tax is a compute ratio: the share of plain training that reaches an arm's loss on
`retain_test`, read off plain runs with shorter schedules.

Shape legend: S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from excise.core.stages import Runtime
from excise.data.labels import LabelNoise
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, Facts
from excise.evals.stats import Array, Estimate
from excise.methods import Chain
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
    make_arms,
    make_draws,
    make_inits,
    measure_arms,
    rails,
    result,
)

Missed = Literal["occurrences", "units"]
"""What labels miss: rows one by one, or all rows of a unit."""

Rest = Literal["core", "unlabeled"]
"""What is told of rows without a label."""

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of the steps at which plain training is scored for the compute ratio."""

LENGTH = FACTS_MAX_LENGTH


def facts_bench(**changes: Any) -> ExperimentSetting:
    """Return the bench of the routing studies: 48 subjects, width 64, two blocks.

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
    labelled rows and from rows that nobody has looked at. Chosen on draw 0 (docs/lab-notes.md).

    Args:
        **changes: Settings that differ.
    """
    module = Module(width=0.5, heads=0, grow=True)
    return SGTM(**{"module": module, "ablate": "delete", "joint": (), "p_off": 1.0, **changes})


def misses(rate: float, kind: Missed = "occurrences", rest: Rest = "core") -> LabelNoise | None:
    """Return labels that reach a share of what is to be forgotten; None for all of it.

    Args:
        rate: Share that is labelled.
        kind: Whether rows are missed one by one, or units whole.
        rest: `core`: what is missed is told to be core, as by a labeller that only looks for the
            capability. `unlabeled`: labels are few but sure; nothing is told of what is missed,
            nor of the same share of core rows, lest a missing label give rows away.
    """
    if rate >= 1:
        return None
    left = round(1 - rate, 6)
    which = {"missed_units": left} if kind == "units" else {"missed_occurrences": left}
    if rest == "core":
        return LabelNoise.model_validate(which)
    return LabelNoise.model_validate({**which, "missed_as": "unlabeled", "unread_core": left})


def prepared(method: Method, bench: ExperimentSetting, labels: LabelNoise | None = None) -> Method:
    """Return a method with the schedule of the bench and the labels one has.

    A method whose own labels spread over units or groups keeps that.

    Args:
        method: Any method; of a chain, every link.
        bench: Gives the schedule of what trains from scratch and has none.
        labels: What labels are told; methods that read none are left alone.
    """
    if isinstance(method, Chain):
        links = tuple(prepared(link, bench, labels) for link in method.methods)
        return method.model_copy(update={"methods": links})
    fields, update = type(method).model_fields, dict[str, Any]()
    if "pretrain" in fields and getattr(method, "pretrain", None) is None:
        update["pretrain"] = bench.pretrain
    if "labels" in fields and labels is not None:
        own: LabelNoise | None = getattr(method, "labels", None)
        spread = own.spread if own is not None else labels.spread
        update["labels"] = labels.model_copy(update={"spread": spread})
    return method.model_copy(update=update)


@dataclass(frozen=True)
class RoutingSetting:
    """The draws of a study, and what arms start from.

    Attributes:
        bench: Data, models, attacker.
        draws: Data, original and oracle by seed.
        inits: A further random model by seed: what arms from scratch start from.
    """

    bench: ExperimentSetting
    draws: Mapping[int, Replicate]
    inits: Mapping[int, Checkpoint]

    def make(self, method: Method, seed: int, labels: LabelNoise | None = None) -> Make:
        """Return what makes one arm of one draw, from scratch or from the original."""
        ready = prepared(method, self.bench, labels)
        first = ready.methods[0] if isinstance(ready, Chain) else ready
        scratch = first.starts_from == "scratch"
        start = self.inits[seed] if scratch else self.draws[seed].original
        return Make(ready, start, self.draws[seed].domain)


def make_world(
    bench: ExperimentSetting, seeds: Sequence[int], runtime: Runtime, pool: Pool
) -> RoutingSetting:
    """Train original and oracle of every draw, and make the random models of its arms."""
    draws = make_draws(bench, seeds, runtime, pool)
    return RoutingSetting(bench, draws, make_inits(bench, draws, runtime, pool))


def train_arms(
    methods: Mapping[str, tuple[Method, LabelNoise | None]],
    world: RoutingSetting,
    runtime: Runtime,
    pool: Pool,
) -> dict[RunKey, Removal]:
    """Train every arm on every draw, one stage each.

    Args:
        methods: By arm: the method and its labels, None for right ones.
        world: The draws.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    wanted = {
        (name, seed): world.make(method, seed, labels)
        for name, (method, labels) in methods.items()
        for seed in world.draws
    }
    return make_arms(wanted, runtime, pool)


# -- scores ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutingOutcome:
    """All arms of a world, scored.

    Attributes:
        found: V, T and retain recall before and after T is relearned, rails among the arms.
        loss: Loss on `retain_test`, arms, rails and plain runs of shorter schedules.
        shares: Shares of the steps of those plain runs; empty where the tax is not asked for.
        removals: What methods left behind, by arm and draw.
    """

    found: RecoveryScores
    loss: Levels
    shares: tuple[float, ...] = ()
    removals: Mapping[RunKey, Removal] = field(default_factory=dict)

    def ratio(self, arm: str) -> Array:
        """Return an arm's compute ratio: of the data, then of the samples.

        Raises:
            AssertionError: If no plain run was made.
        """
        assert self.shares, "no plain run to read the ratio from"
        plain = [self.loss.at(shorter(share)) for share in self.shares]
        return compute_ratio(self.loss.at(arm), self.shares, np.stack(plain))

    def estimate(self, values: Array) -> Estimate:
        """Return values of the data and the samples as an estimate with its interval."""
        return estimate(values, self.found.after.n)


def shorter(share: float) -> str:
    """Return the name of the plain run with a share of the steps."""
    return f"plain, {100 * share:g} % of the steps"


def compute_ratio(loss: Array, shares: Sequence[float], plain: Array) -> Array:
    """Return the share of plain compute that reaches a loss.

    Linear in the logarithm of the share between neighbouring runs; a run that is worse than a
    shorter one counts as equal to it. Beyond the ends it is the end.

    Args:
        loss: [1 + S] losses.
        shares: Shares of the steps, ascending.
        plain: [shares, 1 + S] losses of the plain runs.

    Returns:
        [1 + S] shares.
    """
    best = np.minimum.accumulate(plain, axis=0)
    logs = np.log(np.asarray(shares, dtype=np.float64))
    out = np.empty_like(loss)
    for i, value in enumerate(loss):
        # np.interp wants ascending losses; of equal ones the shortest run must win.
        falling = best[:, i] - 1e-12 * np.arange(len(logs))
        out[i] = np.exp(np.interp(value, falling[::-1], logs[::-1]))
    return out


def text_losses(
    models: Mapping[RunKey, Checkpoint],
    world: RoutingSetting,
    runtime: Runtime,
    pool: Pool,
    on: str = "retain_test",
) -> dict[str, dict[int, dict[str, float]]]:
    """Return the loss on a scored set by arm, draw and unit, in nats.

    Args:
        models: By arm and draw.
        world: Their data.
        runtime: Where stages are kept.
        pool: Worker processes.
        on: `retain_test`, `adjacent_test`, or `test` for V of all capabilities.
    """
    spec = EvalSpec(max_rows=0, max_length=world.bench.pretrain.max_length, samples=0)
    jobs = [
        ScoreModel(model, world.draws[seed].domain, spec) for (name, seed), model in models.items()
    ]
    out: dict[str, dict[int, dict[str, float]]] = {}
    for (name, seed), scored in zip(models, pool.map(runtime.run, jobs), strict=True):
        units: dict[str, list[float]] = {}
        for item in scored.items:
            if item.set.split(".")[0] == on and item.metric == "text_loss":
                units.setdefault(item.unit, []).append(item.value)
        out.setdefault(name, {})[seed] = {u: sum(v) / len(v) for u, v in units.items()}
    return out


def plain_curve(
    world: RoutingSetting, shares: Sequence[float], runtime: Runtime, pool: Pool
) -> dict[RunKey, Checkpoint]:
    """Train plainly with shares of the steps, from the random models of the arms."""
    full = world.bench.pretrain
    runs: dict[str, tuple[Method, LabelNoise | None]] = {
        shorter(share): (
            Plain(pretrain=cut_to(full, max(1, round(share * full.fit.steps)), "plain")),
            None,
        )
        for share in shares
    }
    return {k: r.checkpoint for k, r in train_arms(runs, world, runtime, pool).items()}


def score_arms(
    made: Mapping[RunKey, Removal],
    world: RoutingSetting,
    seeds: Sequence[int],
    runtime: Runtime,
    pool: Pool,
    *,
    shares: Sequence[float] = SHARES,
) -> RoutingOutcome:
    """Score arms and rails, relearn T with each, and read the tax off shorter plain runs.

    Args:
        made: By arm and draw.
        world: The draws, `seeds` among them.
        seeds: Draws that are reported.
        runtime: Where stages are kept.
        pool: Worker processes.
        shares: Shares of the steps of the plain runs; empty for no tax.
    """
    draws = {seed: world.draws[seed] for seed in seeds}
    arms = {key: removal for key, removal in made.items() if key[1] in draws}
    models = checkpoints(arms)
    found = measure_arms(world.bench, models, draws, runtime, pool)
    here = RoutingSetting(world.bench, draws, world.inits)
    curve = plain_curve(here, shares, runtime, pool) if shares else {}
    losses = text_losses({**rails(draws, seeds), **models, **curve}, here, runtime, pool)
    return RoutingOutcome(found, levels(losses, groups_of(draws)), tuple(shares), arms)


def groups_of(draws: Mapping[int, Replicate]) -> dict[int, dict[str, str]]:
    """Return by draw the group of every unit of `retain_test` and V."""
    return {
        seed: {
            row.unit: row.group
            for rows in (draw.domain.retain_test, *draw.domain.test.values())
            for row in rows
            if row.group
        }
        for seed, draw in draws.items()
    }


def tax_table(
    outcome: RoutingOutcome, title: str = "Loss on retain and the alignment tax"
) -> StudyTable:
    """Return losses on retain and compute ratios of arms, rails and plain runs."""
    rows: list[StudyRow] = []
    loss = outcome.loss
    for arm in loss.arms:
        rows.append(row(arm, "retain loss", estimate(loss.at(arm), loss.n)))
        if outcome.shares and not arm.startswith("plain, "):
            rows.append(row(arm, "compute ratio", estimate(outcome.ratio(arm), loss.n)))
    ends = f" It is cut at {min(outcome.shares):g} and 1." if outcome.shares else ""
    return StudyTable(
        title=title,
        note=(
            "Compute ratio: the share of plain training's steps that reaches the arm's loss on "
            f"retained facts in a wording of their own; 1 is no tax.{ends}"
        ),
        rows=tuple(rows),
    )


def conclude(
    outcome: RoutingOutcome,
    world: RoutingSetting,
    words: Sequence[str],
    decision: str,
    *,
    more: Sequence[StudyTable] = (),
    notes: Sequence[str] = (),
    brief: bool = False,
) -> StudyResult:
    """Return the result of a study of one world: tables, decision, one paragraph.

    Args:
        outcome: The arms.
        world: Their draws.
        words: Sentences between those on the rails and on retain, and the decision.
        decision: What the statistic says; without power of the attacker it is void.
        more: Tables that come first.
        notes: What a reader should know.
        brief: Whether the paragraph leaves out what every single arm kept.
    """
    absorption = absorption_table(outcome.removals)
    tables = [*more, tax_table(outcome), *([absorption] if absorption else [])]
    return result(
        outcome.found,
        [*words, *([] if brief else [said_retain(outcome)])],
        decision,
        world.draws,
        checkpoints(outcome.removals),
        tables=tables,
        notes=notes,
        chosen="settings of data, models and methods were chosen by hand on the draws named above",
    )


def said_retain(outcome: RoutingOutcome) -> str:
    """Return what arms kept, and at which share of the compute plain training keeps as much."""
    found, parts = outcome.found, []
    for arm in found.arms:
        ratio = f" at compute ratio {outcome.ratio(arm)[0]:.2f}" if outcome.shares else ""
        parts.append(f"{arm} {found.retain.at(arm)[0]:.2f}{ratio}")
    original = f"Retain recall, the original's {found.retain.at('original')[0]:.2f}"
    return f"{original}: {', '.join(parts)}."


def absorption_table(removals: Mapping[RunKey, Removal]) -> StudyTable | None:
    """Return where rows write and what the ablation did, means over draws; None where unknown."""
    sums: dict[tuple[str, str], list[float]] = {}
    for (arm, _), removal in removals.items():
        for metric, value in absorbed(removal).items():
            sums.setdefault((arm, metric), []).append(value)
    if not sums:
        return None
    rows = [
        StudyRow(condition=arm, metric=metric, value=sum(values) / len(values), n=len(values))
        for (arm, metric), values in sums.items()
    ]
    return StudyTable(
        title="Absorption",
        note=(
            "Share of the squared gradient that rows of a kind would write into the modules "
            "before the ablation, and their loss before and after it; `missed` are forget rows "
            "without a label. n counts draws."
        ),
        rows=tuple(rows),
    )


def absorbed(removal: Removal) -> dict[str, float]:
    """Return absorption and losses of one removal, as far as it tells them."""
    out: dict[str, float] = {}
    for kind, held in removal.extras.get("absorption", {}).items():
        modules = [v for name, v in held["share"].items() if name.startswith("module_")]
        out[f"{kind} rows into modules"] = sum(modules)
    for when, held in removal.extras.get("losses", {}).items():
        for kind, value in held.items():
            out[f"loss of {kind} rows, {when}"] = value
    return out
