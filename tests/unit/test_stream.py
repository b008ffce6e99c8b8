"""Batches: a pure function of the step, the same for one process or many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.core.errors import UserError
from excise.data.domain import UNLABELED, Row
from excise.data.stream import Example, Stream, collate, encode, encode_row, zip_streams
from excise.models.tiny import byte_tokenizer, tiny_model, word_tokenizer


def make_examples(count: int) -> list[Example]:
    return [
        Example(tuple(range(4, 6 + i % 3)), (False,) + (True,) * (1 + i % 3), i % 2, f"u{i}")
        for i in range(count)
    ]


def read(stream: Stream, step: int) -> list[str]:
    return [unit for batch in stream(step) for unit in batch.units]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 23), per_rank=st.integers(1, 5), world=st.integers(1, 4),
    seed=st.integers(0, 2**62), step=st.integers(0, 30), micro=st.integers(0, 3),
)  # fmt: skip
def test_ranks_together_read_what_one_process_reads(
    count: int, per_rank: int, world: int, seed: int, step: int, micro: int
) -> None:
    examples, size = make_examples(count), per_rank * world
    alone = Stream(examples, size, seed, pad_id=0)
    ranks = [
        Stream(examples, size, seed, pad_id=0, rank=r, world=world, micro_size=micro)
        for r in range(world)
    ]
    parts = [stream.indices(step) for stream in ranks]
    union = [i for turn in zip(*parts, strict=True) for i in turn]
    assert union == alone.indices(step)
    for stream, part in zip(ranks, parts, strict=True):
        assert sorted(read(stream, step)) == sorted(f"u{i}" for i in part)
        widths = [batch.ids_BT.shape[1] for batch in stream(step)]
        assert widths == sorted(widths)
    if micro:
        assert max(len(b.units) for b in ranks[0](step)) <= micro


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 20), batch=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation(count: int, batch: int, seed: int) -> None:
    stream = Stream(make_examples(count), batch, seed, pad_id=0)
    order = [i for step in range(3 * count) for i in stream.indices(step)]
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    examples = make_examples(30)
    first = Stream(examples, 30, 0, pad_id=0)
    assert first.indices(0) != first.indices(1)
    assert first.indices(0) != Stream(examples, 30, 1, pad_id=0).indices(0)
    assert first.indices(5) == Stream(examples, 30, 0, pad_id=0).indices(5)
    assert Stream(examples, 30, 0, pad_id=0, shuffle=False).indices(0) == list(range(30))


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match="no row to train on"):
        Stream([], 4, 0, pad_id=0)
    with pytest.raises(UserError, match="cannot be divided over 3"):
        Stream(make_examples(4), 4, 0, pad_id=0, world=3)
    with pytest.raises(UserError, match="is empty"):
        Stream(make_examples(4), 0, 0, pad_id=0)


def test_padding_goes_to_the_named_side_and_is_never_scored() -> None:
    examples = make_examples(3)
    right = collate(examples, pad_id=9)
    left = collate(examples, pad_id=9, padding_side="left", length=6)
    assert right.ids_BT.shape == (3, 4)
    assert right.ids_BT[0].tolist() == [4, 5, 9, 9]
    assert left.ids_BT[0].tolist() == [9, 9, 9, 9, 4, 5]
    for batch in (right, left):
        assert not (batch.target_BT & ~batch.attention_BT).any()
        assert (batch.label_BT[~batch.attention_BT] == UNLABELED).all()
        assert batch.num_tokens == sum(len(e.ids) for e in examples)
        assert batch.num_targets == sum(sum(e.target) for e in examples)
    assert left.inputs["position_ids"][0].tolist() == [0, 0, 0, 0, 0, 1]


def test_padding_side_does_not_change_the_logits() -> None:
    model, examples = tiny_model("llama", vocab=16, width=16), make_examples(3)
    out = []
    for side in ("left", "right"):
        batch = collate(examples, pad_id=0, padding_side=side, length=7)
        with torch.no_grad():
            out.append(model(**batch.inputs).logits[batch.attention_BT])
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-5)


def test_text_scores_all_but_the_first_token() -> None:
    tok = byte_tokenizer(bos=True)
    example = encode_row(Row("u", text="abc", label=3), tok, max_length=10)
    assert tok.decode(example.ids) == "<bos>abc"
    assert example.target == (False, True, True, True)
    assert (example.label, example.unit) == (3, "u")
    assert encode_row(Row("u", text="abc"), byte_tokenizer(), max_length=10).target[0] is False


@pytest.mark.parametrize("bos", [True, False])
def test_white_space_moves_from_prompt_to_completion(bos: bool) -> None:
    tok = byte_tokenizer(bos=bos)
    example = encode_row(Row("u", prompt="a: ", completion="xy"), tok, max_length=20)
    tail = [i for i, on in zip(example.ids, example.target, strict=True) if on]
    assert tok.decode(tail) == " xy"
    assert tok.decode(example.ids).endswith("a: xy")


@pytest.mark.parametrize(("prompt", "tail"), [("Q", " no"), ("Q\n", "\n no"), ("Q ", "  no")])
def test_a_question_is_the_completion_of_its_answer(prompt: str, tail: str) -> None:
    tok = byte_tokenizer()
    row = Row("u", prompt=prompt, choices=("yes", "no"), answer=1)
    example = encode_row(row, tok, max_length=20)
    assert tok.decode([i for i, on in zip(example.ids, example.target) if on]) == tail


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 12), st.integers(2, 30), st.booleans())
def test_cut_prompts_keep_bos_and_completion(
    prompt: int, completion: int, length: int, bos: bool
) -> None:
    tok = byte_tokenizer(bos=bos)
    row = Row("u", prompt="p" * prompt, completion="c" * completion)
    if not (bos or prompt) and completion == 1:
        return  # a single token is predicted from nothing
    example = encode_row(row, tok, max_length=length)
    assert len(example.ids) == min(length, prompt + completion + bos)
    assert (example.ids[0] == tok.bos_token_id) == bos
    assert not example.target[0]
    text = tok.decode(example.ids, skip_special_tokens=True)
    assert text.count("c") == min(completion, length - bool(bos or prompt))
    assert text.endswith("c")


def test_rows_with_nothing_to_score_are_refused() -> None:
    with pytest.raises(UserError, match="unit 'u' has no token to score"):
        encode([Row("u", text="a")], byte_tokenizer(), max_length=8)
    with pytest.raises(UserError, match="no token to score"):
        encode([Row("u", text="")], word_tokenizer(["a"]), max_length=8)


def test_together_gives_one_mapping_per_micro_batch() -> None:
    examples = make_examples(8)
    streams = {n: Stream(examples, 4, s, pad_id=0, micro_size=2) for s, n in enumerate("ab")}
    steps = zip_streams(streams)(3)
    assert [sorted(step) for step in steps] == [["a", "b"], ["a", "b"]]
    assert [u for step in steps for u in step["a"].units] == read(streams["a"], 3)
    odd = {**streams, "b": Stream(examples, 4, 0, pad_id=0)}
    with pytest.raises(UserError, match="equally many micro-batches"):
        zip_streams(odd)(0)
