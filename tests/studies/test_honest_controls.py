"""Routed conditions that are loss masking are called that; models of the same weights are one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.studies.test_routing_studies import outcome_of
from tests.studies.tiny_setting import QUICK

from excise.core.stages import Runtime
from excise.data.labels import LabelNoise
from excise.domains.facts import FACTS_MAX_LENGTH, Facts
from excise.evals.replicates import Decision
from excise.evals.stats import Estimate
from excise.methods import ERA, GRAM, SGTM, Filtering
from excise.methods.base import ApplyMethod, Method
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.routed.modules import Module
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.run.stages import MakeModel
from excise_studies.base import identical, said_identical
from excise_studies.routing import edges
from excise_studies.routing.presets import PRESETS
from excise_studies.routing.setting import (
    facts_setting,
    masks_loss,
    misses,
    of_masking,
    prepared,
    routed,
    said_masking,
)
from excise_studies.routing.spurious import Spurious, conditions

NARROW = Module(width=0.25, heads=0, grow=True)
HALF = misses(0.5, "occurrences", "unlabeled")
MISSED_AS_CORE = misses(0.5, "occurrences", "core")


@pytest.mark.parametrize(
    ("method", "labels", "wanted"),
    [
        (routed(), None, True),
        (routed(), MISSED_AS_CORE, True),
        (routed(), HALF, False),
        (routed(labels=HALF), None, False),
        (routed(p_off=0.5), None, False),
        (routed(p_as=0.5), None, False),
        (routed(p_push=0.5), None, False),
        (routed(joint=("embed",)), None, False),
        (SGTM(), None, False),
        (PRESETS["gram"], None, True),
        (GRAM(), None, False),
        (ERA(), None, False),
        (Filtering(), None, False),
        (routed(), LabelNoise(file="labels.jsonl"), False),
    ],
)
def test_loss_masking_is_known_by_its_settings(
    method: Method, labels: LabelNoise | None, wanted: bool
) -> None:
    assert masks_loss(method, labels) == wanted


def test_what_is_loss_masking_does_not_depend_on_its_module(tmp_path: Path) -> None:
    """Trained without clipping, the cut model is the same for every module; else it is not."""
    runtime = Runtime(tmp_path)
    domain = Facts(subjects=20, relations=2, objects=8, wordings=2, forget_share=0.4).build()
    start = runtime.run(MakeModel(Scratch(width=32, blocks=1), Facts().tokenizer(), 1))
    setting = facts_setting(pretrain=Pretrain(fit=QUICK, max_length=FACTS_MAX_LENGTH))

    def made(method: Method, labels: LabelNoise | None = None) -> Checkpoint:
        return runtime.run(
            ApplyMethod(prepared(method, setting, labels), start, domain, 1)
        ).checkpoint

    models = {
        ("sgtm", 1): made(routed()),
        ("sgtm, narrow", 1): made(routed(module=NARROW)),
        ("gram", 1): made(PRESETS["gram"]),
        ("half of the labels", 1): made(routed(), HALF),
        ("half of the labels, gram", 1): made(PRESETS["gram"], HALF),
        ("half of the labels, narrow", 1): made(routed(module=NARROW), HALF),
    }
    same = identical(models)
    half = ("half of the labels", "half of the labels, gram")
    assert same == (("sgtm", "sgtm, narrow", "gram"), half)
    assert said_identical(same[:1]) == (
        "Identical weights at every seed, which count as one: sgtm = sgtm, narrow = gram."
    )
    assert said_identical(identical({})) == ""
    more = {**models, ("sgtm", 2): models["half of the labels", 1], ("gram", 2): models["gram", 1]}
    assert identical(more) == (half,)


def test_a_decision_about_loss_masking_says_so() -> None:
    told = Decision("the tax grows")
    assert of_masking(told, routed(), HALF) == told
    assert of_masking(told, routed(), None, "S").text == (
        "the tax grows (S is of loss masking, which the routed condition is by construction, not "
        "of routing)"
    )
    methods = conditions(Spurious())
    said = said_masking({name: (method, None) for name, method in methods.items()})
    assert "routed, 100 % labels (" in said
    assert "50 %" not in said
    assert said_masking({"era": (ERA(), None)}) == ""


def test_a_rate_of_loss_masking_does_not_count_among_edges() -> None:
    study = edges.Edges(rates=(1.0, 0.5))
    names = [edges.at(name, rate) for rate in study.rates for name in edges.places(study)]
    gaps = dict.fromkeys(names, 0.5) | {edges.at(edges.PARAMETERS, 1.0): 0.0}
    effects = edges.contrasts(study, outcome_of(gaps))
    for name in (edges.ZERO, edges.REVERSED):
        by_rate = {rate: f"{edges.hold(name)} at {rate} % labels" for rate in (100, 50)}
        assert effects[f"{by_rate[100]}, not counted"].value == pytest.approx(0.5, abs=0.05)
        assert effects[edges.hold(name)].value == effects[by_rate[50]].value == 0
        assert np.isfinite(effects[edges.keep(name)].value)
    assert edges.decide(study, effects).text.count("alike") == 2
    alone = edges.contrasts(edges.Edges(rates=(1.0,)), outcome_of(gaps))
    assert edges.decide(study, alone).text.startswith("none")
    assert not edges.decide(study, alone).contrasts


def test_edges_are_decided_one_kind_at_a_time_and_only_where_retain_is_kept() -> None:
    """Zeroed activations leave more than parameters do; reversed ones are not told apart."""
    study = edges.Edges()
    effects = {
        edges.hold(edges.ZERO): Estimate(0.4, 0.2, 0.6, 9),
        edges.keep(edges.ZERO): Estimate(-0.03, -0.06, 0.0, 9),
        edges.hold(edges.REVERSED): Estimate(0.1, -0.1, 0.3, 9),
        edges.keep(edges.REVERSED): Estimate(-0.03, -0.06, 0.0, 9),
    }
    text = edges.decide(study, effects).text
    assert text.startswith("against activations: edges that leave parameters hold better; against")
    assert "reversed: undecided" in text
    effects[edges.keep(edges.ZERO)] = Estimate(-0.1, -0.3, 0.1, 9)
    decision = edges.decide(study, effects)
    assert decision.text.startswith("against activations: undecided, edges that leave parameters")
    assert len(decision.contrasts) == 3
