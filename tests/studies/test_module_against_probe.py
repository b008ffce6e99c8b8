"""What `module-against-probe` compares: parts of units, gates, the decision, and that it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.studies.tiny_setting import QUICK, ran_twice

from excise.core.config import ConfigError
from excise.data.domain import CORE, UNLABELED, Row
from excise.domains.definitions import Definitions
from excise.evals.replicates import SeedEstimate
from excise.evals.stats import Estimate
from excise.methods import Filtering, GradDiffPretrain
from excise.methods.base import Cost
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.relabel import Judged
from excise.methods.pretraining.relabel.probe import Judgement
from excise.models.spec import Scratch
from excise_studies.attacking import Attacker
from excise_studies.routing.module_against_probe import (
    PROBE,
    PUSH,
    Compared,
    ModuleAgainstProbe,
    contestants,
    decide,
    gram,
    part_of_units,
    probe,
)
from excise_studies.routing.setting import routed
from excise_studies.setting import ExperimentSetting

EXPERIMENT = ExperimentSetting(
    domain=Definitions(documents=40, prose=60, words=20, vocabulary=320, exposure="seen"),
    model=Scratch(width=32, blocks=1),
    pretrain=Pretrain(fit=QUICK, max_length=24),
    attacker=Attacker(steps=2, rates=(1e-3,), checkpoints=(0, 1), batch_size=8, power=0.5),
)


def test_every_arm_is_searched_alike_and_gets_no_labels_of_its_own() -> None:
    arms = ModuleAgainstProbe().arms
    assert {len(settings) for settings in arms.values()} == {3}
    assert all(method.labels is None for each in arms.values() for method in each)  # type: ignore[attr-defined]
    assert len({m.model_dump_json() for each in arms.values() for m in each}) == 18


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": {k: v for k, v in contestants().items() if k != "gram"}}, "'gram' decides"),
        ({"arms": {**contestants(), "sgtm": (routed(),)}}, "give every arm as many settings"),
        ({"arms": {**contestants(), PROBE: (Filtering(),) * 3}}, "takes settings of relabel"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        ModuleAgainstProbe(**change)


def test_a_unit_is_found_where_all_its_rows_are() -> None:
    def row(unit: str, label: int, capability: str = "a") -> Row:
        return Row(unit=unit, text=f"{unit}.", capability=capability, label=label)

    given = (
        row("named", 1), row("half", UNLABELED), row("half", UNLABELED), row("all", UNLABELED),
        row("core", CORE, ""), row("other", UNLABELED, ""),
    )  # fmt: skip
    now = (
        row("named", 1), row("half", 1), row("half", UNLABELED), row("all", 1),
        row("core", CORE, ""), row("other", 1, ""),
    )  # fmt: skip
    nothing = Judgement(torch.zeros(6), torch.zeros(6), 0.5, {})
    judged = Judged(given, given, now, nothing, Cost(), {})
    assert part_of_units(judged) == {"named": "labelled", "half": "not found", "all": "found"}


def between(low: float, high: float, *sides: float) -> Estimate:
    return SeedEstimate((low + high) / 2, low, high, 9, freedom=9, sides=sides)


LESS, MORE, SAME = (0.2, 0.3), (-0.4, -0.3), (-0.02, 0.02)


@pytest.mark.parametrize(
    ("all_units", "missed", "retain", "weak", "said"),
    [
        (LESS, MORE, 0.0, (), "all units: the module leaves less, units not found: the module "
         "leaves more"),
        (SAME, (0.0, 0.3), 0.0, (), "leaves no less within 0.1, units not found: undec"),
        (LESS, None, 0.5, (), "less, which counts for nothing, for sgtm is not shown to cost less"),
        (LESS, None, 0.1, (), "less, which counts for nothing, for sgtm is not shown to cost less"),
        (LESS, None, -0.5, (), "all units: the module leaves less, the probe found every unit"),
        (LESS, None, 0.0, ("sgtm",), "for the attacker does not teach sgtm"),
        (LESS, None, 0.0, (PROBE,), "all units: the module leaves less, the probe found every"),
        (MORE, None, 0.5, ("sgtm",), "all units: the module leaves more, the probe found every"),
        (MORE, None, -0.1, (), f"more, which counts for nothing, for {PROBE} is not shown to cost"),
        (MORE, None, 0.0, (PROBE,), f"for the attacker does not teach {PROBE}"),
        (SAME, None, 0.1, (), "within 0.1, which counts for nothing, for sgtm is not shown"),
        (SAME, None, -0.1, (), f"within 0.1, which counts for nothing, for {PROBE} is not shown"),
        ((-0.02, 0.02, 0.01, 0.01), None, 0.0, (), "at the floor"),
        ((-0.02, 0.02, 0.99, 0.98), None, 0.0, (), "at the ceiling"),
    ],
)  # fmt: skip
def test_the_gates_and_the_gaps_decide(
    all_units: tuple[float, ...],
    missed: tuple[float, ...] | None,
    retain: float,
    weak: tuple[str, ...],
    said: str,
) -> None:
    gaps = {"D, sgtm": between(*all_units)}
    if missed is not None:
        gaps["U, sgtm"] = between(*missed)
    found = {"sgtm": Compared(gaps, between(retain - 0.02, retain + 0.02), weak)}
    decision = decide(ModuleAgainstProbe(), found)
    assert said in decision.text
    assert len(decision.contrasts) == 1 + len(gaps)
    # More seeds are worth adding where they could show that retain matches, too.
    unmatched = abs(retain) == 0.1 and "counts for nothing" in said
    assert decision.open == ("undec" in said or unmatched)


def test_the_study_runs_through(tmp_path: Path) -> None:
    study = ModuleAgainstProbe(
        experiment=EXPERIMENT,
        seeds=(1, 2),
        arms={
            PROBE: (probe(),),
            PUSH: (probe(then=GradDiffPretrain()),),
            "sgtm": (routed(),),
            "gram": (gram(),),
        },
    )
    made = ran_twice(study, tmp_path)
    rows = {t.title: {(r.condition, r.metric): r.value for r in t.rows} for t in made.tables}
    assert {c for c, _ in rows["Against probe + filter"]} == {"sgtm", "gram"}
    found = rows["What the probe found"]
    units = [found[PROBE, f"units {part}"] for part in ("labelled", "found", "not found")]
    assert sum(filter(None, units)) == 40
    assert units[0] == 20
    assert {c for c, metric in found if metric == "recall"} == {PROBE, PUSH}
    assert rows["Power of the attacker"]["sgtm", "taught"]
    assert rows["Settings on dev of the tuned seeds"]["sgtm", "setting chosen"] == 1
    assert ("gram", "gap, labelled") in rows["Depth gap by what the probe found"]
