"""Rows joined into texts: one BOS, targets and labels kept, processes agree."""

from __future__ import annotations

import pytest

from excise.data.stream import Example, Stream, join

BOS = 1


def example(i: int, label: int = 0) -> Example:
    return Example((BOS, 10 + i, 20 + i), (False, False, True), label, f"u{i}")


def test_join_keeps_one_bos_and_every_target_and_label() -> None:
    text = join([example(0), example(1, label=2), example(2)], bos_id=BOS)
    assert text.ids == (BOS, 10, 20, 11, 21, 12, 22)
    assert text.target == (False, False, True, False, True, False, True)
    assert text.label == (0, 0, 0, 2, 2, 0, 0)
    assert join([example(3)], bos_id=BOS) == example(3)
    assert join([example(0), example(1)], bos_id=None).ids.count(BOS) == 2


def test_a_packed_batch_carries_a_label_per_token() -> None:
    rows = [example(i, label=i % 2) for i in range(4)]
    (batch,) = Stream(rows, 4, 0, 0, shuffle=False, pack=(4,), bos_id=BOS)(0)
    assert batch.ids_BT.shape == (1, 9)
    assert batch.label_BT[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert batch.num_targets == 4


@pytest.mark.parametrize("pack", [(1,), (1, 1, 2), (3,), (1, 2, 4)])
def test_every_row_is_read_once_an_epoch_whatever_the_texts(pack: tuple[int, ...]) -> None:
    rows = [example(i) for i in range(12)]
    stream = Stream(rows, 6, 5, 0, pack=pack, bos_id=BOS)
    seen = [i for step in (0, 1) for text in stream.texts(step) for i in text]
    assert sorted(seen) == list(range(12))
    sizes = [len(text) for text in stream.texts(0)]
    assert sizes[:-1] == [pack[i % len(pack)] for i in range(len(sizes) - 1)]


def test_two_processes_read_what_one_reads() -> None:
    rows = [example(i) for i in range(16)]
    alone = Stream(rows, 8, 5, 0, pack=(1, 2), bos_id=BOS)
    halves = [Stream(rows, 8, 5, 0, pack=(1, 2), bos_id=BOS, rank=r, world=2) for r in (0, 1)]
    for step in range(3):
        both = [text for half in halves for text in half.texts(step)]
        assert sorted(both) == sorted(alone.texts(step))
