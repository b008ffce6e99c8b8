"""YAML and JSON of strangers: plain data or a sentence, whatever was made of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from excise.core.errors import UserError
from excise.core.plain import NODES, NotPlain, read_json, read_yaml


def bomb() -> str:
    """Return nine levels of nine aliases each."""
    lines = ["a0: &a0 [x, x]"]
    for i in range(1, 10):
        lines.append(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("{a: {b: 1, b: 2}}", "the key 'b' is given twice"),
        ("a: 1\n? a\n: 2", "line 2: the key 'a' is given twice"),
        ("a: !!binary aGk=", "the tag '!!binary' is not read"),
        ("a: !!set {b, c}", "the tag '!!set'"),
        ("a: !mine 3", "the tag '!mine'"),
        ("a: !!python/object/apply:os.system [false]", "the tag '!!python/object/apply"),
        ("a: &a [*a]", "stands inside what it stands for"),
        ("&a\n<<: *a", "stands inside what it stands for"),
        ("[" * 500 + "]" * 500, "nests deeper than 100 levels"),
        ("".join(" " * i + "a:\n" for i in range(300)), "nests deeper"),
        (bomb(), f"more than {NODES:,} keys and values"),
        ("a: " + "9" * 5000, "a number of 5,000 digits"),
        ('a: "\\ud800"', "half a character"),
        ("a: \x07", "is not YAML: special characters"),
        ("a: [1", "line 1: is not YAML"),
        ("? [a]\n: 1", "unhashable"),
    ],
)
def test_what_is_no_plain_data_is_a_sentence(text: str, words: str) -> None:
    with pytest.raises(NotPlain) as caught:
        read_yaml(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_plain_stays() -> None:
    text = "a: &x {b: 1}\nc: {<<: *x, b: 2}\nd: 2001-12-14\ne: 1:30\nf: 1.5\ng: [*x, yes, ~]"
    assert read_yaml(text) == {
        "a": {"b": 1},
        "c": {"b": 2},
        "d": "2001-12-14",
        "e": "1:30",
        "f": 1.5,
        "g": [{"b": 1}, True, None],
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{", "no UTF-8"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b"9" * 10_000, "is not valid JSON"),
    ],
)
def test_json_of_strangers(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    for given in (data, tmp_path / "x.json"):
        with pytest.raises(NotPlain, match=words):
            read_json(given)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    for path in (tmp_path / "x.json", Path("/dev/zero")):
        with pytest.raises(UserError, match="is a pipe or a device"):
            read_json(path)
