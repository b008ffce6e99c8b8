"""Candidates side by side: rows, groups, refused rankings, joined budgets, and what is written."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from tests.report import sample
from tests.report.pages import read

from excise.core.errors import UserError
from excise.record import CurvePoint, Record
from excise.record.comparison import T_95, compare
from excise.report import comparison as pages
from excise.report.comparison import as_csv, as_latex, as_markdown, as_svg, picture, render_html


def seeded(seed: int, end: float) -> Record:
    """Return a removal by RMU with a seed, a model of its own, and a score of its own."""
    record = sample.full(("rmu",))
    run = record.method_runs[0]
    model = run.model.model_copy(update={"fingerprint": f"{seed:064x}"})
    scores = tuple(
        s.model_copy(update={"value": end, "low": end - 0.01, "high": end + 0.01})
        if (s.model, s.set, s.metric) == ("rmu", "test.facts", "exact_match")
        else s
        for s in record.scores
    )
    runs = (run.model_copy(update={"seed": seed, "model": model}),)
    return record.model_copy(update={"method_runs": runs, "scores": scores, "seeds": (seed,)})


def test_models_of_one_record_are_ranked() -> None:
    result = compare({"demo": sample.many()})
    assert result.ranked
    assert result.rows[0].label == "filtering"
    assert {row.label for row in result.rows} == {"filtering", "grad_diff", "maxent", "rmu"}
    assert result.rows[0].answer == "holds"


def test_seeds_of_one_method_are_one_row_with_an_interval_over_them() -> None:
    values = (0.02, 0.05, 0.11)
    result = compare({f"r{i}": seeded(i, v) for i, v in enumerate(values)})
    (row,) = result.rows
    assert (row.label, row.seeds) == ("rmu", 3)
    forget = row.forget
    assert forget is not None
    mean = sum(values) / 3
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert forget.value == pytest.approx(mean)
    assert forget.high - mean == pytest.approx(T_95[1] * spread / math.sqrt(3))
    assert forget.n == 3
    html = render_html(result)
    assert "rmu (3 seeds)" in html
    assert "one seed" not in html


def test_one_seed_says_so() -> None:
    assert "one seed" in render_html(compare({"a": seeded(0, 0.05)}))


def test_the_same_method_with_other_settings_is_another_row() -> None:
    other = seeded(1, 0.05)
    run = other.method_runs[0]
    changed = run.model_copy(update={"method": {**run.method, "lr": 1.0}})
    other = other.model_copy(update={"method_runs": (changed,)})
    result = compare({"a": seeded(0, 0.05), "b": other})
    assert [row.label for row in result.rows] == ["a", "b"]


def test_a_seed_may_draw_data_of_its_own_and_a_file_may_not() -> None:
    def drawn(seed: int, file: str) -> Record:
        record = seeded(seed, 0.05)
        config = {"domain": {"name": "files", "forget": {"forget": file}, "seed": seed}}
        data = {**record.data, "fingerprint": f"{seed:064d}"}
        return record.model_copy(update={"config": config, "data": data})

    assert len(compare({"a": drawn(0, "f"), "b": drawn(1, "f")}).rows) == 1
    assert len(compare({"a": drawn(0, "f"), "b": drawn(1, "g")}).groups) == 2


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"data": {**sample.full().data, "fingerprint": "f" * 64}}, "the data ("),
        ({"data": {**sample.full().data, "claim": "capability"}}, "the claim ("),
        ({"data": {**sample.full().data, "exposure": "unknown"}}, "the exposure ("),
        (
            {
                "scores": tuple(
                    s.model_copy(update={"definition": f"{s.metric}@2"})
                    for s in seeded(1, 0.05).scores
                )
            },
            "the definition of the score exact_match (exact_match@1 and exact_match@2)",
        ),
        (
            {"config": {"audit": {"budget": "smoke", "change": {"steps": 99}}}},
            "the budget of the audit (smoke and smoke (steps=99))",
        ),
    ],
)
def test_what_was_not_measured_alike_is_not_ranked(update: dict[str, Any], words: str) -> None:
    other = seeded(1, 0.05).model_copy(update=update)
    result = compare({"a": seeded(0, 0.02), "b": other})
    assert not result.ranked
    assert len(result.groups) == 2
    assert words in result.sentence
    html = render_html(result)
    assert "Unranked" in html
    assert "Ranked by" not in html


def test_a_removal_and_its_audit_are_one_candidate() -> None:
    audit = sample.full(("rmu",))
    run = audit.method_runs[0].model_copy(update={"name": "candidate", "method": {}})
    attacked = [
        a.model_copy(update={"subject": "candidate"}) if a.subject == "rmu" else a
        for a in audit.attacks
    ]
    audit = audit.model_copy(
        update={
            "kind": "audit",
            "method_runs": (run,),
            "attacks": tuple(attacked),
            "scores": tuple(
                s.model_copy(update={"model": "candidate"}) if s.model == "rmu" else s
                for s in audit.scores
            ),
            "verdicts": tuple(v.model_copy(update={"model": "candidate"}) for v in audit.verdicts),
        }
    )
    removal = sample.removed()
    (row,) = compare({"out": removal, "out-audit": audit}).rows
    (candidate,) = row.candidates
    assert candidate.run is not None
    assert candidate.run.method["name"] == "rmu"
    assert row.recovery is not None
    assert row.answer == "comes back"


def test_several_budgets_are_one_curve_by_tokens() -> None:
    smoke = sample.full(("rmu",))

    def further(points: tuple[CurvePoint, ...]) -> tuple[CurvePoint, ...]:
        return (points[0], *(p.model_copy(update={"tokens": p.tokens * 8}) for p in points[1:]))

    standard = smoke.model_copy(
        update={
            "verdicts": tuple(v.model_copy(update={"budget": "standard"}) for v in smoke.verdicts),
            "attacks": tuple(
                a.model_copy(update={"curve": further(a.curve)}) if a.lr else a
                for a in smoke.attacks
            ),
        }
    )
    result = compare({"standard": standard, "smoke": smoke})
    (row,) = result.rows
    assert row.candidates[0].budgets == ("smoke", "standard")
    drawn = picture(result.rows, "k")
    assert drawn is not None
    tokens = [cells[1] for cells in drawn.rows if cells[0] == row.label]
    assert tokens == ["0", "512", "1,024", "2,048", "4,096", "8,192", "16,384", "32,768", "65,536"]
    assert "joined by tokens" in drawn.caption


def test_no_model_no_comparison() -> None:
    with pytest.raises(UserError, match="hold no edited model"):
        compare({"a": sample.minimal()})


HOSTILE = {"=1+1|x": sample.full(("rmu",))}


def test_csv_runs_nothing_in_a_spreadsheet() -> None:
    (line,) = csv.DictReader(io.StringIO(as_csv(compare(HOSTILE))))
    assert line["model"] == "'=1+1|x"
    assert float(line["retain_change"]) == pytest.approx(-0.01)
    assert float(line["recovery"]) == pytest.approx(0.841, abs=1e-3)


def test_everything_written_comes_from_one_table() -> None:
    result = compare({"demo": sample.many()})
    cells = [cell.text for row in pages.table(result.rows) for cell in row]
    html = read(render_html(result)).text()
    markdown = as_markdown(result).replace("\\", "")
    for text in cells:
        assert " ".join(text.split()) in html
        assert text in markdown
    assert len(list(csv.reader(io.StringIO(as_csv(result))))) == 5


def test_latex_is_escaped() -> None:
    text = as_latex(compare({r"a_b & 50% $x$ #{}~^\n": sample.full(("rmu",))}))
    head = r"a\_b \& 50\% \$x\$ \#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}n &"
    assert head in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1


def test_the_figure_is_a_file_of_its_own() -> None:
    text = as_svg(compare({"demo": sample.many()}))
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "var(" not in text
    for name in ("original", "oracle", "rmu", "filtering"):
        assert name in "".join(root.itertext())
    assert as_svg(compare({"a": sample.removed()})) == ""


@pytest.mark.parametrize("name", sample.RECORDS)
def test_pages_of_every_record_hold_together(name: str) -> None:
    record = sample.RECORDS[name]()
    if not (record.verdicts or record.method_runs):
        return
    result = compare({"a": record, "b": seeded(7, 0.2)})
    root = read(render_html(result))
    ids = [n.attrs["id"] for n in root.walk() if "id" in n.attrs]
    assert len(ids) == len(set(ids))
    for node in root.walk():
        for label in node.attrs.get("aria-labelledby", "").split():
            assert label in ids
    text = root.all("body")[0].text(without=("script", "style"))
    assert not re.search(r"\b(nan|None|undefined)\b", text)
    assert not root.all("img")
    for other in (as_csv, as_markdown, as_latex):
        assert "nan" not in other(result)


def test_eighty_columns_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    result = compare({"demo": sample.many(), "other": seeded(3, 0.1)})
    Console(width=80).print(pages.render_terminal(result))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "holds" in said
    assert "..." not in said
    assert "\u2026" not in said


def test_a_picture_of_many_says_how_many_it_leaves_out() -> None:
    (row,) = compare({"a": seeded(0, 0.1)}).rows
    rows = [replace(row, label=f"m{i}") for i in range(10)]
    drawn = picture(rows, "k")
    assert drawn is not None
    assert "the first 8 of 10 models" in drawn.title


def test_other_numbers_of_scored_units_are_not_ranked() -> None:
    other = seeded(1, 0.05)
    fewer = tuple(s.model_copy(update={"n": s.n // 2}) for s in other.scores)
    result = compare({"a": seeded(0, 0.02), "b": other.model_copy(update={"scores": fewer})})
    assert not result.ranked
    assert "the number of scored units (" in result.sentence
