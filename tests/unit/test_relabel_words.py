"""Relabelling by word: labellers that never saw a document's labels label its words."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.toy import context, toy_checkpoint
from tests.unit.test_labelling import ENCODER, FILLERS, SMALL, word_decides

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows, Span
from excise.data.labels import LabelNoise, give_labels
from excise.labelling.labeller import NgramLabeller, StatesLabeller
from excise.methods import Relabel, TokenFilter
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.relabel.words import judge_words, relabel_words
from excise.train.fit import FitConfig

SCHEDULE = Pretrain(fit=FitConfig(steps=12, lr=1e-3, batch_size=8), max_length=16)


def judged(rows: Rows, folder: Path, *, by: Any = "group", **more: Any) -> Any:
    chosen: dict[str, Any] = {"folds": 3, "rule": "lift", "fixed": 0.5, "seed": 0} | more
    return judge_words(
        rows, NgramLabeller(buckets=4096), 2, Context(folder), model=None, by=by, **chosen
    )


def test_missed_words_are_found_by_labellers_that_never_saw_them(tmp_path: Path) -> None:
    noise = LabelNoise(missed_occurrences=0.3, missed_spans=0.2)
    rows = give_labels(word_decides(120), noise, seed=0)
    judgement = judged(rows, tmp_path)
    now, facts = relabel_words(rows, judgement)
    assert (facts["labelled"] or 0) >= 50
    assert (facts["precision"] or 0) >= 0.95
    assert (facts["recall"] or 0) >= 0.95
    assert judgement.verdict == ""
    assert [row.text for row in now] == [row.text for row in rows]
    assert [row.capability for row in now] == [row.capability for row in rows]
    found = [row for row, before in zip(now, rows, strict=True) if row != before]
    for row in found:
        assert any(row.text[s.start : s.end].startswith("zyx") for s in row.spans if s.label == 1)


def test_the_labels_of_a_document_do_not_decide_its_own_words(tmp_path: Path) -> None:
    rows = tuple(replace(row, group=f"g{i // 4}") for i, row in enumerate(word_decides(48)))
    before = judged(rows, tmp_path / "a")
    flipped = tuple(
        replace(row, label=CORE, spans=tuple(replace(s, label=CORE) for s in row.spans))
        if row.group == "g1" else row
        for row in rows
    )  # fmt: skip
    after = judged(flipped, tmp_path / "b")
    same = [
        torch.equal(a, b)
        for row, a, b in zip(rows, before.chances, after.chances, strict=True)
        if row.group == "g1"
    ]
    assert same == [True] * 4
    assert not all(torch.equal(a, b) for a, b in zip(before.chances, after.chances, strict=True))


def test_equal_texts_share_a_fold_whatever_splits_them(tmp_path: Path) -> None:
    rows = word_decides(48)
    twin = replace(rows[1], unit="twin", label=CORE, spans=())
    judgement = judged((*rows, twin), tmp_path, by="row")
    assert torch.equal(judgement.chances[1], judgement.chances[-1])


def test_words_without_a_label_are_cleared_below_the_threshold(tmp_path: Path) -> None:
    rows = tuple(
        replace(row, label=UNLABELED, spans=()) if i >= 36 else row
        for i, row in enumerate(word_decides(48))
    )
    judgement = judged(rows, tmp_path)
    left, _ = relabel_words(rows, judgement)
    assert any(row.label == UNLABELED for row in left)
    cleared, _ = relabel_words(rows, judgement, clear=1.0)
    assert {row.label for row in cleared} == {CORE, 1}


def test_a_labeller_that_cannot_tell_labels_nothing_and_says_so(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = tuple(
        Row(f"u{i}", text=" ".join(draw.choices(FILLERS[:4], k=9)), label=draw.randrange(2))
        for i in range(90)
    )
    judgement = judged(rows, tmp_path, by="unit")
    _, facts = relabel_words(rows, judgement)
    assert facts["labelled"] == 0
    assert "finds nothing" in judgement.verdict


def toy(count: int = 24) -> Domain:
    """Return documents of toy words, w7 and w8 of which are of the capability."""
    forget = tuple(
        Row(f"f{i}", text=f"w1 w{7 + i % 2} w2 w3 w1", capability="a", label=1,
            spans=(Span(3, 5, "a", 1),))
        for i in range(count)
    )  # fmt: skip
    retain = tuple(Row(f"r{i}", text=f"w1 w2 w{3 + i % 3} w{4 + i % 2} w2") for i in range(count))
    forget = tuple(replace(row, text=f"{row.text} w{20 + i}") for i, row in enumerate(forget))
    retain = tuple(replace(row, text=f"{row.text} w{20 + i}") for i, row in enumerate(retain))
    few = {"a": forget[:1]}
    return Domain("toy", {"a": forget}, retain, few, few, retain[:1], few, retain[:1], retain[:1])


QUICK = ENCODER.model_copy(
    update={"fit": SMALL.model_copy(update={"steps": 30}), "masked_weight": 0.0, "width": 8,
            "blocks": 1, "buckets": 64}
)  # fmt: skip


@pytest.mark.parametrize(
    "labeller", [NgramLabeller(buckets=1024), QUICK, StatesLabeller(block=0)], ids=lambda c: c.name
)
def test_relabel_labels_words_and_takes_what_that_costs_off_its_steps(
    labeller: Any, tmp_path: Path
) -> None:
    start, domain = toy_checkpoint(tmp_path / "start"), toy()
    fit = SCHEDULE.fit.model_copy(update={"steps": 400})
    config = SCHEDULE.model_copy(update={"fit": fit})
    method = Relabel(
        pretrain=config if labeller.name == "encoder" else SCHEDULE,
        labels=LabelNoise(missed_occurrences=0.3), features=labeller.name, labeller=labeller,
        folds=2, fold_by="row", then=TokenFilter(how="mask"),
    )  # fmt: skip
    made = method.apply(start, domain, context(tmp_path / "ours"))
    facts = made.extras["relabel"]
    assert facts["probe"]["recall"] >= 0.7
    assert facts["probe"]["precision"] >= 0.3
    steps = facts["steps"]
    assert sum(steps.values()) == method.pretrain.fit.steps if method.pretrain else False
    assert steps["reading"] >= 1
    assert (steps["features"] > 0) == (labeller.name == "states")
    assert made.cost.steps == steps["features"] + steps["training"]


def test_what_labels_words_is_refused_where_rows_are_meant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"then: features 'ngrams' label words, which cannot be"):
        Relabel(features="ngrams")
    with pytest.raises(ValueError, match=r"labeller: is 'encoder', and features are 'tokens'"):
        Relabel(labeller=QUICK)
    asked = Row("q", prompt="w1?", choices=("w1", "w2"), answer=0)
    with pytest.raises(UserError, match=r"unit 'q' is a multiple-choice question; use features"):
        judged((*word_decides(12), asked), tmp_path)
    with pytest.raises(UserError, match=r"no labelled forget word outside fold 0 of 3"):
        judged(word_decides(24)[::2], tmp_path)
