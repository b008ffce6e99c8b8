"""What docs say in numbers is what records say, and what has no record is known."""

from __future__ import annotations

import re

import pytest
from tests.docs.quoted import (
    LINK,
    ROOT,
    entries,
    foreign,
    in_order,
    numbers,
    section,
    without_blocks,
)
from tests.docs.unrecorded import UNRECORDED, Quote

from excise_studies.publish import (
    LIMIT,
    MARKS,
    RECORDS,
    blocks,
    filled,
    names_in,
    pages,
    picture,
    read,
)

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {path.name: path.read_text("utf-8") for path in pages(ROOT)}
SAID = [entry for entry in entries(README) if numbers(entry)]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_what_its_record_renders(page: str) -> None:
    assert filled(PAGES[page], blocks(ROOT)) == PAGES[page], (
        f"a block of {page} differs from its record; publish the study again instead of editing it"
    )
    assert len(re.findall(r"^<!-- /", PAGES[page], re.MULTILINE)) == len(MARKS.findall(PAGES[page]))


def test_a_number_edited_by_hand_is_found() -> None:
    known = blocks(ROOT)
    assert "auditor-roc" in names_in(README)
    forged = re.sub(r"(\| hides .* )0\.(\d\d \[)", r"\g<1>1.\g<2>", README)
    assert filled(forged, known) == README != forged


def test_every_record_is_small_and_quoted() -> None:
    names = {name for page in PAGES.values() for name in names_in(page)}
    for path in (ROOT / RECORDS).glob("*.json"):
        assert path.stat().st_size <= LIMIT
        assert path.stem in names, f"no page quotes {path.name}"
        drawn = path.with_suffix(".svg")
        shown = f"<!-- {path.stem}: picture -->" in "".join(PAGES.values())
        assert drawn.exists() == shown
        if shown:
            assert drawn.read_text("utf-8") == picture(read(path)), "publish the study again"
        study = read(path).study
        assert study is not None
        assert study.decision


def test_numbers_of_the_readme_without_a_record_are_listed_with_the_reason() -> None:
    listed = {
        entry: [quote for quote in UNRECORDED if entry.startswith(quote.starts)] for entry in SAID
    }
    assert [entry for entry, quotes in listed.items() if len(quotes) != 1] == []
    wrong = [e for e, (quote,) in listed.items() if " ".join(in_order(e)) != quote.numbers]
    assert wrong == [], "publish the study, or say in unrecorded.py where the number comes from"
    stale = [q.starts for q in UNRECORDED if not any(e.startswith(q.starts) for e in SAID)]
    assert stale == []


@pytest.mark.parametrize("quote", [q for q in UNRECORDED if q.where], ids=lambda q: q.starts)
def test_such_numbers_stand_where_the_list_says(quote: Quote) -> None:
    there = " ".join(
        section(PAGES[page], a) for page, _, a in (w.partition("#") for w in quote.where)
    )
    assert numbers(quote.numbers) <= numbers(there)


def test_findings_have_no_number_of_their_own() -> None:
    found = entries(PAGES["findings.md"])
    linked = [entry for entry in found if LINK.search(entry)]
    assert len(linked) > 25
    assert {e[:60]: f for e in found if (f := foreign(e, PAGES))} == {}
    broken = [
        link for e in linked for link in LINK.findall(e) if not section(PAGES[link[0]], link[1])
    ]
    assert broken == []
    assert foreign(linked[1].replace("0.34", "0.3401"), PAGES) == {0.3401}


def test_numbers_are_read_as_they_are_written() -> None:
    assert in_order("a -0.05 [.23, 1,072] of `7` at D4, int8, 2.4e-15 [3](x.md) Apache-2.0.") == [
        "-0.05", ".23", "1,072", "2.4e-15",
    ]  # fmt: skip
    page = "# A b\n1\n## C: d, e\n2\n### F\n3\n## G\n4\n"
    assert section(page, "c-d-e").split() == ["2", "3"]
    assert section(page, "none") == ""
    assert without_blocks("1\n<!-- x -->\n2\n<!-- /x -->\n3") == "1\n\n3"
    assert entries("# T 9\n1 a\n- 2\n- 3\n\n```\n4\n\n5\n```\n| 6 |\n") == [
        "1 a",
        "- 2",
        "- 3",
        "| 6 |",
    ]
