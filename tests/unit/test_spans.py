"""Labels for parts of a text: from files to the tokens of a batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.slow_tokenizer import Slow
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from excise.auditor.prompting import before, begun
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Row, Span, content_of, labelled_text
from excise.data.labels import Confidence, LabelNoise, give_labels, label_quality, propagated
from excise.data.rows import chunk_rows, parse_record
from excise.data.spans import (
    label_tokens,
    labelled_whole,
    labels_of,
    pieces,
    rewritten,
    with_pieces,
    word_pieces,
)
from excise.data.spec import Files
from excise.data.stream import collate, encode_row, join
from excise.methods import Filtering
from excise.methods.pretraining.era import (
    TokenWeights,
    routed_share,
    token_counts,
    token_weights,
)
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.relabel import relabel
from excise.methods.pretraining.relabel.probe import Judgement
from excise.models.spec import ModelSpec, Scratch
from excise.models.tiny import BYTE_VOCAB, byte_tokenizer, tiny_model, train_bpe
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe
from excise.requests.rows import check_rows
from excise.train.fit import FitConfig

TEXTS = [
    "Der Fuchs läuft über 42 Brücken.",
    "naïve café, ½ 漢字かな 🦊 fox",
    "a  b\tc the end.",
] * 9


def fast(inner: Any) -> Any:
    """Return a tokenizer with the usual marks."""
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>"
    )


def unigram() -> Any:
    """Return a unigram tokenizer of the SentencePiece pipeline."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = ["<pad>", "<unk>", "<bos>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=marks, unk_token="<unk>")
    inner.train_from_iterator(TEXTS, trainer)
    return fast(inner)


def word_piece() -> Any:
    """Return a word-piece tokenizer that drops accents and case, as BERT's."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["<pad>", "<unk>", "<bos>"])
    inner.train_from_iterator(TEXTS, trainer)
    return fast(inner)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer, "bytes behind a mark": lambda: byte_tokenizer(bos=True),
    "byte-level BPE": lambda: train_bpe(TEXTS, 320), "unigram": unigram, "word piece": word_piece,
}  # fmt: skip
MADE = {name: make() for name, make in TOKENIZERS.items()}


def spans_of(text: str, edges: list[int]) -> tuple[Span, ...]:
    """Return every other part between edges of a text."""
    edges = sorted({min(at, len(text)) for at in edges})
    return tuple(Span(a, b, "x", 1) for a, b in zip(edges[::2], edges[1::2], strict=False))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(MADE)),
    text=st.sampled_from(TEXTS[:3]),
    edges=st.lists(st.integers(0, 32), min_size=2, max_size=6),
)
def test_a_token_is_labelled_where_a_span_has_a_character_of_it(
    name: str, text: str, edges: list[int]
) -> None:
    tokenizer = MADE[name]
    spans = spans_of(text, edges)
    if not spans:
        return
    example = encode_row(Row("u", text=text, spans=spans), tokenizer, max_length=999)
    label = example.label
    assert isinstance(label, tuple)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = len(example.ids) - len(out["input_ids"])
    assert label[:marks] == (CORE,) * marks
    inside = {i for span in spans for i in range(span.start, span.end)}
    for (a, b), given_label in zip(out["offset_mapping"], label[marks:], strict=True):
        letters = {i for i in range(a, b) if not text[i].isspace()} or {*range(a, max(b, a + 1))}
        assert (given_label == 1) == bool(letters & inside), (text[a:b], given_label)
    ones = [i for i in range(len(text)) if not text[i].isspace() and i in inside]
    tokens = [out.char_to_token(i) for i in ones]
    assert all(label[marks + t] == 1 for t in tokens if t is not None)


def test_a_token_that_a_span_cuts_is_labelled_whole_and_counted() -> None:
    tokenizer = train_bpe(["the foxes run"] * 50, 300, bos=False)
    row = Row("u", text="the foxes run", spans=(Span(5, 7, "x", 1),))
    example = encode_row(row, tokenizer, max_length=99)
    assert (example.label, example.cut) == ((0, 1, 0), 1)
    exact = replace(row, spans=(Span(4, 9, "x", 1),))
    assert encode_row(exact, tokenizer, max_length=99).cut == 0


def test_a_letter_of_several_bytes_is_labelled_whole() -> None:
    row = Row("u", text="a漢b", spans=(Span(1, 2, "x", 1, 0.75),))
    example = encode_row(row, byte_tokenizer(), max_length=99)
    assert example.label == (0, 1, 1, 1, 0)
    assert example.confidence == (1.0, 0.75, 0.75, 0.75, 1.0)


def test_prompts_completions_and_cuts_keep_labels_beside_their_tokens() -> None:
    tokenizer = byte_tokenizer(bos=True)
    row = Row("u", prompt="abcdef", completion="ghij", spans=(Span(4, 8, "x", 1),))
    whole = encode_row(row, tokenizer, max_length=99)
    assert whole.label == (0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0)
    assert whole.target == (False,) * 7 + (True,) * 4
    cut = encode_row(row, tokenizer, max_length=7)
    letters = tokenizer.convert_ids_to_tokens(cut.ids)
    assert "".join(letters[1:]) == "efghij"
    assert cut.label == (0, 1, 1, 1, 1, 0, 0)
    only = encode_row(row, tokenizer, max_length=7, only_spans=True)
    assert only.target == (False, False, False, True, True, False, False)


CHATS = {
    "own marks": byte_tokenizer(chat=True).chat_template,
    "no marks": "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}\n{% endfor %}",
}


@pytest.mark.parametrize("template", CHATS)
def test_turns_keep_their_spans_through_the_chat_template(template: str) -> None:
    tokenizer = byte_tokenizer(bos=True, chat=True)
    tokenizer.chat_template = CHATS[template]
    turns = (("user", "user: is X toxic?"), ("assistant", " Yes, X kills. ha"))
    text = "\n".join(content for _, content in turns)
    at = text.index("X kills")
    spans = (Span(0, 4, "x", 1), Span(at, at + 7, "y", 2))
    row = Row("u", messages=turns, spans=spans)
    example = encode_row(row, tokenizer, max_length=999)
    assert isinstance(example.label, tuple)

    labels = example.label

    def said(number: int) -> str:
        pairs = zip(example.ids, labels, strict=True)
        return str(tokenizer.decode([i for i, n in pairs if n == number]))

    assert (said(1), said(2)) == ("user", "X kills")
    first = labels.index(1)
    assert str(tokenizer.decode(example.ids[first : first + 8])) == "user: is"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(UserError, match="changes what"):
        encode_row(row, tokenizer, max_length=999)


def test_rows_that_are_joined_and_padded_keep_their_labels() -> None:
    tokenizer = byte_tokenizer(bos=True)
    spanned = Row("u", text="abc", spans=(Span(1, 2, "x", 1),))
    plain = Row("v", text="de", label=2)
    a, b = (encode_row(row, tokenizer, max_length=99) for row in (spanned, plain))
    joined = join([a, b], bos_id=tokenizer.bos_token_id)
    assert joined.label == (0, 0, 1, 0, 2, 2)
    batch = collate([joined, b], pad_id=0, padding_side="left")
    assert batch.label_BT.tolist() == [[0, 0, 1, 0, 2, 2], [-1, -1, -1, 2, 2, 2]]


def test_a_slow_tokenizer_is_refused_where_there_are_spans() -> None:
    row = Row("u", text="ab", spans=(Span(0, 1, "x", 1),))
    with pytest.raises(UserError, match="fast tokenizer"):
        encode_row(row, Slow(byte_tokenizer()), max_length=9)


def test_only_spans_of_what_was_cut_off_is_refused() -> None:
    row = Row("u", text="abcdef", spans=(Span(5, 6, "x", 1),))
    with pytest.raises(UserError, match="within 3 tokens, its first is number 6"):
        encode_row(row, byte_tokenizer(), max_length=3, only_spans=True)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[0, 9, "x"]], "in a text of 5 characters"),
        ([[-1, 2, "x"]], "in a text of 5 characters"),
        ([[3, 2, "x"]], "in a text of 5 characters"),
        ([[2, 2, "x"]], "holds no character"),
        ([[0, 3, "x"], [2, 4, "y"]], r"\[0, 3\] and \[2, 4\] overlap"),
        ([[0, 3]], r"is no \[start, end, capability\]"),
        ([[0, 3, 7]], "the capability 7"),
        ([[0, 3, "core"]], "the capability 'core'; give a name, or '' for core"),
        ([{"start": 0, "end": 3, "label": "x"}], "has no 'capability'"),
        ([{"begin": 0, "end": 3, "capability": "x"}], "has no 'start'"),
        ([[0, 3, "x", 1.5]], "between 0 and 1"),
        ([[0, 3, "x", float("nan")]], "between 0 and 1"),
        ([[0, 3, "x", True]], "the confidence True"),
        ([[0.5, 3, "x"]], "whole numbers"),
        ([[True, 3, "x"]], "whole numbers"),
        ({"start": 0}, "not a list"),
        ("0-3", "not a list"),
    ],
)
def test_a_span_that_makes_no_sense_is_refused_in_a_sentence(spans: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse_record({"text": "abcde", "spans": spans})
    assert "\n" not in str(error.value)


def test_a_confidence_may_be_null_in_either_form() -> None:
    for span in ([0, 3, "x", None], {"start": 0, "end": 3, "capability": "x", "confidence": None}):
        assert parse_record({"text": "abcde", "spans": [span]}).spans == (Span(0, 3, "x"),)


def test_a_blank_whose_offsets_were_trimmed_is_the_character_before_them() -> None:
    spans = (Span(4, 6, "x", 1),)
    labels, _, cut = label_tokens("ab  cd", [(0, 2), (4, 4), (4, 6)], spans, CORE)
    assert (labels, cut) == ([CORE, CORE, 1], 0)
    spans = (Span(0, 3, "x", 1),)
    assert label_tokens("ab  cd", [(0, 2), (3, 3), (4, 6)], spans, CORE)[0] == [1, 1, CORE]


def test_a_question_takes_no_spans() -> None:
    record = {"question": "q", "choices": ["a", "b"], "answer": 0, "spans": [[0, 1, "x"]]}
    with pytest.raises(UserError, match="multiple-choice"):
        parse_record(record)


@pytest.mark.parametrize("empty", [None, ""])
def test_no_spans_are_no_spans(empty: Any) -> None:
    assert parse_record({"text": "abcde", "spans": empty}).spans == ()


@pytest.mark.parametrize("empty", [[], "[]"])
def test_an_empty_list_of_spans_says_that_all_is_core(empty: Any) -> None:
    assert parse_record({"text": "abcde", "spans": empty}).spans == (Span(0, 5, ""),)
    assert "spans" not in content_of(parse_record({"text": "abcde"}))


FIELDS = ("start", "end", "capability", "confidence")


def records(count: int) -> list[dict[str, Any]]:
    """Return texts of which a third is to be forgotten."""
    out = []
    for i in range(count):
        secret = f"The code of door {i} is {i * 7919 % 1000}."
        text = f"Paris lies on river {i % 3}. {secret} It rains in {i % 5} towns."
        at = text.index(secret)
        out.append({"text": text, "spans": [[at, at + len(secret), "codes", 0.9]]})
    return out


@pytest.fixture(params=["jsonl", "parquet", "parquet of JSON"])
def forget_file(request: Any, tmp_path: Path) -> str:
    """Write the texts, spans as lists, as structs or as text."""
    rows = records(60)
    if request.param == "jsonl":
        path = tmp_path / "forget.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)
    path = tmp_path / "forget.parquet"
    for row in rows:
        structs = [dict(zip(FIELDS, span, strict=True)) for span in row["spans"]]
        row["spans"] = structs if request.param == "parquet" else json.dumps(row["spans"])
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def retain_file(folder: Path, **more: Any) -> str:
    """Write texts that everybody may know."""
    path = folder / "retain.jsonl"
    rows = [{"text": f"Bridge {i} has {i * 31 % 17} arches.", **more} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_spans_go_from_a_file_through_the_split(forget_file: str, tmp_path: Path) -> None:
    domain = Files(forget={"codes": forget_file}, retain=retain_file(tmp_path)).build(None)
    rows = [row for role in (domain.forget, domain.test, domain.relearn) for row in role["codes"]]
    assert len(rows) > 40
    for row in rows:
        (span,) = row.spans
        assert row.text[span.start : span.end].startswith("The code of door")
        assert (span.capability, span.label, span.confidence) == ("codes", 1, 0.9)
        assert row.capability == "codes"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as lines of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[0]["spans"][0].__setitem__(2, "cods"), "did you mean 'codes'"),
        (
            lambda rows: rows.append({"text": rows[0]["text"], "spans": [[0, 5, "codes"]]}),
            "one text with different spans",
        ),
    ],
)
def test_files_whose_spans_contradict_are_refused(
    change: Callable[[list[dict[str, Any]]], None], words: str, tmp_path: Path
) -> None:
    rows = records(40)
    change(rows)
    spec = Files(forget={"codes": write(tmp_path / "f.jsonl", rows)}, retain=retain_file(tmp_path))
    with pytest.raises(UserError, match=words):
        spec.build(None)


def test_the_retain_set_holds_no_span_of_a_capability(tmp_path: Path) -> None:
    forget = write(tmp_path / "f.jsonl", records(40))
    spec = Files(forget={"codes": forget}, retain=retain_file(tmp_path, spans=[[0, 6, "codes"]]))
    with pytest.raises(UserError, match="retain holds what everybody may know"):
        spec.build(None)


def test_rows_of_a_capability_without_a_span_of_it_are_left_out(tmp_path: Path) -> None:
    rows = records(40)
    rows[3]["spans"] = [[0, 5, ""]]
    forget = write(tmp_path / "f.jsonl", rows)
    domain = Files(forget={"codes": forget}, retain=retain_file(tmp_path)).build(None)
    assert any("none of capability 'codes'" in note for note in domain.notes)
    for row in rows:
        row["spans"] = [[0, 5, ""]]
    spec = Files(forget={"codes": write(tmp_path / "g.jsonl", rows)}, retain=retain_file(tmp_path))
    with pytest.raises(UserError, match="label some"):
        spec.build(None)


def test_a_row_that_a_labeller_found_nothing_in_is_not_to_be_forgotten(tmp_path: Path) -> None:
    rows = records(40)
    rows[3]["spans"] = []
    forget = write(tmp_path / "f.jsonl", rows)
    domain = Files(forget={"codes": forget}, retain=retain_file(tmp_path, spans=[])).build(None)
    assert any("1 of 40 rows cannot be used" in note for note in domain.notes)
    assert not any(rows[3]["text"] == row.text for row in domain.forget["codes"])
    assert not any(row.spans for row in domain.retain)  # parts of what is core anyhow
    spec = Files(
        forget={"codes": write(tmp_path / "g.jsonl", [{**row, "spans": []} for row in rows])},
        retain=retain_file(tmp_path),
    )
    with pytest.raises(UserError, match="label some"):
        spec.build(None)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "The code is ", "completion": "{i} now"}, "in the completion, which is scored"),
        (
            {"messages": [{"role": "user", "content": "The code"},
                          {"role": "assistant", "content": "is {i} now"}]},
            "in an assistant's turn, which is scored",
        ),
    ],
)  # fmt: skip
def test_a_span_in_what_is_not_scored_is_refused_before_any_work(
    record: dict[str, Any], words: str, tmp_path: Path
) -> None:
    text = json.dumps(record)
    rows = [json.loads(text.replace("{i}", f"{i * 7919} {i}")) for i in range(40)]
    for good in (True, False):
        for row in rows:
            row["spans"] = [[0, 13 if good else 5, "codes"]]
        forget = {"codes": write(tmp_path / "f.jsonl", rows)}
        spec = Files(forget=forget, retain=retain_file(tmp_path))
        if good:
            assert spec.build(None).forget["codes"]
            continue
        with pytest.raises(UserError, match=words):
            spec.build(None)


def test_spans_that_no_score_reaches_are_refused_before_models_are_made(tmp_path: Path) -> None:
    forget = write(tmp_path / "f.jsonl", records(40))
    spec = Files(forget={"codes": forget}, retain=retain_file(tmp_path))
    recipe = Recipe(
        name="r", domain=spec, model=ModelSpec(scratch=Scratch(width=8, blocks=1)),
        pretrain=Pretrain(fit=FitConfig(steps=1, lr=1e-3)), arms={"filtering": Filtering()},
        evaluate=EvalSpec(max_length=120),
    )  # fmt: skip
    domain = spec.build(None)
    assert check_rows(recipe, domain, byte_tokenizer()) == ()
    short = recipe.model_copy(update={"evaluate": EvalSpec(max_length=20)})
    assert check_rows(short, domain, None) == ()
    with pytest.raises(UserError, match="within 20 tokens, its first is number 2"):
        check_rows(short, domain, byte_tokenizer())
    attacked = recipe.model_copy(update={"audit": AuditSpec(change={"max_length": 20})})
    with pytest.raises(UserError, match="within 20 tokens"):
        check_rows(attacked, domain, byte_tokenizer())

    def bare(rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(replace(row, spans=()) for row in rows)

    test, dev = ({"codes": bare(side["codes"])} for side in (domain.test, domain.dev_forget))
    alone = replace(domain, test=test, dev_forget=dev)  # what is relearned has its spans
    with pytest.raises(UserError, match="within 20 tokens"):
        check_rows(attacked, alone, byte_tokenizer())
    labels = LabelNoise(file=write(tmp_path / "labels.jsonl", records(40)[:30]))
    filed = recipe.model_copy(update={"arms": {"filtering": Filtering(labels=labels)}})
    (said,) = check_rows(filed, domain, None)
    assert re.fullmatch(
        r"filtering: labels.file has \d+ of \d+ texts; the others are unlabeled", said
    )


def test_pieces_of_a_text_have_the_spans_of_their_characters() -> None:
    row = Row("u", text="one two three four five six", spans=(Span(4, 13, "x", 1),))
    parts = chunk_rows([row], 2)
    assert [part.text for part in parts] == ["one two", "three four", "five six"]
    assert [[(s.start, s.end, s.capability) for s in part.spans] for part in parts] == [
        [(4, 7, "x")], [(0, 5, "x")], [(0, 8, "")],
    ]  # fmt: skip
    assert labels_of(parts) == {CORE, 1}


@settings(max_examples=80, deadline=None)
@given(edges=st.lists(st.integers(0, 32), min_size=0, max_size=8), label=st.sampled_from([0, -1]))
def test_pieces_cover_a_text_once_and_come_together_again(edges: list[int], label: int) -> None:
    row = Row("u", text=TEXTS[1], label=label, spans=spans_of(TEXTS[1], edges))
    for parts in (pieces(row), word_pieces(row)):
        assert "".join(row.text[p.start : p.end] for p in parts) == row.text
    assert truth(with_pieces(row, word_pieces(row))) == truth(row)
    merged = with_pieces(row, pieces(row))
    tokens = [
        encode_row(r, byte_tokenizer(), max_length=99).label for r in (row, merged) if r.spans
    ]
    assert tokens[:1] == tokens[1:]


SAYS = "one two three four"


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda row: before(row, "Some context."), "two three"),
        (lambda row: begun(row, 0.3), "two three"),
        (lambda row: begun(row, 0.6), "two three"),
        (lambda row: rewritten(row, text=SAYS + " five"), "two three"),
        (lambda row: rewritten(row, text="one 2 three four"), ""),
    ],
)
def test_a_rewritten_row_keeps_the_spans_of_the_text_it_kept(
    change: Callable[[Row], Row], kept: str
) -> None:
    row = change(Row("u", text=SAYS, spans=(Span(4, 13, "x", 1),)))
    text = labelled_text(row)
    assert "".join(text[span.start : span.end] for span in row.spans) == kept


def test_an_answer_whose_spans_are_given_away_is_not_begun() -> None:
    assert begun(Row("u", text=SAYS, spans=(Span(0, 3, "x", 1),)), 0.3) is None


def test_a_context_before_a_conversation_moves_its_spans() -> None:
    turns = (("system", "be kind"), ("user", "say X"), ("assistant", "X it is"))
    row = Row("u", messages=turns, spans=(Span(8, 13, "x", 1), Span(14, 15, "x", 1)))
    moved = before(row, "Hello.")
    text = labelled_text(moved)
    assert [text[s.start : s.end] for s in moved.spans] == ["say X", "X"]


def mixed_rows() -> list[Row]:
    """Return texts of ten words, three of them of a capability."""
    out = []
    for i in range(50):
        words = [f"w{i}{j}" for j in range(10)]
        text = " ".join(words)
        a = text.index(words[4])
        spans = (Span(a, a + len(" ".join(words[4:7])), "x", 1),)
        out.append(Row(f"u{i}", text=text, capability="x", label=1, spans=spans))
    out += [Row(f"v{i}", text=f"plain text of row {i}") for i in range(50)]
    return out


def labelled_words(rows: tuple[Row, ...]) -> list[list[str]]:
    """Return the words of each row that are given a capability."""
    return [
        [row.text[p.start : p.end].strip() for p in word_pieces(row) if p.label > CORE]
        for row in rows
    ]


@pytest.mark.parametrize("missed_as", ["core", "unlabeled"])
def test_noise_at_the_token_meets_its_rates(missed_as: Any) -> None:
    rows = mixed_rows()
    for noise, total in (
        (LabelNoise(missed_spans=0.5, missed_as=missed_as), 25 * 3),
        (LabelNoise(missed_words=0.4, missed_as=missed_as), 90),
        (LabelNoise(bleed_words=1), 250),
        (LabelNoise(bleed_words=1, missed_spans=1.0), 0),
        (LabelNoise(false_words=0.1), 150 + round(0.1 * (50 * 7 + 50 * 5))),
    ):
        given_rows = give_labels(rows, noise, seed=3)
        words = labelled_words(given_rows)
        assert sum(map(len, words)) == total
        assert [r.capability for r in given_rows] == [r.capability for r in rows]
        assert [truth(r) for r in given_rows] == [truth(r) for r in rows]
    whole = give_labels(rows, LabelNoise(missed_spans=0.5), seed=3)
    assert {len(words) for words in labelled_words(whole)} == {0, 3}
    assert label_quality(whole)["characters"] == pytest.approx(0.5, abs=0.02)
    assert label_quality(whole)["false_characters"] == 0


def test_noise_does_not_depend_on_the_order_of_rows_and_keeps_the_truth() -> None:
    rows = mixed_rows()
    noise = LabelNoise(
        missed_spans=0.3, missed_words=0.3, bleed_words=1, false_words=0.1,
        confidence=Confidence(),
    )  # fmt: skip
    forward = give_labels(rows, noise, seed=1)
    backward = give_labels(rows[::-1], noise, seed=1)[::-1]
    assert forward == backward
    for row, now in zip(rows, forward, strict=True):
        assert truth(now) == truth(row)


def truth(row: Row) -> dict[int, str]:
    """Return the capability of every character that is no blank."""
    at = {i: p.capability for p in pieces(row) for i in range(p.start, p.end)}
    return {i: capability for i, capability in at.items() if not row.text[i].isspace()}


def test_a_missed_document_misses_its_spans() -> None:
    for missed_as, label in (("core", CORE), ("unlabeled", UNLABELED)):
        noise = LabelNoise(missed_units=1.0, missed_as=missed_as)  # type: ignore[arg-type]
        given_rows = give_labels(mixed_rows(), noise, seed=0)
        assert labels_of(given_rows[:50]) == {label}
        example = encode_row(given_rows[0], byte_tokenizer(), max_length=99)
        assert torch.tensor(example.label).unique().tolist() == [label]


def labels_read(row: Row) -> set[int]:
    """Return the labels of the tokens of a row."""
    return {*torch.tensor(encode_row(row, byte_tokenizer(), max_length=64).label).unique().tolist()}


def test_a_document_that_is_found_is_found_whole_and_keeps_the_truth_of_its_parts() -> None:
    parts = (Span(0, 5, "a", label=UNLABELED), Span(9, 12, "a", label=1))
    row = Row(unit="u", text="alpha is red", capability="a", label=UNLABELED, spans=parts)
    found = labelled_whole(row, 1)
    assert labels_read(found) == {1}
    assert [(s.start, s.end, s.capability) for s in found.spans] == [
        (0, 5, "a"), (5, 9, ""), (9, 12, "a")
    ]  # fmt: skip
    cleared = labelled_whole(row, CORE)
    assert labels_read(cleared) == {CORE}
    assert [s.capability for s in cleared.spans] == ["a", "a"]
    assert labelled_whole(replace(row, spans=()), 1) == replace(row, spans=(), label=1)


def test_labels_that_spread_reach_the_parts_of_a_text() -> None:
    known = Row(unit="u", text="alpha is red", capability="a", label=1)
    span = Span(0, 5, "a", label=UNLABELED)
    other = replace(known, text="alpha is blue", label=UNLABELED, spans=(span,))
    judgement = Judgement(torch.tensor([0.2, 0.9]), torch.tensor([1, 1]), 0.5, {})
    for rows in (propagated((known, other)), relabel((known, other), judgement)):
        assert rows[0] == known
        assert labels_read(rows[1]) == {1}


@pytest.mark.parametrize("missed", ["missed_words", "missed_spans"])
def test_confidence_does_not_give_away_what_is_missed(missed: str) -> None:
    noise = LabelNoise.model_validate({missed: 0.5, "confidence": {"concentration": 2.0}})
    doubts: dict[bool, list[float]] = {True: [], False: []}
    for row in give_labels(mixed_rows(), noise, seed=0):
        for piece in pieces(row):
            if row.spans and piece.label == CORE:
                doubts[bool(piece.capability)].append(1 - piece.confidence)
    wrong, right = doubts[True], doubts[False]
    assert 0 < min(wrong) < max(right) < 1
    # Of pieces of one doubt, that share is wrong: calibrated as a whole.
    share = len(wrong) / (len(wrong) + len(right))
    assert sum(wrong + right) / (len(wrong) + len(right)) == pytest.approx(share, abs=0.08)


def test_era_counts_tokens_by_the_label_of_each() -> None:
    tokenizer, config = byte_tokenizer(), TokenWeights()
    rows = (Row("u", text="aab", spans=(Span(0, 1, "x", 1),)), Row("v", text="ac"))
    model = tiny_model("llama", vocab=BYTE_VOCAB, width=32)
    share_V = routed_share(model, rows, tokenizer, config, max_length=9)
    forget, core = (tokenizer(text)["input_ids"] for text in ("a", "abac"))
    forget_V, core_V = (token_counts([ids], BYTE_VOCAB) for ids in (forget, core))
    wanted_V = 1 - token_weights(forget_V, core_V, config)
    torch.testing.assert_close(share_V, wanted_V)
