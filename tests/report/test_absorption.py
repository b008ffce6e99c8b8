"""The picture of absorption: shares become bars, words and numbers; nonsense becomes nothing."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
from tests.report.pages import read
from tests.report.sample import full, method_run

from excise.record import MethodRun, Record, StudyRecord, StudyRow, StudyTable
from excise.report import figures
from excise.report.page import render_html

TOLD = {
    "retain": {"share": {"core": 0.9, "module_alpha": 0.1}},
    "labelled": {"share": {"core": 0.25, "module_alpha": 0.75}},
    "missed": {"share": {"core": 0.0, "module_alpha": 1.0}},
}


def routed(told: Any) -> MethodRun:
    made: MethodRun = method_run("rmu").model_copy(update={"extras": {"absorption": told}})
    return made


def study(rows: tuple[StudyRow, ...]) -> Record:
    table = StudyTable(title="Absorption", note="", rows=rows)
    found = StudyRecord(
        name="s", question="q", statistic="d", margin=0.1, tuned_on=(0,), decision="none",
        paragraph="p", tables=(table,),
    )  # fmt: skip
    return full().model_copy(update={"kind": "study", "study": found})


def test_bars_words_and_numbers_say_the_same() -> None:
    found = figures.absorption_figure(routed(TOLD), "a")
    assert found is not None
    assert found.header == ("Rows", "core", "module_alpha")
    assert [row[0] for row in found.rows] == list(figures.ABSORBED.values())
    assert "labelled forget rows: module_alpha 75 %, core 25 %" in found.caption
    plot = str(found.plot)
    assert plot.count('class="share s-original"') == 2  # a part of no width is not drawn
    assert plot.count('class="share s-candidate"') == 3
    assert "module_alpha 75 %" in plot


@pytest.mark.parametrize(
    "told", [None, "x", {}, {"retain": 3}, {"retain": {"share": {"core": math.nan, "b": "c"}}}]
)
def test_nonsense_is_left_out(told: Any) -> None:
    assert figures.absorption_figure(routed(told), "a") is None


def test_the_page_shows_it_once_and_escapes_names() -> None:
    told = {"retain": {"share": {"<b>": 1.0}}}
    record = full().model_copy(update={"method_runs": (routed(told),)})
    html = render_html(record)
    read(html)
    assert "What rows write into: rmu" in html
    assert "<b>" not in html


def test_a_study_shows_its_table_of_absorption() -> None:
    rows = (
        StudyRow(condition="sgtm", metric="labelled rows into modules", value=0.8, n=3),
        StudyRow(condition="sgtm", metric="loss of labelled rows, before", value=2.0, n=3),
    )
    found = figures.study_absorption_figure(study(rows))
    assert found is not None
    assert [row[0] for row in found.rows] == ["sgtm: labelled forget rows"]
    assert figures.study_absorption_figure(study(())) is None
    assert figures.study_absorption_figure(full()) is None
    assert "Share that rows write into modules, by condition" in render_html(study(rows))


def test_many_bars_say_how_many_are_drawn_and_long_words_do_not_meet() -> None:
    rows = tuple(
        StudyRow(condition=f"a long name of a condition {i} [50 %]", value=0.3, n=3,
                 metric=f"{kind} rows into modules")
        for i in range(20) for kind in ("retain", "labelled")
    )  # fmt: skip
    found = figures.study_absorption_figure(study(rows))
    assert found is not None
    assert "the first 24 of 40" in found.title
    assert len(found.rows) == 40
    words = re.findall(r"<text[^>]*>([^<]*)</text>", str(found.plot))
    lines = list(itertools.pairwise(words))[::2]
    assert len(lines) == 24
    assert all(len(left) + len(right) <= figures.LETTERS for left, right in lines)
