"""Studies of gradient routing: the tax by hand, decisions on made-up numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from excise.data.domain import UNLABELED
from excise.data.labels import LabelNoise, forget_score, give_labels, label_quality, label_rows
from excise.domains.definitions import Definitions
from excise.domains.facts import Facts
from excise.evals.stats import Estimate
from excise.methods import RMU, SGTM, Chain, Filtering
from excise.methods.base import Cost, Removal
from excise.methods.pretraining.pretrain import corpus
from excise.models.checkpoint import Checkpoint
from excise_studies.attacking import Attacked
from excise_studies.levels import Levels, levels
from excise_studies.recovery import gather
from excise_studies.routing import edges, era_after_training, ingrained, partial_labels, repair
from excise_studies.routing import routing_scale as scale
from excise_studies.routing.setting import (
    RoutingOutcome,
    absorbed,
    absorption_table,
    compute_ratio,
    facts_setting,
    misses,
    prepared,
    said_retain,
    shorter,
    tax_table,
)

SEEDS = (1, 2, 3)
DOMAIN = Facts(subjects=120, relations=4, objects=8).build()
V = sorted({row.unit for row in DOMAIN.test["alpha"]})
KEPT = sorted({row.unit for row in DOMAIN.retain_test})
SHARES = (0.25, 0.5, 1.0)
PLAIN = {shorter(0.25): 2.0, shorter(0.5): 1.0, shorter(1.0): 0.5}


def known(units: list[str], value: float) -> dict[str, float]:
    """Return units of which a share is known."""
    return {u: float(i * 37 % len(units) < value * len(units)) for i, u in enumerate(units)}


def outcome_of(
    after: Mapping[str, float],
    *,
    retain: Mapping[str, float] | None = None,
    loss: Mapping[str, float] | None = None,
    shares: tuple[float, ...] = SHARES,
) -> RoutingOutcome:
    """Return conditions that know so much after the attack; the original knows all."""
    values = {"original": 1.0, "oracle": 0.0, **after}
    kept = retain or {}

    def one(name: str, value: float) -> Attacked:
        first = known(V, 1.0 if name == "original" else value)
        mine = known(KEPT, kept.get(name, 1.0))
        t = {"t": 1.0}
        return Attacked((0, 8), 1, (first, known(V, value)), (t, t), (mine, mine))

    attacked = {(n, s): one(n, v) for n, v in values.items() for s in SEEDS}
    found = gather(attacked, dict.fromkeys(SEEDS, DOMAIN), power=0.8)
    losses = {**dict.fromkeys(values, 0.5), **(loss or {}), **(PLAIN if shares else {})}
    on = {name: {s: dict.fromkeys(KEPT, x) for s in SEEDS} for name, x in losses.items()}
    return RoutingOutcome(found, levels(on, {}), shares)


# -- the setting -----------------------------------------------------------------------------------


def test_compute_ratio_by_hand() -> None:
    plain = np.array([[2.0], [1.0], [0.5]])

    def ratio(loss: float) -> float:
        return float(compute_ratio(np.array([loss]), SHARES, plain)[0])

    assert ratio(1.0) == pytest.approx(0.5)
    assert ratio(0.75) == pytest.approx(math.sqrt(0.5))
    assert [ratio(9.0), ratio(0.1)] == pytest.approx([0.25, 1.0])
    bumpy = np.array([[1.0], [3.0], [0.5]])
    assert compute_ratio(np.array([1.0]), SHARES, bumpy)[0] == pytest.approx(0.25)


def test_labels_of_a_study_meet_their_rate() -> None:
    rows = label_rows(corpus(DOMAIN), tuple(DOMAIN.forget))
    assert misses(1.0) is None
    few = misses(0.25, "units", "unlabeled")
    assert few is not None
    told = give_labels(rows, few, seed=3)
    forget = [row for row in told if row.capability]
    assert sum(row.label > 0 for row in forget) / len(forget) == pytest.approx(0.25, abs=0.01)
    core = [row for row in told if not row.capability]
    unread = [row for row in core if row.label == UNLABELED]
    assert len(unread) / len(core) == pytest.approx(0.75, abs=0.01)
    assert all(row.label in (UNLABELED, 1) for row in forget)
    kinds = {(row.unit, row.label) for row in forget}
    assert len(kinds) == len({row.unit for row in forget})
    sure = misses(0.25, "occurrences")
    assert sure is not None
    assert all(row.label >= 0 for row in give_labels(rows, sure, seed=3))
    assert all(forget_score(row) == 0 for row in unread)


def test_labels_spread_before_they_are_used() -> None:
    rows = label_rows(corpus(DOMAIN), tuple(DOMAIN.forget))
    noise = LabelNoise(missed_occurrences=0.5, missed_as="unlabeled", unread_core=0.5)
    alone = label_quality(give_labels(rows, noise, seed=3))
    spread = give_labels(rows, noise.model_copy(update={"spread": "unit"}), seed=3)
    assert alone["occurrences"] == pytest.approx(0.5, abs=0.01)
    assert label_quality(spread)["occurrences"] == label_quality(spread)["units"] == alone["units"]
    assert all(row.label <= 0 for row in spread if not row.capability)


def test_arms_get_the_schedule_and_the_labels_of_the_study() -> None:
    experiment, labels = facts_setting(), misses(0.5)
    ready = prepared(Chain(methods=(SGTM(), RMU())), experiment, labels)
    assert isinstance(ready, Chain)
    first = ready.methods[0]
    assert isinstance(first, SGTM)
    assert (first.pretrain, first.labels) == (experiment.pretrain, labels)
    assert ready.methods[1] == RMU(labels=labels)
    spreads = prepared(SGTM(labels=LabelNoise(spread="unit")), experiment, labels)
    assert isinstance(spreads, SGTM)
    assert spreads.labels == LabelNoise(missed_occurrences=0.5, spread="unit")
    own = experiment.pretrain.model_copy(update={"max_length": 9})
    kept = prepared(Filtering(pretrain=own), experiment)
    assert isinstance(kept, Filtering)
    assert (kept.pretrain, kept.labels) == (own, None)


def test_tables_and_words_by_hand() -> None:
    outcome = outcome_of({"a": 0.5}, retain={"a": 0.5}, loss={"a": 1.0})
    assert "a 0.5" in said_retain(outcome)
    assert "ratio 0.50" in said_retain(outcome)
    settings = {(row.condition, row.metric): row.value for row in tax_table(outcome).rows}
    assert settings["a", "compute ratio"] == pytest.approx(0.5)
    assert settings["oracle", "retain loss"] == pytest.approx(0.5)
    assert (shorter(0.5), "compute ratio") not in settings


def test_absorption_sums_modules_and_leaves_out_who_tells_nothing() -> None:
    share = {"module_1": 0.25, "module_2": 0.25, "core": 0.5}
    extras = {"absorption": {"missed": {"share": share}}, "losses": {"after": {"missed": 4.0}}}
    told = Removal(Checkpoint(Path("nowhere")), (), Cost(), extras)
    found = absorbed(told)
    assert found == {"missed rows into modules": 0.5, "loss of missed rows, after": 4.0}
    silent = replace(told, extras={})
    table = absorption_table({("a", 1): told, ("a", 2): told, ("b", 1): silent})
    assert table is not None
    assert {row.condition for row in table.rows} == {"a"}
    assert absorption_table({("b", 1): silent}) is None


# -- decisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "zero", "negative", "kept", "said"),
    [
        (0.1, 0.9, 0.8, 1.0, "edges that leave parameters hold better"),
        (0.9, 0.9, 0.2, 1.0, "reversed: edges that leave activations hold better"),
        (0.5, 0.5, 0.9, 1.0, "activations: alike"),
        (0.5, 0.9, 0.5, 1.0, "reversed: alike"),
        (0.02, 0.02, 0.9, 1.0, "activations: at the floor"),
        (0.99, 0.99, 1.0, 1.0, "activations: at the ceiling"),
        (0.1, 0.9, 0.9, 0.5, "may keep less"),
    ],
)
def test_edges(parameters: float, zero: float, negative: float, kept: float, said: str) -> None:
    study = edges.Edges(seeds=SEEDS)
    after = {edges.PARAMETERS: parameters, edges.ZERO: zero, edges.REVERSED: negative}
    after |= {edges.BOTH: 0.5, edges.NEITHER: 1.0}
    everywhere = {edges.at(n, rate): x for n, x in after.items() for rate in study.rates}
    mine = {edges.at(edges.PARAMETERS, rate): kept for rate in study.rates}
    found = edges.contrasts(study, outcome_of(everywhere, retain=mine))
    for name, gap in ((edges.ZERO, zero), (edges.REVERSED, negative)):
        assert found[edges.hold(name)].value == pytest.approx(gap - parameters, abs=0.05)
    assert said in edges.decide(study, found).text


def test_the_edges_of_a_study_are_what_they_are_called() -> None:
    conditions: dict[str, Any] = edges.places(edges.Edges())
    written = {
        name: condition._rules()["forget"][0].write for name, condition in conditions.items()
    }
    passed = {name: condition._rules()["forget"][0].edges for name, condition in conditions.items()}
    assert written[edges.PARAMETERS] == written[edges.BOTH] == ("self",)
    assert written[edges.ZERO] == written[edges.NEITHER] == ("self", "core")
    assert passed[edges.PARAMETERS] == passed[edges.NEITHER] == {}
    assert passed[edges.ZERO] == passed[edges.BOTH] == {"core": 0.0}
    assert passed[edges.REVERSED] == {"core": -0.75}


@pytest.mark.parametrize(
    ("mine", "other", "kept", "said"),
    [
        (0.2, 0.9, 1.0, "sgtm beats filtering"),
        (0.2, 0.9, 0.9, "below 0.98"),
        (0.9, 0.2, 1.0, "does not beat"),
        (0.5, 0.5, 1.0, "does not beat"),
    ],
)
def test_partial_labels(mine: float, other: float, kept: float, said: str) -> None:
    study = partial_labels.PartialLabels(
        rates=(1.0, 0.5), arms=("sgtm", "filtering"), preset="sgtm", against="filtering"
    )
    settings = partial_labels.label_settings_of(study)
    assert [str(c) for c in settings] == [
        "100 %", "50 %, missed occurrences", "50 %, missed units",
    ]  # fmt: skip
    half = {partial_labels.condition_name("sgtm", c): mine for c in settings if c.rate < 1}
    half |= {partial_labels.condition_name("filtering", c): other for c in settings if c.rate < 1}
    whole = {partial_labels.condition_name(n, settings[0]): 0.0 for n in study.arms}
    retain = {partial_labels.condition_name("sgtm", c): kept for c in settings}
    outcomes = {"none": outcome_of({**half, **whole}, retain=retain)}
    found = partial_labels.difference(study, outcomes)
    assert found is not None
    assert found[0].value == pytest.approx(other - mine, abs=0.05)
    assert said in partial_labels.decide(study, found).text
    table = partial_labels.grid(study, outcomes["none"], "none")
    assert len(table.rows) == 2 * 3 * 3
    less = study.model_copy(update={"rates": (1.0,)})
    assert partial_labels.difference(less, outcomes) is None
    assert partial_labels.decide(less, None).text.startswith("none:")


def test_what_text_keeps_is_a_share_of_the_originals() -> None:
    outcome = outcome_of({"sgtm": 0.2}, retain={"original": 0.5, "sgtm": 0.25})
    recovery = outcome.recovery
    assert recovery.kept("sgtm")[0] == pytest.approx(0.25, abs=0.05)
    assert replace(recovery, absolute=False).kept("sgtm")[0] == pytest.approx(0.5, abs=0.1)


def test_partial_labels_has_real_prose() -> None:
    study = partial_labels.PartialLabels.full()
    assert [str(c) for c in partial_labels.label_settings_of(study)] == [
        "100 %", "50 %, missed units",
    ]  # fmt: skip
    assert {study.preset, study.against} < set(partial_labels.methods_of(study))
    few = partial_labels.PartialLabels(arms=("sgtm",))
    assert list(partial_labels.methods_of(few)) == [few.preset, few.against, "sgtm"]
    inside = partial_labels.prose_setting(prose_around=40).domain
    assert isinstance(inside, Definitions)
    assert (inside.prose_around, inside.documents) == (40, 800)


def test_a_study_of_arms_that_do_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"no condition .sgtn.*sgtm"):
        partial_labels.PartialLabels(arms=("sgtn",))
    with pytest.raises(ValidationError, match="ascending"):
        scale.RoutingScale(widths=(64, 32, 48, 96))
    with pytest.raises(ValidationError, match="1 is missing"):
        scale.RoutingScale(shares=(0.5, 0.9))
    with pytest.raises(ValidationError, match="no 'cats / dogs'"):
        scale.RoutingScale(pair="cats / dogs")
    with pytest.raises(ValidationError, match="ascending"):
        ingrained.Ingrained(mix=(0.5, 0.2))


def losses_at(tax: float) -> dict[str, float]:
    """Return losses of plain runs that fall by a nat with every doubling, and of a condition."""
    plain = {shorter(share): -math.log2(share) for share in SHARES}
    return {**plain, scale.FILTERED: 0.0, scale.ROUTED: -math.log2(1 - tax)}


def scale_outcome(taxes: Mapping[int, float]) -> scale.ScaleOutcome:
    """Return sizes a tenfold apart whose routed condition has a tax."""

    def on(losses: Mapping[str, float]) -> Levels:
        by_seed = {n: {s: dict.fromkeys(KEPT, x) for s in SEEDS} for n, x in losses.items()}
        return levels(by_seed, {})

    away = on({shorter(1.0): 3.0, scale.FILTERED: 5.0, scale.ROUTED: 4.0})
    return scale.ScaleOutcome(
        SHARES,
        tuple(taxes),
        tuple(1000 * 10**i for i in range(len(taxes))),
        {width: on(losses_at(tax)) for width, tax in taxes.items()},
        dict.fromkeys(taxes, away),
    )


def test_routing_scale() -> None:
    study = scale.RoutingScale(widths=(16, 32, 64, 128))
    falling = scale_outcome({16: 0.4, 32: 0.3, 64: 0.2, 128: 0.1})
    assert falling.ratio(16, scale.ROUTED).value == pytest.approx(0.6)
    assert falling.removed(16).value == pytest.approx(0.5)
    found = falling.slope(scale.ROUTED)
    assert found.value == pytest.approx(0.1)
    assert falling.slope(scale.FILTERED).value == pytest.approx(0.0)
    assert falling.beyond().value == pytest.approx(0.1)
    assert "shrinks" in scale.decide(study, found).text
    growing = scale_outcome({16: 0.1, 32: 0.2, 64: 0.3, 128: 0.4})
    assert "grows" in scale.decide(study, growing.slope(scale.ROUTED)).text
    same = scale_outcome(dict.fromkeys((16, 32, 64, 128), 0.1))
    assert "stays" in scale.decide(study, same.slope(scale.ROUTED)).text
    better = scale_outcome({16: -0.5, 32: 0.0})
    assert better.ratio(16, scale.ROUTED).value == pytest.approx(1.5)


def test_one_rule_sets_all_sizes() -> None:
    study = scale.RoutingScale()
    methods = scale.conditions(study, 4 * study.model.width)
    fit = study.pretrain.fit
    routed = methods[scale.ROUTED]
    assert isinstance(routed, SGTM)
    assert routed.labels is not None
    schedules: dict[str, Any] = {n: getattr(m, "pretrain", None) for n, m in methods.items()}
    for schedule in schedules.values():
        assert schedule.fit.lr == pytest.approx(fit.lr / 2)
    assert schedules[shorter(1.5)].fit.steps == 1.5 * fit.steps


def test_a_line_is_followed_beyond_its_ends_only_where_it_falls() -> None:
    plain = np.array([[2.0], [1.0], [0.5]])

    def beyond(loss: float, plain: Any = plain) -> float:
        return float(compute_ratio(np.array([loss]), SHARES, plain, beyond=True)[0])

    assert [beyond(3.0), beyond(0.25), beyond(0.75)] == pytest.approx(
        [0.125, math.sqrt(2), math.sqrt(0.5)]
    )
    assert math.isnan(beyond(0.25, np.array([[2.0], [0.5], [0.5]])))


@pytest.mark.parametrize(
    ("none", "retain", "said"),
    [(0.2, 0.25, "light touch"), (0.2, 0.9, "brings knowledge back"), (0.9, 0.2, "removes")],
)
def test_repair(none: float, retain: float, said: str) -> None:
    study = repair.Repair(lengths=(0.01, 0.1))
    light = {(side, length): 0.2 for side in ("mixture", "oracle on the mixture", "retain")
             for length in study.lengths}  # fmt: skip
    ends = {("retain", 0.1): retain, ("mixture", 0.1): 0.9, ("oracle on the mixture", 0.1): 0.1}
    after = {repair.named(*at): value for at, value in {**light, **ends}.items()}
    outcome = outcome_of({repair.NONE: none, **after})
    found = repair.effects(study, outcome)
    assert found[repair.MIXTURE][0.1].value == pytest.approx(0.8 - none, abs=0.07)
    decision = repair.decide(study, found[repair.RETAIN], outcome.recovery.weak)
    assert said in decision.text.split("; ")[1]
    assert [contrast.error for contrast in decision.contrasts] == [0.025, 0.025]
    fit = repair.schedule(study, 0.01).fit
    assert (fit.steps, fit.lr, fit.warmup) == (3, study.lr, 0)


def test_a_repair_that_was_not_attacked_is_no_light_touch() -> None:
    study = repair.Repair(lengths=(0.01, 0.1))
    same = {n: Estimate(0.0, -0.01, 0.01, 9) for n in study.lengths}
    assert repair.decide(study, same, {}).text.count("a light touch") == 2
    weak = {repair.named("retain", 0.01): (1,)}
    decision = repair.decide(study, same, weak)
    assert decision.text.startswith("1 % of training: invalid, relearning did not teach")
    assert decision.text.count("a light touch") == 1
    assert len(decision.contrasts) == 1
    assert repair.decide(study, same, {repair.NONE: (2,)}).contrasts == ()


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [((0.1, 0.01), "ascending"), ((0.01, 0.0101), "the same number of steps")],
)
def test_lengths_of_repairs_are_different(lengths: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        repair.Repair(lengths=lengths)


@pytest.mark.parametrize(
    ("few", "many", "said"),
    [(0.2, 0.9, "harder"), (0.9, 0.2, "easier"), (0.5, 0.5, "no difference")],
)
def test_ingrained(few: float, many: float, said: str) -> None:
    study = ingrained.Ingrained(mix=(0.1, 0.5))

    def at(value: float, routed: float) -> RoutingOutcome:
        return outcome_of({ingrained.ROUTED: routed, **dict.fromkeys(study.after, value)})

    outcomes = {0.1: at(few, 0.1), 0.5: at(many, 0.4)}
    found = ingrained.grown(study, outcomes)
    assert found.value == pytest.approx(many - few, abs=0.05)
    assert said in ingrained.decide(study, found).text
    beside = ingrained.grown(study, outcomes, beyond=(ingrained.ROUTED,))
    assert beside.value == pytest.approx(many - few - 0.3, abs=0.05)


def test_more_readings_add_nothing_where_all_is_known() -> None:
    study = ingrained.Ingrained()
    same = {ingrained.ROUTED: 0.1, **dict.fromkeys(study.after, 0.2)}
    (why,) = ingrained.no_headroom(study, outcome_of(same))
    assert why.startswith("no headroom, the original recalls 1.00")
    assert (
        ingrained.no_headroom(study.model_copy(update={"most_recall": 1.0}), outcome_of(same)) == ()
    )


def test_exposures_follow_the_share_of_the_mix() -> None:
    study = ingrained.Ingrained()
    seen = []
    for share in (0.2, 0.4):
        experiment = ingrained.setting_at(study, share)
        seen.append(ingrained.exposures(experiment.domain.build(None), experiment.pretrain))
    assert seen[1] / seen[0] == pytest.approx(2, rel=0.1)
    facts = len({row.unit for row in study.experiment.domain.build(None).forget["alpha"]})
    assert seen[0] == pytest.approx(0.2 * 300 * 96 / facts, rel=0.1)


@pytest.mark.parametrize(
    ("routed", "retain", "said"),
    [(0.2, 0.9, "removes after training"), (0.9, 0.9, "does not"), (0.9, 0.2, "does not")],
)
def test_era_after_training(routed: float, retain: float, said: str) -> None:
    study = era_after_training.ERAAfterTraining(steps=(5,))
    named = era_after_training.named
    outcome = outcome_of({named("era", 5): routed, named("retain alone", 5): retain})
    found = era_after_training.difference(study, outcome)
    assert said in era_after_training.decide(study, found).text
    wide = Estimate(0.1, -0.5, 0.6, 9)
    assert era_after_training.decide(study, wide).text.startswith("undecided")
