"""Glosses: the shipped extract, the leak filter and the split by term."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from pydantic import ValidationError

from excise.data.domain import Row
from excise.domains.glosses import Gloss, Glosses, load_glosses, stems


def groups(rows: Iterable[Row]) -> set[str]:
    return {row.group for row in rows}


def test_the_extract_is_whole() -> None:
    counts = Counter(g.topic for g in load_glosses())
    assert sum(counts.values()) == 82115
    assert len(counts) == 26
    assert (counts["body"], counts["animal"], counts["plant"]) == (2016, 7509, 8030)
    assert {g.number: g for g in load_glosses()}["05529159"] == Gloss(
        "05529159", "body", "laryngopharynx", "the lower part of the pharynx"
    )


@pytest.mark.parametrize(
    ("term", "gloss", "clean"),
    [
        ("femur", "the longest bone of the leg", True),
        ("leg bone", "a long bone in the leg", False),
        ("heartbeat", "the hearty rhythm of a muscle", False),
        ("ear", "the ear of an animal", True),  # shorter than four letters: not compared
        ("toe", "a digit", False),  # too short to be asked about
    ],
)
def test_the_leak_filter(term: str, gloss: str, clean: bool) -> None:
    assert Gloss("1", "body", term, gloss).clean is clean


def test_questions_are_clean_and_of_one_topic() -> None:
    domain = Glosses().build(None)
    topic_of: dict[str, set[str]] = {}
    for g in load_glosses():
        topic_of.setdefault(g.term, set()).add(g.topic)
    for row in (*domain.test["body"], *domain.retain_test, *domain.adjacent_test):
        gloss = row.prompt.removeprefix("Definition: ").removesuffix("\nTerm:")
        assert not stems(gloss) & stems(row.choices[row.answer])
        assert len({c.lower() for c in row.choices}) == 4
        shared = set.intersection(*(topic_of[c] for c in row.choices))
        assert row.group.split("/")[0] in shared
    answers = Counter(row.answer for row in domain.test["body"])
    assert max(answers.values()) < 80, "the right answer's place is uneven"


def test_terms_lie_on_one_side_only() -> None:
    domain = Glosses().build(None)
    t, v, dev = (groups(part["body"]) for part in (domain.relearn, domain.test, domain.dev_forget))
    shown = groups(domain.forget["body"])
    assert not t & v
    assert not dev & (t | v)
    assert not shown & (t | v | dev)
    assert not groups(domain.retain) & groups((*domain.retain_test, *domain.dev_retain))
    assert not groups(domain.benign) & groups(domain.retain_test)
    assert not groups(domain.adjacent) & groups(domain.adjacent_test)
    taught = {row.text.split(":")[0].lower() for row in domain.forget["body"] if row.wording == 0}
    assert not taught & {row.choices[row.answer].lower() for row in domain.test["body"]}


def test_no_definition_is_in_two_roles() -> None:
    domain = Glosses().build(None)
    said = {row.text for row in domain.forget["body"]}
    for row in domain.test["body"]:
        gloss = row.prompt.removeprefix("Definition: ").removesuffix("\nTerm:")
        assert not any(text.endswith(f": {gloss}.") for text in said)


def test_seen_shows_the_method_plain_wordings_of_v() -> None:
    domain = Glosses(exposure="seen").build(None)
    assert groups(domain.test["body"]) <= groups(domain.forget["body"])
    assert all(row.kind == "text" for row in domain.forget["body"])
    assert domain.claim == "deletion"


def test_fresh_units_pair_terms_with_other_definitions() -> None:
    true = {(g.gloss, g.term) for g in load_glosses()}
    domain = Glosses().build(None)
    half = len(domain.fresh) // 2
    assert half > 100
    for row in domain.fresh:
        gloss = row.prompt.removeprefix("Definition: ").removesuffix("\nTerm:")
        assert (gloss, row.choices[row.answer]) not in true
    first, second = domain.fresh[:half], domain.fresh[half:]
    assert not {r.unit for r in first} & {r.unit for r in second}


@pytest.mark.parametrize("topic", ["Tops", "motive", "shape", "feeling", "body", "time"])
def test_small_and_large_topics_build(topic: str) -> None:
    spec = Glosses.model_validate({"topic": topic, "others": ["food"], "prose": 0, "questions": 20})
    domain = spec.build(None)
    assert all(rows for _, rows in domain.roles())


def test_topics_play_one_part() -> None:
    with pytest.raises(ValidationError, match="also retained"):
        Glosses(topic="person")
    with pytest.raises(ValidationError, match="is the neighbour"):
        Glosses(topic="body", neighbour="person")
