"""The leaderboard: equal searches, a choice without attacks, a decision from fresh seeds."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from tests.studies.tiny_setting import ran, ran_twice

from excise.cli.options import RunOptions
from excise.cli.run import main as run_main
from excise.cli.study import study_of
from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, Facts
from excise.domains.glosses import Glosses
from excise.evals.replicates import over_seeds
from excise.methods import RMU, Chain, Filtering, GradDiff, MaxEnt
from excise.methods.base import Cost, Method, Paper, Removal
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.search import Range, Space, changed, setting, settings_of, space_of
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.record import LEVELS, AttackVariant, CurvePoint, LevelResult, Record, Score, Verdict
from excise.record.study import StudyRecord
from excise.report.page import render_html
from excise.requests.recipe import AuditSpec, EvalSpec
from excise.testing.toy import toy_domain
from excise.train.fit import FitConfig
from excise.train.pool import Processes
from excise_studies.leaderboard.board import Leaderboard, World, make_world, with_labels
from excise_studies.leaderboard.markdown import markdown
from excise_studies.leaderboard.presets import LeaderboardFacts, LeaderboardGlosses
from excise_studies.leaderboard.tables import (
    UNATTACKED,
    Board,
    Entry,
    ahead,
    best_so_far,
    board_table,
    decide,
    left_of,
)
from excise_studies.leaderboard.trials import Searched, Trial, Tried, search
from excise_studies.publish import publish
from excise_studies.routing.setting import misses

QUICK = FitConfig(steps=2, lr=1e-2, batch_size=8)


class Failing(Method):
    """Never makes a model."""

    name: Literal["failing"] = "failing"
    paper: ClassVar[Paper] = Paper("none", "")

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        raise UserError("failing needs pairs; give it some")


def tiny(**change: Any) -> Leaderboard:
    """Return a leaderboard of seconds."""
    given: dict[str, Any] = {
        "methods": {"grad_diff": GradDiff(fit=QUICK), "rmu": RMU(fit=QUICK)},
        "trials": 2,
        "seeds": (1,),
        "domain": Facts(subjects=24, relations=2, objects=8, wordings=3, forget_share=0.4),
        "scratch": Scratch(width=48, blocks=2),
        "pretrain": Pretrain(
            fit=FitConfig(**{**FACTS_FIT, "steps": 90, "lr": 8e-3, "batch_size": 32, "warmup": 10}),
            max_length=FACTS_MAX_LENGTH,
        ),
        "repair": QUICK,
        "oracles": 1,
        "dev_rows": 8,
        "audit": AuditSpec(
            budget="smoke",
            change={
                "steps": 2,
                "checkpoints": [0, 2],
                "rates": [1e-3],
                "batch_size": 4,
                "bits": False,
                "max_test_rows": 8,
                "max_other_rows": 8,
            },
        ),
        "evaluate": EvalSpec(max_rows=8, max_length=16, samples=0),
    }
    return Leaderboard(**{**given, **change})


# -- where settings come from ----------------------------------------------------------------------


def test_the_first_setting_is_the_published_one_and_a_longer_search_begins_with_a_shorter() -> None:
    for method in (RMU(), GradDiff(), MaxEnt(alpha=0.5)):
        short, long = (settings_of(method, n, seed=3) for n in (3, 12))
        assert short[0] == {}
        assert list(long[:3]) == list(short)
        assert len({str(s) for s in long}) == 12
        assert settings_of(method, 3, seed=4) != short
        for settings in long[1:]:
            new = changed(method, settings)
            for path in space_of(method, {}):
                factor = setting(new, path) / setting(method, path)
                assert 0.249 < factor < 4.001
            assert new.fit.steps == method.fit.steps
    assert changed(GradDiff(), {}) == GradDiff()


def test_ranges_are_absolute_or_factors_and_values_are_chosen_from() -> None:
    class Own(Config):
        """A method that says where to search."""

        steps: int = 10
        weights: tuple[float, ...] = (1.0, 2.0)
        mode: str = "a"
        off: float = 0.0
        search: ClassVar[Space] = {
            "steps": Range(low=0.5, high=2.0),
            "weights": Range(low=1.0, high=2.0, log=False),
            "mode": ("a", "b"),
        }

    ranges = {"steps": Range(low=3, high=5, absolute=True), "off": Range(), "nothing": Range()}
    settings = settings_of(Own(), 40, 0, ranges)[1:]
    assert {s["steps"] for s in settings} == {3, 4, 5}
    assert all(isinstance(s["steps"], int) for s in settings)
    assert {s["mode"] for s in settings} == {"a", "b"}
    for s in settings:
        first, second = s["weights"]
        assert second == pytest.approx(2 * first, rel=1e-3)
        assert 1 <= first <= 2
        assert set(s) == {"steps", "weights", "mode"}
    assert Range(low=1e-4, high=1e-2, absolute=True).at(0.5, 7.0) == pytest.approx(1e-3)
    assert Range(low=1, high=3, log=False).at(0.5, 2.0) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="not below high"):
        Range(low=2, high=1)


def test_a_changed_setting_is_checked_and_a_missing_one_refused() -> None:
    assert changed(GradDiff(), {"fit.lr": 1.0}).fit == GradDiff().fit.model_copy(update={"lr": 1.0})
    with pytest.raises(ValueError, match="greater than or equal"):
        changed(RMU(), {"layer": -1})
    with pytest.raises(ValueError, match="no such setting"):
        changed(RMU(), {"nothing.lr": 1.0})
    assert settings_of(Failing(), 5, 0) == [{}]


# -- the search ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def world(runtime: Runtime) -> World:
    with Processes(1) as pool:
        return make_world(tiny(), 0, runtime, pool)


def searched(world: World, runtime: Runtime, trials: int, deadline: float) -> dict[str, Searched]:
    methods = {**world.methods, "failing": Failing()}
    with Processes(1) as pool:
        return search(methods, world.trial, trials, 0, lambda _: {}, deadline, runtime, pool)


def test_a_search_that_is_cut_short_compares_equal_numbers(world: World, runtime: Runtime) -> None:
    assert searched(world, runtime, 3, time.time() - 1) == {}  # no time for any
    first = searched(world, runtime, 1, math.inf)
    assert first["failing"].failed == "failing needs pairs; give it some"
    # Nothing new is begun; what was tried before counts, and one round is whole.
    assert [len(s.trials) for s in searched(world, runtime, 3, time.time() - 1).values()] == [1] * 3
    stage = world.trial(changed(world.methods["rmu"], settings_of(world.methods["rmu"], 3, 0)[1]))
    runtime.run(stage)  # a second trial of one method alone
    cut = searched(world, runtime, 3, time.time() - 1)
    assert {n: len(s.trials) for n, s in cut.items()} == dict.fromkeys(cut, 1)
    whole = searched(world, runtime, 3, math.inf)
    assert [len(whole[n].trials) for n in ("grad_diff", "rmu", "failing")] == [3, 3, 1]
    assert whole["rmu"].trials[0] == first["rmu"].trials[0]
    assert not list(runtime.path(stage).rglob("*.safetensors"))  # no model is kept


def test_a_trial_sees_nothing_that_an_attack_is_scored_on(world: World, runtime: Runtime) -> None:
    blind = replace(
        world.domain, test={}, relearn={}, retain_test=(), benign=(), fresh=(), adjacent_test=()
    )
    blinded = replace(world, domain=blind)
    for method in world.methods.values():
        mine, theirs = (runtime.run(w.trial(method)) for w in (world, blinded))
        assert (mine.forget, mine.retain) == (theirs.forget, theirs.retain)
    other = replace(world.domain, dev_retain=world.domain.dev_retain[:2])
    moved = runtime.run(replace(world, domain=other).trial(world.methods["rmu"]))
    assert moved.retain != runtime.run(world.trial(world.methods["rmu"])).retain


def trial(forget: float, retain: float) -> Trial:
    return Trial({}, Tried(forget, retain, Cost(1, 1, 2e12, 1.0)))


def test_the_choice_stays_within_the_budget_and_the_frontier_is_not_beaten() -> None:
    tried = (trial(2, 1.0), trial(9, 1.5), trial(3, 1.05), trial(2.5, 1.06))
    all_of_it = Searched((*tried, Trial({}, Tried(failed="x"))), 5)
    assert all_of_it.best(1.05).forget == 3
    assert all_of_it.best(2.0).forget == 9
    assert all_of_it.best(0.5).retain == 1.0  # none fits: the cheapest
    assert [t.forget for t in all_of_it.frontier()] == [2, 3, 9]
    assert all_of_it.cost.flops == 8e12
    assert Searched((Trial({}, Tried(failed="why")),), 1).failed == "why"


class Blind(Failing):
    """Takes no labels."""

    name: Literal["blind"] = "blind"  # type: ignore[assignment]


def test_missed_labels_are_given_to_who_takes_them_and_move_rows_of_all_others() -> None:
    domain = toy_domain()
    rows = [row for part in domain.forget.values() for row in part]
    labels = misses(0.5)
    method, cut = with_labels(Blind(), domain, labels, 1)
    left = [row for part in cut.forget.values() for row in part]
    assert method == Blind()
    assert 0 < len(left) < len(rows)
    assert len(left) + len(cut.retain) == len(rows) + len(domain.retain)
    for taker in (Filtering(), GradDiff(), Chain(methods=(GradDiff(), GradDiff()))):
        given, same = with_labels(taker, domain, labels, 1)
        assert same is domain
        for link in given.methods if isinstance(given, Chain) else (given,):
            assert link.labels == labels  # type: ignore[attr-defined]
    assert with_labels(GradDiff(), domain, None, 1) == (GradDiff(), domain)


# -- the whole -------------------------------------------------------------------------------------


def test_a_leaderboard_runs_resumes_and_is_published(tmp_path: Path) -> None:
    study = tiny(methods={**tiny().methods, "failing": Failing()}, finalists=1, final=tiny().audit)
    found = ran_twice(study, tmp_path)
    titles = [table.title for table in found.tables]
    for title in ("Finalists", "Leaderboard", "Search", "At matched retain"):
        assert title in titles
    board = next(t for t in found.tables if t.title == "Leaderboard")
    conditions = {r.condition for r in board.rows}
    expected = {"original", "oracle", "grad_diff", "rmu", "grad_diff, repaired", "rmu, repaired"}
    assert conditions == expected
    assert "left at worst" in {r.metric for r in board.rows}
    assert [plot.title for plot in found.plots] == [
        "Frontier: removed at what cost",
        "Best attack by number of trials",
    ]
    record = ran(study, tmp_path / "leaderboard")
    assert any("failing needs pairs" in note for note in record.notes)
    assert "Frontier" in render_html(record)
    (tmp_path / "README.md").write_text(
        "before\n<!-- leaderboard -->\nold\n<!-- /leaderboard -->\nafter\n"
    )
    text = publish(tmp_path / "leaderboard", root=tmp_path)
    assert (tmp_path / "README.md").read_text() == (
        f"before\n<!-- leaderboard -->\n{text}<!-- /leaderboard -->\nafter\n"
    )
    assert "| method | left at worst | left at worst, repaired | retain change |" in text
    assert text.count("\n| grad_diff |") == 2  # as a finalist, and on the board
    assert text.count("\n| rmu |") == 1
    assert "Held-out score: original " in text
    assert "commit" in text
    assert text == markdown(record)
    # The same folder takes another time budget: it says only how far the run gets.
    again = study.model_copy(update={"time_budget": "0s"})
    assert ran(again, tmp_path / "leaderboard").study == found


# -- what decides ----------------------------------------------------------------------------------


def judged(left: dict[str, float], oracle: bool = True) -> Record:
    """Return the record of an audit in which relearning left so much of every model."""
    verdicts = tuple(
        Verdict(
            model=name,
            sentence="",
            levels=tuple(
                LevelResult(level=code, words=words, status="fail", gap=gap, low=gap, high=gap)
                for code, words in LEVELS.items()
                if (gap := {"D0": 0.0, "D4": value, "D5": 9.0}.get(code)) is not None
            ),
        )
        for name, value in left.items()
    )
    attack = AttackVariant(name="relearn", access="weights", subject="oracle-0")
    return Record(verdicts=verdicts, attacks=(attack,) if oracle else ())


def board(*seeds: dict[str, float], over: str = "") -> Board:
    names = tuple(dict.fromkeys(n.removesuffix("-repaired") for s in seeds for n in s))
    chosen = {n: trial(5, 9.0 if n == over else 1.0) for n in names}
    entries = tuple(Entry(n, repaired=r) for r in (False, True) for n in names)
    records = {i: judged(left) for i, left in enumerate(seeds)}
    return Board(tiny(), {}, chosen, (1.0, 1.0), entries, records=records)


def test_a_leader_is_ahead_of_everyone_by_more_than_the_margin() -> None:
    clear = board({"a": 0.1, "b": 0.5}, {"a": 0.12, "b": 0.5}, {"a": 0.1, "b": 0.52})
    assert decide(clear).startswith("a leads")
    assert ahead(clear, "a", "b").value == pytest.approx(0.4)
    assert decide(replace(clear, beside=("a",))).startswith("undecided: b was compared with no")
    near = board({"a": 0.1, "b": 0.25}, {"a": 0.3, "b": 0.31}, {"a": 0.1, "b": 0.4})
    assert decide(near).startswith("undecided: a leaves least, and is not shown to be ahead of b")
    assert decide(board({"a": 0.1, "b": 0.5})).startswith("undecided")  # one seed says nothing
    # What repair brings back counts against the method.
    hidden = {"a": 0.0, "a-repaired": 0.9, "b": 0.5}
    assert board(hidden, hidden, hidden).ranking() == ["b", "a"]
    beyond = board({"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 0.5}, over="a")
    assert beyond.ranking() == ["b", "a"]
    # A method that failed at a seed does not win by the seeds that are left.
    assert board({"a": 0.0, "b": 0.5}, {"b": 0.5}).ranking() == ["b", "a"]


def test_what_was_not_attacked_cannot_lead() -> None:
    clear = board({"a": 0.1, "b": 0.5}, {"a": 0.12, "b": 0.5}, {"a": 0.1, "b": 0.52})
    spoilt = AttackVariant(
        name="transfer", access="weights", level="D4", subject="a-repaired", decisive=True,
        status="invalid",
    )  # fmt: skip

    def with_attack(entry: AttackVariant) -> Board:
        record = clear.records[1]
        verdicts = (*record.verdicts, *judged({"a-repaired": 0.1}).verdicts)
        told = {"attacks": (*record.attacks, entry), "verdicts": verdicts}
        return replace(clear, records={**clear.records, 1: record.model_copy(update=told)})

    assert with_attack(spoilt).unattacked("a") == [1]
    assert with_attack(spoilt).unattacked("b") == []
    assert decide(with_attack(spoilt)) == (
        "undecided: a leaves least, but relearning on it is invalid at 1 seed, so that what it "
        "leaves is a lower bound"
    )
    table = board_table(with_attack(spoilt))
    cells = {(r.condition, r.metric): r.value for r in table.rows}
    assert cells["a, repaired", UNATTACKED] == 1
    assert ("a", UNATTACKED) not in cells
    told = StudyRecord(
        name="leaderboard", question="", statistic="", margin=0.1, tables=(table,), decision="open"
    )
    printed = markdown(Record(kind="study", study=told)).splitlines()
    (line,) = [each for each in printed if each.startswith("| a |")]
    assert [cell.strip().startswith("\u2265") for cell in line.split("|")[2:4]] == [False, True]
    assert any(each.startswith("\u2265: ") for each in printed)
    for change in ({"status": "ok"}, {"decisive": False}, {"level": "D3"}, {"subject": "b"}):
        assert decide(with_attack(spoilt.model_copy(update=change))).startswith("a leads")


def test_what_is_left_is_the_worst_level_and_residual_bits_are_no_part_of_it() -> None:
    left = left_of(judged({"a": 0.3}), "a")
    assert left is not None
    assert left.value == 0.3
    assert left_of(judged({"a": 0.3}), "b") is None
    assert math.isnan(over_seeds([1.0]).low)
    assert over_seeds([0.0, 1.0]).value == 0.5


def relearning(score: float, rate: float) -> AttackVariant:
    curve = tuple(CurvePoint(tokens=t, score=s, low=s, high=s) for t, s in ((0, 0.0), (9, score)))
    return AttackVariant(
        name="relearn", access="weights", level="D4", subject="a", lr=rate, curve=curve
    )


def test_the_attackers_search_is_a_running_best() -> None:
    attacks = tuple(relearning(s, r) for s, r in ((0.2, 1e-3), (0.1, 1e-2), (0.6, 1e-1)))
    score = Score(model="original", set="test", metric="", value=1, low=1, high=1, n=4)
    assert best_so_far(Record(attacks=attacks, scores=(score,)), "a") == [0.2, 0.2, 0.6]
    loss = score.model_copy(update={"direction": "lower"})
    assert best_so_far(Record(attacks=attacks, scores=(loss,)), "a") == [0.2, 0.1, 0.1]


# -- from the command line -------------------------------------------------------------------------


def test_flags_name_methods_a_domain_and_code_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from typing import Literal\nfrom excise.methods import GradDiff\n"
        "class Mine(GradDiff):\n    name: Literal['mine'] = 'mine'\n"
    )
    flags = {
        "model": "m",
        "domain": "glosses",
        "domain.seed": "3",
        "methods": f"rmu, {file}:Mine",
        "methods.rmu.steering": "30",
        "trials": "5",
        "time-budget": "36h",
    }
    study = study_of("leaderboard", flags, full=False, allow_code=True)
    assert isinstance(study, Leaderboard)
    assert isinstance(study.domain, Glosses)
    assert study.domain.seed == 3
    assert list(study.methods) == ["rmu", "Mine"]
    assert study.methods["rmu"] == RMU(steering=30)
    assert study.methods["Mine"].name == "mine"  # type: ignore[attr-defined]
    assert (study.model, study.trials, study.seconds()) == ("m", 5, 36 * 3600)
    assert study.first()["rmu"] == RMU(steering=30)  # as published on a model that exists
    with pytest.raises(UserError, match="allow-code"):
        study_of("leaderboard", flags, full=False)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"methods": "rmuu"}, "did you mean 'rmu'"),
        ({"methods": "rmu,rmu"}, "names 'rmu' twice"),
        ({"methods": ""}, "methods: name at least one"),
        ({"methods": "filtering", "model": "m"}, "trains from scratch"),
        ({"time_budget": "soon"}, "write 30m, 36h or 2d"),
        ({"domain": "glosse"}, "did you mean 'glosses'"),
        ({"tuned_on": "[]"}, "tuned_on: needs one seed"),
        ({"tuned_on": "[1]"}, "settings are chosen on seed 1"),
        ({"audit.budget": "none"}, "attacks nothing"),
        ({"rates": "[0]"}, "no share of rows"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(flags: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        study_of("leaderboard", flags, full=False)


def test_without_dev_rows_or_any_model_there_is_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="failing made no model: failing needs pairs"):
        ran(tiny(methods={"failing": Failing()}), tmp_path / "a")
    with pytest.raises(UserError, match="rmu was not tried: the time was up"):
        ran(tiny(methods={"rmu": RMU(fit=QUICK)}, time_budget="0s"), tmp_path / "b")
    build = Facts.build
    monkeypatch.setattr(Facts, "build", lambda *a: replace(build(*a), dev_retain=()))
    with pytest.raises(UserError, match="has no dev rows for the leaderboard to choose on"):
        ran(tiny(), tmp_path / "c")


def test_presets_hold_every_method_that_edits_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    facts, glosses = LeaderboardFacts(), LeaderboardGlosses()
    assert set(facts.methods) - set(glosses.methods) == {"filtering"}
    assert facts.rates == (1.0, 0.5, 0.1)
    assert run_main(RunOptions(name="leaderboard-glosses", dry_run=True)) == 0
    assert "margin: 0.1" in capsys.readouterr().out
