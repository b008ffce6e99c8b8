"""Tables, folders of texts, fields inside fields, and conversations of other formats."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.sources import parse_source, read_source, source_files, source_hashes
from excise.data.units import read_sets


def rows(spec: str | Path) -> list[Row]:
    return [located.row for located in read_source(parse_source(str(spec))).rows]


def refusal(spec: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        rows(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


QUOTED = 'She said "no",\nthen left.\r\n\r\nTwice'


@pytest.mark.parametrize("extension", ["csv", "tsv", "CSV"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_tables(extension: str, bom: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a.{extension}"
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="\t" if extension == "tsv" else ",")
    book = "word " * 40_000  # longer than the csv module takes by itself
    writer.writerows([["text", "unit", "note"], [QUOTED, "3.0", ""], ["caf\u00e9\tx", "", "n"],
                      [book, "14.0", ""]])  # fmt: skip
    path.write_bytes(bom + out.getvalue().encode() + b"\r\n\r\n")
    usual = csv.field_size_limit()
    located = read_source(parse_source(str(path))).rows
    assert [r.row for r in located] == [Row("3", text=QUOTED), Row("", text="caf\u00e9\tx"),
                                        Row("14", text=book)]  # fmt: skip
    assert [r.where for r in located] == [f"{path} line {n}" for n in (2, 6, 7)]
    assert csv.field_size_limit() == usual


def test_questions_in_a_table_have_their_options_in_columns_or_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "question,A,B,C,D,answer,wording\nQ1?,w,x,y,z,B,1\nQ2?,w,x,,,A,\n", encoding="utf-8"
    )
    assert rows(f"{path}?choices=A,B,C,D") == [
        Row("", prompt="Q1?", choices=("w", "x", "y", "z"), answer=1, wording=1),
        Row("", prompt="Q2?", choices=("w", "x"), answer=0),
    ]
    spec = f"{path}?choices=A,B,C,D"
    assert parse_source(spec).spec() == spec
    assert "?choices=a.b or ?choices=a,b,c" in refusal(f"{path}?choices=A")
    path.write_text('question,choices,answer\nQ?,"[""w"", ""x""]",1.0\nQ?,"[""w"", ""y""]",0.0\n')
    assert [row.choices[row.answer] for row in rows(path)] == ["x", "w"]


TABLES: dict[str, tuple[str, str]] = {
    "an open quote": ('text,unit\n"a,1\nb,2\n', r"f\.csv line 3: unexpected end of data; close"),
    "a stray quote": ('text\n"a" b\n', r"f\.csv line 2: .*expected after.*double those inside"),
    "a cell more": ("text,unit\na,1\nb,2,3\n", r"line 3: has 3 cells and .* names 2 columns"),
    "a cell less": ("text,unit\na\n", r"line 2: has 1 cell and the first line names 2 columns"),
    "no header": ("It rains.,1\nIt snows.,2\n", r"line 1: must name the columns.*\?text=NAME"),
    "semicolons": ("text;unit\na;1\n", r"line 1: columns are separated by ';'; .* by commas"),
    "a column twice": ("text,text\na,b\n", r"line 1: names the column 'text' twice"),
    "a header alone": ("text,unit\n", r"f\.csv holds no row"),
    "another column": ("body\nx\n", r"line 1: must name the columns.*there is 'body'"),
}


@pytest.mark.parametrize("case", TABLES)
def test_broken_tables(case: str, tmp_path: Path) -> None:
    text, message = TABLES[case]
    (tmp_path / "f.csv").write_text(text)
    said = refusal(tmp_path / "f.csv")
    assert re.search(message, said), said


def letters(folder: Path, start: int = 0, end: str = "") -> Path:
    """Write ten documents into nested folders."""
    for i in range(start, start + 10):
        path = folder / ("2020" if i % 2 else "2021/may") / f"test-{i % 10}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = random.Random(i).choices([f"w{k}" for k in range(300)], k=30)
        path.write_text(" ".join(words[:15]) + "\n\n" + " ".join(words[15:]) + end + "\n")
    (folder / "letter.txt").write_text(f"The last letter is {start}.")
    return folder


def test_a_folder_of_texts_holds_a_document_a_file(tmp_path: Path) -> None:
    folder = letters(tmp_path / "letters")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "2020" / "EMPTY.TXT").write_text("")
    source = read_source(parse_source(str(folder)))
    assert len(source.rows) == 11
    assert source.blank == 1
    assert [r.row.unit for r in source.rows[:2]] == ["2020/test-1.txt", "2020/test-3.txt"]
    assert source.rows[0].row.text == (folder / "2020/test-1.txt").read_text().strip()
    assert source.rows[0].where == f"{folder} 2020/test-1.txt line 1"
    assert [*source_hashes(parse_source(str(folder)))][-1] == "letter.txt"
    assert len({*source_hashes(parse_source(str(folder)))}) == 12
    assert [r.unit for r in rows(f"{folder}?by=blank")] == [""] * 21
    (folder / "2020" / "bad.txt").write_bytes(b"a\n\xff")
    assert f"{folder}/2020/bad.txt line 2: byte 0xff is not valid UTF-8" in refusal(folder)


def test_equal_names_mean_one_document_in_one_capability_alone(tmp_path: Path) -> None:
    folders = {name: letters(tmp_path / name, start) for name, start in
               (("f", 0), ("p", 100), ("r", 200))}  # fmt: skip
    specs = {"forget.a": "f", "test.a": "p", "retain": "r"}
    sets, _ = read_sets({name: str(folders[folder]) for name, folder in specs.items()})
    units = {name: {member.row.unit for member in members} for name, members in sets.items()}
    assert units["forget.a"] == units["test.a"]
    assert "a/2020/test-1.txt" in units["forget.a"]
    assert not units["forget.a"] & units["retain"]


def test_texts_named_by_split_are_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n\nb")
    (tmp_path / "test.txt").write_text("c")
    assert [row.text for row in rows(tmp_path)] == ["a", "b"]
    (tmp_path / "more.txt").write_text("d")
    assert [row.text for row in rows(tmp_path)] == ["d", "c", "a\n\nb"]
    assert [row.text for row in rows(f"{tmp_path}#test")] == ["c"]
    assert [p.name for p in source_files(parse_source(f"{tmp_path}#test"))] == ["test.txt"]


def test_fields_inside_fields(tmp_path: Path) -> None:
    record = {"body": {"content": "a text", "lang": "en"}, "person": {"id": 7.0},
              "a.b": {"c": "odd name"}, "turns": [{"say": "first"}, {"say": "second"}]}  # fmt: skip
    path = put(tmp_path / "f.jsonl", record)
    assert rows(f"{path}?text=body.content&unit=person.id") == [Row("7", text="a text")]
    assert rows(f"{path}?text=a.b.c") == [Row("", text="odd name")]
    assert rows(f"{path}?prompt=turns.0.say&completion=turns.1.say") == [
        Row("", prompt="first", completion="second")
    ]
    spec = f"{path}?question=body.content&choices=turns.say&answer=turns.1.say"
    assert rows(spec) == [Row("", prompt="a text", choices=("first", "second"), answer=1)]
    assert "field 'body.contents' (for 'text') is missing" in refusal(f"{path}?text=body.contents")
    assert "field 'turns.9.say' (for 'text') is missing" in refusal(f"{path}?text=turns.9.say")
    assert "'text' of source" in refusal(f"{path}?text=a.b.c&text=body.content")
    assert "field 'text' is an object, not text" in refusal(f"{path}?text=body")


def test_sharegpt_conversations_by_name(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"},
             {"from": "gpt", "value": "hello"}]  # fmt: skip
    expected = (("system", "s"), ("user", "hi"), ("assistant", "hello"))
    path = put(tmp_path / "f.jsonl", {"conversations": turns, "id": "x"})
    assert rows(f"{path}?format=sharegpt") == [Row("", messages=expected)]
    spec = f"{path}?format=sharegpt&unit=id"
    assert parse_source(spec).spec() == spec
    assert rows(spec)[0].unit == "x"
    assert "field 'conversations' is read where the source ends in ?format=sharegpt" in refusal(
        path
    )
    put(path, {"dialog": turns})
    assert rows(f"{path}?format=sharegpt&messages=dialog") == [Row("", messages=expected)]
    put(path, {"conversations": [*turns, {"from": "Ann", "value": "x"}]})
    assert "'conversations[3].from' is 'Ann'; known speakers: human" in refusal(
        f"{path}?format=sharegpt"
    )
    put(path, {"conversations": [{"role": "user", "content": "x"}]})
    assert "'conversations[0]' is no object with 'from' and 'value'" in refusal(
        f"{path}?format=sharegpt"
    )
    assert "'format=alpaca' of source" in refusal(f"{path}?format=alpaca")


def test_content_parts_of_text_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    path = put(tmp_path / "f.jsonl", {"messages": [{"role": "user", "content": parts}, answer]})
    assert rows(path) == [Row("", messages=(("user", "one two"), ("assistant", "yes")))]
    put(path, {"messages": [{"role": "user", "content": [*parts, {"type": "image"}]}, answer]})
    assert "'messages[0].content' has 1 part(s) that are no text (image)" in refusal(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("skip=2", r"'skip=2' of source .* must be a share from 0 to below 1"),
        ("answers=from-1", r"'answers=from-1' .* must be zero-based, one-based, letters or text"),
        ("duplicates=none", r"must be near or exact"),
        ("by=line&by=file", r"option 'by' of source .* is given twice"),
        ("chioces=a.b", r"unknown option 'chioces' .* did you mean 'choices'"),
    ],
)
def test_options_that_make_no_sense(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_source(f"f.jsonl?{options}")
