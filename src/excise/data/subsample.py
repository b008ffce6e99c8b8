"""Cutting rows to a number, the same way for every model that reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch

from excise.data.domain import Row, Rows


def subsample(
    rows: Sequence[Row],
    count: int,
    *,
    by: Literal["unit", "row", "content"] = "unit",
    seed: int = 0,
) -> Rows:
    """Return at most `count` rows; a pure function of its arguments.

    There are three rules, because scores, attacks and methods each chose theirs before and their
    numbers rest on it:

    Args:
        rows: All rows.
        count: Rows at most; 0 takes all where rows are chosen by unit.
        by: `unit` takes first one paraphrase of every unit, then a second one, and so on, units in
            the order of their hash: as many units as possible, in file order. `row` takes a random
            part in which a smaller count is nested, in file order. `content` takes the rows whose
            text hashes lowest under `seed`, in that order.
        seed: Read by `content` alone.
    """
    if by == "content":
        return tuple(sorted(rows, key=lambda row: _digest(row, seed))[:count])
    if len(rows) <= count or (by == "unit" and not count):
        return tuple(rows)
    if by == "row":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        return tuple(rows[i] for i in sorted(order[:count]))
    seen: dict[str, int] = {}
    keys = []
    for i, row in enumerate(rows):
        seen[row.unit] = seen.get(row.unit, -1) + 1
        keys.append((seen[row.unit], hashlib.sha256(row.unit.encode()).digest(), i))
    return tuple(rows[i] for i in sorted(key[2] for key in sorted(keys)[:count]))


def _digest(row: Row, seed: int) -> bytes:
    """Return a hash of what a row says and of the seed."""
    text = f"{seed}:{row.unit}:{row.wording}:{row.prompt}:{row.text}:{row.completion}"
    return hashlib.sha256(text.encode()).digest()
