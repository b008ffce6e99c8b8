"""Prompt and answer are one text to the tokenizer, cut where the answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fixtures.slow_tokenizer import Slow
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.encoding import encode_pair, leading_specials
from excise.data.stream import encode_row, pair_of
from excise.evals.generate import prompt_of
from excise.models.tiny import _wrap, byte_tokenizer, train_bpe

TEXTS = ["Question 12 A. x B. y Answer: A Answer: B the cat sat there"] * 20


def marked(single: str) -> Any:
    """Return a BPE whose post-processor puts marks around every text."""
    made = train_bpe(TEXTS, 300)
    ids = [("<bos>", 1), ("<eos>", 2), ("<unk>", 3)]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=ids
    )
    return made


def prefix_space(vocab: Sequence[str]) -> Any:
    """Return a tokenizer of the Llama-2 pipeline: a space is put before every text."""
    pieces = {s: i for i, s in enumerate(("<pad>", "<bos>", "<eos>", "<unk>"))}
    merges: list[tuple[str, str]] = []
    for letter in "▁" + "abcdefghijklmnopqrstuvwxyzAL.[]":
        pieces[letter] = len(pieces)
    for word in vocab:
        current = word[0]
        for letter in word[1:]:
            if (current, letter) not in merges:
                merges.append((current, letter))
            current += letter
            pieces.setdefault(current, len(pieces))
    inner = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip


def spanning(merges: Sequence[tuple[str, str]]) -> Any:
    """Return a byte tokenizer with tokens over white space."""
    symbols = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {s: i for i, s in enumerate(symbols)}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _wrap(inner, bos=True)


@pytest.mark.parametrize(
    ("single", "head"),
    [("<bos> $A <eos>", [1]), ("$A <eos>", []), ("<unk> <bos> $A", [3, 1]), ("$A", [])],
)
def test_marks_before_a_text_are_kept_and_marks_behind_it_are_not(
    single: str, head: list[int]
) -> None:
    tok, plain = marked(single), train_bpe(TEXTS, 300, bos=False)
    assert leading_specials(tok) == head
    pair = encode_pair("Answer:", " B", tok)
    assert [*pair.head] == [*head, *plain("Answer:")["input_ids"]]
    assert [*pair.tail] == plain(" B")["input_ids"]
    row = Row("u", prompt="Answer:", choices=("A", "B"), answer=1)
    example = encode_row(row, tok, max_length=64)
    assert example.ids == pair.head + pair.tail
    assert example.target == (False,) * len(pair.head) + (True,) * len(pair.tail)
    assert encode_row(Row("u", text="the cat"), tok, max_length=64).ids == (
        *head,
        *plain("the cat")["input_ids"],
    )


def test_a_prefix_space_stands_before_the_prompt_alone() -> None:
    tok = prefix_space(["▁Aldan", "▁lives", "▁in", "▁Lisdun", "Lisdun"])
    row = Row("u", prompt="Aldan lives in", completion=" Lisdun")
    example = encode_row(row, tok, max_length=64)
    assert tok.convert_ids_to_tokens(list(example.ids)) == [
        "<bos>", "▁Aldan", "▁lives", "▁in", "▁Lisdun",
    ]  # fmt: skip
    assert example.target == (False, False, False, False, True)
    glued = encode_row(Row("u", prompt="Aldan [", completion="Lisdun]"), tok, max_length=64)
    assert tok.decode(glued.ids, skip_special_tokens=True) == "Aldan [Lisdun]"
    assert tok.convert_ids_to_tokens(
        [i for i, on in zip(glued.ids, glued.target, strict=True) if on]
    ) == ["Lisdun", "]"]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("merges", "prompt", "tails"),
    [
        ([(":", "Ġ"), (":Ġ", "C")], "Answer:", {"B": [":Ġ", "B"], "C": [":ĠC"]}),
        ([("x", "Ġ"), ("xĠ", "C")], "Answer x", {"B": ["xĠ", "B"], "C": ["xĠC"]}),
    ],
)
def test_a_token_over_the_border_belongs_to_the_answer(
    merges: list[tuple[str, str]], prompt: str, tails: dict[str, list[str]], slow: bool
) -> None:
    inner = spanning(merges)
    tok = Slow(inner) if slow else inner
    row = Row("u", prompt=prompt, choices=tuple(tails), answer=1)
    pairs = [pair_of(row, tok, i) for i in range(2)]
    assert [inner.convert_ids_to_tokens(list(p.tail)) for p in pairs] == list(tails.values())
    assert pairs[0].head == pairs[1].head == (1, *inner(prompt[:-1])["input_ids"][1:])
    assert [p.overlap.strip() for p in pairs] == [prompt[-1]] * 2
    assert prompt_of(row, tok).begun.strip() == prompt[-1]


@settings(max_examples=80, deadline=None)
@given(
    st.text("ab é漢:. \n", max_size=12), st.text("ab é漢:. \n", min_size=1, max_size=8),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_the_parts_spell_prompt_and_answer(prompt: str, answer: str, slow: bool, bpe: bool) -> None:
    inner = train_bpe(["ab: ab é漢. ab: b"] * 9, 280) if bpe else byte_tokenizer(bos=True)
    pair = encode_pair(prompt, answer, Slow(inner) if slow else inner)
    assert [*pair.head, *pair.tail] == inner(prompt + answer)["input_ids"]
    assert pair.head[0] == 1
    at = len(inner.decode(pair.head[1:]))
    assert (prompt + answer)[:at] == inner.decode(pair.head[1:])
    assert (prompt + answer)[at:] == inner.decode(pair.tail)
    assert at + len(pair.overlap) == len(prompt.rstrip()) or slow
    assert at <= len(prompt.rstrip())


def test_offsets_that_tell_nothing_are_refused() -> None:
    class Blind(Slow):
        is_fast = True

        def __call__(self, text: str, **how: Any) -> Any:
            out = self.inner(text, **how)
            if "offset_mapping" in out:
                out["offset_mapping"] = [(0, len(text))] * len(out["input_ids"])
            return out

    with pytest.raises(UserError, match="does not tell where the answer 'B' begins"):
        encode_pair("Answer:", " B", Blind(byte_tokenizer()))
