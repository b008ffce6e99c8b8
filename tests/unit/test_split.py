"""The split: disjoint, whole groups, exact shares, the same whatever the order of rows."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from excise.core.errors import UserError
from excise.data.split import (
    ADJACENT,
    FORGET,
    RETAIN,
    SEEN,
    Split,
    assign,
    read_split,
    withheld,
    without,
    write_split,
)

SHARES = st.sampled_from([FORGET, RETAIN, SEEN, ADJACENT])


def singles(count: int) -> dict[str, set[str]]:
    return {f"u{i}": set() for i in range(count)}


@pytest.mark.parametrize("shares", [FORGET, RETAIN, SEEN, ADJACENT])
def test_shares_are_percent_and_met_exactly(shares: dict[str, int]) -> None:
    assert sum(shares.values()) == 100
    assert Counter(assign(singles(100), shares, seed=0, name="s").values()) == shares


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(10, 60),
    shares=SHARES,
    seed=st.integers(0, 2**63),
    rng=st.randoms(use_true_random=False),
)
def test_every_unit_has_one_role_whatever_the_order(
    count: int, shares: dict[str, int], seed: int, rng: random.Random
) -> None:
    units = singles(count)
    shuffled = list(units)
    rng.shuffle(shuffled)
    roles = assign(units, shares, seed=seed, name="s")
    assert roles == assign({u: units[u] for u in shuffled}, shares, seed=seed, name="s")
    assert set(roles) == set(units)
    held = Counter(roles.values())
    for role, share in shares.items():
        assert abs(held[role] - share * count / 100) <= 1
        assert held[role] >= 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 25), max_size=2), min_size=20, max_size=60),
    SHARES,
    st.integers(0, 99),
)
def test_groups_are_never_split(held: list[set[int]], shares: dict[str, int], seed: int) -> None:
    units = {f"u{i}": {f"g{g}" for g in groups} for i, groups in enumerate(held)}
    try:
        roles = assign(units, shares, seed=seed, name="s")
    except UserError:
        assume(False)  # too few bundles of groups
    by_group: dict[str, set[str]] = {}
    for unit, groups in units.items():
        for group in groups:
            by_group.setdefault(group, set()).add(roles[unit])
    assert all(len(found) == 1 for found in by_group.values())
    assert set(roles.values()) == set(shares)


def test_groups_of_an_earlier_set_keep_their_role() -> None:
    units = {f"u{i}": {f"g{i // 2}"} for i in range(40)}
    roles = assign(units, FORGET, seed=0, name="s", fixed={"g0": "test", "g1": "relearn"})
    assert [roles[f"u{i}"] for i in range(4)] == ["test", "test", "relearn", "relearn"]
    assert Counter(roles.values()) == {"forget": 16, "dev_forget": 4, "relearn": 10, "test": 10}


def test_seeds_and_names_draw_apart() -> None:
    draws = [
        tuple(sorted(assign(singles(40), FORGET, seed=seed, name=name).items()))
        for seed, name in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert len(set(draws)) == 3


def test_adding_a_role_file_gives_its_share_to_the_method() -> None:
    assert without(FORGET, ["test", "relearn"], "forget") == {"forget": 90, "dev_forget": 10}
    assert without(SEEN, ["test"], "") == {"relearn": 40, "dev_forget": 20}
    assert without(RETAIN, [], "retain") == RETAIN


@pytest.mark.parametrize(("count", "shares"), [(9, FORGET), (9, RETAIN), (4, SEEN), (1, ADJACENT)])
def test_too_few_units_says_how_many(count: int, shares: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"at least {count + 1} are needed"):
        assign(singles(count), shares, seed=0, name="s")
    assert assign(singles(count + 1), shares, seed=0, name="s")


@settings(max_examples=40, deadline=None)
@given(st.sets(st.text("abcdef", min_size=1), max_size=12), st.integers(0, 9))
def test_a_third_of_the_wordings_is_withheld(versions: set[str], seed: int) -> None:
    hidden = withheld(versions, seed=seed, unit="u")
    assert hidden == withheld(sorted(versions, reverse=True), seed=seed, unit="u")
    assert hidden <= versions
    assert len(hidden) == (max(1, len(versions) // 3) if len(versions) > 1 else 0)


def make() -> Split:
    return Split(
        seed=3,
        units={"forget.a": {"u1": "test", "u2": "relearn"}, "retain": {"\u00e9": "benign"}},
        sources={"forget.a": {"f.jsonl": "11"}, "retain": {"r.jsonl": "22"}},
    )


def test_a_written_split_reads_back(tmp_path: Path) -> None:
    write_split(tmp_path / "split.json", make())
    assert read_split(tmp_path / "split.json") == make()
    assert read_split(tmp_path / "split.json", make().sources).role("forget.a", "u1") == "test"
    assert make().role("forget.a", "u9") is None
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"forget.a": {"f.jsonl": "99"}, "retain": {"r.jsonl": "22"}},
            r"another file for forget\.a: f\.jsonl differs from what was split",
        ),
        ({"forget.a": {"f.jsonl": "11"}}, r"made with a file for retain \(r\.jsonl\); give it too"),
        (
            {"forget.a": {"f.jsonl": "11"}, "retain": {"r.jsonl": "22"}, "test.a": {"v": "3"}},
            r"made without a file for test\.a; leave it out",
        ),
    ],
)
def test_a_split_of_other_files_is_refused(
    sources: dict[str, dict[str, str]], message: str, tmp_path: Path
) -> None:
    write_split(tmp_path / "split.json", make())
    with pytest.raises(UserError, match=message):
        read_split(tmp_path / "split.json", sources)


def test_renamed_files_are_the_same_files(tmp_path: Path) -> None:
    write_split(tmp_path / "split.json", make())
    renamed = {"forget.a": {"moved.jsonl": "11"}, "retain": {"r.jsonl": "22"}}
    assert read_split(tmp_path / "split.json", renamed) == make()
