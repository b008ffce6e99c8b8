"""Sources: every format gives the same rows; data-set folders and the hub's cache are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from excise.core.errors import UserError
from excise.data.domain import Row, text_of
from excise.data.rows import chunk_rows, parse_record
from excise.data.sources import Source, parse_source, read_source, source_hashes

RECORDS: list[dict[str, Any]] = [
    {"question": "Which?", "choices": ["a", "b\u2028c"], "answer": 1, "unit": "u1", "group": "g"},
    {"question": "What?", "choices": ["x", "y"], "answer": 0, "unit": "u2", "group": None},
]
ROWS = [
    Row("u1", group="g", prompt="Which?", choices=("a", "b\u2028c"), answer=1),
    Row("u2", prompt="What?", choices=("x", "y"), answer=0),
]


def rows(spec: str | Path) -> list[Row]:
    return [held.row for held in read_source(parse_source(str(spec))).rows]


def texts(spec: str | Path) -> list[str]:
    return [row.text for row in rows(spec)]


def save_arrow(folder: Path, table: Any, name: str = "data-00000-of-00001.arrow") -> None:
    """Write a folder as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / name), "wb") as out, pa.ipc.new_stream(out, table.schema) as w:
        w.write_table(table)
    state = {"_data_files": [{"filename": name}], "_split": "train", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize(
    "kind", ["jsonl", "bom", "crlf", "json", "lines", "parquet", "saved", "file"]
)
def test_formats_give_the_same_rows(kind: str, tmp_path: Path) -> None:
    lines = [json.dumps(r, ensure_ascii=False) for r in RECORDS]
    table = pa.Table.from_pylist(RECORDS)
    path = tmp_path / {"parquet": "a.parquet", "saved": "a", "file": "a.arrow"}.get(kind, "a.jsonl")
    if kind in ("json", "lines"):
        path = tmp_path / "a.json"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "saved":
        save_arrow(path, table)
    elif kind == "file":
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
    else:
        text = {"json": json.dumps(RECORDS), "crlf": "\r\n".join(lines) + "\r\n\r\n"}
        data = text.get(kind, "\n".join(lines)).encode()
        path.write_bytes(b"\xef\xbb\xbf" + data if kind == "bom" else data)
    assert rows(path) == ROWS


def test_places_count_lines_from_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n\n{"text": " "}\n{"text": "b"}\n')
    held = read_source(parse_source(str(path)))
    assert [h.where for h in held.rows] == [f"{path} line 2", f"{path} line 5"]
    assert held.blank == 1


def test_text_files_by_blank_line_line_or_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n \r\n\r\nthree\r\n")
    assert texts(path) == ["one\ntwo", "three"]
    assert texts(f"{path}?by=line") == ["one", "two", "three"]
    assert texts(f"{path}?by=file") == ["one\ntwo\n \n\nthree"]
    held = read_source(parse_source(str(path))).rows
    assert [h.where.rpartition(" ")[2] for h in held] == ["1", "5"]


@pytest.mark.parametrize(
    "answer", [1, 1.0, "1", "B", "b", "(B)", "B.", "two"], ids=lambda a: repr(a)
)
def test_answers_by_index_letter_or_text(answer: object) -> None:
    record = {"question": "Q", "choices": ["one", "two"], "answer": answer}
    assert parse_record(record).answer == 1


def test_an_answers_text_comes_before_its_letter() -> None:
    assert parse_record({"question": "Q", "choices": ["B", "A"], "answer": "A"}).answer == 1


def test_fields_are_renamed_and_others_ignored(tmp_path: Path) -> None:
    path = tmp_path / "tofu.jsonl"
    path.write_text('{"question": "Who?", "answer": "Me", "author": 3, "n": [1]}\n')
    spec = f"{path}?prompt=question&completion=answer&group=author"
    with pytest.raises(UserError, match="'choices' is missing"):
        rows(path)
    assert rows(spec) == [Row("", group="3", prompt="Who?", completion="Me")]
    assert parse_source(spec).spec() == spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/name", {}),
        ("org/name:cfg", {"config": "cfg"}),
        ("org/name@v1.0#test", {"revision": "v1.0", "split": "test"}),
        ("org/name:c-d@refs/pr/1#a[:5]", {"config": "c-d", "revision": "refs/pr/1",
                                          "split": "a[:5]"}),
        ("org/name#train?text=body", {"split": "train", "fields": {"text": "body"}}),
    ],
)  # fmt: skip
def test_hub_ids_are_read_and_written_back(spec: str, expected: dict[str, Any]) -> None:
    source = parse_source(spec)
    assert source == Source.model_validate({"path": "org/name", "hub": True, **expected})
    assert source.spec() == spec


def test_what_is_on_disk_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not parse_source("data/forget.jsonl").hub
    assert parse_source("data/forget").hub
    (tmp_path / "data" / "forget").mkdir(parents=True)
    assert not parse_source("data/forget").hub
    assert parse_source("data/forget:en#test") == Source(
        path="data/forget", config="en", split="test"
    )
    (tmp_path / "a?b.txt").write_text("odd name")
    assert texts("a?b.txt") == ["odd name"]


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    expected = hashlib.sha256(b'{"text": "a"}\n').hexdigest()
    assert source_hashes(parse_source(str(tmp_path / "a.jsonl"))) == {"a.jsonl": expected}
    with pytest.raises(UserError, match=r"there is no file .*b\.jsonl; did you mean 'a\.jsonl'"):
        source_hashes(parse_source(str(tmp_path / "b.jsonl")))


def test_chunks_are_even_keep_their_unit_and_lose_no_word() -> None:
    text = "  a  b\nc d e f\tg h i j \n"
    row = Row("u", text=text, group="g")
    chunks = chunk_rows([row, Row("v", prompt="a b c d", completion="e f g h")], 4)
    assert [len(c.text.split()) for c in chunks[:-1]] == [3, 3, 4]
    assert " ".join(c.text for c in chunks[:-1]).split() == text.split()
    assert {(c.unit, c.group) for c in chunks[:-1]} == {("u", "g")}
    assert chunks[0].text == "a  b\nc"
    assert chunks[-1].prompt == "a b c d"
    assert chunk_rows([row], 10) == (row,)
    with pytest.raises(UserError, match="chunks of 0 words"):
        chunk_rows([row], 0)


def test_text_of_every_shape() -> None:
    assert text_of(Row("u", text="a")) == "a"
    assert text_of(Row("u", prompt="a", completion=" b")) == "a b"
    assert text_of(Row("u", prompt="q", choices=("x", "y"), answer=1)) == "q\ny"
    chat = (("system", "s"), ("user", "a"), ("assistant", "b"))
    assert text_of(Row("u", messages=chat)) == "a\nb"
