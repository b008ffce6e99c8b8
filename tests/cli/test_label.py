"""`excise label`: few labels in, labels for all out, as a file that is read and edited."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from excise.cli import main
from excise.core.config import parse
from excise.core.errors import UserError
from excise.core.events import silent
from excise.core.keys import identity
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows, Span
from excise.data.labels import LabelNoise, give_labels, label_rows, relabelled
from excise.data.sources import parse_source, read_source
from excise.data.spec import Files
from excise.labelling import labeller, stages
from excise.labelling.labeller import EncoderLabeller
from excise.labelling.words import document_of
from excise.methods import Relabel, TokenFilter
from excise.methods.pretraining.pretrain import Pretrain
from excise.requests.labelling import LabelRun
from excise.requests.registry import registry
from excise.run.labelling import given_rows
from excise.train.fit import FitConfig
from tests.cli import material as m
from tests.cli.material import state
from tests.parity.toy import context, toy_checkpoint

FILLERS = [
    "der", "alte", "läuft", "ünder", "grünes", "漢", "🦊", "brot", "fenster", "licht", "haus", "weg"
]  # fmt: skip
QUICK = ("--labeller.buckets", "4096", "--quiet")


def record(i: int, draw: random.Random, *, labelled: bool) -> dict[str, Any]:
    words = draw.choices(FILLERS, k=10)
    spans: list[list[Any]] = []
    if i % 2:
        at = draw.randrange(10)
        words[at] = "zyx" + draw.choice("äbc")
        start = len(" ".join(words[:at])) + (at > 0)
        spans.append([start, start + len(words[at]), "secret"])
    out: dict[str, Any] = {"text": " ".join(words), "unit": f"u{i}"}
    return out | ({"spans": spans} if labelled and spans else {})


def write(path: Path, records: list[dict[str, Any]]) -> None:
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
    path.write_text("".join(lines), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw = random.Random(0)
    write(tmp_path / "few.jsonl", [record(i, draw, labelled=True) for i in range(60)])
    write(tmp_path / "rest.jsonl", [record(i, draw, labelled=False) for i in range(60, 120)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


FEW = ["label", "--labels", "few.jsonl?duplicates=exact", "--unlabeled"]
LABEL = [*FEW, "rest.jsonl?duplicates=exact", "--out", "out", *QUICK]


def test_few_labels_become_labels_for_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (here / name).read_bytes() for name in ("few.jsonl", "rest.jsonl")}
    assert main(LABEL) == 0
    said = capsys.readouterr().out
    assert "threshold  precision  recall  flagged" in said
    assert "wrote out/labels.jsonl" in said
    assert {name: (here / name).read_bytes() for name in before} == before
    facts = json.loads((here / "out" / "labeller.json").read_text())
    assert facts["capabilities"] == ["secret"]
    assert facts["documents"]["unlabelled"] == 60
    line = next(line for line in facts["thresholds"] if line["threshold"] == 0.5)
    assert line["precision"] >= 0.95
    assert line["recall"] >= 0.95
    assert {"seconds_per_word", "flops_per_word", "training_flops"} <= facts["cost"].keys()
    assert "head" in load_file(here / "out" / "labeller.safetensors")
    found = read(here / "out" / "labels.jsonl")
    texts = [each["text"] for name in before for each in read(here / name)]
    assert [each["text"] for each in found] == texts
    right = 0
    for each in found[60:]:
        flagged = [each["text"][a:b].strip() for a, b, name, c in each["spans"] if name]
        right += flagged == [w for w in each["text"].split() if w.startswith("zyx")]
    assert right >= 55
    # What was labelled stays as it was.
    assert [e["spans"] for e in found[:60]] == [
        [[*span, 1.0] for span in each.get("spans", [])] for each in read(here / "few.jsonl")
    ]


def test_the_file_is_a_source_like_any_other(here: Path) -> None:
    assert main(LABEL) == 0
    rows = read_source(parse_source("out/labels.jsonl")).rows
    assert len(rows) == 120
    assert all(s.capability in ("", "secret") for located in rows for s in located.row.spans)
    write(here / "core.jsonl", [{"text": f"core {i} {'x' * i}"} for i in range(24)])
    domain = Files(
        forget={"secret": "out/labels.jsonl?duplicates=exact"}, retain="core.jsonl?duplicates=exact"
    ).build(None)
    forget = [row for row in domain.forget["secret"] if row.spans]
    assert forget
    assert {s.label for row in forget for s in row.spans} <= {CORE, 1}
    again = ["label", "--labels", "out/labels.jsonl?duplicates=exact", "--unlabeled", "core.jsonl"]
    assert main([*again, "--out", "again", *QUICK]) == 0


def test_equal_commands_write_equal_bytes_and_edited_labels_stay(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(LABEL) == 0
    other = [word.replace("out", "elsewhere/out") if word == "out" else word for word in LABEL]
    assert main(other) == 0
    for name in ("labels.jsonl", "labeller.safetensors"):
        assert (here / "out" / name).read_bytes() == (here / "elsewhere/out" / name).read_bytes()
    edited = (here / "out" / "labels.jsonl").read_text().replace("zyx", "abc")
    (here / "out" / "labels.jsonl").write_text(edited)
    capsys.readouterr()
    assert main([word for word in LABEL if word != "--quiet"]) == 0
    assert "labels.jsonl was changed and stays" in capsys.readouterr().err
    assert (here / "out" / "labels.jsonl").read_text() == edited


def test_a_killed_run_resumes_and_labels_nothing_twice(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHUNK", 25)
    real: Callable[..., list[Row]] = labeller.label_documents
    seen: list[str] = []

    def label(fitted: Any, documents: Any, *more: Any) -> list[Row]:
        if len(seen) == 50:
            seen.append("killed")
            raise KeyboardInterrupt
        seen.extend(document.row.unit for document in documents)
        return real(fitted, documents, *more)

    monkeypatch.setattr(labeller, "label_documents", label)
    assert main(LABEL) == 130
    assert not (here / "out" / "labels.jsonl").exists()
    assert main(LABEL) == 0
    assert [unit for unit in seen if unit != "killed"] == [f"u{i}" for i in range(120)]
    found = (here / "out" / "labels.jsonl").read_bytes()
    monkeypatch.setattr(labeller, "label_documents", real)
    assert main([w.replace("out", "new/out") if w == "out" else w for w in LABEL]) == 0
    assert (here / "new/out" / "labels.jsonl").read_bytes() == found
    assert not [*here.rglob("*.partial"), *here.rglob("training"), *here.rglob("parts")]


def test_a_domain_is_labelled_and_judged_by_the_truth(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--domain", "definitions", "--domain.documents", "80", "--domain.prose", "120"]
    assert main(["label", *words, "--documents", "20", "--out", "out", *QUICK]) == 0
    assert "judged by the truth" in capsys.readouterr().out
    facts = json.loads((here / "out" / "labeller.json").read_text())
    assert facts["unlabelled_truth"]["recall"] > 0.2
    assert facts["documents"]["learned_from"] + facts["documents"]["held_out"] == 40


WRONG = [
    (["label", "--out", "out"], "give a file of labelled documents (labels) and one without"),
    (["label", "--labels", "few.jsonl"], "--out is missing"),
    ([*LABEL[:3], "--out", "out"], "give a file of labelled documents (labels) and one without"),
    ([*LABEL, "--domain", "definitions"], "has data of its own"),
    ([*LABEL, "--documents", "3"], "documents: is for a domain"),
    ([*LABEL, "--labeller", "magic"], "--labeller"),
    (
        [*FEW, "rest.jsonl", "--out", "out", "--labeller", "states"],
        "'states' reads hidden states of a model; name one",
    ),
    ([*LABEL, "--model", "model"], "model"),
    ([*LABEL[:-3], "--labeller", "encoder", "--labeller.heads", "7"], "a multiple of 'heads' (7)"),
    ([*LABEL, "--labeller.fit.steps", "3"], "fit"),
    ([*LABEL, "--labeller.held-out", "2"], "held_out"),
    ([*FEW, "nowhere.jsonl", "--out", "out"], "there is no file nowhere.jsonl"),
    (
        ["label", "--labels", "rest.jsonl?duplicates=exact", "--unlabeled", "few.jsonl",
         "--out", "out"],
        "labels nothing as a capability; give rows 'spans' or a 'capability'",
    ),
    ([*FEW, "few.jsonl?duplicates=exact", "--out", "out"], "every row has a label already"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=lambda v: str(v)[-40:])
def test_what_is_wrong_is_said_in_a_sentence(
    here: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(here)
    assert main([*words, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert {k: v for k, v in state(here).items() if not k.startswith(".stages")} == before


def test_words_that_are_labelled_in_a_corpus_stay_so(here: Path) -> None:
    lines = [{"text": "one zyxa three", "spans": [[4, 8, "secret"], [9, 14, ""]]}]
    write(here / "rest.jsonl", [*lines, {"text": "four", "capability": "secret"}])
    given = given_rows(
        LabelRun(labels=("few.jsonl?duplicates=exact",), unlabeled=("rest.jsonl",)), silent
    )
    assert given.names == ("secret",)
    assert document_of(given.rows[-2]).labels == (UNLABELED, 1, CORE)
    assert (given.rows[-1].label, given.rows[-1].capability) == (UNLABELED, "")


def test_a_labeller_is_chosen_by_name_in_a_recipe() -> None:
    data = {
        "name": "relabel",
        "features": "encoder",
        "then": {"name": "token_filter", "how": "mask"},
    }
    method = parse(Relabel, {**data, "labeller": {"name": "encoder", "width": 32}}, registry())
    assert isinstance(method.labeller, EncoderLabeller)
    assert method.labeller.width == 32
    with pytest.raises(UserError, match=r"labeller"):
        parse(Relabel, {**data, "labeller": {"name": "encoder", "l2": 1.0}}, registry())


# Labels of a file, given to a method.


def domain_of(texts: int = 8) -> Domain:
    """Return a domain of toy words whose forget documents hold core words too."""
    forget = tuple(
        Row(f"f{i}", text=f"w1 w2 w{3 + i} w4", capability="a", label=1,
            spans=(Span(6, 8, "a", 1),))
        for i in range(texts)
    )  # fmt: skip
    retain = tuple(Row(f"r{i}", text=f"w9 w{10 + i} w8") for i in range(texts))
    few: dict[str, Rows] = {"a": forget[:1]}
    return Domain("toy", {"a": forget}, retain, few, few, retain[:1], few, retain[:1], retain[:1])


def lines_for(domain: Domain) -> list[dict[str, Any]]:
    forget = [{"text": row.text, "spans": [[6, 8, "a", 0.9]]} for row in domain.forget["a"]]
    return [*forget, *({"text": row.text} for row in domain.retain)]


def test_labels_of_a_file_take_the_place_of_the_truth(here: Path) -> None:
    domain = domain_of()
    lines = lines_for(domain)
    lines[0]["spans"] = [[0, 2, "a", 0.7], [3, 5, "", 0.6]]
    lines[1]["spans"] = []
    lines[9] = {"text": lines[9]["text"], "capability": "a"}
    write(here / "given.jsonl", lines[:-1])
    noise = LabelNoise(file="given.jsonl")
    rows = label_rows((*domain.forget["a"], *domain.retain), ("a",))
    given = give_labels(rows, noise, seed=0)
    assert [row.capability for row in given] == [row.capability for row in rows]
    assert [(s.start, s.end, s.capability, s.label, s.confidence) for s in given[0].spans] == [
        (0, 2, "", 1, 0.7), (3, 5, "", 0, 0.6), (6, 8, "a", 0, 1.0),
    ]  # fmt: skip
    assert given[1].label == CORE
    assert {s.label for s in given[1].spans} == {CORE}
    assert given[2].label == 1
    assert given[2].spans == (Span(6, 8, "a", 1, 0.9),)
    assert (given[9].label, given[9].spans, given[9].capability) == (1, (), "")
    assert given[-1].label == UNLABELED
    core = LabelNoise(file="given.jsonl", not_in_file="core")
    assert give_labels(rows, core, seed=0)[-1].label == CORE
    moved, facts = relabelled(domain, noise, seed=0)
    assert {row.unit for row in moved.forget["a"]} == {"f0", *(f"f{i}" for i in range(2, 8)), "r1"}
    assert "f1" in {row.unit for row in moved.retain}
    assert facts["labels"]["occurrences"] == 7 / 8
    looked_at = replace(rows[2], label=UNLABELED, spans=())
    assert give_labels([looked_at, *rows], noise, seed=0)[0].label == 1


def test_an_edited_label_reaches_the_method_and_its_key(here: Path, tmp_path: Path) -> None:
    domain = domain_of()
    lines = lines_for(domain)
    write(here / "given.jsonl", lines)
    noise = LabelNoise(file="given.jsonl?duplicates=exact")
    fit = FitConfig(steps=2, lr=1e-3, batch_size=4, log_every=1)
    method = TokenFilter(how="mask", pretrain=Pretrain(fit=fit, max_length=16), labels=noise)

    def losses(name: str) -> Any:
        made = method.apply(toy_checkpoint(tmp_path / name), domain, context(tmp_path / name))
        return made.history

    before, key = losses("before"), identity(method)
    (here / "other").mkdir()
    write(here / "other" / "given.jsonl", lines)
    moved = noise.model_copy(update={"file": "other/given.jsonl?duplicates=exact"})
    assert identity(method.model_copy(update={"labels": moved})) == key
    for line in lines:
        line["spans"] = [[0, len(line["text"]), "a", 1.0]] if line["text"] < "w9" else []
    write(here / "given.jsonl", lines)
    assert identity(method) != key
    assert losses("after") != before
    plain = noise.model_copy(update={"file": "given.jsonl"})
    assert identity(plain) != identity(noise)


def test_labels_of_an_outside_classifier_are_read_by_the_name_of_their_column(here: Path) -> None:
    domain = domain_of()
    lines = [{"text": e["text"], "marks": e.get("spans", [])} for e in lines_for(domain)]
    write(here / "given.jsonl", lines)
    noise = LabelNoise(file="given.jsonl?spans=marks")
    given = give_labels(label_rows(domain.forget["a"], ("a",)), noise, seed=0)
    assert {s.confidence for row in given for s in row.spans} == {0.9}


def test_bad_label_files_are_refused(here: Path) -> None:
    domain = domain_of()
    rows = label_rows((*domain.forget["a"], *domain.retain), ("a",))
    lines = lines_for(domain)

    def refused(records: list[dict[str, Any]], sentence: str) -> None:
        write(here / "given.jsonl", records)
        with pytest.raises(UserError, match=sentence):
            give_labels(rows, LabelNoise(file="given.jsonl"), seed=0)

    twice = {**lines[0], "spans": [[0, 2, "a"]]}
    refused([*lines, twice], r"line 17 and given.jsonl line 1 are one text with different labels")
    unknown = {**lines[0], "spans": [[0, 2, "b"]]}
    refused([unknown, *lines[1:]], r"line 1: has the capability 'b', which none of the rows")
    refused([{"text": "else"}], r"has the text of none of 16 rows; label the very texts")
    refused([{**lines[0], "spans": [[0, 99, "a"]]}], r"in a text of 11 characters")
    bad = {**lines[0], "spans": [[0, 99, "a"]]}
    more = [{"text": f"else {i}"} for i in range(40)]
    refused(
        [*lines, *more, {**bad, "text": "another one"}], r"1 of its rows cannot be used, such as"
    )
    core = [{"text": line["text"], "marks": line.get("spans")} for line in lines]
    refused(core, r"labels none of 16 rows as a capability; give its rows 'spans'")
    with pytest.raises(UserError, match=r"there is no file nowhere\.jsonl"):
        give_labels(rows, LabelNoise(file="nowhere.jsonl"), seed=0)
    with pytest.raises(ValueError, match=r"leave out missed_words"):
        LabelNoise(file="given.jsonl", missed_words=0.5)


@pytest.mark.parametrize("start", ["scratch", "trained"])
def test_a_run_refuses_a_file_of_labels_before_it_makes_anything(here: Path, start: str) -> None:
    if start == "scratch":
        (here / "tiny.yaml").write_text(m.TINY)
        line = ["run", "tiny.yaml", "--arms.filtering.labels"]
    else:
        m.save_tiny(here / "model")
        (here / "f.jsonl").write_text(m.texts("f", 40))
        (here / "r.jsonl").write_text(m.texts("r", 40))
        line = ["remove", "grad_diff", "--model", "model", "--forget", "f.jsonl"]
        line += ["--retain", "r.jsonl", "--fit.steps", "1", "--labels"]
    assert main([*line, "{file: nowhere.jsonl}", "--out", "out", "--quiet"]) == 2
    assert not list(here.glob("**/.stages/*/*"))
