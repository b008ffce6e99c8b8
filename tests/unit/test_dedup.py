"""Duplicates: found exactly, clustered, whatever the order."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.data.dedup import (
    SHINGLE,
    Clusters,
    find_duplicates,
    near_pairs,
    normal_form,
    shingles,
    text_hash,
    words_of,
)

WORDS = [f"word{i}" for i in range(400)]


def document(seed: int, words: int = 60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def partition(clusters: tuple[int, ...], keys: list[int]) -> set[frozenset[int]]:
    out: dict[int, set[int]] = {}
    for at, key in zip(clusters, keys, strict=True):
        out.setdefault(at, set()).add(key)
    return {frozenset(held) for held in out.values()}


def test_normal_form_keeps_signs_and_drops_case_and_space() -> None:
    assert normal_form("  The\u00a0Cat\n\tsat ") == "the cat sat"
    assert normal_form("\ufb01ne") == "fine"
    assert text_hash("3 + 4 = 7") != text_hash("3 - 4 = 7")
    assert text_hash("A b") == text_hash("a  B\n")


def test_words_lose_their_punctuation_and_unspaced_scripts_are_cut() -> None:
    assert words_of('"hello," (world) + c++.') == ["hello", "world", "+", "c"]
    assert words_of("\u6771\u4eac ab") == ["\u6771", "\u4eac", "ab"]


def test_exact_duplicates_of_short_texts_only() -> None:
    found = find_duplicates(["A cat.", "a  CAT.", "a cat", "a dog."])
    assert found.cluster == (0, 0, 2, 3)
    assert found.exact == ((0, 1),)
    assert found.near == ()


def test_near_duplicates_and_their_chains_are_one_cluster() -> None:
    first = document(0)
    second = first[:50] + document(1, 10)
    third = second[10:] + document(2, 10)
    other = document(3)
    texts = [" ".join(t) for t in (other, third, first, second)]
    a, b, c = (shingles(normal_form(" ".join(t))) for t in (first, second, third))
    assert len(np.intersect1d(a, c)) / len(np.union1d(a, c)) < 0.5  # joined through the second
    assert len(np.intersect1d(a, b)) / len(np.union1d(a, b)) >= 0.5
    assert find_duplicates(texts).cluster == (0, 1, 1, 1)


def test_punctuation_and_case_do_not_hide_a_copy() -> None:
    words = document(4)
    copy = " ".join(w.upper() + "," for w in words)
    assert find_duplicates([" ".join(words), copy]).near == ((0, 1),)


def test_shingles_count_words() -> None:
    assert len(shingles(" ".join(WORDS[: SHINGLE - 1]))) == 0
    assert len(shingles(" ".join(WORDS[:SHINGLE]))) == 1
    assert len(shingles(" ".join(WORDS[:40]))) == 28
    assert len(shingles(" ".join(reversed(WORDS[:40])))) == 28


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 25), max_size=12), max_size=14),
    st.sampled_from([0.3, 0.5, 0.8]),
)
def test_prefix_filtering_misses_no_similar_pair(sets: list[set[int]], threshold: float) -> None:
    arrays = [np.array(sorted(s), np.uint64) for s in sets]
    wanted = Clusters()
    for i, j in itertools.combinations(range(len(sets)), 2):
        union = len(sets[i] | sets[j])
        if union and len(sets[i] & sets[j]) / union >= threshold:
            wanted.join(i, j)
    got = Clusters()
    for i, j in near_pairs(arrays, threshold):
        assert len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
        assert got.join(i, j)
    n = range(len(sets))
    assert {(i, j) for i in n for j in n if got.find(i) == got.find(j)} == {
        (i, j) for i in n for j in n if wanted.find(i) == wanted.find(j)
    }


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_clusters_do_not_depend_on_order(picks: list[int], rng: random.Random) -> None:
    base = [document(i // 4) for i in range(12)]
    texts = [" ".join(doc[i % 4 * 3 :] + document(50 + i, i % 4 * 4)) for i, doc in enumerate(base)]
    order = list(range(len(picks)))
    rng.shuffle(order)
    first = find_duplicates([texts[i] for i in picks])
    second = find_duplicates([texts[picks[i]] for i in order])
    assert partition(first.cluster, list(range(len(picks)))) == partition(second.cluster, order)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_is_no_problem(texts: list[str]) -> None:
    assert len(find_duplicates(texts).cluster) == len(texts)


def test_many_texts_with_shared_boilerplate_are_fast() -> None:
    boilerplate = document(9, 40)
    texts = [" ".join(boilerplate + document(1000 + i, 22)) for i in range(1000)]
    assert len(set(find_duplicates(texts).cluster)) > 990
