"""A fixed-router mixture built by hand, and what is said of the differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.studies.tiny_setting import ran

from excise_studies.routing.moe_equivalence import (
    CASES,
    NUMBERS,
    Difference,
    Job,
    MoEEquivalence,
    compare,
    decide,
    policy_of,
    readers,
)

SPANS = {"module_1": (10, 15), "module_2": (15, 20)}


def test_the_study_runs_through(tmp_path: Path) -> None:
    made = ran(MoEEquivalence(seeds=(1,), families=("gpt2",)), tmp_path / "out").study
    assert made is not None
    assert made.decision.startswith("equal")
    value = {(r.condition, r.metric): r.value for r in made.tables[0].rows}
    assert value["read = write, gpt2", "E, core"] == value["read = write", "E, core"]
    assert (value["write less", "E, core"] or 0) > 0.1
    assert (value["write less", "E, modules"] or 0) < 1e-12


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_fused_and_upcast_families_are_equal_too(family: str) -> None:
    job = Job(family, "read = write", 2, 32)  # type: ignore[arg-type]
    assert compare(job).largest < 1e-12
    assert compare(replace(job, case="read all")).modules > 0.01


def test_the_router_follows_what_labels_read() -> None:
    label_BT = torch.tensor([list(NUMBERS)])
    own = readers(policy_of("read = write", SPANS), label_BT)
    assert own["module_1"].tolist() == [True, False, True, False]
    assert own["module_2"].tolist() == [True, False, False, True]
    every = readers(policy_of("read all", SPANS), label_BT)
    assert every["module_1"].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("same", "other", "wanted"),
    [
        (1e-15, 0.5, "equal"),
        (1e-9, 0.5, "not equal"),
        (float("nan"), 0.5, "not equal"),
        (1e-15, 1e-6, "invalid: 'write less, read all'"),
    ],
)
def test_the_decision_needs_equality_and_contrast(same: float, other: float, wanted: str) -> None:
    study = MoEEquivalence(seeds=(1,), families=("llama",))
    found = {
        Job("llama", case, 1, 32): Difference(same if case in ("read = write", "write more")
                                              else other, 0.0, 0.0)
        for case in CASES
    }  # fmt: skip
    assert decide(study, found).startswith(wanted)
