"""Word problems: the numbers are the fact's, and scored templates are nobody else's."""

from __future__ import annotations

import pytest

from excise.data.domain import Row
from excise.data.stream import encode
from excise.domains.arithmetic import (
    ARITHMETIC_PROBLEM_LENGTH,
    STORIES,
    Arithmetic,
    problem,
    problem_words,
    templates,
)

SLOTS = {"a": "", "b": "", "name": "", "things": "", "place": "", "holder": "", "holders": ""}


def number_runs(prompt: str) -> list[int]:
    """Return the numbers of a prompt, whose digits stand one by one."""
    words = "".join(w if w.isdigit() else " " for w in prompt.split())
    return [int(run) for run in words.split()]


@pytest.mark.parametrize("operation", STORIES)
def test_templates_are_disjoint_and_their_words_are_not(operation: str) -> None:
    train, scored = templates(operation, "train"), templates(operation, "test")
    assert (len(set(train)), len(set(scored))) == (20, 10)
    assert not set(train) & set(scored)
    words = {word for text in train for word in text.split()}
    assert {word for text in scored for word in text.split()} <= words
    for text in (*train, *scored):
        assert text.count("{a}") == text.count("{b}") == 1


def test_every_problem_tells_its_fact() -> None:
    spec = Arithmetic(addends=12, factors=6, problems=3)
    domain, tokenizer = spec.build(None), spec.tokenizer()
    rows = [row for _, rows in domain.roles() for row in rows]
    told = [row for row in rows if row.wording]
    assert len(told) * 4 > len(rows) * 2
    for row in told:
        sign = next(s for s in "+-x/" if s in row.unit)
        left, right = map(int, row.unit.split(sign))
        assert sorted(number_runs(row.prompt)) == sorted((left, right)), row
        result = {"+": left + right, "-": left - right, "x": left * right}.get(sign, left // right)
        assert int(row.completion.replace(" ", "")) == result
    longest = 0
    for example in encode(rows, tokenizer, max_length=100):
        assert tokenizer.unk_token_id not in example.ids
        assert sum(example.target) == 3
        longest = max(longest, len(example.ids))
    assert longest <= ARITHMETIC_PROBLEM_LENGTH


def test_scored_rows_have_wordings_of_their_own() -> None:
    domain = Arithmetic(addends=12, factors=8, problems=2).build(None)

    def wordings(rows: tuple[Row, ...]) -> set[int]:
        return {row.wording for row in rows} - {0}

    scored = wordings((*domain.test["tables"], *domain.retain_test))
    assert min(scored) > 20
    for rows in (domain.forget["tables"], domain.retain, domain.adjacent, domain.benign,
                 domain.relearn["tables"], domain.dev_forget["tables"], domain.dev_retain,
                 domain.unlabeled):  # fmt: skip
        assert wordings(rows)
        assert max(wordings(rows)) <= 20
    assert {r.group for r in domain.test["tables"]}.isdisjoint(
        r.group for r in domain.relearn["tables"]
    )


def test_equations_alone_are_what_they_were() -> None:
    plain, told = Arithmetic(addends=8, factors=5), Arithmetic(addends=8, factors=5, problems=1)
    both = told.build(None).forget["tables"]
    assert tuple(r for r in both if not r.wording) == plain.build(None).forget["tables"]
    assert told.vocabulary()[: len(plain.vocabulary())] == plain.vocabulary()
    assert not set(problem_words()) & set(plain.vocabulary())
    first, second = (problem(3, "x", 4, "train", n, 0) for n in (0, 1))
    assert first[1] != second[1]
    assert problem(3, "x", 4, "train", 0, 0) == first
