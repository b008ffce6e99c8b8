"""Conversations: exactly the assistant's words and end marks are scored, under any template."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fixtures.slow_tokenizer import Slow

from excise.core.errors import UserError
from excise.data.chat import render_chat
from excise.data.domain import Row
from excise.data.stream import encode_row, show
from excise.models.tiny import byte_tokenizer, train_bpe

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' + m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1].lstrip() }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
REASONED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last and parts | length > 1 %}"
    "{{ '<think>\n' + parts[0].split('<think>')[-1] | trim + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1] | trim }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)
"""Sets white space around thinking, keeps it in the last turn and drops it from history."""
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"

TURNS = (("user", "Hi?"), ("assistant", "Hello x"), ("user", "x and?"), ("assistant", "Qu\u00e9 Z"))


def tokenizer(template: str | None, *, bos: bool = False) -> Any:
    made = byte_tokenizer(bos=bos)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def scored(row: Row, tok: Any) -> list[str]:
    """Return the runs of scored tokens as text."""
    ids, target = render_chat(row, tok)
    runs: list[list[int]] = []
    last = False
    for token, on in zip(ids, target, strict=True):
        if on and not last:
            runs.append([])
        if on:
            runs[-1].append(token)
        last = on
    return [tok.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Hello x<|im_end|>", "Qu\u00e9 Z<|im_end|>"]),
        (TRIMMED, ["Hello x <eos>", "Qu\u00e9 Z <eos>"]),
        (THINKING, ["Hello x<|im_end|>", "Qu\u00e9 Z<|im_end|>"]),
        (PLAIN, ["Hello x", "Qu\u00e9 Z"]),
    ],
)
def test_only_what_the_assistant_said_is_scored(template: str, expected: list[str]) -> None:
    assert scored(Row("u", messages=TURNS), tokenizer(template)) == expected


def test_template_with_generation_marks_decides() -> None:
    tok = byte_tokenizer(chat=True)
    assert scored(Row("u", messages=TURNS), tok) == ["Hello x<eos>", "Qu\u00e9 Z<eos>"]


def test_ids_are_those_of_the_template() -> None:
    tok = tokenizer(CHATML)
    messages = [{"role": r, "content": c} for r, c in TURNS]
    expected = tok.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert render_chat(Row("u", messages=TURNS), tok)[0] == expected


@pytest.mark.parametrize("said", ["Q", "xQ1J", "X2Z", "K3V", "QZ", "KJ", "XV", "  Q  "])
def test_words_like_the_stand_ins_are_scored_whole(said: str) -> None:
    row = Row("u", messages=(("user", said), ("assistant", said)))
    assert scored(row, tokenizer(CHATML)) == [said + "<|im_end|>"]
    assert scored(row, tokenizer(TRIMMED)) == [said.strip() + " <eos>"]


def test_merges_across_the_border_stay_with_the_turn() -> None:
    tok = train_bpe([" Hello there Hello there" * 9], 300)
    tok.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    row = Row("u", messages=(("user", "a"), ("assistant", "Hello there")))
    assert scored(row, tok)[0].strip() == "Hello there"


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML, "<bos><bos>" + CHATML])
def test_exactly_one_bos(template: str) -> None:
    tok = tokenizer(template, bos=True)
    ids, target = render_chat(Row("u", messages=TURNS), tok)
    assert ids[0] == tok.bos_token_id
    assert ids.count(tok.bos_token_id) == 1
    assert len(ids) == len(target)
    assert not target[0]


def test_no_bos_where_the_tokenizer_has_none() -> None:
    tok = tokenizer(CHATML)
    assert tok.bos_token_id not in render_chat(Row("u", messages=TURNS), tok)[0]


def test_thinking_in_the_last_turn_is_scored() -> None:
    said = "<think>hm</think>Yes"
    row = Row("u", messages=(("user", "Hi"), ("assistant", said)))
    assert scored(row, tokenizer(THINKING)) == [said + "<|im_end|>"]


def test_thinking_that_a_template_sets_anew_is_scored_and_dropped_thinking_is_not() -> None:
    turns = (
        ("user", "Hi"), ("assistant", "<think>ab</think>One"),
        ("user", "and"), ("assistant", "<think>hm</think>Yes"),
    )  # fmt: skip
    runs = scored(Row("u", messages=turns), tokenizer(REASONED))
    assert runs == ["One<|im_end|>", "<think>\nhm\n</think>\n\nYes<|im_end|>"]


def test_without_offsets_segments_are_tokenized_apart() -> None:
    tok = tokenizer(CHATML)
    row = Row("u", messages=TURNS)
    assert render_chat(row, Slow(tok)) == render_chat(row, tok)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (None, TURNS, "no chat template"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            TURNS,
            "changes what the assistant says",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
            "{% endif %}" + CHATML,
            (("system", "s"), *TURNS),
            "refuses the conversation of unit 'u' .no system role.",
        ),
        ("hello", TURNS, "changes what the assistant says"),
    ],
)
def test_what_cannot_be_scored_exactly_is_refused(
    template: str | None, turns: tuple[tuple[str, str], ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        render_chat(Row("u", messages=turns), tokenizer(template))


def test_encode_row_cuts_and_refuses_rows_with_nothing_left() -> None:
    tok = tokenizer(CHATML)
    row = Row("u", messages=TURNS, label=2)
    assert len(encode_row(row, tok, max_length=40).ids) == 40
    with pytest.raises(UserError, match="no token to score"):
        encode_row(row, tok, max_length=6)


def test_show_marks_what_is_scored() -> None:
    text = show(Row("u", messages=TURNS[:2]), tokenizer(CHATML))
    assert text.splitlines()[0] == "31 tokens, 8 scored (between >> and <<)"
    assert ">>Hello x<|im_end|><<" in text
    assert show(Row("u", prompt="a b", completion=" c"), tokenizer(None)).endswith("a b>> c<<")
