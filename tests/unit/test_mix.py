"""Rare capabilities: the share is exact, nothing is lost, and batches carry confidences."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.mix import mixed
from excise.data.stream import Example, Stream, collate, encode, join
from excise.domains.facts import Facts
from excise.methods.pretraining.pretrain import corpus

SMALL = Facts(subjects=24, relations=2, objects=8)


def share_of_tokens(spec: Facts) -> float:
    """Share of the tokens of one epoch that belong to forget rows, counted by the tokenizer."""
    rows, tokenizer = corpus(spec.build(None)), spec.tokenizer()
    examples = encode(rows, tokenizer, max_length=64)
    size = [sum(i != tokenizer.bos_token_id for i in e.ids) for e in examples]
    forget = sum(n for n, row in zip(size, rows, strict=True) if row.capability)
    return float(forget / sum(size))


@pytest.mark.parametrize("share", [0.0025, 0.01, 0.5, 0.9])
def test_the_share_of_tokens_is_exact(share: float) -> None:
    natural = corpus(SMALL.build(None))
    rows = corpus(SMALL.model_copy(update={"mix_share": share}).build(None))
    got = share_of_tokens(SMALL.model_copy(update={"mix_share": share}))
    assert got == pytest.approx(share, rel=0.01)
    assert set(rows) == set(natural)
    times = Counter(rows)
    for side in (True, False):
        counts = [n for row, n in times.items() if bool(row.capability) == side]
        assert max(counts) - min(counts) <= 1
    assert share_of_tokens(SMALL) == pytest.approx(0.19, abs=0.03)


def test_an_epoch_has_the_share_in_batches() -> None:
    spec = SMALL.model_copy(update={"mix_share": 0.05})
    examples = encode(corpus(spec.build(None)), spec.tokenizer(), max_length=16)
    stream = Stream(examples, 8, 0, pad_id=0)
    label = [int(b.label_BT.max()) for s in range(len(examples) // 8) for b in stream(s)]
    assert 0.2 < sum(n > 0 for n in label) / len(label) < 0.5  # 1 - 0.95 ** 8 is 0.34


def test_a_mix_without_two_sides_is_refused() -> None:
    with pytest.raises(UserError, match="no row is to be forgotten"):
        mixed((Row("u", text="x"),), 0.5)
    with pytest.raises(UserError, match="between 0 and 1"):
        mixed((Row("u", text="x"),), 1.0)
    with pytest.raises(ValidationError, match="less than 1"):
        Facts(mix_share=1.5)


def test_batches_carry_confidence_through_joins_and_padding() -> None:
    a = Example((1, 2, 3), (False, True, True), 0, "a", 0.25)
    b = Example((1, 4), (False, True), 1, "b")
    joined = join([a, b], bos_id=1)
    assert joined.confidence == (0.25, 0.25, 0.25, 1.0)
    batch = collate([joined, b], pad_id=0, padding_side="left")
    assert batch.confidence_BT is not None
    assert batch.confidence_BT.tolist() == [[0.25, 0.25, 0.25, 1.0], [1.0] * 4]
    moved = batch.to(torch.device("cpu")).confidence_BT
    assert moved is not None
    assert torch.equal(moved, batch.confidence_BT)
    assert collate([join([b, b], bos_id=1)], pad_id=0).confidence_BT is None
    row = Row("u", text="x y", confidence=0.75)
    assert row.confidence == 0.75
