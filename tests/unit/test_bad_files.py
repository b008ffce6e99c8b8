"""Bad files: one clear sentence that names file and line, and inputs stay untouched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from excise.core.errors import UserError
from excise.data.sources import parse_source, read_source

GOOD = b'{"text": "one"}\n'
ASK = {"question": "Q?", "choices": ["a", "b", "c"], "answer": 0}
PAIR = {"prompt": "p", "completion": "c"}
CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}


def line(**record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def drop(record: dict[str, Any], name: str) -> bytes:
    return line(**{k: v for k, v in record.items() if k != name})


def turn(**message: Any) -> bytes:
    return line(messages=[message, {"role": "assistant", "content": "y"}])


BYTES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("f.jsonl", b"", r"f\.jsonl is empty; put"),
    "only white space": ("f.jsonl", b" \n\n\t", r"f\.jsonl is empty; put"),
    "only a BOM": ("f.jsonl", b"\xef\xbb\xbf", r"f\.jsonl is empty; put"),
    "NUL bytes": ("f.jsonl", GOOD + b'{"text": "a\0b"}\n', r"f\.jsonl line 2: holds a NUL byte"),
    "NUL in text file": ("f.txt", b"ok\n\n\0\0", r"f\.txt line 3: holds a NUL byte"),
    "UTF-16": ("f.jsonl", '{"text": "x"}'.encode("utf-16"), r"line 1: .*save it as UTF-8"),
    "Latin-1": (
        "f.jsonl",
        GOOD + b'{"text": "caf\xe9"}\n',
        r"line 2: byte 0xe9 is not valid UTF-8",
    ),
    "cut UTF-8": ("f.txt", b"one\ntwo\nth\xc3", r"f\.txt line 3: byte 0xc3 is not valid UTF-8"),
    "broken line": ("f.jsonl", GOOD + GOOD + b'{"text": "x"\n', r"line 3: is not valid JSON"),
    "half a line": ("f.jsonl", GOOD + b'{"te', r"line 2: is not valid JSON .* at column 2"),
    "two objects": ("f.jsonl", b'{"text": "a"} {"text": "b"}\n', r"line 1: .*extra data at column"),
    "NaN": ("f.jsonl", b'{"text": NaN}\n', r"line 1: .*NaN is no JSON number"),
    "too deep": ("f.jsonl", b"[" * 100_000 + b"]" * 100_000, r"line 1: is nested too deeply"),
    "a list": ("f.jsonl", b'["text"]\n', r"line 1: is a list, not an object"),
    "a number": ("f.jsonl", b"3\n", r"line 1: is a number, not an object"),
    "null": ("f.jsonl", b"null\n", r"line 1: is null, not an object"),
    "broken json": (
        "f.json",
        b'[{"text": "a"},\n {"text": }]',
        r"f\.json line 2: is not valid JSON",
    ),
    "json of nothing": ("f.json", b"[]", r"f\.json holds no row; give 'text'"),
    "json of texts": ("f.json", b'["a"]', r"f\.json item 1: is text, not an object"),
    "no known field": (
        "f.jsonl",
        line(body="x", n=1),
        r"'text' is missing \(there is 'body', 'n'\)",
    ),
    "no field": ("f.jsonl", b"{}\n", r"line 1: field 'text' is missing \(there is no field\)"),
    "text null": ("f.jsonl", line(text=None), r"field 'text' is missing"),
    "text a number": ("f.jsonl", line(text=5), r"field 'text' is a number, not text"),
    "text a list": ("f.jsonl", line(text=["a"]), r"field 'text' is a list, not text"),
    "NUL escape": ("f.jsonl", line(text="a\0b"), r"line 1: field 'text' holds a NUL character"),
    "lone surrogate": ("f.jsonl", b'{"text": "\\ud800"}\n', r"field 'text' holds half a surrogate"),
    "all blank": ("f.jsonl", line(text=" ") + line(text="\n"), r"f\.jsonl holds blank texts only"),
    "no completion": ("f.jsonl", drop(PAIR, "completion"), r"'completion' is missing.*'prompt'"),
    "no prompt": ("f.jsonl", drop(PAIR, "prompt"), r"'prompt' is missing.*'completion'"),
    "blank completion": ("f.jsonl", line(**{**PAIR, "completion": " "}), r"'completion' is blank"),
    "completion a number": ("f.jsonl", line(**{**PAIR, "completion": 7}), r"is a number, not text"),
    "no choices": ("f.jsonl", drop(ASK, "choices"), r"'choices' is missing.*read it as \?prompt="),
    "no answer": ("f.jsonl", drop(ASK, "answer"), r"field 'answer' is missing"),
    "null answer": ("f.jsonl", line(**{**ASK, "answer": None}), r"field 'answer' is null"),
    "no question": ("f.jsonl", drop(ASK, "question"), r"field 'question' is missing"),
    "one choice": ("f.jsonl", line(**{**ASK, "choices": ["a"]}), r"'choices' has 1 option"),
    "choices a text": (
        "f.jsonl",
        line(**{**ASK, "choices": "abc"}),
        r"'choices' is text, not a list",
    ),
    "choice a number": (
        "f.jsonl",
        line(**{**ASK, "choices": [1, 2]}),
        r"'choices\[0\]' is a number",
    ),
    "equal choices": ("f.jsonl", line(**{**ASK, "choices": ["a", "a"]}), r"two equal options"),
    "answer beyond": (
        "f.jsonl",
        line(**{**ASK, "answer": 3}),
        r"names option 3 of 3; give an index",
    ),
    "answer negative": ("f.jsonl", line(**{**ASK, "answer": -1}), r"names option -1 of 3"),
    "letter beyond": ("f.jsonl", line(**{**ASK, "answer": "D"}), r"letter from A to C"),
    "answer elsewhere": ("f.jsonl", line(**{**ASK, "answer": "zebra"}), r"is none of the options"),
    "answer true": ("f.jsonl", line(**{**ASK, "answer": True}), r"true or false, not a whole"),
    "answer a half": ("f.jsonl", line(**{**ASK, "answer": 0.5}), r"a number, not a whole number"),
    "no messages": ("f.jsonl", line(messages=[]), r"'messages' must be a list"),
    "messages a text": ("f.jsonl", line(messages="hi"), r"'messages' must be a list"),
    "message a text": ("f.jsonl", line(messages=["hi"]), r"'messages\[0\]' is text, not an object"),
    "unknown role": (
        "f.jsonl",
        turn(role="bot", content="x"),
        r"'messages\[0\]\.role' is 'bot'; known",
    ),
    "no role": (
        "f.jsonl",
        turn(content="x"),
        r"'messages\[0\]\.role' is None; known roles: system",
    ),
    "no content": ("f.jsonl", turn(role="user"), r"'messages\[0\]\.content' is null, not text"),
    "nobody answers": ("f.jsonl", line(messages=CHAT["messages"][:1]), r"has no 'assistant' turn"),
    "two shapes": (
        "f.jsonl",
        line(text="x", **PAIR),
        r"has both 'text' and 'prompt'\+'completion'",
    ),
    "mixed shapes": (
        "f.jsonl",
        GOOD + line(**ASK),
        r"line 2 is a multiple-choice question and .* 1 is",
    ),
    "unit a list": ("f.jsonl", line(text="x", unit=["a"]), r"field 'unit' is a list, not text"),
    "blank group": ("f.jsonl", line(text="x", group=" "), r"field 'group' is blank"),
    "wording a text": ("f.jsonl", line(text="x", wording="a"), r"'wording' is text, not a whole"),
    "unknown extension": ("f.xml", b"text\nx\n", r"f\.xml has the unknown extension '\.xml'; use"),
    "no extension": ("data", GOOD, r"data has the unknown extension ''"),
    "not parquet": ("f.parquet", b"PAR1 no", r"f\.parquet is not a readable parquet file"),
    "empty parquet": ("f.parquet", b"", r"f\.parquet is not a readable parquet file"),
    "not arrow": ("f.arrow", b"xxxx", r"f\.arrow is not a readable arrow file"),
}


@pytest.mark.parametrize("case", BYTES)
def test_broken_files(case: str, tmp_path: Path) -> None:
    name, data, message = BYTES[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_source(parse_source(str(path)))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_up_to_five_problems_at_once(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(GOOD + line(**PAIR, text="x") * 3 + b"{\n" * 6)
    with pytest.raises(UserError) as caught:
        read_source(parse_source(str(path)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    assert [f"line {i}:" in text for i, text in enumerate(lines[1:6], 2)] == [True] * 5
    assert lines[6].strip() == "and 4 more like these"
