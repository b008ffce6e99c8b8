"""Data that cannot be split: how many, an example, what to do; inputs stay untouched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from excise.core.errors import UserError
from excise.data.spec import Files

Records = list[dict[str, Any]]


def texts(start: int, count: int, **more: Any) -> Records:
    return [{"text": f"the number {i} is here", **more} for i in range(start, start + count)]


def grouped(count: int) -> Records:
    return [{**row, "group": f"g{i % 3}"} for i, row in enumerate(texts(0, count))]


def questions(count: int, wordings: int) -> Records:
    return [
        {"unit": f"q{i}", "prompt": f"{w} of {i}", "completion": f" {i}"}
        for i in range(count)
        for w in range(wordings)
    ]


def long(end: str) -> Records:
    return [{"text": " ".join(f"w{i}" for i in range(40)) + end}]


Case = tuple[dict[str, Records | str | None], dict[str, Any], str]
"""Files (records, or text as it is, or None for a file that is not there), fields, message."""

DOMAINS: dict[str, Case] = {
    "missing": (
        {"f.jsonl": None, "forgot.jsonl": texts(0, 20)},
        {},
        r"no file f\.jsonl; did you mean .*'forgot\.jsonl'",
    ),
    "a folder without data": (
        {"f.jsonl": None, "f.jsonl/notes.md": "x"},
        {},
        r"f\.jsonl holds no file that is read here; use \.parquet",
    ),
    "two broken files": (
        {"f.jsonl": [{}], "r.jsonl": [{}]},
        {},
        r"2 problems\n.*f\.jsonl line 1: .*\n.*r\.jsonl line 1: ",
    ),
    "forget and retain share units": (
        {"r.jsonl": texts(17, 20)},
        {},
        r"forget\.forget and retain share 3 units, for example f\.jsonl line \d+ and "
        r"r\.jsonl line \d; remove",
    ),
    "near duplicates across": (
        {"f.jsonl": long(" a") + texts(0, 20), "r.jsonl": long(" b") + texts(100, 20)},
        {},
        r"share 1 unit, for example f\.jsonl line 1 and r\.jsonl line 1",
    ),
    "unit ids across": (
        {"f.jsonl": texts(0, 1, unit=7) + texts(1, 19), "r.jsonl": texts(100, 1, unit="7")},
        {},
        r"share 1 unit.*or give the rows unit ids of their own",
    ),
    "test inside relearn": (
        {"t.jsonl": texts(200, 5), "v.jsonl": texts(204, 5)},
        {"relearn": "t.jsonl", "test": "v.jsonl"},
        r"test\.forget and relearn\.forget share 1 unit.* v\.jsonl line 1 and t\.jsonl line 5; "
        r".*must not be scored",
    ),
    "test inside retain": (
        {"v.jsonl": texts(100, 5)},
        {"test": "v.jsonl"},
        r"test\.forget and retain share 5 unit",
    ),
    "retain test inside retain": (
        {"v.jsonl": texts(100, 2)},
        {"retain_test": "v.jsonl"},
        r"retain and retain_test share 2 unit",
    ),
    "adjacent inside forget": (
        {"a.jsonl": texts(0, 4)},
        {"adjacent": "a.jsonl"},
        r"forget\.forget and adjacent share 4 unit",
    ),
    "capabilities share units": (
        {"g.jsonl": texts(0, 1) + texts(300, 20)},
        {"forget": {"a": "f.jsonl", "b": "g.jsonl"}},
        r"forget\.a and forget\.b share 1 unit.*belongs to one capability",
    ),
    "too few forget units": (
        {"f.jsonl": texts(0, 9)},
        {},
        r"forget has 9 units, too few to cut .*; at least 10 are needed",
    ),
    "copies are one unit": ({"f.jsonl": texts(0, 1) * 30}, {}, r"has 1 unit, too few"),
    "too few retain units": ({"r.jsonl": texts(100, 4)}, {}, r"retain has 4 units, too few"),
    "too few groups": (
        {"f.jsonl": grouped(30)},
        {},
        r"forget has 3 groups, never split, too few .*; at least 4 are needed",
    ),
    "too few wordings": (
        {"f.jsonl": questions(4, 3)},
        {},
        r"has 4 units, too few .*; at least 5 are needed, each in several paraphrases",
    ),
    "test half in forget": (
        {"v.jsonl": texts(0, 2) + texts(200, 3)},
        {"test": "v.jsonl"},
        r"2 of the 5 units of test are in forget and the others are not",
    ),
    "another capability": (
        {"f.jsonl": texts(0, 20, capability="bio")},
        {},
        r"f\.jsonl line 1: has the capability 'bio', but forget\.forget holds capability 'forget'",
    ),
    "forget rows in retain": (
        {"r.jsonl": texts(100, 20, capability="forget")},
        {},
        r"r\.jsonl line 1: has the capability 'forget', but retain holds what everybody",
    ),
    "metric of another shape": (
        {},
        {"metrics": ("multiple_choice",)},
        r"metric 'multiple_choice' does not apply to test, .* use text_loss",
    ),
    "mixed metrics": (
        {"g.jsonl": questions(20, 1)},
        {"forget": {"a": "f.jsonl", "b": "g.jsonl"}},
        r"test holds rows of several shapes \(completion, text\)",
    ),
    "unknown option": (
        {},
        {"retain": "r.jsonl?txt=body"},
        r"unknown option 'txt' of source .*; did you mean 'text'",
    ),
    "half an option": ({}, {"retain": "r.jsonl?by"}, r"'by' .*needs the form name=value"),
    "unknown separator": ({}, {"retain": "r.jsonl?by=page"}, r"must be blank, line or file"),
    "column that is not there": (
        {},
        {"retain": "r.jsonl?text=body"},
        r"r\.jsonl line 1: field 'body' \(for 'text'\) is missing",
    ),
    "no source": ({}, {"retain": " "}, r"a source is empty; give a file"),
    "no split file": ({}, {"split": "s.json"}, r"there is no split s\.json"),
    "a folder as split": ({}, {"split": "."}, r"\. is a folder; name the split\.json in it"),
    "a split that is none": ({"s.json": "[]"}, {"split": "s.json"}, r"s\.json is not a split"),
    "a split with other fields": (
        {"s.json": '{"version": 1, "rows": 3}'},
        {"split": "s.json"},
        r"s\.json is not a split",
    ),
    "a broken split": ({"s.json": "{"}, {"split": "s.json"}, r"s\.json is not valid JSON"),
    "a newer split": (
        {"s.json": '{"version": 9}'},
        {"split": "s.json"},
        r"written by a newer excise \(split version 9\)",
    ),
}


def put(folder: Path, name: str, held: Records | str | None) -> None:
    path = folder / name
    if held is None:
        path.unlink()
        return
    path.parent.mkdir(exist_ok=True)
    text = held if isinstance(held, str) else "".join(json.dumps(r) + "\n" for r in held)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", DOMAINS)
def test_data_that_cannot_be_split(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, more, message = DOMAINS[case]
    monkeypatch.chdir(tmp_path)
    good: dict[str, Records | str | None] = {"f.jsonl": texts(0, 20), "r.jsonl": texts(100, 20)}
    for name, held in (*good.items(), *files.items()):
        put(tmp_path, name, held)
    before = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as caught:
        Files.model_validate({"forget": "f.jsonl", "retain": "r.jsonl", **more}).build(None)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forget": ""}, "name at least one source"),
        ({"forget": {"a b": "f.jsonl"}}, "use letters, digits"),
        ({"test": {"other": "v.jsonl"}}, "is no capability of forget"),
        ({"adjacent_test": "a.jsonl"}, "needs 'adjacent' too"),
        ({"chunk_words": -1}, "greater than or equal to 0"),
        ({"forgot": "f"}, "Extra inputs"),
    ],
)
def test_specs_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Files.model_validate({"forget": "f.jsonl", "retain": "r.jsonl", **fields})
