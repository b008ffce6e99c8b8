"""What `minimal-edit` measures: edits are cut as said, the smallest is found, the study runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.studies.tiny_setting import QUICK, quick, ran_twice

from excise.domains.facts import FACTS_MAX_LENGTH, Facts
from excise.methods import GRAM, SSD, GradDiff
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.routed.modules import Module
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise_studies.attacking import Attacker
from excise_studies.routing import minimal_edit
from excise_studies.routing.minimal_edit import (
    AIMS,
    WAYS,
    Cut,
    Found,
    MinimalEdit,
    bisected,
    cut,
    decide,
    ratios_of,
    shape_of,
    truncated,
)
from excise_studies.setting import ExperimentSetting

EXPERIMENT = ExperimentSetting(
    domain=Facts(subjects=20, relations=2, objects=8, wordings=2, forget_share=0.4),
    model=Scratch(width=32, blocks=1),
    pretrain=Pretrain(fit=QUICK, max_length=FACTS_MAX_LENGTH),
    attacker=Attacker(steps=2, rates=(1e-3,), checkpoints=(0, 1), batch_size=8, power=0.5),
)

EDIT = {"a": torch.tensor([[3.0, 0.0], [0.0, -1.0]]), "b": torch.tensor([0.5, -2.0])}


def test_entries_are_kept_from_the_largest_and_ranks_from_the_strongest() -> None:
    half = cut(EDIT, "entries", 0.5)
    assert half["a"].tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert half["b"].tolist() == [0.0, -2.0]
    assert [int((d != 0).sum()) for d in cut(EDIT, "entries", 0.01).values()] == [1, 0]
    low = cut(EDIT, "rank", 0.5)
    assert torch.allclose(low["a"], torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(low["b"], EDIT["b"])  # vectors stay
    for way in WAYS:
        whole = cut(EDIT, way, 1.0)
        assert all(torch.allclose(whole[n], EDIT[n], atol=1e-6) for n in EDIT)
    random = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(random)
    left = random - truncated(random, 0.4)  # two of five
    assert float(left.norm()) == pytest.approx(float(values[2:].norm()), rel=1e-5)  # Eckart-Young


def test_what_is_said_of_an_edit_is_so() -> None:
    before = {n: torch.ones_like(d) for n, d in EDIT.items()}
    said = shape_of(before, cut(EDIT, "entries", 0.5))
    assert said["norm"] == pytest.approx(math.sqrt((9 + 4) / 6))
    assert said == {"norm": said["norm"], "rank": 0.5, "entries": 2 / 6}


@pytest.mark.parametrize("count", [1, 2, 7, 25])
def test_bisection_finds_the_last_size_that_holds(count: int) -> None:
    last = {name: name for name in range(-1, count)}
    rounds = []

    def holds(at: Mapping[int, int]) -> dict[int, bool]:
        rounds.append(len(at))
        return {key: i <= last[key] for key, i in at.items()}

    found = bisected(list(last), count, holds)
    assert found == {key: at for key, at in last.items() if at >= 0}
    assert len(rounds) <= 2 + math.ceil(math.log2(count + 1))


def found_of(sizes: Mapping[tuple[str, str], Mapping[tuple[str, int], float]]) -> Found:
    edit = Cut(Checkpoint(Path()), 0.0, 1.0, 0.1, 1.0, 1.0)
    return {
        (way, aim): {k: (size, edit) for k, size in sizes.get((way, aim), {}).items()}
        for way in WAYS
        for aim in AIMS
    }


def test_the_ratio_of_sizes_decides_and_a_lower_bound_is_never_called_equal() -> None:
    study = MinimalEdit()
    keys = [(name, seed) for name in ("rmu", "npo", "ssd") for seed in study.seeds]
    small = dict.fromkeys([*keys, ("filtered", 1)], 0.125)
    far = {("length", "suppressing"): small, ("length", "resistant"): dict.fromkeys(keys, 1.0)}
    ratios = {way: ratios_of(study, found_of(far), way) for way in WAYS}
    assert ratios["length"].value.value == 3
    assert len(ratios["length"].single) == len(keys)  # the reference is no method
    said = decide(study, ratios).text
    assert said.startswith("length: resisting takes more than 1 doubling(s); rank: undecided")
    near = {("length", "suppressing"): small, ("length", "resistant"): small}
    ratios = {"length": ratios_of(study, found_of(near), "length")}
    assert decide(study, ratios).text == "length: resisting takes no more within 1 doubling(s)"
    alone = {k: dict.fromkeys([k for k in keys if k[1] == 1], 0.5) for k in near}
    one = ratios_of(study, found_of(alone), "length")
    assert decide(study, {"length": one}).text == "length: undecided"  # one seed
    # Of one edit nothing resists: it counts at the farthest that was looked at.
    wide = study.model_copy(update={"reach": 0.125})
    near["length", "resistant"] = dict.fromkeys(keys[1:], 0.125)
    bound = ratios_of(wide, found_of(near), "length")
    assert bound.bounds == 1
    assert bound.value.value == 0
    assert decide(wide, {"length": bound}).text == "length: undecided"


def test_overlap_is_one_of_the_same_and_none_of_what_has_nothing_in_common() -> None:
    one = {"a": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.zeros(2)}
    other = {"a": torch.tensor([[0.0, 0.0], [0.0, 2.0]]), "b": torch.zeros(2)}
    for same, value in ((one, 1.0), (other, 0.0)):
        entries = minimal_edit._entries_shared(one, same)
        assert entries == {"cosine": value, "entries of both": value}
        spaces = minimal_edit._spaces_shared(one, same)
        assert spaces["directions of both"] == pytest.approx(value)
        assert spaces["directions, by chance"] == 0.5


def test_the_study_runs_through(tmp_path: Path) -> None:
    methods: dict[str, Any] = {
        "grad_diff": quick(GradDiff()),
        "ssd": SSD(against="retain", alpha=1.0, max_length=FACTS_MAX_LENGTH),
    }
    study = MinimalEdit(
        seeds=(1,),
        experiment=EXPERIMENT,
        methods=methods,
        routed=GRAM(module=Module(width=0.4), ablate="zero"),
        reach=1.0,
    )
    made = ran_twice(study, tmp_path)
    assert made.decision.startswith("invalid")  # nothing was learned, so anything suppresses
    sizes = next(t for t in made.tables if t.title == "Smallest edits")
    names = {r.condition.split(",")[0] for r in sizes.rows}
    assert names == {"grad_diff", "ssd", "filtered", "routed"}
    values = {(r.condition, r.metric): r.value for r in sizes.rows}
    small, whole = values["ssd, suppressing", "entries"], values["ssd, suppressing", "rank"]
    assert small is not None
    assert whole is not None
    assert 0 < small < whole < 1
    overlap = next(t for t in made.tables if t.title == "Overlap between methods")
    assert not any("routed" in r.condition for r in overlap.rows)
