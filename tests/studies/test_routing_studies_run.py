"""Studies of gradient routing at a size of seconds run through, and go on where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.studies.tiny_setting import QUICK, quick, ran_twice

from excise.domains.facts import FACTS_MAX_LENGTH, Facts
from excise.methods import ERA, RMU, Chain, MaxEnt
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import Scratch
from excise.run.study import study_named
from excise_studies.attacking import Attacker
from excise_studies.setting import ExperimentSetting

EXPERIMENT = ExperimentSetting(
    domain=Facts(subjects=20, relations=2, objects=8, wordings=2, forget_share=0.4),
    model=Scratch(width=32, blocks=1),
    pretrain=Pretrain(fit=QUICK, max_length=FACTS_MAX_LENGTH),
    attacker=Attacker(steps=2, rates=(1e-3,), checkpoints=(0, 1), batch_size=8, power=0.5),
)
"""The smallest setting; its attacker has no power, so that every study on it is invalid."""

LONGER = Pretrain(fit=QUICK.model_copy(update={"steps": 16}), max_length=FACTS_MAX_LENGTH)
"""Relabelling spends some steps on reading."""

SHARES = (0.4, 1.0)

QUICKLY: dict[str, dict[str, Any]] = {
    "edges": {"rates": (0.5,), "shares": SHARES},
    "repair": {"lengths": (0.5,), "shares": ()},
    "era-after-training": {"steps": (2,)},
}
"""Studies that every run of the tests tries, and what makes them small."""

MORE: dict[str, dict[str, Any]] = {
    "partial-labels": {
        "rates": (0.5,),
        "missed": ("units",),
        "shares": (),
        "own": {"era_rmu": Chain(methods=(ERA(), quick(RMU(layer=0, blocks=(0,)))))},
        "experiment": EXPERIMENT.model_copy(update={"pretrain": LONGER}),
    },
    "ingrained": {
        "mix": (0.3, 0.5),
        "after": {"maxent": quick(MaxEnt(max_length=16))},
        "sweep": (1.0,),
        "tuned_on": (11,),
    },
}
"""The others."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose studies share stages."""
    return tmp_path_factory.mktemp("studies")


def check(name: str, changes: dict[str, Any], shelf: Path) -> None:
    """Run a study twice: its record says what decides, and nothing is computed again."""
    settings: dict[str, Any] = {"seeds": (1,), "experiment": EXPERIMENT, **changes}
    made = ran_twice(study_named(name)(**settings), shelf)
    assert made.decision.startswith("invalid")
    titles = [table.title for table in made.tables]
    assert {
        "Recovery on the held-out test set after relearning",
        "Loss on retain and the alignment tax",
    } <= {*titles}
    conditions = {row.condition for table in made.tables for row in table.rows}
    assert {"original", "oracle"} < conditions


@pytest.mark.parametrize("name", QUICKLY)
def test_a_study_runs_through(name: str, shelf: Path) -> None:
    check(name, QUICKLY[name], shelf)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_studies_run_through(name: str, shelf: Path) -> None:
    check(name, MORE[name], shelf)
