"""Numbers, statuses and names in words."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tests.report import parts, sample
from tests.report.pages import read
from tests.report.test_inspection import inspection, record_of
from tests.report.test_study import study

from excise.record import LEVELS, Record
from excise.report import words
from excise.report.card import render_card
from excise.report.page import render_html
from excise.report.terminal import render_terminal

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence.md"

RETIRED = re.compile(
    r"\b(rungs?|ladders?|rails?|plants?|planted|void|powerless|sheets?|arms?|draws?|wordings?"
    r"|strangers?|T|V)\b"
)
"""Words of our own in place of which the glossary has one that is in use."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (math.nan, "not measured"),
        (math.inf, "not measured"),
        (0.0, "0.000"),
        (-0.0001, "\u22121.0e\u221204"),
        (-0.0, "0.000"),
        (0.93, "0.930"),
        (-3.15, "\u22123.150"),
        (10.05, "10.05"),
        (12345.6, "12,346"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_other_numbers() -> None:
    assert words.interval(0.1, 0.2) == "[0.100, 0.200]"
    assert words.interval(None, math.nan) == ""
    assert words.share(0.842) == "84 %"
    assert words.share(0.022) == "2.2 %"
    assert words.short(12_288) == "12.3k"
    assert words.short(8.2e10, "FLOP") == "82 GFLOP"
    assert words.short(0) == "0"
    assert words.short(999_999) == "1M"
    assert words.duration(104.2) == "1 min 44 s"
    assert words.duration(7265) == "2 h 1 min"
    assert words.size(2**31) == "2.00 GiB"


def test_spell_puts_words_beside_codes_once() -> None:
    assert words.spell("passes D0.") == "passes D0 (the behaviour is gone)."
    assert words.spell("D0: the behaviour is gone") == "D0: the behaviour is gone"
    assert words.spell("D9, ID3") == "D9, ID3"


def test_plain_removes_what_rewrites_a_terminal() -> None:
    assert words.plain("a\x1b[31m\u202eb\n\t") == "a\ufffd[31m\ufffdb\n\t"


def test_a_level_counts_only_above_passed_ones() -> None:
    levels = parts.verdict("rmu", 0.09, 0.83).levels
    assert [r.status for r in levels][:4] == ["pass", "underpowered", "fail", "pass"]
    assert words.counts(levels) == (True, False, False, False, False, False)


def test_highest_is_in_words() -> None:
    verdict = parts.verdict("filtering", 0.04, 0.06)
    assert words.highest(verdict) == "as if never learned (D5)"
    assert words.highest(verdict.model_copy(update={"highest": ""})) == "none"


def test_candidate_is_the_only_model() -> None:
    record = sample.no_oracle()
    assert words.model_names(record) == ("rmu",)
    assert len(words.attacks_on(record, "rmu")) == len(parts.attacks("rmu", 0.1, 0.8))
    assert words.attacks_on(sample.full(), "oracle-9") == ()


WITHOUT = [sample.no_oracle, sample.fresh_text, sample.removed, sample.minimal]


@pytest.mark.parametrize("make", WITHOUT)
def test_nothing_speaks_of_an_oracle_where_there_was_none(make: Callable[[], Record]) -> None:
    record = make()
    page = read(render_html(record)).all("body")[0].text(without=("script", "pre"))
    screen = io.StringIO()
    Console(file=screen, width=2000).print(render_terminal(record))
    for text in (page, " ".join(screen.getvalue().split())):
        assert "oracle" not in text.replace(words.WITHOUT_ORACLE, "").lower()
        assert text.count(words.WITHOUT_ORACLE) == (1 if record.attacks else 0)


def changed(record: Record, **update: object) -> Record:
    """Return the record with fields of its only verdict changed."""
    (verdict,) = record.verdicts
    return record.model_copy(update={"verdicts": (verdict.model_copy(update=update),)})


def with_levels(record: Record, **status: str) -> Record:
    """Return the record with other results of its only verdict's levels."""
    (verdict,) = record.verdicts
    levels = tuple(
        r.model_copy(update={"status": status[r.level]}) if r.level in status else r
        for r in verdict.levels
    )
    return changed(record, levels=levels)


def standard(record: Record, **update: object) -> Record:
    """Return a record that passed everything at the standard budget."""
    passed = dict.fromkeys(LEVELS, "pass")
    return changed(with_levels(record, **passed), budget="standard", recovery=0.0, **update)


FILTERING = sample.full(("filtering",))


@pytest.mark.parametrize(
    ("record", "ship", "why"),
    [
        (standard(FILTERING), "yes", "it held against every attack of the standard budget"),
        (
            changed(standard(FILTERING), budget="smoke"),
            "open",
            "it held, but only against the quick attacks of the smoke budget",
        ),
        (
            standard(FILTERING, retain_change=-0.4, retain_low=-0.5, retain_high=-0.3),
            "no",
            "the retain set is damaged",
        ),
        (
            standard(FILTERING, retain_change=-0.01, retain_low=-0.05, retain_high=0.02),
            "yes",
            "it held against every attack of the standard budget",
        ),
        (with_levels(FILTERING, D0="fail"), "no", "it is still there"),
        (with_levels(FILTERING, D1="underpowered"), "open", '"holds against prompts" was not'),
        (sample.full(("rmu",)), "no", "84 % comes back with relearning"),
        (sample.no_oracle(), "no", "84 % comes back with relearning"),
        (
            changed(with_levels(sample.no_oracle(), D1="pass", D2="pass"), recovery=0.3),
            "open",
            "30 % comes back, and how much any model would relearn is not known",
        ),
        (sample.removed(), "open", "nobody attacked it"),
        (
            changed(FILTERING, sentence="There is nothing to remove: the original scores 0.04."),
            "open",
            "the original did not know it, so there was nothing to remove",
        ),
    ],
)
def test_whether_it_can_ship(record: Record, ship: str, why: str) -> None:
    (name,) = words.model_names(record)
    answers = words.answers(record, name)
    assert answers.ship == ship
    assert answers.why.startswith(why)


def test_what_never_went_does_not_come_back() -> None:
    record = changed(with_levels(sample.full(("rmu",)), D0="fail"), recovery=None)
    assert words.answers(record, "rmu").came_back == "it had not gone"
    silent = changed(FILTERING, sentence="There is nothing to remove: it scores 0.04.")
    assert words.answers(silent, "filtering").came_back == "there was nothing to remove"


def test_what_was_removed_and_what_it_cost() -> None:
    record = standard(FILTERING, retain_change=-0.4, retain_low=-0.5, retain_high=-0.3)
    answers = words.answers(record, "filtering")
    assert answers.removed == "exact match 0.97 \u2192 0.04"
    assert answers.lost == "exact match 0.99 \u2192 0.99 (damaged)"
    assert words.capabilities(record) == "facts"
    unnamed = record.model_copy(update={"data": {"rows": {"forget.forget": 3}}})
    assert words.capabilities(unnamed) == "the forget set"


def table_rows(heading: str) -> dict[str, str]:
    """Return the first two columns of the table under a heading of `docs/evidence.md`."""
    section = EVIDENCE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1] for row in cells}


def test_the_glossary_of_the_page_is_that_of_the_docs() -> None:
    documented = table_rows("Glossary")
    for word, meaning in words.GLOSSARY.items():
        assert documented[word] == meaning.replace("\u2212", "-")
    assert table_rows("Depth levels") == LEVELS
    assert not RETIRED.search(" ".join([*documented, *documented.values()]))


PAGES: dict[str, Callable[[], Record]] = {
    **{name: make for name, make in sample.RECORDS.items() if name != "hostile"},
    "study": study,
    "inspection": lambda: record_of(inspection()),
}


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_no_report_uses_a_word_that_the_glossary_retired(make: Callable[[], Record]) -> None:
    record = make()
    page = read(render_html(record)).all("body")[0].text(without=("script", "pre", "style"))
    screen = io.StringIO()
    Console(file=screen, width=200).print(render_terminal(record))
    cards = [render_card(record, name) for name in words.model_names(record)]
    for text in (page, screen.getvalue(), *cards):
        match = RETIRED.search(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        assert match is None, text[max(0, match.start() - 60) : match.end() + 60]
