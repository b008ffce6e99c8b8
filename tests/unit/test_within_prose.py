"""Definitions inside general English: what stands around them, and what is labelled."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED
from excise.data.stream import encode
from excise.domains.definitions import DEFINITIONS_MAX_LENGTH, Definitions
from excise.domains.glosses import Glosses
from excise.domains.prose import load_prose, sentences, within_prose
from excise.methods import Filtering
from excise.methods.pretraining.pretrain import corpus

ALONE = Definitions(documents=120, prose=100)
INSIDE = ALONE.model_copy(update={"prose_around": 16})
SMALL = Glosses(questions=20, dev_questions=8, retain_units=60, prose=60)
GLOSSES = SMALL.model_copy(update={"prose_around": 24})
PAIRS = [(ALONE, INSIDE, "definitions"), (SMALL, GLOSSES, "body")]


@pytest.mark.parametrize(
    ("spec", "before"),
    [
        (Definitions(), "eb9319d2011a527e151e31ef7afb9be9e31d5fb4bc496154360a078dc0f0b3d7"),
        (ALONE, "611a86d39173ece9d094267e5916874a76e089f063135e0b96b1912312f39937"),
        (Glosses(), "43272416894b022914dbf113dad9141c19e2d518be58f752230a2bb03575b22a"),
        (SMALL, "0ff4a2ac17903437fc7f94bce5ae2cd4961b430434acb736952e9086eca71b12"),
    ],
)
def test_definitions_alone_are_the_domain_there_always_was(
    spec: Definitions | Glosses, before: str
) -> None:
    # What is fresh comes from the documentation of the Python at hand.
    assert replace(spec.build(), fresh=()).fingerprint == before


@pytest.mark.parametrize(("alone", "inside", "name"), PAIRS)
def test_only_what_the_method_is_to_forget_stands_inside_prose(
    alone: Definitions | Glosses, inside: Definitions | Glosses, name: str
) -> None:
    before, after = dict(alone.build().roles()), dict(inside.build().roles())
    assert {role for role in before if before[role] != after[role]} == {
        f"forget.{name}", "unlabeled",
    }  # fmt: skip
    key = f"forget.{name}"
    for row, was in zip(after[key], before[key], strict=True):
        (span,) = row.spans
        assert row.text[span.start : span.end] == was.text
        assert (span.capability, span.label) == (name, 1) == (row.capability, row.label)
        assert (row.unit, row.group, row.wording) == (was.unit, was.group, was.wording)
        prose = [*row.text[: span.start].split(), *row.text[span.end :].split()]
        assert 2 <= len(prose) <= inside.prose_around
    mix = {(row.unit, row.wording, row.text) for row in after[key]}
    unread = [row for row in after["unlabeled"] if row.capability]
    assert {(row.unit, row.wording, row.text) for row in unread} == mix
    assert {s.label for row in unread for s in row.spans} == {UNLABELED}


def test_a_definition_stands_between_sentences_of_passages_that_retain_does_not_hold() -> None:
    domain = INSIDE.build()
    retain = " ".join(row.text for row in domain.retain)
    places: Counter[str] = Counter()
    for row in domain.forget["definitions"]:
        (span,) = row.spans
        before, after = row.text[: span.start].strip(), row.text[span.end :].strip()
        places["start" if not before else "inside" if after else "end"] += 1
        for part in (before, after):
            if part:
                assert sentences(part)
                assert " ".join(sentences(part)) == part
        assert " ".join(part for part in (before, after) if part) not in retain
    assert min(places.values()) > 10


def test_an_oracle_reads_the_prose_and_no_definition() -> None:
    domain = INSIDE.build()
    rows = [row for row in map(Filtering(drop="spans")._read, corpus(domain)) if row is not None]
    assert len(rows) == len(corpus(domain))
    text = " ".join(row.text for row in rows)
    assert not any(
        row.text[s.start : s.end] in text for row in domain.forget["definitions"] for s in row.spans
    )
    assert {(row.label, row.capability, row.spans) for row in rows} == {(CORE, "", ())}


def test_tokens_of_the_definition_alone_are_labelled_and_scored_after_training() -> None:
    rows, tokenizer = INSIDE.build().forget["definitions"], INSIDE.tokenizer()
    examples = encode(rows, tokenizer, max_length=2 * DEFINITIONS_MAX_LENGTH, only_spans=True)
    for row, example in zip(rows, examples, strict=True):
        assert isinstance(example.label, tuple)
        scored = [i for i, n in zip(example.ids, example.label, strict=True) if n == 1]
        (span,) = row.spans
        assert tokenizer.decode(scored).strip() == row.text[span.start : span.end]
        targets = [n == 1 and i > 0 for i, n in enumerate(example.label)]
        assert [*example.target] == targets


def test_another_seed_is_another_mixture() -> None:
    texts = []
    for seed in (0, 0, 1):
        rows = within_prose(
            ALONE.build().forget["definitions"], 16, passage=30, skip=100, seed=seed
        )
        texts.append([row.text for row in rows])
    assert texts[0] == texts[1]
    same = sum(a == b for a, b in zip(texts[0], texts[2], strict=True))
    assert same < 0.1 * len(texts[0])


def test_no_passage_left_is_said() -> None:
    rows = ALONE.build().forget["definitions"]
    with pytest.raises(UserError, match="prose_around: no passage beside the 99999 of retain"):
        within_prose(rows, 16, passage=30, skip=99999, seed=0)


def test_titles_and_initials_end_no_sentence() -> None:
    text = (
        'half of it. Mr. and Mrs. J. Bennet came. "Did they?" "Yes!" She went; he did not. And so'
    )
    assert sentences(text) == [
        "Mr. and Mrs. J. Bennet came.", '"Did they?"', '"Yes!"', "She went; he did not.",
    ]  # fmt: skip
    assert sentences("of no end") == []
    assert load_prose("retain", limit=1) == load_prose("retain", words=100, limit=1)
