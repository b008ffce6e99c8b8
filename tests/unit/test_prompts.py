from __future__ import annotations

import torch

from excise.auditor.prompting import before, begun, draw, separator, shown, spelled
from excise.data.domain import Row
from excise.models.tiny import byte_tokenizer, word_tokenizer

TEXT = Row("u", text="one two three four")
PAIR = Row("u", prompt="Q: who", completion=" Ann Bell")
CHOICE = Row("u", prompt="who?", choices=("Ann", "Bob"), answer=1)
CHAT = Row("u", messages=(("system", "be kind"), ("user", "who?"), ("assistant", "Ann")))


def test_what_a_row_says() -> None:
    assert shown(TEXT) == "one two three four"
    assert shown(PAIR) == "Q: who Ann Bell"
    assert shown(CHOICE) == "who? Bob"
    assert shown(CHAT) == "be kind\nwho?\nAnn"


def test_context_goes_before_and_is_never_scored() -> None:
    text = before(TEXT, "ctx")
    assert (text.kind, text.prompt, text.completion) == ("completion", "ctx\n", TEXT.text)
    assert before(PAIR, "ctx", " ").prompt == "ctx Q: who"
    assert before(PAIR, "ctx").completion == PAIR.completion
    assert before(CHOICE, "ctx").choices == CHOICE.choices
    assert before(CHAT, "ctx").messages[0] == ("system", "ctx\nbe kind")
    assert before(CHAT, "ctx").messages[2] == ("assistant", "Ann")
    assert before(PAIR, "") is PAIR


def test_answers_of_several_words_are_begun() -> None:
    row = begun(PAIR)
    assert row is not None
    assert (row.prompt, row.completion) == ("Q: who Ann", " Bell")
    row = begun(TEXT)
    assert row is not None
    assert (row.prompt, row.completion, row.text) == ("one two", " three four", "")
    assert begun(Row("u", prompt="Q", completion=" Ann")) is None
    assert begun(CHOICE) is None


def test_a_closed_vocabulary_has_no_line_break() -> None:
    words = word_tokenizer(["a", "b"])
    assert separator(byte_tokenizer()) == "\n"
    assert spelled("a b", words)
    assert not spelled("a c", words)
    assert not spelled("", words)


def test_draws_take_a_unit_once_and_never_the_one_asked_for() -> None:
    rows = [Row(f"u{i // 2}", text=f"text {i}") for i in range(8)]
    got = draw(rows, 10, torch.Generator().manual_seed(0), avoid="u1")
    assert sorted(row.unit for row in got) == ["u0", "u2", "u3"]
