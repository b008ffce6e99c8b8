"""The report and the terminal summary of a study."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from typing import Any

from rich.console import Console
from tests.report.pages import read
from tests.report.sample import HOSTILE, full

from excise.record import Record, StudyPicture, StudyPictureRow, StudyRecord, StudyRow, StudyTable
from excise.report.page import render_html
from excise.report.terminal import render_terminal


def study(text: str = "plain") -> Record:
    """Return the record of a study whose every text holds `text`."""
    rows = (
        StudyRow(
            condition=f"cleared {text}", metric="exact match", value=0.5, low=0.4, high=0.6, n=9
        ),
        StudyRow(condition=f"cleared {text}", seed=1, metric="exact match", value=0.25, n=3),
        StudyRow(condition="original", metric=f"loss {text}", value=None),
    )
    tables = tuple(StudyTable(title=f"{t} {text}", note=text, rows=rows) for t in ("One", "Two"))
    picture = StudyPicture(
        title=f"drawn {text}",
        note=text,
        width=2,
        columns=(f"zero {text}", "one"),
        rows=(StudyPictureRow(name=f"whole {text}", images=("0990", "5005"), values=(0.25,)),),
    )
    found = StudyRecord(
        name="name",
        question=f"Why {text}?",
        statistic=f"What decides {text}",
        margin=0.5,
        tuned_on=(0,),
        decision=f"shallow {text}",
        paragraph=f"Over three seeds {text}.",
        tables=tables,
        pictures=(picture,),
    )
    record = full()
    kept: dict[str, Any] = {
        "environment": record.environment,
        "data": record.data,
        "models": record.models,
    }
    return Record(kind="study", title=f"a study {text}", study=found, seeds=(1, 2, 3), **kept)


def test_the_page_of_a_study_is_sound() -> None:
    root = read(render_html(study()))
    ids = [n.attrs["id"] for n in root.walk() if "id" in n.attrs]
    assert len(ids) == len(set(ids))
    for node in root.walk():
        assert all(name in ids for name in node.attrs.get("aria-labelledby", "").split())
        if node.tag == "a" and node.attrs["href"].startswith("#"):
            assert node.attrs["href"][1:] in ids
    assert root.all("body")[0].children[0].attrs["href"] == "#study"
    levels = [int(n.tag[1]) for n in root.walk() if re.fullmatch(r"h[1-6]", n.tag)]
    assert all(b <= a + 1 for a, b in pairwise(levels))
    titles = [n.text() for n in root.all("h2")]
    assert titles[0] == "What the study found"
    assert "What came back" not in titles
    text = root.text()
    for said in ("shallow plain", "What decides plain", "0.500 [0.400, 0.600]", "seed 1"):
        assert said in text
    assert "3 reported seeds" in text


def test_missing_numbers_of_a_study_are_words() -> None:
    assert "not measured" in read(render_html(study())).text()


def test_hostile_text_of_a_study_stays_text() -> None:
    html = render_html(study(HOSTILE))
    assert html.count("<script") == 1
    assert "<img" not in html
    assert "\x1b" not in html


def test_the_terminal_shows_a_study_in_eighty_columns() -> None:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(render_terminal(study(HOSTILE)))
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())
    assert "\x1b" not in out.getvalue()
    assert "shallow" in out.getvalue()
    assert "Nobody attacked" not in out.getvalue()


def test_small_images_are_drawn_with_their_numbers() -> None:
    root = read(render_html(study()))
    plot = next(n for n in root.all("svg") if "drawn plain" in n.text())
    assert plot.attrs["role"] == "img"
    inked = [p for p in plot.all("path") if p.attrs["fill"] == "currentColor"]
    assert [p.attrs["d"] for p in inked] == ["M1 0h1v1h-1zM0 1h1v1h-1z", "M0 0h1v1h-1zM1 1h1v1h-1z"]
    assert [p.attrs.get("fill-opacity") for p in inked] == [None, ".5"]
    assert plot.parent is not None
    cells = [c.text() for c in plot.parent.all("td")]
    assert cells == ["0.250", "\u2013"]
