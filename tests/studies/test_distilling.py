"""Studies of distillation: statistics by hand, decisions on made-up numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.studies.tiny_setting import EXPERIMENT

from excise.core.errors import UserError
from excise.core.stages import Runtime
from excise.domains.arithmetic import Arithmetic
from excise.evals.replicates import Decision, spearman
from excise.evals.stats import Estimate
from excise.methods import SSD
from excise.methods.distillation.undo import Undo
from excise_studies import matching
from excise_studies.attacking import Attacked, RunKey, chosen, known
from excise_studies.distillation.dark_knowledge import DarkKnowledge
from excise_studies.distillation.dark_knowledge import decide as decide_dark
from excise_studies.distillation.distil_corpus import DistilCorpus, retain_lost
from excise_studies.distillation.distil_corpus import decide as decide_corpus
from excise_studies.distillation.init_leak import InitLeak, leaks
from excise_studies.distillation.init_leak import decide as decide_init
from excise_studies.distillation.noise_like import NoiseLike
from excise_studies.distillation.noise_where import RANDOM, SNIP, NoiseWhere
from excise_studies.distillation.noise_where import decide as decide_noise
from excise_studies.distillation.predictions import (
    Predictions,
    auc,
    by_unit,
    kl,
    noises,
    readout_bits,
    shuffled,
    threshold,
)
from excise_studies.distillation.presets import graddiff, maxent
from excise_studies.distillation.pretrain_loss import NOTHING, PretrainLoss
from excise_studies.distillation.pretrain_loss import decide as decide_push
from excise_studies.distillation.pretrain_loss import differences as pushed
from excise_studies.distillation.reversal_cost import (
    ReversalCost,
    costs_at_bar,
    log_cost,
    unmatched,
)
from excise_studies.distillation.reversal_cost import decide as decide_reversal
from excise_studies.distillation.splice import TeacherSplice, explained, with_part
from excise_studies.distillation.splice import decide as decide_splice
from excise_studies.distillation.splice_factorial import (
    FILTERED,
    SpliceFactorial,
    alone,
    conditions,
    effects_of,
    levels_with,
)
from excise_studies.distillation.splice_factorial import decide as decide_factorial
from excise_studies.distillation.undo_levels import UndoLevels, methods_of
from excise_studies.distillation.undo_levels import decide as decide_levels
from excise_studies.distillation.undo_pilot import UndoPilot, correlations
from excise_studies.distillation.undo_pilot import condition_name as pilot_name
from excise_studies.distillation.undo_pilot import decide as decide_pilot
from excise_studies.levels import estimate, estimate_of_seed, levels
from excise_studies.matching import deepest, level_with, stronger
from excise_studies.recovery import (
    RecoveryScores,
    curves_table,
    finish,
    gather,
    groups_of,
    recovery_table,
)
from excise_studies.setting import Make

DOMAIN = Arithmetic(factors=8, addends=8).build(None)
UNITS = sorted({row.unit for row in DOMAIN.test["tables"]})


def units_at(value: float) -> dict[str, float]:
    """Return units of which a share is known."""
    return {u: float(i < value * len(UNITS)) for i, u in enumerate(UNITS)}


def attacked(after: float, *, before: float = 0.0, learned: float = 1.0) -> Attacked:
    """Return an attack that brings a share of V back."""
    both = (units_at(before), units_at(after))
    t = {"t": learned}
    kept = ({"r": 1.0}, {"r": 1.0})
    return Attacked((0, 8), 1, both, ({"t": 0.0}, t), kept, taught=learned >= 0.8)


def found_of(
    after: Mapping[str, float], *, power: float = 1.0, top: float = 1.0, taught: float = 1.0
) -> RecoveryScores:
    """Return conditions that know so much after the attack, the original `top`, the oracle 0.1."""
    conditions = {
        (name, seed): attacked(value, learned=taught)
        for name, value in {"oracle": 0.1, **after}.items()
        for seed in (1, 2, 3)
    }
    conditions |= {("original", seed): attacked(1.0, before=top) for seed in (1, 2, 3)}
    conditions |= {("oracle", seed): attacked(0.1, learned=power) for seed in (1, 2, 3)}
    return gather(conditions, dict.fromkeys((1, 2, 3), DOMAIN), power=0.8)


# -- levels ----------------------------------------------------------------------------------------


def test_levels_weigh_draws_alike_and_keep_pairs() -> None:
    scores = {
        "a": {1: {"x": 1.0, "y": 0.0}, 2: {"x": 1.0, "y": 1.0, "z": 1.0, "only a": 9.0}},
        "b": {1: {"x": 0.5, "y": -0.5}, 2: {"x": 0.5, "y": 0.5, "z": 0.5}},
    }
    found = levels(scores, {})
    assert found.at("a")[0] == pytest.approx(0.75)
    assert found.at("a", 1)[0] == pytest.approx(0.5)
    assert found.n == 5
    apart = found.at("a") - found.at("b")
    assert np.allclose(apart, 0.5), "conditions of one sample rest on the same units"
    assert found.at("a")[1:].std() > 0.05
    assert levels(scores, {}).values.tolist() == found.values.tolist()


def test_groups_are_drawn_whole() -> None:
    units = {f"u{i}": float(i < 10) for i in range(20)}
    alone = levels({"a": {0: units}}, {}).at("a", 0)[1:].std()
    halves = {unit: str(value) for unit, value in units.items()}
    found = levels({"a": {0: units}}, {0: halves})
    whole = found.at("a", 0)[1:].std()
    assert found.groups == {0: 2}
    assert whole > 2 * alone


def test_the_layout_of_values() -> None:
    """Of all seeds, without one each, then resampled; any function of them has an interval."""
    scores = {"a": {s: {"x": s / 10, "y": s / 10 + 0.2} for s in (1, 2, 3)}}
    found = levels(scores, {}, samples=50)
    values = found.at("a")
    assert values.shape == (1 + 3 + 50,)
    assert values[:4].tolist() == pytest.approx([0.3, 0.35, 0.3, 0.25])
    told = estimate(2 * values, found)
    assert told.value == pytest.approx(0.6)
    assert (told.n, told.freedom) == (6, 2)
    assert told.high - 0.6 == pytest.approx(2 * 4.302653 * 0.1 / math.sqrt(3), abs=1e-5)
    one = estimate_of_seed(found.at("a", 1), found, 1)
    assert one.value == pytest.approx(0.2)
    assert one.n == 2
    alone = levels({"a": {1: {"x": 0.0, "y": 1.0}}}, {})
    assert math.isnan(estimate(alone.at("a"), alone).low), "one seed has no interval over seeds"


def test_rank_correlation_by_hand() -> None:
    one = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    two = np.array([[10.0, 20.0, 30.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    found = spearman(one, two)
    assert found[:2].tolist() == pytest.approx([1.0, -1.0])
    assert math.isnan(found[2])
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(
        0.866, abs=1e-3
    )


# -- the attack ------------------------------------------------------------------------------------


def test_rate_and_step_are_chosen_on_dev() -> None:
    def run(dev: tuple[float, ...], t: float) -> dict[str, Any]:
        marks = [{"v": float(i)} for i in range(len(dev))]
        return {
            "steps": [4 * i for i in range(len(dev))], "v": marks, "retain": marks,
            "t": [{"t": t}] * len(dev), "dev": [{"d": x} for x in dev],
        }  # fmt: skip

    runs = {1e-3: run((0.1, 0.5, 0.2), 0.3), 3e-3: run((0.1, 0.4, 0.5), 0.9)}
    found = chosen(runs, power=0.2)
    assert (found.rate, found.at, found.after) == (1e-3, 1, {"v": 1.0})
    assert (found.before, found.learned) == ({"v": 0.0}, {"t": 0.3})
    taught = chosen(runs, power=0.8)
    assert (taught.rate, taught.at, taught.learned) == (3e-3, 2, {"t": 0.9}), (
        "both sets are read at one step, and only where the relearn set was learned"
    )
    assert taught.taught
    weak = chosen(runs, power=0.95)
    assert weak == replace(taught, taught=False), "without power it is read where it learned most"
    assert chosen({1e-3: run((0.2, 0.2), 0.1)}, power=0.8).at == 0


def test_a_loss_counts_as_a_probability() -> None:
    assert known({"a": 0.0, "b": math.log(2)}, "text_loss") == pytest.approx({"a": 1.0, "b": 0.5})
    assert known({"a": 0.25}, "exact_match") == {"a": 0.25}


def test_gaps_and_what_makes_a_study_invalid() -> None:
    found = found_of({"arm": 0.55})
    scale = found.before.at("original")[0] - found.after.at("oracle")[0]
    wanted = (found.after.at("arm")[0] - found.after.at("oracle")[0]) / scale
    assert found.value("arm").value == pytest.approx(wanted)
    assert 0.4 < wanted < 0.6
    assert found.value("arm").low < wanted < found.value("arm").high
    assert not found.invalid
    assert found_of({"arm": 0.55}, top=0.1).invalid.startswith("invalid: the reference models")
    weak = found_of({"arm": 0.55}, power=0.5)
    assert weak.invalid.startswith("invalid")
    decision, paragraph = finish(["Words."], weak, Decision("all is well"))
    assert decision.text == weak.invalid
    assert "all is well" not in paragraph
    assert "lower bound" not in finish([], found, Decision("all is well"))[1]
    untaught = found_of({"arm": 0.55}, taught=0.5)
    assert (untaught.invalid, untaught.weak) == ("", {"arm": (1, 2, 3)})
    assert "did not teach its set to arm (0.50 of it" in finish([], untaught, Decision("so"))[1]
    metrics = {row.metric for row in recovery_table(found).rows}
    assert {
        "depth gap",
        "held-out test set after relearning",
        "relearn set after relearning",
    } <= metrics
    steps = {row.metric for row in curves_table(found).rows}
    assert {"held-out test set at step 0", "relearn set (never decides) at step 8"} < steps


# -- predictions -----------------------------------------------------------------------------------


def told(content: float, seed: int, count: int = 90) -> Predictions:
    """Return predictions of six tokens that hold so many nats of the right one."""
    generator = torch.Generator().manual_seed(seed)
    right_N = torch.randint(0, 6, (count,), generator=generator)
    logits_NV = torch.randn(count, 6, generator=generator)
    logits_NV[torch.arange(count), right_N] += content
    place_N = torch.arange(count) % 3
    units = tuple(f"u{i // 3}" for i in range(count))
    return Predictions(logits_NV.log_softmax(-1), right_N, place_N, units)


def test_a_readout_finds_what_is_there_and_nothing_else() -> None:
    signal, _ = readout_bits(told(3.0, 0), told(3.0, 1), told(3.0, 2))
    nothing, _ = readout_bits(told(0.0, 0), told(0.0, 1), told(0.0, 2))
    dealt, _ = readout_bits(*(shuffled(told(3.0, i), i) for i in range(3)))

    def mean(bits: Mapping[str, float]) -> float:
        return sum(bits.values()) / len(bits)

    assert len(signal) == 30
    assert mean(signal) < mean(nothing) - 1.0
    assert mean(nothing) == pytest.approx(math.log2(6), abs=0.25)
    assert mean(dealt) == pytest.approx(math.log2(6), abs=0.25)


def test_areas_and_thresholds() -> None:
    assert auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auc([1.0], [1.0]) == 0.5
    assert threshold([3.0, 4.0], [1.0, 2.0]) == 2.5
    assert by_unit([1.0, 3.0, 5.0], ["a", "a", "b"]) == {"a": 2.0, "b": 5.0}


def _away(edited: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Return KLs of a teacher that is a splice with uniform noise, or the original."""
    right = torch.full((4, 5), -8.0)
    right[:, 0] = 8.0
    original = right.log_softmax(-1)
    uniform = noises(original, torch.zeros(4, dtype=torch.long))["uniform"].expand_as(original)
    forget = uniform if edited == "splice" else original
    units = [f"u{i}" for i in range(4)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, held in (
        ("dev", forget),
        ("test", forget),
        ("retain", original),
        ("dev_retain", original),
    ):
        found[name] = {
            "original": by_unit(kl(held, original).tolist(), units),
            "uniform": by_unit(kl(held, uniform).tolist(), units),
        }
    return {("maxent", 1): found, ("maxent", 2): found}


def test_a_splice_is_explained_by_the_splice() -> None:
    class Drawn:
        domain = DOMAIN

    replicates: Any = {1: Drawn(), 2: Drawn()}
    study = TeacherSplice()
    found = explained(_away("splice"), "maxent", replicates, (1, 2))
    assert found.noise == "uniform"
    assert found.harmful.value == found.both.value == pytest.approx(1.0, abs=1e-6)
    assert found.benign.value == pytest.approx(0.0, abs=1e-6)
    assert decide_splice(study, found, {}).text.startswith("the splice")
    nothing = explained(_away("original"), "maxent", replicates, (1, 2))
    assert math.isnan(nothing.harmful.value)
    # What benign text hides in the share of both kinds stands by itself.
    away = _away("splice")
    for kls in away.values():
        kls["retain"]["original"] = dict.fromkeys(kls["retain"]["original"], 0.4)
    loud = explained(away, "maxent", replicates, (1, 2))
    assert loud.harmful.value == pytest.approx(1.0, abs=1e-6)
    assert loud.benign.value == pytest.approx(0.4)
    said = decide_splice(study, loud, {}).text
    assert said.startswith("not the splice: on benign text it lies beyond 0.05 nats")
    leak = dict.fromkeys(("missed", "caught"), found.harmful)
    leak["missed - caught"] = Estimate(0.4, 0.3, 0.5, 9)
    low = replace(found, harmful=Estimate(0.5, 0.4, 0.6, 9))
    assert decide_splice(study, low, leak).text.startswith("not the splice: it explains less")
    assert "leaks" in decide_splice(study, low, leak).text
    between = replace(found, harmful=Estimate(0.9, 0.85, 0.95, 9))
    assert decide_splice(study, between, {}).text.startswith("undecided: the share explained")


def test_a_part_of_the_labels_leaves_the_mix_alone() -> None:
    part = with_part(DOMAIN, 0.25, 0)
    groups = {row.group for row in DOMAIN.forget["tables"]}
    assert len({row.group for row in part.forget["tables"]}) == round(0.25 * len(groups))
    assert part.unlabeled == DOMAIN.unlabeled
    assert part.fingerprint != DOMAIN.fingerprint


# -- decisions -------------------------------------------------------------------------------------


def factorial(
    benign: Mapping[str, float], noise: Mapping[str, float], *, before: float = 0.0
) -> tuple[SpliceFactorial, RecoveryScores]:
    """Return conditions whose gap is 0.3, more by teacher with its benign text or with its noise.

    Args:
        benign: What the unlearned model adds on benign text.
        noise: What its noise adds.
        before: What npo answers before the attack.
    """
    study = SpliceFactorial(seeds=(1, 2, 3))
    after = {}
    for name in conditions(study, study.teachers):
        teacher, _, targets = name.partition(": ")
        more = {"benign unlearned": benign, "benign noise": noise}.get(targets.split(",")[0], {})
        after[name] = 0.3 + more.get(teacher, 0.0)
    after |= {alone(name): 0.3 for name in study.teachers}
    found = found_of(after)
    npo = {(alone("npo"), seed): attacked(0.3, before=before) for seed in (1, 2, 3)}
    both = {**found.attacked, **npo}
    return study, gather(both, dict.fromkeys((1, 2, 3), DOMAIN), power=0.8)


def test_the_factorial_tells_what_is_carried_from_noise_and_from_other_teachers() -> None:
    study, found = factorial({"rmu": 0.4}, {})
    assert levels_with(study, found) == ["maxent", "grad_diff", "npo"]
    effects = effects_of(study, found)
    assert list(effects)[:3] == [
        "benign effect of rmu",
        "benign effect of rmu beyond noise",
        "benign effect of rmu beyond maxent, grad_diff, npo",
    ]
    assert [effects[name].value for name in list(effects)[:3]] == pytest.approx([0.44] * 3, abs=0.1)
    assert effects["benign effect of maxent"].value == pytest.approx(0.0)
    decision = decide_factorial(study, effects)
    assert decision.text.startswith("what rmu says on benign text carries what is removed")
    assert len(decision.contrasts) == 3

    study, found = factorial({"rmu": 0.4}, {"rmu": 0.4})
    said = decide_factorial(study, effects_of(study, found)).text
    assert "carries no more than noise does" in said
    assert "beyond noise within 0.05" in said

    wide = Estimate(0.03, -0.05, 0.11, 9)
    known = {
        "benign effect of rmu": Estimate(0.0, -0.02, 0.02, 9),
        "benign effect of rmu beyond noise": wide,
    }
    assert "no more than the original does" in decide_factorial(study, known).text
    known["benign effect of rmu beyond noise"] = known["benign effect of rmu"]
    assert "no more than the original or noise does" in decide_factorial(study, known).text

    study, found = factorial({"rmu": 0.4, "maxent": 0.4}, {}, before=0.5)
    assert levels_with(study, found) == ["maxent", "grad_diff"]
    shared = effects_of(study, found)["benign effect of rmu beyond maxent, grad_diff"]
    assert shared.value == pytest.approx(0.22, abs=0.1)


def test_the_conditions_of_the_factorial() -> None:
    study = SpliceFactorial()
    made = conditions(study, study.teachers)
    names = [name for name in made if name.startswith("rmu: ")]
    assert names == [
        "rmu: no student",
        "rmu: benign original, harmful unlearned",
        "rmu: benign unlearned, harmful unlearned",
        "rmu: benign unlearned, harmful skip",
        "rmu: benign noise, harmful skip",
    ]
    assert sum(name == FILTERED for name in made) == 1
    noise = made[names[-1]]
    assert isinstance(noise, Undo)
    assert isinstance(noise.unlearn, NoiseLike)
    assert noise.unlearn.like == study.teachers["rmu"]
    assert [name for name in made if "noise" in name] == list(made)[-5:]


def test_strengths_are_matched_at_a_level_that_retain_allows() -> None:
    scores = {0.5: (0.6, 0.98), 1.0: (0.3, 0.9), 2.0: (0.19, 0.4)}
    assert level_with(0.2, 0.0)(scores, 0.8) == 1.0
    assert level_with(0.5, 0.0)(scores, 0.8) == 0.5
    assert level_with(0.2, 0.0)(scores, 0.99) == 0.5
    assert level_with(0.2, 0.6)(scores, 1.0) == 2.0, "retain may cost what is allowed"


def test_what_the_factorial_cannot_compare_is_refused() -> None:
    for change, said in (
        ({"against": ("npoo",)}, "no teacher is called 'npoo'"),
        ({"against": ("rmu",)}, "is the first teacher"),
        ({"harmful": ("unlearned",)}, "'skip' is what effects are measured against"),
    ):
        with pytest.raises(ValueError, match=said):
            SpliceFactorial.model_validate(change)


def test_losses_are_compared_both_ways() -> None:
    push = PretrainLoss()
    flat = dict.fromkeys((NOTHING, *push.pushes), 0.1)
    assert decide_push(push, pushed(push, found_of(flat))).text.startswith("nothing")
    left = pushed(push, found_of({**flat, "ascent": 0.5}))
    assert decide_push(push, left).text.startswith("something is left to invert by ascent")


def test_corpora_count_only_where_retain_is_kept() -> None:
    study = DistilCorpus()
    names = tuple(study.corpora)
    found = found_of(dict.fromkeys(names, 0.3))
    assert not any(retain_lost(study, found, name) for name in names)
    deep = Estimate(-0.3, -0.4, -0.2, 9)
    assert decide_corpus(study, {"a": deep}).text == "a: deeper"
    assert decide_corpus(study, {}).text.startswith("undecided")


def test_starts_groups_and_pilots() -> None:
    init = InitLeak()
    conditions = {f"oracle's logits, from {name}": 0.4 for name in init.inits}
    assert decide_init(init, leaks(init, found_of(conditions))).text.startswith(
        "initialisation does not"
    )
    conditions["oracle's logits, from original"] = 0.8
    assert decide_init(init, leaks(init, found_of(conditions))).text.startswith(
        "initialisation leaks"
    )

    where = NoiseWhere()
    zero, high = Estimate(0.0, -0.05, 0.05, 9), Estimate(0.4, 0.3, 0.5, 9)
    apart = {"mlp": zero, "attention": high, "embed": high, SNIP: zero, RANDOM: high}
    apart["nowhere"] = high
    said = decide_noise(where, apart).text
    assert said.startswith("mlp: suffices; attention: does not suffice; embed: does not suffice")
    assert said.endswith(f"{SNIP}: suffices; {RANDOM}: does not suffice")
    assert decide_noise(where, {**apart, "nowhere": zero}).text.startswith("undecided")

    pilot = UndoPilot()
    names, sizes = list(pilot.teachers), (*pilot.pilots, "no student", "large")
    rising = {pilot_name(n, s): 0.1 + 0.15 * i for i, n in enumerate(names) for s in sizes}
    assert decide_pilot(pilot, correlations(pilot, found_of(rising))).text.startswith("the pilot")
    falling = {
        pilot_name(n, s): 0.1 + 0.15 * (i if s == "large" else 5 - i)
        for i, n in enumerate(names)
        for s in sizes
    }
    assert "does not foretell" in decide_pilot(pilot, correlations(pilot, found_of(falling))).text


def test_strengths_of_damage() -> None:
    study = UndoLevels(alphas=(0.3, 0.6, 1.0))
    deep, same, wide = (
        Estimate(0.3, 0.2, 0.4, 9), Estimate(0.0, -0.05, 0.05, 9), Estimate(0.1, -0.1, 0.3, 9)
    )  # fmt: skip
    whole, lost = Estimate(1.0, 0.98, 1.0, 9), Estimate(0.7, 0.6, 0.8, 9)
    said = decide_levels(
        study, {0.3: same, 0.6: deep, 1.0: wide}, dict.fromkeys(study.alphas, whole)
    ).text
    assert said == "alpha 0.3: not hardened; alpha 0.6: hardened; alpha 1: undecided"
    said = decide_levels(study, {0.6: deep}, {0.6: lost}).text
    assert said == "alpha 0.6: deeper, but retain falls to 0.70 of the original's"
    conditions = methods_of(study)
    assert conditions["no noise"].alpha == 0  # type: ignore[attr-defined]
    assert conditions["noise, no distillation"].fit.steps == 0  # type: ignore[attr-defined]
    assert conditions["alpha 1"].beta == 1  # type: ignore[attr-defined]
    assert len(conditions) == 1 + 2 * len(study.alphas) + 5
    with pytest.raises(ValueError, match="not in"):
        UndoLevels(alphas=(0.0,))


def test_costs_of_reversal_by_hand() -> None:
    steps = (0, 2, 8, 32)
    curve = np.array([[0.0, 0.0, 0.0], [0.0, 0.6, 0.0], [0.5, 0.7, 0.1], [1.0, 0.8, 0.2]])
    bar = np.array([0.5, 0.5, np.nan])
    assert log_cost(steps, curve, bar)[:2].tolist() == pytest.approx([3.0, -1 + 2 * 5 / 6])
    assert np.isnan(log_cost(steps, curve, bar)[2])
    assert np.isnan(log_cost(steps, curve, np.ones(3))[1]), "never reached is not the last step"


def relearned(curve: Sequence[float], at: int) -> Attacked:
    """Return an attack that brings back a share of V at 0, 8 and 32 steps."""
    ones = ({"t": 1.0},) * 3
    return Attacked((0, 8, 32), at, tuple(units_at(x) for x in curve), ones, ones)


def reversed_by(curves: Mapping[str, Sequence[float]]) -> RecoveryScores:
    """Return conditions of such curves, read at the last step, original and oracle with them."""
    both = {"original": (1.0, 1.0, 1.0), "oracle": (0.0, 0.0, 0.1), **curves}
    made = {(n, seed): relearned(c, 2) for n, c in both.items() for seed in (1, 2, 3)}
    return gather(made, dict.fromkeys((1, 2, 3), DOMAIN), power=0.8)


def test_a_reversal_is_measured_at_a_bar_that_both_reach() -> None:
    """RMU is at half after 8 steps and the other at 32; neither comes half-way to the original."""
    study = ReversalCost(against=("tar",), seeds=(1, 2, 3))
    found = reversed_by({"rmu": (0.0, 0.4, 0.4), "tar": (0.0, 0.0, 0.4)})
    groups = dict.fromkeys(study.seeds, groups_of(DOMAIN))
    ours, theirs = costs_at_bar(study, found, ("rmu", "tar"), groups)
    assert ours[0] == pytest.approx(-1 + 4 * 0.5, abs=0.2)
    assert theirs[0] == pytest.approx(3 + 2 * 0.5, abs=0.2)
    assert "within" in unmatched(study, found)
    none = reversed_by({"rmu": (0.5, 0.5, 0.6), "tar": (0.0, 0.0, 0.4)})
    ours, _ = costs_at_bar(study, none, ("rmu", "tar"), groups)
    assert np.isnan(ours[0])
    failed = unmatched(study, none)
    assert failed.startswith("Matching failed")
    assert "tar knew 0.00 of the held-out test set" in failed


def test_reversal_is_decided_against_each() -> None:
    study = ReversalCost()
    found = {
        "tar": Estimate(-2.0, -2.5, -1.5, 9),
        "grad_diff": Estimate(math.nan, math.nan, math.nan, 9),
    }
    decision = decide_reversal(study, found)
    assert decision.text.startswith("against tar: RMU is easier to reverse; against grad_diff: no")
    assert [contrast.error for contrast in decision.contrasts] == [0.025, 0.025]
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"methods": {"maxent": maxent()}}, "needs 'rmu'"),
        ({"against": ("nobody",)}, "no method is called 'nobody'"),
        ({"against": ("rmu",)}, "'rmu' is what is compared"),
        ({"search": {"span": (1.0, 0.5)}}, "the least first"),
    )
    for change, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            ReversalCost(**change)


@pytest.mark.parametrize(("near", "trained"), [(0.05, 3), (0.0, 5)])
def test_a_strength_is_found_by_bisection_on_dev_of_its_own_seed(
    near: float, trained: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is left falls with the rate, twice as fast in the second seed."""
    rates: dict[int, list[float]] = {1: [], 2: []}

    def make(wanted: Mapping[RunKey, Make], *given: object) -> dict[RunKey, Any]:
        for (_, seed), job in wanted.items():
            rates[seed].append(job.method.fit.lr)  # type: ignore[attr-defined]
        return {
            key: SimpleNamespace(checkpoint=job.method.fit.lr)  # type: ignore[attr-defined]
            for key, job in wanted.items()
        }

    def scores(models: Mapping[RunKey, Any], *given: object) -> dict[RunKey, tuple[float, float]]:
        return {
            (name, seed): (1.0, 0.9) if name == "original"
            # A tenth of the rate of the preset leaves 0.2 in seed 1, a twentieth in seed 2.
            else (min(1.0, 0.2 * (graddiff().fit.lr / 10 / seed / model)), 0.85)
            for (name, seed), model in models.items()
        }  # fmt: skip

    monkeypatch.setattr(matching, "make_conditions", make)
    monkeypatch.setattr(matching, "scores_on_dev", scores)
    replicate = SimpleNamespace(original=None, domain=None)
    found = matching.matched_by_seed(
        {"grad_diff": graddiff()},
        matching.Search(level=0.2, retain_cost=0.1, tries=5, near=near),
        ReversalCost().experiment,
        {1: replicate, 2: replicate},  # type: ignore[dict-item]
        Runtime(tmp_path),
        pool=None,  # type: ignore[arg-type]
    )
    assert rates[1][0] == rates[2][0] == pytest.approx(graddiff().fit.lr / 4)
    assert len(rates[1]) == trained
    for seed in (1, 2):
        trial = found["grad_diff", seed]
        assert trial.dev[0] == pytest.approx(0.2, abs=max(near, 0.03))
        assert trial.removal.checkpoint == stronger(graddiff(), trial.factor).fit.lr  # type: ignore[attr-defined]
    assert found["grad_diff", 2].factor < found["grad_diff", 1].factor


def test_strength_is_matched_and_bits_decide() -> None:
    scores = {0.3: (0.5, 1.0), 1.0: (0.1, 0.95), 2.0: (0.0, 0.4)}
    assert deepest(0.0)(scores, 0.9) == 1.0
    assert deepest(0.0)(scores, 0.3) == 2.0
    assert deepest(0.0)(scores, 1.1) == 0.3
    assert deepest(0.6)(scores, 1.0) == 2.0
    with pytest.raises(UserError, match="SSD has no learning rate"):
        stronger(SSD(), 2.0)
    study = DarkKnowledge(experiment=EXPERIMENT)
    some, none = Estimate(0.5, 0.4, 0.6, 9), Estimate(0.0, -0.05, 0.05, 9)
    assert decide_dark(study, {"maxent": some}).text.startswith("signal")
    assert decide_dark(study, {"maxent": none}).text.startswith("no signal")
    assert decide_dark(study, {"maxent": Estimate(0.1, 0.0, 0.2, 9)}).text.startswith("undecided")
