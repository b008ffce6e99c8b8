"""Rows are cut to a number the same way every time, by each of the three rules."""

from __future__ import annotations

import hashlib

from excise.data.domain import Row
from excise.data.subsample import subsample


def test_units_come_before_paraphrases() -> None:
    rows = tuple(Row(f"u{i // 3}", text="x", wording=i % 3) for i in range(30))
    few = subsample(rows, 10)
    assert len({row.unit for row in few}) == 10
    assert subsample(rows, 100) == subsample(rows, 0) == rows
    assert subsample(rows, 10) == few
    assert len(subsample(rows, 13)) == 13


def test_random_parts_are_nested_and_keep_the_order() -> None:
    rows = [Row(f"u{i}", text="x") for i in range(50)]
    few, many = subsample(rows, 5, by="row"), subsample(rows, 20, by="row")
    assert len(few) == 5
    assert set(few) < set(many)
    assert list(many) == sorted(many, key=rows.index)
    assert subsample(rows, 50, by="row") == tuple(rows)
    assert subsample(rows, 0, by="row") == ()


def test_the_choice_by_content_depends_on_text_and_seed_alone() -> None:
    rows = [Row(f"u{i}", prompt=f"p{i}", completion=" c") for i in range(20)]
    few = subsample(rows, 5, by="content", seed=3)
    assert few == subsample(rows[::-1], 5, by="content", seed=3)
    assert few != subsample(rows, 5, by="content", seed=4)
    digests = [
        hashlib.sha256(f"3:{r.unit}:{r.wording}:{r.prompt}::{r.completion}".encode()).digest()
        for r in few
    ]
    assert digests == sorted(digests)
