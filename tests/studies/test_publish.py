"""A study's record becomes a small one, and what docs show is made of that alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from excise.core.errors import UserError
from excise.evals.replicates import Contrast, SeedEstimate
from excise.record import (
    Environment,
    ModelRef,
    Record,
    StudyContrast,
    StudyRecord,
    StudyRow,
    StudyTable,
    save,
)
from excise.report.study import by_condition, forest
from excise.run.study import recorded
from excise_studies.publish import (
    LIMIT,
    MARKS,
    NOT_RUN,
    block,
    compact,
    decision,
    filled,
    main,
    picture,
    publish,
    read,
    text_of,
)
from excise_studies.recovery import RECOVERY

OPEN = Contrast("D", SeedEstimate(0.2, 0.02, 0.38, 84, freedom=2), (-0.1, 0.1))


def made(**change: Any) -> Record:
    """Return the record of a study as a run writes it."""
    rows = [
        StudyRow(condition="a|b", metric="depth gap", value=-1 / 3, low=-0.5, high=0.0, n=84),
        StudyRow(condition="a|b", metric="parameters", value=152_256.0),
        StudyRow(condition="a|b", metric="depth gap", value=0.25, seed=1, n=28),
        StudyRow(condition="c", metric="parameters"),
    ]
    study = StudyRecord(
        name="edges",
        question="Which?",
        statistic="D",
        margin=0.1,
        tuned_on=(0,),
        decision="undecided: D's interval crosses 0.1",
        paragraph="Read from /data/models/x. Decision: undecided.",
        contrasts=(recorded(OPEN),),
        tables=(
            StudyTable(title="Contrasts", rows=tuple(rows)),
            StudyTable(title=RECOVERY, note="How.", rows=tuple(rows)),
        ),
    )
    given: dict[str, Any] = {
        "kind": "study",
        "config": {"rates": [1.0], "experiment": {"width": 64}, "model": "/data/models/x"},
        "environment": Environment(
            git="abc123", started="2026-01-02T03", excise="0.1.0", versions={"torch": "2.8"},
            platform="box",
        ),
        "seeds": (1, 2),
        "models": (ModelRef(name="m", path="/data/models/x"),),
        "study": study,
        "seconds": 125.0,
    }  # fmt: skip
    return Record(**{**given, **change})


def test_a_compact_record_keeps_what_is_quoted_and_names_no_folder() -> None:
    kept = compact(made())
    assert kept.study is not None
    assert [table.title for table in kept.study.tables] == [RECOVERY]
    assert [row.seed for row in kept.study.tables[0].rows] == [None, None, 1, None]
    assert kept.study.tables[0].rows[0].value == -0.33333
    assert kept.study.tables[0].rows[1].value == 152_256.0
    assert kept.config == {"rates": [1.0], "model": "x"}
    assert (kept.models, kept.environment.platform) == ((), "")
    assert kept.study.paragraph == "Read from x. Decision: undecided."
    assert (kept.seeds, kept.study.margin, kept.environment.git) == ((1, 2), 0.1, "abc123")


def test_the_file_reads_back_and_has_a_condition_a_line(tmp_path: Path) -> None:
    kept = compact(made())
    path = tmp_path / "edges.json"
    path.write_text(text_of(kept))
    back = read(path)
    assert block(back) == block(kept)
    assert decision(back) == decision(kept)
    assert text_of(back) == text_of(kept)
    lines = path.read_text().splitlines()
    assert '     ["a|b", 1, [0.25, null, null, 28], null],' in lines
    assert sum(line.strip().startswith('["') for line in lines) == 3
    assert "/data" not in path.read_text()


def test_what_is_shown_is_the_paragraph_the_table_and_where_they_come_from() -> None:
    assert block(compact(made())).splitlines() == [
        "> Read from x. Decision: undecided.",
        "",
        "| Condition | depth gap | parameters |",
        "| --- | --- | --- |",
        "| a\\|b | -0.333 [-0.500, 0.000] | 152,256 |",
        "| c | | not measured |",
        "",
        "Seeds 1, 2 (settings chosen on 0); commit abc123, 2026-01-02, excise 0.1.0, torch 2.8.",
    ]


def test_a_decision_is_quoted_whole_with_the_seeds_it_lacks() -> None:
    needed = OPEN.needed()
    assert needed is not None
    assert decision(compact(made())).startswith(
        "Undecided: D's interval crosses 0.1. D 0.20 [0.02, 0.38], n = 84, against -0.1 and 0.1, "
        f"about {needed} seeds would decide. Seeds 1, 2"
    )


def test_a_contrast_is_recorded_with_what_decides() -> None:
    wide = Contrast("D", SeedEstimate(0.9, 0.8, 1.0, 9, freedom=2), (0.1,), 0.01)
    assert recorded(wide) == StudyContrast(
        name="D", value=0.9, low=0.8, high=1.0, n=9, thresholds=(0.1,), error=0.01, verdict="above"
    )
    nothing = recorded(Contrast("D", SeedEstimate(0.9, float("nan"), float("nan")), (0.1,)))
    assert (nothing.low, nothing.high, nothing.verdict) == (None, None, "undecided")


def test_a_study_is_written_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save(made(), out)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "studies.md"
    page.write_text(
        "0\n<!-- edges -->\nold\n<!-- /edges -->\n1\n<!-- other -->\nold\n<!-- /other -->\n"
        "<!-- edges: decision -->\nold\n<!-- /edges: decision -->\n2\n"
    )
    (tmp_path / "README.md").write_text("none")
    text = publish(out, root=tmp_path)
    kept = read(tmp_path / "docs" / "records" / "edges.json")
    assert page.read_text() == (
        f"0\n<!-- edges -->\n{text}<!-- /edges -->\n1\n<!-- other -->\n{NOT_RUN}<!-- /other -->\n"
        f"<!-- edges: decision -->\n{decision(kept)}<!-- /edges: decision -->\n2\n"
    )
    assert text == block(kept)
    assert (tmp_path / "README.md").read_text() == "none"
    page.write_text("<!-- edges-ten -->\n<!-- /edges-ten -->\n")
    publish(out, "edges-ten", tmp_path)
    assert block(kept) in page.read_text()


def test_what_decides_is_drawn_where_a_page_asks_for_it(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "docs" / "findings.md"
    out.mkdir()
    save(made(), out)
    page.parent.mkdir()
    page.write_text("<!-- edges -->\n<!-- /edges -->\n")
    publish(out, root=tmp_path)
    drawn = tmp_path / "docs" / "records" / "edges.svg"
    assert not drawn.exists()
    page.write_text("<!-- edges: picture -->\n<!-- /edges: picture -->\n")
    publish(out, root=tmp_path)
    assert "![D 0.20 [0.02, 0.38]" in page.read_text()
    assert "](records/edges.svg)\n" in page.read_text()
    text = drawn.read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert "var(--" not in text
    assert "D 0.20 [0.02, 0.38]" in text
    study = made().study
    assert study is not None
    assert forest(study.model_copy(update={"contrasts": ()})) is None


def test_a_score_is_drawn_by_condition_where_a_study_names_one() -> None:
    study = made().study
    assert study is not None
    drawn = str(by_condition(study, "depth"))
    assert "<desc" in drawn
    assert "depth gap: a|b -0.33 [-0.50, 0.00]" in drawn
    assert drawn.count("-0.33</text>") == 1  # of two tables that hold the same row
    assert "c " not in drawn.partition("<desc")[2].partition("</desc>")[0]
    assert by_condition(study, "parameters") is None
    named = made(study=study.model_copy(update={"name": "splice-factorial"}))
    assert "by condition of splice-factorial" in picture(named)
    assert "What decides edges" in picture(made())


def test_a_number_changed_by_hand_differs_from_what_is_rendered() -> None:
    known = {"edges": block(compact(made()))}
    page = filled("<!-- edges -->\n<!-- /edges -->", known)
    assert filled(page, known) == page
    forged = page.replace("-0.333", "-0.433")
    assert filled(forged, known) == page != forged
    assert [match[1] for match in MARKS.finditer(page)] == ["edges"]


def test_what_cannot_be_published_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no record of a finished study"):
        compact(Record())
    many = tuple(
        StudyRow(condition=f"condition {i}", metric="depth gap", value=i / 7) for i in range(LIMIT)
    )
    table = StudyTable(title=RECOVERY, rows=many)
    study = made().study
    assert study is not None
    large = made(study=study.model_copy(update={"tables": (table,)}))
    with pytest.raises(UserError, match=r"bytes of at most 40,000; run fewer"):
        text_of(compact(large))
    save(made(), tmp_path)
    with pytest.raises(UserError, match="no page has lines '<!-- edges -->'"):
        publish(tmp_path, root=tmp_path)
    assert not (tmp_path / "docs").exists()
    assert main([]) == 2
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no run.json" in capsys.readouterr().err
