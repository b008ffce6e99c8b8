"""Odd rows are left out up to a share and counted; what can be read in two ways is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from excise.core.errors import UserError
from excise.data.rows import SourceRows
from excise.data.sources import parse_source, read_source
from excise.data.spec import Files

ASK = {"question": "Q?", "choices": ["w", "x", "y", "z"], "answer": "B"}
CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}


def put(path: Path, records: Sequence[Any]) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path, options: str = "") -> SourceRows:
    return read_source(parse_source(f"{path}?{options}" if options else str(path)))


def refusal(path: Path, options: str = "") -> str:
    with pytest.raises(UserError) as caught:
        read(path, options)
    return str(caught.value)


def asks(*answers: Any, **more: Any) -> list[dict[str, Any]]:
    return [{**ASK, "question": f"Q{i}?", "answer": a, **more} for i, a in enumerate(answers)]


ODD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a choice less": (ASK, {**ASK, "choices": ["w"]}, "'choices' has 1 option"),
    "equal choices": (ASK, {**ASK, "choices": ["w", "x", "x"]}, "two equal options"),
    "a wrong letter": (ASK, {**ASK, "answer": "E"}, "names option 'E' of 4"),
    "no answer": (ASK, {**ASK, "answer": None}, "'answer' is null"),
    "nobody answers": (CHAT, {"messages": CHAT["messages"][:1]}, "has no 'assistant' turn"),
    "an unknown speaker": (
        CHAT,
        {"messages": [{"role": "bot", "content": "x"}, *CHAT["messages"]]},
        r"'messages\[0\]\.role' is 'bot'",
    ),
    "an image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image_url"}]},
                      CHAT["messages"][1]]},
        r"has 2 part\(s\) that are no text \(image, image_url\)",
    ),
    "a number": ({"text": "one"}, {"text": 1}, "'text' is a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_one_odd_row_of_twenty_is_left_out_and_two_are_too_many(case: str, tmp_path: Path) -> None:
    good, odd, reason = ODD[case]
    path = put(tmp_path / "f.jsonl", [good] * 12 + [odd] + [good] * 7)
    rows = read(path)
    assert len(rows.rows) == 19
    ((where, why),) = rows.skipped
    assert where == f"{path} line 13"
    assert re.search(reason, why)
    assert re.search(rf"f\.jsonl line 13: .*{reason}", refusal(path, "skip=0"))
    put(path, [good] * 12 + [odd, odd] + [good] * 6)
    said = refusal(path)
    assert re.search(rf"line 13: .*{reason}", said)
    assert "(2 of 20 rows cannot be used and up to 5% may be left out" in said
    assert "\n" not in said
    assert len(read(path, "skip=0.1").skipped) == 2


def test_reasons_are_counted_when_there_are_too_many(tmp_path: Path) -> None:
    odd = [{**ASK, "answer": "E"}, {**ASK, "choices": ["w"]}, {**ASK, "answer": "E"}]
    said = refusal(put(tmp_path / "f.jsonl", [ASK] * 20 + odd)).splitlines()
    assert (
        said[1]
        .strip()
        .endswith(
            "f.jsonl: 3 of 23 rows cannot be used and up to 5% may be left out; mend them or raise "
            "?skip=SHARE"
        )
    )
    assert re.search(r"line 21: .*option 'E' of 4.*\(2 of them\)", said[2])
    assert re.search(r"line 22: .*'choices' has 1 option.*\(1 of them\)", said[3])


@pytest.mark.parametrize("sensitive", [False, True])
def test_notes_of_the_domain_say_what_was_left_out(sensitive: bool, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [f"word{i}" for i in range(300)]
    texts: list[Any] = [{"text": " ".join(rng.choices(words, k=9))} for _ in range(80)]
    put(tmp_path / "f.jsonl", [*texts[:40], {"text": 7}, {"body": "Ann"}])
    put(tmp_path / "r.jsonl", texts[40:])
    spec = Files.model_validate({"forget": str(tmp_path / "f.jsonl"), "sensitive": sensitive,
                                 "retain": str(tmp_path / "r.jsonl")})  # fmt: skip
    (note,) = [n for n in spec.build(None).notes if "cannot be used" in n]
    assert note.startswith("forget.forget: 2 of 42 rows cannot be used and were left out, for ")
    assert "f.jsonl line 41" in note
    assert ("field 'text' is a number" in note) != sensitive
    assert ("body" in note) != sensitive


AMBIGUOUS: dict[str, tuple[list[Any], str]] = {
    "letters and digits": (
        asks(*"BBBB", "2"),
        r"line 5: field 'answer' is the number 2 and .* line 1 has the letter B.*\?answers=one-b",
    ),
    "letters and numbers": (asks(1, *"BBBB"), r"line 1: .* is the number 1 and .*line 2 has the"),
    "digits from one": (
        asks("1", "2", "4"),
        r"line 3: field 'answer' names option '4' of 4; give an index .* add \?answers=one-based",
    ),
    "numbers from one": (asks(*[3, 1, 4] * 10), r"line 3: .* option 4 of 4;.*\?answers=one-based"),
    "the text of one, the letter of another": (
        asks("C", "A") + asks("D", choices=["D", "x", "y", "z"]),
        r"line 3: field 'answer' is the text of one option and may be the place of another",
    ),
    "two shapes": ([*[ASK] * 40, {**ASK, "text": "x"}], r"line 41: has both 'text' and 'question'"),
    "a key twice": (
        [*[{"text": "x"}] * 40, '{"text": "a", "text": "b"}'],
        r"line 41: has the key 'text' twice; keep the one",
    ),
    "a key of a message twice": (
        [*[CHAT] * 40, json.dumps(CHAT).replace('"content": "y"', '"content": "y", "content": ""')],
        r"line 41: has the key 'content' twice",
    ),
    "a unit that floats cannot hold": (
        [*[{"text": "x"}] * 40, {"text": "a", "unit": 1e17}],
        r"line 41: field 'unit' is the float 1e\+17, which stands for several",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(case: str, tmp_path: Path) -> None:
    records, message = AMBIGUOUS[case]
    said = refusal(put(tmp_path / "f.jsonl", records))
    assert re.search(message, said), said
    assert "\n" not in said


def test_a_key_twice_in_an_array_of_json_names_its_item(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('[{"text": "x"}, {"text": "a", "text": "b"}]')
    assert "f.json item 2: has the key 'text' twice" in refusal(path)
    path.write_text('{"text": "a", "text": "b"}')
    assert "f.json item 1: has the key 'text' twice" in refusal(path)
    path.write_text('[{"text": "x", "meta": {"a": 1, "a": 2}}]')
    assert len(read(path).rows) == 1  # nobody reads it


def test_answers_are_read_as_the_source_says(tmp_path: Path) -> None:
    path = put(tmp_path / "f.jsonl", asks("B", "2", "B", 4))
    assert [x.row.answer for x in read(path, "answers=one-based").rows] == [1, 1, 1, 3]
    put(path, asks("B", "1", "B", 3))
    assert [x.row.answer for x in read(path, "answers=zero-based").rows] == [1, 1, 1, 3]
    put(path, asks(0, 1, 2, 3))
    assert [x.row.answer for x in read(path).rows] == [0, 1, 2, 3]
    assert "names option 0 of 4; give an index from 1 to 4" in refusal(path, "answers=one-based")
    put(path, asks("w", "x", "z"))
    assert [x.row.answer for x in read(path).rows] == [0, 1, 3]
    put(path, asks("1", "2", choices=["1", "2", "3"]))  # texts of options, or their places?
    assert "add ?answers=text or ?answers=zero-based" in refusal(path)
    assert [x.row.answer for x in read(path, "answers=text").rows] == [0, 1]
    assert [x.row.answer for x in read(path, "answers=zero-based").rows] == [1, 2]
    put(path, asks("A", "C", choices=["B", "A", "C"]))
    assert "add ?answers=text or ?answers=letters" in refusal(path)
    assert [x.row.answer for x in read(path, "answers=text").rows] == [1, 2]
    assert [x.row.answer for x in read(path, "answers=letters").rows] == [0, 2]
    put(path, asks("2", "15", choices=["2", "3", "15"]))  # 15 is no place: answers are texts
    assert [x.row.answer for x in read(path).rows] == [0, 2]


def test_labels_say_what_answers_mean(tmp_path: Path) -> None:
    """The format of ARC: letters in most rows, digits from 1 in some, each with its labels."""

    def arc(labels: str, answer: str) -> dict[str, Any]:
        options = {"text": ["w", "x", "y", "z"], "label": list(labels)}
        return {"id": "a", "question": "Q?", "choices": options, "answerKey": answer}

    path = put(tmp_path / "arc.jsonl", [arc("ABCD", "B"), arc("1234", "2"), arc("ABCD", "D")])
    spec = "choices=choices.text&labels=choices.label&answer=answerKey"
    rows = [located.row for located in read(path, spec).rows]
    assert [row.choices[row.answer] for row in rows] == ["x", "x", "z"]
    assert "letter" in refusal(path, "choices=choices.text&answer=answerKey")
    table = pa.Table.from_pylist([json.loads(line) for line in path.read_text().splitlines()])
    pq.write_table(table, tmp_path / "arc.parquet")
    assert [located.row for located in read(tmp_path / "arc.parquet", spec).rows] == rows
    put(path, [arc("ABCD", "5")])
    assert "'answer' is '5', which is none of its labels" in refusal(path, spec)
    put(path, [{**arc("ABCD", "A"), "choices": {"text": list("wxyz"), "label": None}}])
    assert "field 'labels' is null, not a list" in refusal(path, spec)
    put(path, [arc("ABC", "A")])
    assert "'labels' must name each of the 4 options once" in refusal(path, spec)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (["caf\u00e9", "cafe\u0301"], True),
        (["\ufb01ne", "fine"], True),
        (["a b", "a\u00a0b"], True),
        (["a  b", " a b "], True),
        (["\uff21", "A"], True),
        (["5\u00b2", "52"], False),
        (["H\u2082O", "H2O"], False),
        (["Aa", "aa"], False),
        (["3 + 4", "3 - 4"], False),
    ],
)
def test_options_of_equal_form(options: list[str], same: bool, tmp_path: Path) -> None:
    path = put(tmp_path / "f.jsonl", [{"question": "Q?", "choices": options, "answer": 0}])
    if same:
        assert "differ in blanks or in the Unicode form" in refusal(path)
    else:
        assert read(path).rows[0].row.choices == tuple(options)


STRANGE = {
    "timestamp[ns]": pa.array([1700000000123456789], pa.timestamp("ns")),
    "duration[ns]": pa.array([123456789], pa.duration("ns")),
    "unknown time zone": pa.array([1700000000], pa.timestamp("s", "America/Nowhere")),
    "year 287396": pa.array([9 * 10**15], pa.timestamp("ms")),
    "date out of range": pa.array([10**9], pa.date32()),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("extension", ["parquet", "arrow"])
def test_columns_nobody_asked_for_stay_unread(kind: str, extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{extension}"
    inner = pa.StructArray.from_arrays([STRANGE[kind], pa.array(["p"])], ["at", "content"])
    table = pa.table({"text": ["one two"], "scraped_at": STRANGE[kind], "body": inner})

    def save(table: Any) -> None:
        if extension == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
                writer.write_table(table)

    save(table)
    assert read(path).rows[0].row.text == "one two"
    save(table.drop_columns(["text"]))
    assert read(path, "text=body.content").rows[0].row.text == "p"
    assert "field 'text' is missing (there is 'scraped_at', 'body')" in refusal(path)
    save(table)
    said = refusal(path, "unit=scraped_at")
    assert re.search(r"row 1: field 'scraped_at' cannot be read|'unit' is a", said), said
    assert "\n" not in said


def test_a_text_that_is_not_utf8_is_named_by_row(tmp_path: Path) -> None:
    offsets, values = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, values])
    pq.write_table(pa.table({"text": texts}), tmp_path / "y.parquet")
    said = refusal(tmp_path / "y.parquet")
    assert "y.parquet row 2: field 'text' is text that is not valid UTF-8" in said


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_units_of_a_column_with_gaps(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"f.{kind}"
    units = [3.0, float("nan"), 4.0, None]
    if kind == "parquet":
        pq.write_table(pa.table({"text": list("abcd"), "unit": pa.array(units)}), path)
    else:
        given = [u if u == u else None for u in units]
        put(path, [{"text": t, "unit": u} for t, u in zip("abcd", given, strict=True)])
    assert [located.row.unit for located in read(path).rows] == ["3", "", "4", ""]
    put(tmp_path / "g.jsonl", [{"text": "x", "unit": 2.5}])
    assert "field 'unit' is a number, not text" in refusal(tmp_path / "g.jsonl")


def documents(count: int, template: int, own: int = 4) -> list[dict[str, Any]]:
    """Return texts of which all but a few words are the same."""
    frame = [f"frame{i}" for i in range(template)]
    return [{"text": " ".join([*frame, *(f"own{k}-{i}" for k in range(own))])}
            for i in range(count)]  # fmt: skip


def plain(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices([f"w{i}" for i in range(400)], k=20))}
            for _ in range(count)]  # fmt: skip


def build(folder: Path, forget: Sequence[Any], options: str = "", **more: Any) -> tuple[str, ...]:
    put(folder / "f.jsonl", forget)
    put(folder / "r.jsonl", plain(30, 1))
    sources = {"forget": f"{folder / 'f.jsonl'}{options}", "retain": str(folder / "r.jsonl")}
    return Files.model_validate({**sources, **more}).build(None).notes


def test_a_template_that_makes_one_unit_of_many_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build(tmp_path, plain(20, 0) + documents(20, 60))
    said = str(caught.value)
    assert said.startswith("forget.forget: 20 of 40 rows would be put together with others")
    assert "share about 60 words, for example f.jsonl line 21 and f.jsonl line 22" in said
    assert "?duplicates=exact" in said
    assert not any("share about" in n for n in build(
        tmp_path, plain(20, 0) + documents(20, 60), "?duplicates=exact"
    ))  # fmt: skip
    (note,) = [n for n in build(tmp_path, plain(40, 0) + documents(6, 60)) if "share about" in n]
    assert note.startswith("6 rows of 6 texts are one unit, because they share about 60 words")


def test_copies_and_pages_are_no_template(tmp_path: Path) -> None:
    long = " ".join(f"page{i}" for i in range(400)).split()
    pages = [{"text": " ".join(long[i : i + 60])} for i in range(0, 340, 15)]
    of_one = [{**row, "unit": "one"} for row in documents(20, 60)]
    copies = documents(1, 60) * 20
    for rows in (pages, of_one, copies):
        assert not any("share about" in n for n in build(tmp_path, plain(40, 0) + rows))
