"""Labellers: known answers, calibration, what is held out, and the words that labels cover."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Row, Rows, Span, labelled_text
from excise.data.spans import pieces
from excise.data.stream import encode_row
from excise.labelling.head import calibration_error, platt, table, verdict
from excise.labelling.labeller import (
    PARTS,
    AnyLabeller,
    EncoderLabeller,
    Fitted,
    Labeller,
    NgramLabeller,
    StatesLabeller,
    fit_labeller,
    label_documents,
    load_labeller,
    open_reader,
    save_labeller,
    split_documents,
)
from excise.labelling.words import WORD, document_of, documents_of, labelled, split_keys
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.train.fit import FitConfig

FILLERS = [
    "the", "of", "a", "river", "house", "green", "walks", "slowly", "under", "old", "some", "bread",
    "window", "near", "light",
]  # fmt: skip
SMALL = FitConfig(
    steps=120, lr=5e-3, batch_size=16, warmup=5, schedule="cosine", betas=(0.9, 0.98), clip=1.0
)
ENCODER = EncoderLabeller(
    width=32, blocks=2, heads=2, buckets=256, window=16, vocabulary=32, fit=SMALL
)


def spanned(words: list[str], marked: set[int], unit: str, **more: Any) -> Row:
    """Return a row of words, some of them marked as capability 1."""
    spans, at = [], 0
    for i, word in enumerate(words):
        if i in marked:
            spans.append(Span(at, at + len(word), "secret", 1))
        at += len(word) + 1
    return Row(
        unit,
        text=" ".join(words),
        capability="secret" if spans else "",
        label=1 if spans else CORE,
        spans=tuple(spans),
        **more,
    )


def word_decides(count: int, seed: int = 0) -> Rows:
    """Return documents in which words that begin with 'zyx' are of the capability."""
    draw = random.Random(seed)
    out = []
    for i in range(count):
        words = draw.choices(FILLERS, k=12)
        marked = set(draw.sample(range(12), 3)) if i % 2 else set()
        for at in marked:
            words[at] = "zyx" + "".join(draw.choices("abcde", k=3))
        out.append(spanned(words, marked, f"u{i}"))
    return tuple(out)


def context_decides(count: int, seed: int = 0) -> Rows:
    """Return documents in which the first word decides what 'target' is, five words on or more."""
    draw = random.Random(seed)
    out = []
    for i in range(count):
        words = [("alpha", "beta")[i % 2], *draw.choices(FILLERS, k=11)]
        at = draw.randrange(5, 12)
        words[at] = "target"
        out.append(spanned(words, {at} if i % 2 else set(), f"u{i}"))
    return tuple(out)


def hidden(rows: Rows, count: int) -> Rows:
    """Return rows of which all but the first have no label."""
    return tuple(
        row if i < count else replace(
            row, label=UNLABELED, spans=tuple(replace(s, label=UNLABELED) for s in row.spans)
        )
        for i, row in enumerate(rows)
    )  # fmt: skip


def at(fitted: Fitted, threshold: float) -> Mapping[str, float]:
    """Return the line of a threshold."""
    return next(line for line in fitted.facts["thresholds"] if line["threshold"] == threshold)


def quality(rows: list[Row]) -> tuple[float, float]:
    """Return precision and recall of characters, judged by the truth."""
    right = flagged = true = 0
    for row in rows:
        for piece in pieces(row):
            length = len(labelled_text(row)[piece.start : piece.end].strip())
            flagged += length * (piece.label > CORE)
            true += length * bool(piece.capability)
            right += length * (piece.label > CORE and bool(piece.capability))
    return right / max(1, flagged), right / max(1, true)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model") / "model"
    return save_model(tiny_model("llama", width=64, blocks=2), byte_tokenizer(), folder)


@pytest.mark.parametrize(
    "config", [NgramLabeller(), ENCODER, StatesLabeller(block=0)], ids=lambda c: c.name
)
def test_a_word_that_decides_is_found(
    config: AnyLabeller, model: Checkpoint, tmp_path: Path
) -> None:
    rows = hidden(word_decides(120), 60)
    ctx = Context(tmp_path)
    fitted = fit_labeller(config, rows, ("secret",), ctx, model)
    assert at(fitted, 0.5)["precision"] >= 0.97
    assert at(fitted, 0.5)["recall"] >= 0.97
    assert fitted.facts["by_capability"]["secret"]["recall"] >= 0.97
    assert fitted.facts["verdict"] == ""
    assert fitted.facts["calibration"]["error"] < 0.05
    reader = open_reader(config, model, ctx)
    given = label_documents(fitted, documents_of(rows[60:]), ctx, reader)
    precision, recall = quality(given)
    assert precision >= 0.97
    assert recall >= 0.97
    assert [row.text for row in given] == [row.text for row in rows[60:]]
    assert UNLABELED not in {piece.label for row in given for piece in pieces(row)}


def test_context_that_decides_is_found_by_the_encoder_alone(tmp_path: Path) -> None:
    rows = context_decides(160)
    names = ("secret",)
    near = fit_labeller(NgramLabeller(), rows, names, Context(tmp_path / "n"))
    config = ENCODER.model_copy(update={"hide": 0.1})
    far = fit_labeller(config, rows, names, Context(tmp_path / "e"))
    assert at(far, 0.5)["precision"] >= 0.9
    assert at(far, 0.5)["recall"] >= 0.9
    best = max(min(line["precision"] or 0.0, line["recall"]) for line in near.facts["thresholds"])
    assert best < 0.75


def test_capabilities_are_told_apart(tmp_path: Path) -> None:
    rows = []
    for i, row in enumerate(word_decides(90)):
        kind = 1 + i % 4 // 2
        spans = tuple(
            replace(s, label=kind, capability=("one", "two")[kind - 1]) for s in row.spans
        )
        text = row.text.replace("zyx", ("zyx", "qwv")[kind - 1])
        label = kind if spans else CORE
        rows.append(replace(row, text=text, spans=spans, capability="", label=label))
    fitted = fit_labeller(NgramLabeller(), tuple(rows), ("one", "two"), Context(tmp_path))
    for name in ("one", "two"):
        assert fitted.facts["by_capability"][name]["precision"] >= 0.95
        assert fitted.facts["by_capability"][name]["recall"] >= 0.95


def test_documents_labelled_whole_teach_every_word(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = tuple(
        Row(f"u{i}", text=" ".join(draw.choices(words, k=8)), label=i % 2)
        for i in range(40)
        for words in (FILLERS[:7] if i % 2 else FILLERS[7:],)
    )
    fitted = fit_labeller(NgramLabeller(), rows, ("secret",), Context(tmp_path))
    assert at(fitted, 0.5)["recall"] == 1.0
    assert at(fitted, 0.5)["precision"] == 1.0


def test_equal_seeds_give_equal_bytes_and_files_come_back(tmp_path: Path) -> None:
    rows = hidden(word_decides(40), 30)
    config = ENCODER.model_copy(update={"fit": SMALL.model_copy(update={"steps": 6})})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ctx = Context(tmp_path / f"work-{name}", seed=seed)
        (tmp_path / name).mkdir()
        fitted = fit_labeller(config, rows, ("secret",), ctx)
        save_labeller(fitted, tmp_path / name)
    a, b, c = ((tmp_path / n / "labeller.safetensors").read_bytes() for n in "abc")
    assert a == b != c
    again = load_labeller(config, tmp_path / "c")
    assert again.calibration == fitted.calibration
    documents = documents_of(rows)
    ctx = Context(tmp_path)
    assert label_documents(again, documents, ctx) == label_documents(fitted, documents, ctx)


def test_a_killed_training_resumes_to_the_same_labeller(tmp_path: Path) -> None:
    rows = hidden(word_decides(40), 30)
    fit = SMALL.model_copy(update={"steps": 8, "save_every": 1, "log_every": 1})
    config = ENCODER.model_copy(update={"fit": fit})

    def stop(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step" and data["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_labeller(config, rows, ("secret",), Context(tmp_path / "killed", emit=stop))
    steps: list[int] = []

    def watch(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            steps.append(data["step"])

    resumed = fit_labeller(config, rows, ("secret",), Context(tmp_path / "killed", emit=watch))
    assert min(steps) > 4
    whole = fit_labeller(config, rows, ("secret",), Context(tmp_path / "whole"))
    assert all(torch.equal(resumed.weights[k], whole.weights[k]) for k in whole.weights)
    facts = [{k: v for k, v in f.facts.items() if k != "cost"} for f in (resumed, whole)]
    assert facts[0] == facts[1]
    assert resumed.facts["cost"]["training_flops"] == whole.facts["cost"]["training_flops"]


# Calibration.


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.3, -2.0), (4.0, 3.0)])
def test_calibration_finds_how_often_a_margin_is_right(slope: float, shift: float) -> None:
    draw = torch.Generator().manual_seed(0)
    margin_N = 2 * torch.randn(20000, generator=draw)
    true_N = torch.sigmoid(slope * margin_N + shift)
    forget_N = torch.rand(20000, generator=draw) < true_N
    a, b = platt(margin_N[:10000], forget_N[:10000])
    assert a == pytest.approx(slope, rel=0.1)
    assert b == pytest.approx(shift, abs=0.2)
    chance_N = torch.sigmoid(a * margin_N[10000:] + b)
    assert calibration_error(chance_N, forget_N[10000:]) < 0.02


def test_calibration_of_separated_margins_stays_finite() -> None:
    margin_N = torch.tensor([-3.0, -2.0, 2.0, 3.0])
    a, b = platt(margin_N, margin_N > 0)
    assert 0 < a < 10
    assert abs(b) < 1
    assert platt(torch.ones(4), margin_N > 0)[0] == pytest.approx(0.0, abs=1e-6)


def test_a_labeller_that_finds_nothing_or_everything_says_so() -> None:
    forget_N = torch.tensor([True] * 10 + [False] * 90)
    assert "finds nothing" in verdict(torch.full((100,), 0.1), forget_N)
    assert "finds everything" in verdict(torch.full((100,), 0.9), forget_N)
    assert verdict(forget_N.double(), forget_N) == ""
    lines = table(forget_N.double() * 0.6, forget_N)
    assert lines[0]["precision"] == lines[0]["recall"] == 1.0
    assert lines[-1]["precision"] is None
    assert lines[-1]["recall"] == 0.0


def test_random_labels_find_nothing_and_are_said_to(tmp_path: Path) -> None:
    draw = random.Random(1)
    rows = tuple(
        spanned(draw.choices(FILLERS, k=12), {draw.randrange(12)} if i % 2 else set(), f"u{i}")
        for i in range(80)
    )
    notes: list[str] = []
    ctx = Context(tmp_path, emit=lambda kind, data: notes.append(str(data.get("text"))))
    fitted = fit_labeller(NgramLabeller(), rows, ("secret",), ctx)
    assert "the labeller finds nothing" in fitted.facts["verdict"]
    assert notes == [fitted.facts["verdict"]]


# What is held out.


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(30, 80))
def test_what_is_held_out_shares_nothing_with_what_is_learned_from(seed: int, count: int) -> None:
    draw = random.Random(seed)
    rows = [
        Row(
            f"u{draw.randrange(60)}",
            group=draw.choice(["", f"g{draw.randrange(60)}"]),
            text=f"text {draw.randrange(60)}",
            label=CORE,
        )
        for _ in range(count)
    ]
    rows += [Row(f"f{i}", text=f"secret {i}", label=1) for i in range(9)]
    documents = documents_of(dict.fromkeys(rows))
    part = split_documents(documents, Labeller(), seed)
    for first, second in combinations(PARTS, 2):
        a, b = (
            [d.row for d, p in zip(documents, part, strict=True) if p == name]
            for name in (first, second)
        )
        for shared in (lambda r: r.unit, lambda r: r.group, lambda r: r.text):
            of: Callable[[Row], str] = shared
            assert not ({*map(of, a)} & {*map(of, b)}) - {""}


def test_what_is_held_out_does_not_depend_on_the_order_of_rows() -> None:
    documents = documents_of(word_decides(40))
    part = split_documents(documents, Labeller(), 3)
    backwards = split_documents(documents[::-1], Labeller(), 3)
    assert part == backwards[::-1]
    assert part != split_documents(documents, Labeller(), 4)


def test_keys_join_what_one_text_unit_or_group_shares() -> None:
    rows = [
        Row("a", text="one"), Row("a", text="two"), Row("b", text="two"), Row("c", "g", text="x"),
        Row("d", "g", text="y"), Row("e", text="z"),
    ]  # fmt: skip
    group, unit, row = (split_keys(rows, by) for by in ("group", "unit", "row"))
    assert [len({*keys}) for keys in (group, unit, row)] == [3, 4, 5]
    assert group[0] == group[1] == group[2] != group[5]
    assert row[1] == row[2] != row[0]


def test_too_few_labels_are_refused(tmp_path: Path, model: Checkpoint) -> None:
    rows = word_decides(20)
    ctx = Context(tmp_path)
    with pytest.raises(UserError, match=r"from 3 units at least.*there are none"):
        fit_labeller(NgramLabeller(), rows[::2], ("secret",), ctx)
    with pytest.raises(UserError, match=r"from 3 units at least.*there is 1;"):
        fit_labeller(NgramLabeller(), rows[:3], ("secret",), ctx)
    alone = tuple(Row(f"u{i}", text=f"secret {i}", label=1) for i in range(9))
    with pytest.raises(UserError, match=r"core words to learn from.*label more core documents"):
        fit_labeller(NgramLabeller(), alone, ("secret",), ctx)
    with pytest.raises(UserError, match=r"'states' reads hidden states of a model; name one with"):
        fit_labeller(StatesLabeller(), rows, ("secret",), ctx)
    with pytest.raises(UserError, match=r"labeller.block is 7; the model has 2 blocks"):
        fit_labeller(StatesLabeller(block=7), rows, ("secret",), ctx, model)


# Words.

TEXTS = [
    "Der Fuchs läuft über 42 Brücken; don't (stop)!",
    "naïve café, ½ 漢字かな 🦊 fox",
    "  a  b\tc \n the end. ",
    "हिन्दी में लिखा हुआ पाठ",
    "e\u0301te\u0301 👩‍👩‍👧 ok",
]


@pytest.mark.parametrize("text", TEXTS)
def test_words_cover_all_but_blanks(text: str) -> None:
    found = [match.span() for match in WORD.finditer(text)]
    assert "".join(text[a:b] for a, b in found) == "".join(text.split())
    assert all(a[1] <= b[0] for a, b in pairwise(found))


def test_scripts_without_blanks_are_words_by_character() -> None:
    assert WORD.findall("漢字かな, don't") == ["漢", "字", "か", "な", ",", "don", "'", "t"]
    assert WORD.findall("हिन्दी में") == ["हिन्दी", "में"]


@settings(max_examples=100, deadline=None)
@given(text=st.sampled_from(TEXTS), data=st.data())
def test_labels_of_words_come_back_from_spans_and_from_tokens(
    text: str, data: st.DataObject
) -> None:
    row = Row("u", text=text, label=UNLABELED)
    document = document_of(row)
    count = len(document.words)
    labels = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    given_row = labelled(document, labels, [0.9] * count)
    again = document_of(given_row)
    assert [*again.labels] == labels
    assert {s.confidence for s in given_row.spans} <= {0.9}
    example = encode_row(given_row, byte_tokenizer(), max_length=200)
    assert {*labels} <= {*(example.label if isinstance(example.label, tuple) else labels)}
    for a, b in pairwise(given_row.spans):
        assert a.end <= b.start
        assert a.end < b.start or a.label != b.label


def test_the_truth_and_labels_that_are_there_stay() -> None:
    row = Row(
        "u", text="one two three four", label=UNLABELED, capability="secret",
        spans=(Span(4, 7, "secret", 1), Span(8, 13, "secret", UNLABELED)),
    )  # fmt: skip
    document = document_of(row)
    assert document.labels == (UNLABELED, 1, UNLABELED, UNLABELED)
    given_row = labelled(document, [0, 1, 0, 1], [1.0, 1.0, 1.0, 0.7])
    assert [(s.start, s.end, s.capability, s.label) for s in pieces(given_row)] == [
        (0, 4, "", 0), (4, 7, "secret", 1), (7, 8, "", 1), (8, 13, "secret", 0), (13, 14, "", 0),
        (14, 18, "", 1),
    ]  # fmt: skip
    assert given_row.label == 1
    whole = labelled(document_of(Row("u", text="a b", label=UNLABELED)), [0, 0], [1.0, 1.0])
    assert (whole.label, whole.spans) == (CORE, ())


def test_labels_that_are_more_likely_wrong_teach_nothing() -> None:
    assert document_of(Row("u", text="a b", label=1, confidence=0.4)).labels == (UNLABELED,) * 2
