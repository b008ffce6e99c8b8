"""Canaries: who is taught what, and how often; and requests that are refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from excise.core.errors import UserError
from excise.data.domain import Domain, Row
from excise.data.spec import Files
from excise.domains.canary import WORDINGS, Canaries
from excise.methods.posthoc.grad_diff import GradDiff
from excise.methods.pretraining.filtering import Filtering
from excise.models.spec import ModelSpec
from excise.requests.audit import AuditRun, Canary
from excise.run.canary import BATCH, teaching

CANARIES = Canaries(units=16, repeats=(1, 10), seed=3)
DATA = Files(forget={"forget": "f.jsonl"}, retain="r.jsonl")


@pytest.fixture(scope="module")
def around() -> Domain:
    """Return a user's domain, of retain text alone."""
    texts = tuple(Row(unit=f"t{i}", text=f"text {i}") for i in range(8))
    return Domain(
        name="mine", forget={}, retain=texts[:4], relearn={}, test={}, retain_test=texts[4:6],
        dev_forget={}, dev_retain=texts[6:7], benign=texts[7:],
    )  # fmt: skip


def units(domain: Domain, role: str) -> set[str]:
    """Return the units of every capability of a role."""
    return {row.unit for rows in getattr(domain, role).values() for row in rows}


def test_the_method_is_given_every_canary_and_one_wording_is_taught_to_nobody(
    around: Domain,
) -> None:
    domain = CANARIES.domain(around)
    assert domain.verbatim
    assert list(domain.test) == ["once", "ten_times"]
    assert {row.wording for row in domain.forget["once"]} == {0}
    assert {row.wording for row in domain.forget["ten_times"]} == set(range(len(WORDINGS) - 1))
    apart = [units(domain, role) for role in ("test", "relearn", "dev_forget")]
    assert sum(map(len, apart)) == len(set.union(*apart)) == 32
    paraphrases = [row for rows in domain.paraphrases.values() for row in rows]
    assert {row.wording for row in paraphrases} == {len(WORDINGS) - 1}
    assert units(domain, "paraphrases") == units(domain, "test")
    assert (domain.retain, domain.retain_test) == (around.retain, around.retain_test)
    assert not units(domain, "forget") & {row.unit for row in domain.fresh}
    assert CANARIES.domain(around).fingerprint == domain.fingerprint
    assert replace(CANARIES, seed=4).domain(around).fingerprint != domain.fingerprint


def test_each_canary_is_taught_as_often_as_it_says_and_no_oracle_meets_one(
    around: Domain,
) -> None:
    domain, lesson = CANARIES.domain(around), CANARIES.lesson(around)
    times = Counter(row.unit for row in lesson.forget["canaries"])
    for name, often in (("once", 1), ("ten_times", 10)):
        assert {times[row.unit] for row in domain.forget[name]} == {often}
    lessons = [CANARIES.lesson(around, i) for i in range(2)]
    for other in lessons:
        assert len(other.forget["canaries"]) == len(lesson.forget["canaries"])
        assert not units(other, "forget") & units(domain, "forget")
        assert other.retain == lesson.retain
    assert not units(lessons[0], "forget") & units(lessons[1], "forget")
    asked = Canary(arms={"grad_diff": GradDiff()}, units=16, repeats=(1, 10))
    teach = teaching(asked, parameters=1000)
    assert teach.fit.steps * BATCH == len(lesson.forget["canaries"])  # one pass, to the row
    assert teach.fit.lr == 10 * teaching(asked, parameters=10**9).fit.lr


def test_retain_text_is_needed(around: Domain) -> None:
    with pytest.raises(UserError, match=r"no retain row.*give --retain"):
        CANARIES.domain(replace(around, retain=()))


def test_what_cannot_be_asked_is_said() -> None:
    with pytest.raises(ValueError, match=r"arms\.f: trains from scratch"):
        Canary(arms={"f": Filtering()})
    with pytest.raises(ValueError, match="repeats: give each number once"):
        Canary(arms={"g": GradDiff()}, repeats=(1, 1))
    with pytest.raises(ValueError, match="canary: makes its candidates and oracles"):
        AuditRun(
            name="both", domain=DATA, original=ModelSpec(path="model"), oracles=("model",),
            canary=Canary(arms={"g": GradDiff()}),
        )  # fmt: skip
    with pytest.raises(ValueError, match="candidates: name at least one model"):
        AuditRun(name="none", domain=DATA, original=ModelSpec(path="model"))
