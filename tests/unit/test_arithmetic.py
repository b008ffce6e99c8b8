"""Arithmetic: every row is right, and T and V share no factor pair."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import pytest

from excise.data.domain import Row
from excise.data.stream import encode
from excise.domains.arithmetic import ARITHMETIC_MAX_LENGTH, Arithmetic

OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.floordiv}


def groups(rows: Iterable[Row]) -> set[str]:
    return {row.group for row in rows}


def solved(row: Row) -> bool:
    symbols = row.prompt.split()
    left, sign, right = int("".join(symbols[:3])), symbols[3], int("".join(symbols[4:6]))
    exact = sign != "/" or left % right == 0
    return exact and OPERATIONS[sign](left, right) == int(row.completion.replace(" ", ""))


def test_every_row_is_true_and_of_one_length() -> None:
    spec = Arithmetic()
    rows = [row for _, rows in spec.build(None).roles() for row in rows]
    assert all(map(solved, rows))
    tokenizer = spec.tokenizer()
    for example in encode(rows, tokenizer, max_length=64):
        assert len(example.ids) == ARITHMETIC_MAX_LENGTH
        assert sum(example.target) == 3
        assert tokenizer.unk_token_id not in example.ids


def test_tables_are_complete_and_split_by_unordered_pair() -> None:
    domain = Arithmetic().build(None)
    assert len(domain.forget["tables"]) == 800
    t, v = domain.relearn["tables"], domain.test["tables"]
    dev = domain.dev_forget["tables"]
    assert not groups(t) & groups(v)
    assert not groups(dev) & (groups(t) | groups(v))
    assert len(t) + len(v) + len(dev) == 800
    pair = {row.unit for row in (*t, *v) if row.group == "factors/7,13"}
    assert pair == {"7x13", "13x7", "91/7", "91/13"} or not pair


def test_scored_sums_are_taught_but_not_to_the_method() -> None:
    domain = Arithmetic().build(None)
    scored = groups((*domain.retain_test, *domain.dev_retain))
    assert scored == groups(domain.adjacent)
    assert not scored & groups(domain.retain)
    assert groups(domain.benign) <= groups(domain.retain)
    total = {row.unit for row in (*domain.retain, *domain.adjacent)}
    assert len(total) == 2500 + 1275


def test_fresh_products_lie_outside_the_tables() -> None:
    domain = Arithmetic().build(None)
    taught = {row.unit for row in domain.unlabeled}
    assert domain.fresh
    assert not {row.unit for row in domain.fresh} & taught


@pytest.mark.parametrize("factors", [4, 24])
def test_sizes_at_the_ends(factors: int) -> None:
    domain = Arithmetic(factors=factors, addends=6, exposure="held_out").build(None)
    assert all(rows for role, rows in domain.roles() if role != "adjacent_test")
    shown = groups(domain.forget["tables"])
    assert not shown & groups((*domain.relearn["tables"], *domain.test["tables"]))
