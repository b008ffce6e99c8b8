"""What `ssd-finds` measures: modules are told apart by place, and the study runs through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tests.studies.tiny_setting import QUICK, ran_twice

from excise.domains.facts import FACTS_MAX_LENGTH, Facts
from excise.evals.stats import Array
from excise.methods import SSD, Potion
from excise.methods.importance import SortedRatios, accumulate
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import Scratch
from excise_studies.attacking import Attacker
from excise_studies.levels import Levels, of_seeds
from excise_studies.routing.setting import routed
from excise_studies.routing.ssd_finds import SSDFinds, chosen, decide
from excise_studies.setting import ExperimentSetting

EXPERIMENT = ExperimentSetting(
    domain=Facts(subjects=20, relations=2, objects=8, wordings=2, forget_share=0.4),
    model=Scratch(width=32, blocks=1),
    pretrain=Pretrain(fit=QUICK, max_length=FACTS_MAX_LENGTH),
    attacker=Attacker(steps=2, rates=(1e-3,), checkpoints=(0, 1), batch_size=8, power=0.5),
)


def test_as_many_as_asked_are_taken_from_the_top(tmp_path: Path) -> None:
    values = {"a": torch.tensor([[1.0, 8.0], [3.0, 4.0]]), "b": torch.tensor([7.0, 2.0])}
    model = torch.nn.ParameterDict({n: torch.nn.Parameter(v * 0) for n, v in values.items()})
    forget, full = (
        accumulate(
            model,
            [0],
            lambda m, _, top=top: sum((m[n] * (v if top else v * 0 + 1)).sum()  # type: ignore[misc]
                                      for n, v in values.items()),
            tmp_path / f"{top}.safetensors",
            fold="abs",
        )
        for top in (True, False)
    )  # fmt: skip
    ratios = SortedRatios(forget, full, tmp_path / "ratios", floor=0.0)
    shapes = {name: value.shape for name, value in values.items()}
    top = chosen(ratios, shapes, ratios.ranked(3))
    assert top["a"].tolist() == [[False, True], [False, True]]
    assert top["b"].tolist() == [True, False]


def test_the_interval_decides() -> None:
    def shares(low: float, high: float) -> Levels:
        by_seed: dict[int, Array] = {}
        for seed, value in enumerate(np.linspace(low, high, 5)):
            by_seed[seed] = np.full((9, 1), value)
        return Levels(("sgtm",), of_seeds(by_seed), by_seed, 40, dict.fromkeys(by_seed, 8))

    study = SSDFinds()
    assert decide(study, "ssd", "sgtm", shares(0.6, 0.9)).text.startswith("ssd finds")
    assert decide(study, "ssd", "sgtm", shares(0.1, 0.4)).text.startswith("ssd does not find")
    assert "undecided" in decide(study, "ssd", "sgtm", shares(0.3, 0.7)).text


def test_the_study_runs_through(tmp_path: Path) -> None:
    study = SSDFinds(
        seeds=(1,),
        experiment=EXPERIMENT,
        routed={"sgtm": routed()},
        ssd=SSD(against="retain", batch_size=8, alpha=2.0),
        potion=Potion(batch_size=8, tries=2),
        holds=0.0,
    )
    made = ran_twice(study, tmp_path)
    assert made.decision.startswith(("ssd", "invalid"))
    table = {(r.condition, r.metric): r for r in made.tables[0].rows}
    assert set(table) == {(c, n) for c in ("sgtm", "no routing") for n in ("ssd", "potion")}
    share = next(r.value for r in made.tables[1].rows if r.metric == "module, share of all entries")
    assert share is not None
    assert 0.1 < share < 0.5
