"""Studies: pieces by known answers, records that come back, a killed study that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from excise.cli import run_verb
from excise.cli.study import is_study
from excise.core.errors import UserError
from excise.core.stages import LAYOUT
from excise.domains.facts import Facts
from excise.evals.score import measure
from excise.methods import RMU
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import ModelSpec, Scratch
from excise.models.tiny import tiny_model
from excise.record import load
from excise.report.page import render_html
from excise.report.terminal import render_terminal
from excise.run.study import conduct, study_named, study_points
from excise.train.fit import FitConfig
from excise.train.pool import Processes
from excise_studies.base import share
from excise_studies.rmu.messy_forget_set import (
    MessyForgetSet,
    as_statements,
    asked,
    change,
    decide,
    forget_set,
    interpolate,
    matched,
    ranked_of,
    strength_at,
)
from excise_studies.rmu.rmu_is_shallow import RMUIsShallow, choose
from excise_studies.rmu.scoring import kind_nats, rubric


def test_the_chosen_clearing_stays_within_the_budget() -> None:
    def scored(dev: float, retain: float, **facts: bool) -> dict[str, Any]:
        scores = {"dev_loss": {"a": dev}, "dev_retain_loss": {"a": retain}}
        return {"facts": {"control": False, **facts}, "edited": scores}

    arms = {
        "not cleared": scored(9, 1), "costly": scored(1, 2), "good": scored(2, 1.05),
        "weak": scored(5, 1), "random 0": scored(0, 1, control=True),
        "good, in the weights": scored(0, 1),
    }  # fmt: skip
    assert choose({0: {"arms": arms}}, [0], 0.1) == "good"
    assert choose({0: {"arms": arms}}, [0], 2.0) == "costly"
    assert choose({0: {"arms": arms}}, [0], -1.0) == "weak"
    none = {name: arms[name] for name in ("not cleared", "random 0")}
    with pytest.raises(UserError, match="only: leaves no condition"):
        choose({0: {"arms": none}}, [0], 0.1)


# -- scores and data -------------------------------------------------------------------------------

SMALL = Facts(subjects=24, relations=2, objects=8, wordings=2, cue="category")


def test_kind_and_knowledge_add_up_to_the_loss() -> None:
    domain, tokenizer = SMALL.build(), SMALL.tokenizer()
    what = rubric(domain, tokenizer, max_rows=0, max_length=16)
    assert {len(ids) for ids in what.kinds.values()} <= {7, 8}
    model = tiny_model("llama", width=32, vocab=len(tokenizer))
    kind = kind_nats(model, what.test, tokenizer, what)
    loss = measure(model, tokenizer, what.test, "text_loss").by_unit()
    assert all(0 < kind[unit] < loss[unit] for unit in loss)
    everything = {u: tuple(range(len(tokenizer))) for u in what.kinds}
    sure = kind_nats(model, what.test, tokenizer, replace(what, kinds=everything))
    assert max(map(abs, sure.values())) < 1e-5


def test_messy_sets_hold_every_fact_and_leave_what_is_scored() -> None:
    domain = as_statements(SMALL.build())
    made = {
        mess: forget_set(domain, mess, filler=3, off_topic=0.5, seed=0)
        for mess in ("clean", "diluted", "off_topic", "messy")
    }
    facts = [row.text for row in domain.forget["alpha"]]
    assert [row.text for row in made["clean"].forget["alpha"]] == facts
    for mess, one in made.items():
        texts = [row.text for row in one.forget["alpha"]]
        assert all(any(fact in text for text in texts) for fact in facts), mess
        assert one.test == domain.test
    assert len(made["off_topic"].forget["alpha"]) == 2 * len(facts)
    words = [len(row.text.split()) for row in made["diluted"].forget["alpha"]]
    assert min(words) > 3 * max(len(fact.split()) for fact in facts) / 2
    assert len({one.fingerprint for one in made.values()}) == 4
    off = made["off_topic"].forget["alpha"][len(facts) :]
    assert all(row.text.split()[0] == row.group and row.text not in facts for row in off)
    assert asked(domain.test["alpha"][0]).text == domain.test["alpha"][0].prompt


# -- statistics ------------------------------------------------------------------------------------


def test_share_by_hand() -> None:
    def of(value: float) -> dict[int, dict[str, float]]:
        return {seed: {str(i): value for i in range(5)} for seed in (1, 2, 3)}

    found = share((of(0.7), of(0.1)), (of(0.9), of(0.1)))
    assert found.value == pytest.approx(0.75)
    assert share((of(1), of(0)), (of(0), of(0))).value != found.value


def test_matching_by_hand() -> None:
    assert strength_at((1.0, 100.0), (0.0, 1.0), 0.5) == pytest.approx(2.302585, abs=1e-4)
    assert strength_at((1.0, 10.0), (0.0, 0.1), 0.5) == pytest.approx(2.302585, abs=1e-4)
    costs = torch.tensor([[0.0, 0.0], [1.0, 2.0]]).numpy()
    scores = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).numpy()
    assert interpolate(costs, scores, 0.5).tolist() == pytest.approx([0.5, 0.75])


def _ranked(study: MessyForgetSet, left: Mapping[str, tuple[float, ...]]) -> Any:
    """Return RMU's change of rank where methods leave `left` of V at one cost of retain."""
    units = [f"u{i}" for i in range(20)]

    def units_of(value: float) -> dict[str, float]:
        return {u: float(i < value * 20) for i, u in enumerate(units)}

    base = {s: {"V": units_of(1), "retain": dict.fromkeys(units, 0.0)} for s in study.seeds}
    points = {
        (s, mess, m): [{"V": units_of(v), "retain": dict.fromkeys(units, 0.2)}]
        for s in study.seeds
        for mess in study.sets
        for m, v in zip(study.methods, left[mess], strict=True)
    }
    drawn = {m: ranked_of(matched(study, base, points, m, "V")) for m in study.sets}
    return change(study, drawn)


def test_a_change_of_rank_is_seen() -> None:
    study = MessyForgetSet(sets=("clean", "messy"))
    better = _ranked(study, {"clean": (0.9, 0.1, 0.5), "messy": (0.1, 0.9, 0.5)})
    assert better.value == -2
    assert decide(study, better).text.startswith("supported")
    same = _ranked(study, {"clean": (0.1, 0.5, 0.9), "messy": (0.1, 0.5, 0.9)})
    assert same.value == 0
    assert decide(study, same).text.startswith("contradicted")
    tied = _ranked(study, {"clean": (0.5, 0.5, 0.5), "messy": (0.5, 0.5, 0.5)})
    assert tied.value == 0


# -- whole studies ---------------------------------------------------------------------------------

SCHEDULE = Pretrain(fit=FitConfig(steps=30, lr=5e-3, batch_size=32), max_length=16)
STEER = RMU(
    layer=1, blocks=(0, 1), steering=30, alpha=1,
    fit=FitConfig(steps=6, lr=1e-2, batch_size=16), max_length=32,
)  # fmt: skip


def small_shallow() -> RMUIsShallow:
    """Return the study at a size of seconds."""
    return RMUIsShallow(
        seeds=(1,), tuned_on=(0,), domain=SMALL, pretrain=SCHEDULE, rmu=STEER,
        model=ModelSpec(scratch=Scratch(width=32, blocks=2)), dims=(1, 2), random_directions=1,
        rates=(1e-3,), relearn_steps=2, only=("not cleared", "original, one", "random"),
    )  # fmt: skip


class Stop(BaseException):
    """What a kill looks like from inside."""


def test_a_killed_study_goes_on_and_its_record_comes_back(tmp_path: Path) -> None:
    said: list[str] = []

    def listen(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "note" and str(data["text"]).startswith("seed"):
            said.append(str(data["text"]))
            if len(said) == 4:
                raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        conduct(small_shallow(), out, Processes(1, emit=listen))
    (partial,) = (tmp_path / ".stages" / LAYOUT).glob("clearing-*.partial")
    done = {file: file.stat().st_mtime_ns for file in (partial / "arms").iterdir()}
    assert len(done) == 3
    made = conduct(small_shallow(), out, Processes(1, emit=listen))
    final = partial.with_name(partial.name.removesuffix(".partial"))
    assert all((final / "arms" / f.name).stat().st_mtime_ns == t for f, t in done.items())
    assert load(out) == made
    study = made.study
    assert study is not None
    assert study.decision in study.paragraph
    conditions = {row.condition for row in study.tables[1].rows}
    assert {"original", "not cleared", "edited - original, one", "random 0"} <= conditions
    assert "edited - original, one, in the weights" in conditions
    assert {row.seed for table in study.tables for row in table.rows} <= {None, 1}
    html = render_html(made)
    assert "What the study found" in html
    console = Console(record=True, width=100)
    console.print(render_terminal(made))
    assert study.decision[:20] in console.export_text()


def test_the_messy_study_runs_on_a_small_scale(tmp_path: Path) -> None:
    study = MessyForgetSet(
        seeds=(1,), domain=SMALL, model=Scratch(width=32, blocks=2), pretrain=SCHEDULE,
        sets=("clean", "messy"), sweep=(1.0,), around=(1.0,), relearn_steps=2,
        methods={
            name: method.model_copy(update={"fit": method.fit.model_copy(update={"steps": 3})})  # type: ignore[attr-defined]
            for name, method in MessyForgetSet().methods.items()
        },
    )  # fmt: skip
    made = conduct(study, tmp_path / "out", Processes(1))
    assert made.study is not None
    titles = [table.title for table in made.study.tables]
    assert titles == ["Knowledge left at matched retain", "Ranks", "Strength"]
    assert load(tmp_path / "out") == made
    for mess in ("clean", "messy"):
        rows = [r for r in made.study.tables[1].rows if r.condition.endswith(f"on {mess}")]
        late = [r.value for r in rows if "relearning" in r.metric and r.value is not None]
        assert sum(late) == pytest.approx(6)


def test_studies_have_names_and_say_what_decides() -> None:
    for name in study_points():
        study = study_named(name)(**{})
        assert study.name == name
        assert study.question.endswith("?")
        assert "margin" in study.statistic
    with pytest.raises(UserError, match="rmu-is-shallow"):
        study_named("rmu-is-shalow")
    with pytest.raises(UserError, match="no --full"):
        MessyForgetSet.full()
    with pytest.raises(ValueError, match="needs 'rmu'"):
        MessyForgetSet(methods={"steer": STEER, "other": STEER})
    assert RMUIsShallow.full().model.path == "smollm2-135m"


def test_run_takes_a_study_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_study("rmu-is-shallow")
    assert not is_study("demo")
    assert run_verb("run", ["rmu-is-shallow", "--dry-run", "--margin", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "margin: 0.25" in said
    assert "output: runs/rmu-is-shallow" in said
    with pytest.raises(UserError, match="unknown field"):
        run_verb("run", ["rmu-is-shallow", "--dry-run", "--mragin", "1"])
