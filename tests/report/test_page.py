"""The page: structure, accessibility, escaping, contrast, no network, and what it must say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from tests.report import sample
from tests.report.pages import Node, read

from excise.core.errors import UserError
from excise.record import Record, save
from excise.report import words
from excise.report.page import render_html, write_report

GOLDEN = Path(__file__).with_name("outline.txt")
SECTIONS = (
    "What came back",
    "On this page",
    "How deep the cut went",
    "Before and after",
    "Relearning, between the reference models",
    "Every attack",
    "Samples",
    "What was done",
    "What this does not show",
    "How to reproduce",
    "Words used here",
)

every = pytest.mark.parametrize("make", sample.RECORDS.values(), ids=sample.RECORDS)


def outline(root: Node) -> str:
    """Return headings, tables and figures in order: the shape of a page without its numbers."""
    lines = []
    for node in root.walk():
        if node.tag in ("h1", "h2", "h3", "h4"):
            lines.append(f"{'#' * int(node.tag[1])} {node.text()}")
        elif node.tag == "caption":
            lines.append(f"    table: {node.text()}")
        elif node.tag == "figcaption":
            lines.append(f"    figure: {node.text()}")
    return "\n".join(lines) + "\n"


@every
def test_structure_is_sound(make: Callable[[], Record]) -> None:
    root = read(render_html(make()))
    nodes = root.walk()
    ids = [n.attrs["id"] for n in nodes if "id" in n.attrs]
    assert len(ids) == len(set(ids))
    for node in nodes:
        for name in node.attrs.get("aria-labelledby", "").split():
            assert name in ids
        if node.attrs.get("href", "#").startswith("#") and node.tag == "a":
            assert node.attrs["href"][1:] in ids
    levels = [int(n.tag[1]) for n in nodes if re.fullmatch(r"h[1-6]", n.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert tuple(n.text() for n in root.all("h2")) == SECTIONS
    assert [len(root.all(t)) for t in ("header", "main", "nav", "footer")] == [1, 1, 1, 1]
    assert root.all("html")[0].attrs["lang"] == "en"
    assert root.all("body")[0].children[0].attrs["href"] == "#verdict"


@every
def test_tables_and_plots_can_be_read_aloud(make: Callable[[], Record]) -> None:
    root = read(render_html(make()))
    for table in root.all("table"):
        assert table.children[0].tag == "caption"
        assert table.children[0].text()
        assert all(cell.attrs.get("scope") for cell in table.all("th"))
        region = table.parent
        assert region is not None
        assert region.attrs["role"] == "region"
        assert region.attrs["tabindex"] == "0"
        width = len(table.all("thead")[0].all("th"))
        for row in table.all("tr"):
            spans = sum(int(c.attrs.get("colspan", "1")) for c in row.all("th", "td"))
            assert spans == width
    for plot in (n for n in root.all("svg") if "aria-hidden" not in n.attrs):
        assert plot.attrs["role"] == "img"
        assert [c.tag for c in plot.children[:2]] == ["title", "desc"]
        assert all(c.text() for c in plot.children[:2])
        assert plot.parent is not None
        assert plot.parent.all("details")[0].all("table")


@every
def test_needs_no_network_and_runs_no_script(make: Callable[[], Record]) -> None:
    html = render_html(make())
    root = read(html)
    for node in root.walk():
        assert node.tag not in ("img", "iframe", "object", "embed", "form", "base", "video")
        for name, text in node.attrs.items():
            assert not name.startswith("on")
            if name in ("href", "src", "action", "data", "srcset", "xlink:href"):
                assert text.startswith(("#", "data:,")), (node.tag, text)
    style = root.all("style")[0].text()
    assert "url(" not in style
    assert "@import" not in style
    assert [s.attrs["type"] for s in root.all("script")] == ["application/json"]
    assert html.count("<script") == html.count("</script>") == 1


@every
def test_the_record_travels_inside(make: Callable[[], Record]) -> None:
    record = make()
    data = json.loads(read(render_html(record)).all("script")[0].text())
    assert data["title"] == " ".join(record.title.split())
    assert len(data["attacks"]) == len(record.attacks)


def test_hostile_text_stays_text() -> None:
    html = render_html(sample.hostile())
    assert "<script>alert" not in html
    assert "<img" not in html
    visible = html.partition("<script type")[0]
    assert not any(c in visible for c in "\x1b\u202e")
    assert "&lt;script&gt;alert" in visible


def test_nothing_hostile_is_missed() -> None:
    text = sample.hostile().model_dump_json()
    assert text.count("alert(") > 500
    assert set(Record.model_fields) >= {"notes", "samples", "config", "data", "command"}


@every
def test_codes_come_with_their_words(make: Callable[[], Record]) -> None:
    root = read(render_html(make()))
    text = root.all("body")[0].text(without=("script", "pre", "style"))
    for match in re.finditer(r"\bD[0-5]\b", text):
        said = words.level_words(match.group(0))
        reach = len(said) + len(sample.HOSTILE) + 4
        near = text[max(0, match.start() - reach) : match.end() + reach]
        assert said in near


def test_the_verdict_stands_first() -> None:
    record = sample.full()
    text = read(render_html(record)).all("main")[0].text()
    assert text.index(record.verdicts[0].sentence) < 60
    assert text.index(record.verdicts[1].sentence) < text.index("How deep the cut went")


@every
def test_missing_numbers_are_words(make: Callable[[], Record]) -> None:
    text = read(render_html(make())).all("body")[0].text(without=("script", "pre", "style"))
    assert not re.search(r"\b(nan|NaN|None|inf|undefined)\b", text)


def test_missing_numbers_say_so() -> None:
    assert render_html(sample.broken_numbers()).count(words.MISSING) > 50


def test_sensitive_texts_are_nowhere() -> None:
    html = render_html(sample.sensitive())
    assert "SECRET" not in html
    assert "marked sensitive" in html


def test_no_oracle_is_said() -> None:
    text = read(render_html(sample.no_oracle())).text()
    assert "There is no oracle" in text
    assert "Whether the removal saw the test units is unknown" in text


def test_a_pass_above_a_failure_does_not_count() -> None:
    text = read(render_html(sample.full(("rmu",)))).text()
    assert text.count("does not count: a lower level did not pass") == 1
    assert "does not count" not in read(render_html(sample.full(("filtering",)))).text()


def test_every_attack_is_listed() -> None:
    record = sample.many()
    root = read(render_html(record))
    rows = [t for n in root.all("table") if n.attrs.get("class") == "attacks" for t in n.all("tr")]
    arms = [r for r in rows if len(r.all("td")) > 5]
    assert len(arms) == len(record.attacks)
    assert sum("invalid" in r.text() for r in arms) == sum(
        a.status == "invalid" for a in record.attacks
    )
    assert sum("control" in r.text() for r in arms) >= sum(a.control for a in record.attacks)


def test_pure_and_self_consistent() -> None:
    assert render_html(sample.many()) == render_html(sample.many())


def test_outline_is_the_stored_one() -> None:
    assert outline(read(render_html(sample.full()))) == GOLDEN.read_text(encoding="utf-8")


def test_write_report(tmp_path: Path) -> None:
    save(sample.full(), tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render_html(sample.full())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run.json"]


def test_write_report_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run\.json"):
        write_report(tmp_path)


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rgb` or `#rrggbb`, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two colours."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_known_pairs() -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


def test_contrast_in_every_theme() -> None:
    style = read(render_html(sample.minimal())).all("style")[0].text()
    themes = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root \{(.*?)\}", style)
    ]
    assert len(themes) == 3
    names = {"text", "dim", "link", "pass", "fail", "untested", "underpowered"}
    names |= {"original", "oracle", "candidate", "control", "positive"}
    for theme in themes:
        assert names <= set(theme)
        for name in names:
            assert contrast(theme[name], theme["page"]) >= 4.5, name
        for name in ("text", "dim"):
            assert contrast(theme[name], theme["panel"]) >= 4.5, name


def test_colours_come_from_variables_alone() -> None:
    style = read(render_html(sample.minimal())).all("style")[0].text()
    rules = re.sub(r":root \{.*?\}", "", style)
    assert not re.search(r"#[0-9a-f]{3,6}\b(?![^{]*\{)", rules)
    assert set(re.findall(r"var\(--([a-z]+)\)", rules)) <= set(re.findall(r"--([a-z]+):", style))
