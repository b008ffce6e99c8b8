"""What `routing-against-posthoc` compares: labels, arms, the decision, and that it runs through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.studies.test_leaderboard import judged, tiny, trial
from tests.studies.tiny_setting import QUICK, ran_twice

from excise.core.config import ConfigError
from excise.data.labels import give_labels, label_quality, label_rows
from excise.domains.facts import Facts
from excise.methods import SSD, Chain, Filtering
from excise.methods.pretraining.pretrain import corpus
from excise.methods.search import changed, settings_of
from excise.record import AttackVariant, Record, Score
from excise_studies.leaderboard.repair import RetainTuning
from excise_studies.leaderboard.tables import Board, Entry
from excise_studies.routing.against_posthoc import (
    RoutingAgainstPosthoc,
    behind,
    decide,
    left_at,
)
from excise_studies.routing.setting import label_settings, misses, routed


def test_structured_misses_take_the_foreign_paraphrases_first() -> None:
    domain = Facts(subjects=120, relations=4, objects=8).build()
    rows = label_rows(corpus(domain), tuple(domain.forget))
    for rate in (0.9, 0.5, 0.1):
        noise = misses(rate, "structured", "unlabeled")
        assert noise is not None
        given = give_labels(rows, noise, seed=3)
        assert label_quality(given)["occurrences"] == pytest.approx(rate, abs=0.01)
        missed = [row.wording for row in given if row.capability and row.label < 0]
        assert (0 in missed) == (rate < 1 / 3)


def study_of(**change: Any) -> RoutingAgainstPosthoc:
    return RoutingAgainstPosthoc(**{"missed": ("units", "structured"), "rates": (0.5,), **change})


def test_a_chain_is_searched_over_its_links_and_only_the_arms_run() -> None:
    study = study_of(arms=("sgtm_relabelled", "ssd_then_retain"))
    first = study.first()
    assert list(first) == ["sgtm_relabelled", "ssd_then_retain"]
    chain = first["ssd_then_retain"]
    assert isinstance(chain, Chain)
    assert [type(link) for link in chain.methods] == [SSD, RetainTuning]
    setting = settings_of(chain, 3, 0)[1]
    assert list(setting) == ["methods.0.alpha", "methods.0.lam", "methods.1.fit.lr"]
    new = changed(chain, setting).methods
    assert isinstance(new[0], SSD)
    assert new[0].alpha == setting["methods.0.alpha"]
    assert isinstance(new[1], RetainTuning)
    assert new[1].fit.steps == study.then.steps
    assert new[1].fit.lr == setting["methods.1.fit.lr"]
    for path in ("methods.2.alpha", "methods.x.alpha", "methods.0"):
        with pytest.raises(ValueError, match="no such setting"):
            changed(chain, {path: 1.0})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": ("sgtm_relabelled", "ssdd")}, "arms: no method that runs is called 'ssdd'"),
        ({"arms": ("ssd",)}, "preset: no method that runs is called 'sgtm_relabelled'"),
        ({"followed": ("sssd",)}, "followed: no method that runs is called 'sssd'"),
        ({"decide_at": 0.4}, "decide_at: 0.4 is none of 'rates'"),
    ],
)
def test_what_cannot_be_decided_is_refused_in_a_sentence(change: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        study_of(**change)


LEFT = {"sgtm_relabelled": 0.1, "rmu": 0.8, "npo": 0.12, "ssd": 0.9, "ssd_then_retain": 0.05}


def board_of(study: RoutingAgainstPosthoc, cost: dict[str, float] | None = None) -> Board:
    """Return audits of three seeds in which every method left what `LEFT` says, more or less."""
    settings = label_settings(study.rates, study.missed)
    entries = {Entry(name, labels) for name in LEFT for labels in settings}
    records = {}
    for seed in study.seeds:
        lefts = {e.name: LEFT[e.method] + 0.01 * (seed + len(e.labels.missed)) for e in entries}
        scores = [
            Score(model=model, set="retain_test", metric="", value=v, low=v, high=v, n=4)
            for model, v in (
                ("original", 1.0),
                *((e.name, 1 - (cost or {}).get(e.method, 0.0)) for e in entries),
            )
        ]
        records[seed] = judged(lefts).model_copy(update={"scores": tuple(scores)})
    chosen = {name: trial(5, 1.0) for name in LEFT}
    return Board(study, {}, chosen, (1.0, 1.0), tuple(entries), records=records)


def said(study: RoutingAgainstPosthoc, board: Board) -> str:
    names = [name for name in LEFT if name != study.preset]
    return decide(study, board, {name: behind(study, board, name) for name in names}).text


def test_the_difference_to_the_preset_decides() -> None:
    study = study_of()
    board = board_of(study)
    units = left_at(board, "rmu", label_settings((0.5,), ("units",)))
    assert units[1] == pytest.approx((0.8 + 0.06, 0.0))
    assert behind(study, board, "rmu").value == pytest.approx(0.7)
    words = said(study, board)
    assert words.startswith("sgtm_relabelled leaves less than rmu, ssd; npo, ssd_then_retain")
    assert words.endswith("fine-tuning on retain rows makes ssd work")
    dear = said(study, board_of(study, {"ssd_then_retain": 0.2, "sgtm_relabelled": 0.1}))
    assert "ssd_then_retain leave(s) no more and cost(s) more than 0.05 of retain" in dear
    assert "sgtm_relabelled itself does not keep retain" in dear
    assert "is not shown to make ssd work" in dear


def test_what_was_not_attacked_neither_beats_nor_does_as_well() -> None:
    study = study_of()
    board = board_of(study)

    def resisting(model: str, board: Board = board) -> str:
        entry = AttackVariant(
            name="transfer", access="weights", level="D4", subject=model, decisive=True,
            status="invalid",
        )  # fmt: skip
        told = board.records[2].model_copy(update={"attacks": (entry,)})
        return said(study, replace(board, records={**board.records, 2: told}))

    (half, *_) = label_settings((study.decide_at,), study.missed)
    npo = resisting(Entry("npo", half).name)
    assert "; undecided against npo, on which relearning is invalid; ssd_then_retain leave" in npo
    # Nor does one that costs retain leave "no more" by it.
    assert "undecided against npo, on" in resisting(
        Entry("npo", half).name, board_of(study, {"npo": 0.2})
    )
    ours = resisting(Entry("sgtm_relabelled", half).name)
    assert "sgtm_relabelled leaves less than" not in ours
    assert "undecided against rmu, ssd; relearning on sgtm_relabelled itself is invalid" in ours
    # Elsewhere it decides nothing.
    assert resisting(Entry("npo").name) == said(study, board)


def test_a_seed_without_an_audit_says_nothing() -> None:
    study = study_of()
    board = board_of(study)
    records: dict[int, Record] = {**board.records, 2: Record()}
    short = Board(study, {}, board.chosen, (1.0, 1.0), board.entries, records=records)
    assert set(left_at(short, "rmu", label_settings((0.5,), study.missed))) == {1, 3}
    assert behind(study, short, "rmu").n == 2


@pytest.mark.slow
def test_the_study_runs_through(tmp_path: Path) -> None:
    small = tiny()
    study = RoutingAgainstPosthoc(
        domain=small.domain,
        scratch=small.scratch,
        pretrain=small.pretrain,
        oracles=small.oracles,
        dev_rows=small.dev_rows,
        audit=small.audit,
        evaluate=small.evaluate,
        methods={
            "sgtm": routed(),
            "ssd": SSD(against="retain", alpha=2.0, max_length=16),
            "filtering": Filtering(),
        },
        preset="sgtm",
        followed=("ssd",),
        then=QUICK,
        trials=2,
        seeds=(1,),
        rates=(0.5,),
        missed=("structured",),
    )
    made = ran_twice(study, tmp_path)
    left = {(r.condition, r.metric): r.value for r in made.tables[0].rows}
    names = {"sgtm", "ssd", "ssd_then_retain", "filtering"}
    assert {name for name, _ in left} == names
    assert {metric for _, metric in left} == {
        "left, 50 %, missed structured",
        "retain change, 50 %, missed structured",
    }
    assert "Fine-tuning on retain rows changed what ssd left by" in made.paragraph
    titles = [table.title for table in made.tables]
    assert {"Against sgtm at 50 % labels", "Leaderboard", "Search"} < {*titles}
