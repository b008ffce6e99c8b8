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
from excise.report import figures, words
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


def test_a_picture_and_a_table_stand_first_and_the_verdicts_follow() -> None:
    record = sample.full()
    root = read(render_html(record))
    text = root.all("main")[0].text()
    assert text.startswith("What came back What relearning brings back on facts")
    assert text.index("Can it ship?") < text.index(record.verdicts[0].sentence)
    assert text.index(record.verdicts[1].sentence) < text.index("How deep the cut went")
    (table,) = (t for t in root.all("table") if t.attrs.get("class") == "answers")
    rows = [[c.text() for c in row.all("th", "td")] for row in table.all("tbody")[0].all("tr")]
    assert rows[1] == [
        "rmu",
        "0.97 \u2192 0.09",
        "84 % after 8,192 tokens; some under direction clearing",
        "0.99 \u2192 0.98",
        "No : 84 % comes back with relearning",
    ]


def names_in(plot: Node) -> list[str]:
    """Return the names at the right of a plot, from the top."""
    return [n.text() for n in plot.all("text") if n.attrs["class"].startswith("name")]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (sample.full, ["original", "rmu", "filtering", "oracle"]),
        (sample.no_oracle, ["original", "rmu", "before attack"]),
        (sample.fresh_text, ["original", "rmu", "never taught"]),
    ],
)
def test_relearning_is_drawn_between_what_references_there_are(
    make: Callable[[], Record], names: list[str]
) -> None:
    plot = read(render_html(make())).all("svg")[0]
    assert sorted(names_in(plot)) == sorted(names)
    assert names_in(plot)[0] == "original"


def test_of_many_candidates_the_first_ten_are_named_and_all_are_drawn() -> None:
    plot = read(render_html(sample.crowd())).all("svg")[0]
    assert len(names_in(plot)) == figures.NAMED + 2
    lines = [p for p in plot.all("path") if p.attrs["class"].startswith("l s-")]
    assert len(lines) == 14 + 1
    assert sum("s-rest" in p.attrs["class"] for p in lines) == 14 - figures.NAMED
    heights = [float(n.attrs["y"]) for n in plot.all("text") if "name" in n.attrs["class"]]
    assert all(b - a >= 16.9 for a, b in pairwise(heights))


def test_a_training_of_two_checkpoints_is_drawn() -> None:
    record = sample.no_oracle()
    short = tuple(
        a.model_copy(update={"curve": (a.curve[0], a.curve[-1])}) if a.curve else a
        for a in record.attacks
    )
    text = read(render_html(record.model_copy(update={"attacks": short}))).text()
    assert "What relearning brings back" in text
    assert "No relearning ran" not in text


def test_a_training_on_test_units_is_not_what_relearning_brings_back() -> None:
    record = sample.full()
    on_test = [
        a.model_copy(
            update={
                "variant": "full on forget rows",
                "facts": {"trained_on_test_units": True},
                "decisive": False,
                "curve": tuple(p.model_copy(update={"score": 1.0}) for p in a.curve),
            }
        )
        for a in record.attacks
        if a.variant == "full"
    ]
    assert on_test
    shown = figures.lead_figure(record.model_copy(update={"attacks": (*record.attacks, *on_test)}))
    assert shown == figures.lead_figure(record)


def test_levels_that_nothing_was_compared_on_take_one_line() -> None:
    root = read(render_html(sample.no_oracle()))
    (levels,) = (t for t in root.all("table") if t.attrs.get("class") == "levels")
    assert len(levels.all("tbody")[0].all("tr")) == 4
    assert (
        "Not tested: relearning does not bring back the held-out test set (D4), as if never "
        "learned (D5) (no model was trained without the forget set)."
    ) in root.text()


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
    text = read(render_html(sample.no_oracle())).all("body")[0].text(without=("script",))
    assert text.count(words.WITHOUT_ORACLE) == 1
    assert text.index(words.WITHOUT_ORACLE) < text.index("How deep the cut went")
    assert "Whether the removal saw the test units is unknown" in text


def test_a_pass_above_a_failure_does_not_count() -> None:
    root = read(render_html(sample.full(("rmu",))))
    text = root.text()
    assert text.count("does not count: a lower level did not pass") == 1
    marks = [n for n in root.walk() if n.attrs.get("class", "").startswith("status uncounted")]
    assert [m.text() for m in marks] == ["\u00b7 passed"]
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
