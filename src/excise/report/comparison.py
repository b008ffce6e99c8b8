"""Candidates side by side: page, terminal, CSV, Markdown, LaTeX and picture, all of one table."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from excise.record import LEVELS, AttackVariant, CurvePoint, Estimate
from excise.record.comparison import Candidate, ComparedRow, Comparison, metric_of
from excise.record.measured import pooled, relearning_curve
from excise.report import svg, words

LINES = 8
"""Candidates in one picture at most; the table has all."""

HEADS = (
    "Model",
    "Forget score before any attack",
    "Came back at most",
    "Retain change",
    "Adjacent change",
    "Highest level that counts",
    "Residual bits",
    "Verdict",
)
"""Columns of the table."""

SHORT = ("model", "forget", "came back", "retain", "adjacent", "level", "bits", "verdict")
WIDTHS = (13, 6, 12, 7, 8, 15, 5, 11)
"""The same on a terminal of 80 columns."""

NOTE = (
    "Came back at most: published fraction (attacked \u2212 unlearned) / (original \u2212 "
    "unlearned) on the held-out test set, the worst attack, anywhere along its curve. "
    "Changes are against the original, positive is better. Intervals are over test units; where a "
    "row holds several seeds, 95 % over seeds (Student's t)."
)


@dataclass(frozen=True)
class Cell:
    """One cell: in full, short for a terminal, and its numbers by column of a CSV file."""

    text: str
    short: str
    values: dict[str, str | float | int | None]


def table(rows: Sequence[ComparedRow]) -> tuple[tuple[Cell, ...], ...]:
    """Return the cells of a table, a line per row; everything that is written comes from here."""
    return tuple(_cells(row) for row in rows)


def _cells(row: ComparedRow) -> tuple[Cell, ...]:
    name = words.plain(row.label)
    shown = f"{name} ({row.seeds} seeds)" if row.seeds > 1 else name
    budgets = " + ".join(row.candidates[0].budgets) or "none"
    model: dict[str, str | float | int | None] = {
        "model": name,
        "seeds": row.seeds,
        "budget": budgets,
    }
    level = row.highest
    level_text = f"{LEVELS[level]} ({level})" if level else "none"
    return (
        Cell(shown, shown, model),
        _number("forget", row.forget),
        _came_back(row),
        _number("retain_change", row.retain, signed=True, note=" (damaged)" * row.damaged),
        _number("adjacent_change", row.adjacent, signed=True),
        Cell(level_text, level_text, {"highest_level": level or "", **_statuses(row)}),
        _number("residual_bits", row.bits),
        Cell(row.answer, row.answer, {"verdict": row.answer}),
    )


def _statuses(row: ComparedRow) -> dict[str, str | float | int | None]:
    return {code: status for code, status in row.levels.items()}


def _number(name: str, estimate: Estimate | None, *, signed: bool = False, note: str = "") -> Cell:
    """Return a number with its interval, and a note on it where there is room."""
    if estimate is None:
        return Cell(words.MISSING, "-", {name: None, f"{name}_low": None, f"{name}_high": None})
    value = _value(estimate.value, signed)
    text = f"{value} {words.interval(estimate.low, estimate.high)}".strip() + note
    numbers = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return Cell(text, value, dict(numbers))


def _value(value: float, signed: bool) -> str:
    text = words.number(value)
    return f"+{text}" if signed and value > 0 else text


def _came_back(row: ComparedRow) -> Cell:
    """Return how much came back, after how many tokens, under which attack."""
    recovery, worst = row.recovery, row.worst
    if row.nothing_removed:
        return Cell("nothing was removed", "not removed", _recovered(None, None, ""))
    if recovery is None or not worst:
        return Cell(words.MISSING, "-", _recovered(None, None, ""))
    tokens = round(sum(back.tokens for back in worst) / len(worst))
    attacks = " or ".join(dict.fromkeys(back.attack for back in worst))
    amount = _number("recovery", recovery)
    after = f"after {words.count(tokens)} tokens"
    return Cell(
        f"{amount.text} {after} ({words.plain(attacks)})",
        f"{amount.short} {after}",
        _recovered(recovery, tokens, attacks),
    )


def _recovered(
    recovery: Estimate | None, tokens: int | None, attack: str
) -> dict[str, str | float | int | None]:
    numbers = _number("recovery", recovery).values
    return {**numbers, "recovery_tokens": tokens, "recovery_attack": attack}


def as_csv(comparison: Comparison) -> str:
    """Return all rows as CSV with numbers as numbers; text that a spreadsheet would run is quoted.

    A cell of text that begins with one of `= + - @`, tab or return gets an apostrophe before it, as
    OWASP recommends against CSV injection.
    """
    out = io.StringIO()
    lines = [
        {"table": i + 1} | {k: v for cell in cells for k, v in cell.values.items()}
        for i, group in enumerate(comparison.groups)
        for cells in table(group)
    ]
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _inert(v) for k, v in line.items()} for line in lines)
    return out.getvalue()


def _inert(value: object) -> object:
    risky = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if risky else value


def as_markdown(comparison: Comparison) -> str:
    """Return Markdown tables, one for each group of rows that were measured alike."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_md(cell) for cell in cells) + " |"

    parts = [f"{_md(comparison.sentence)}\n"] if comparison.sentence else []
    for group in comparison.groups:
        lines = [line(HEADS), "|" + " --- |" * len(HEADS)]
        lines += [line([cell.text for cell in cells]) for cells in table(group)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, NOTE + "\n"])


def _md(text: str) -> str:
    clean = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", clean)


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\u2212": "$-$",
    '"': r"\textquotedbl{}",
}  # fmt: skip
"""How LaTeX writes characters that mean something else to it."""


def as_latex(comparison: Comparison) -> str:
    """Return LaTeX tables that need no package, one for each group of rows measured alike."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(TEX.get(c, c) for c in cell) for cell in cells) + r" \\"

    parts = []
    for group in comparison.groups:
        body = [line([cell.text for cell in cells]) for cells in table(group)]
        parts.append(
            "\n".join(
                [
                    r"\begin{tabular}{lrrrrlrl}",
                    r"\hline",
                    line(HEADS),
                    r"\hline",
                    *body,
                    r"\hline",
                    r"\end{tabular}",
                ]
            )
        )
    head = [f"% {words.plain(comparison.sentence)}"] if comparison.sentence else []
    return "\n".join([*head, *parts]) + "\n"


def render_terminal(comparison: Comparison) -> RenderableType:
    """Return what `rich` prints in 80 columns: the sentence, then one table a group."""
    parts: list[RenderableType] = []
    if comparison.sentence:
        parts.append(Text(f"{_ascii(comparison.sentence)}\n"))
    for i, group in enumerate(comparison.groups):
        ranked = comparison.ranked and len(group) > 1
        title = "Ranked by verdict, highest level that counts, and what came back"
        printed = RichTable(
            title=title if ranked else f"Table {i + 1}" if not comparison.ranked else None,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            padding=(0, 1, 0, 0),
            header_style="dim",
        )
        for head, width in zip(SHORT, WIDTHS, strict=True):
            printed.add_column(head, overflow="fold", max_width=width)
        for cells in table(group):
            printed.add_row(*(Text(_ascii(cell.short)) for cell in cells))
        parts.append(printed)
        parts += [Text(_ascii(f"{name}: {said}"), style="dim") for name, said in _said(group)]
        parts.append(Text(""))
    parts.append(Text(_ascii(_seed_note(comparison)), style="dim"))
    return Group(*parts)


def _ascii(text: str) -> str:
    clean = words.plain(text)
    for fancy, simple in (("\u2212", "-"), ("\u2013", "-"), ("\u2192", "->"), ("\u00b1", "+-")):
        clean = clean.replace(fancy, simple)
    return clean


def _said(rows: Sequence[ComparedRow]) -> list[tuple[str, str]]:
    """Return what the worst attack on every row was, in words."""
    said = [(words.plain(r.label), [back.attack for back in r.worst]) for r in rows]
    return [(name, f"worst under {' or '.join(dict.fromkeys(a))}") for name, a in said if a]


def _seed_note(comparison: Comparison) -> str:
    single = [row.label for row in comparison.rows if row.seeds == 1]
    if not single:
        return "Every number is a mean over seeds."
    which = "Every row is" if len(single) == len(comparison.rows) else f"{', '.join(single)}:"
    return f"{which} one seed; its intervals are over test units, not over seeds."


@dataclass(frozen=True)
class Picture:
    """Relearning of one group: the plot, who is which line, and the numbers."""

    key: str
    title: str
    caption: str
    plot: Markup
    legend: tuple[tuple[Markup, str], ...]
    rows: tuple[tuple[str, ...], ...]


def picture(rows: Sequence[ComparedRow], key: str) -> Picture | None:
    """Return the relearned score against the attacker's tokens, between the reference models.

    Args:
        rows: Rows that were measured alike.
        key: Prefix of the ids.

    Returns:
        The picture; None where no relearning was scored on the held-out test set.
    """
    curves = {row.label: pooled([_joined(c) for c in row.candidates]) for row in rows}
    curves = {label: points for label, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    shown = list(curves.items())[:LINES]
    first = next(r.candidates[0] for r in rows if r.label in curves)
    drawn = [
        _series(role, role, points)
        for role in ("original", "oracle")
        if len(points := _reference(first, role)) > 1
    ]
    drawn += [_series(words.plain(label), f"c{i}", p) for i, (label, p) in enumerate(shown)]
    metric = words.metric_name(metric_of(rows)) or "score"
    way = words.direction(first.record, metric_of(rows))
    values = [v for line in drawn for _, v in line.points]
    values += [v for line in drawn for _, low, high in line.band for v in (low, high)]
    x = svg.log_axis("attacker's tokens", [t for line in drawn for t, _ in line.points])
    y = svg.linear_axis(f"held-out {metric}; {way}", values)
    said = "; ".join(svg.describe(line.name, line.points, "tokens") for line in drawn)
    more = len(curves) - len(shown)
    title = "What relearning brings back"
    title += f" (the first {LINES} of {len(curves)} models)" if more > 0 else ""
    joined = any(len(c.records) > 1 and len(c.budgets) > 1 for r in rows for c in r.candidates)
    caption = said + "." + (" Points of several budgets are joined by tokens." if joined else "")
    plot = svg.line_plot(key, title, caption, x, y, drawn)
    legend = tuple((svg.swatch(line.role), line.name) for line in drawn)
    numbers = tuple(
        (line.name, words.count(t), words.number(v)) for line in drawn for t, v in line.points
    )
    return Picture(key, title, caption, plot, legend, numbers)


def _joined(candidate: Candidate) -> AttackVariant:
    """Return one candidate's relearning over all its budgets as one curve by tokens.

    Where two budgets score it at equal tokens, the larger one's score stands.
    """
    by_tokens: dict[int, CurvePoint] = {}
    variant = AttackVariant(name="", access="weights")
    for record in candidate.records:
        seeds = relearning_curve(record, candidate.model)
        if seeds:
            variant = seeds[0]
            by_tokens |= {point.tokens: point for point in pooled(seeds)}
    curve = tuple(by_tokens[tokens] for tokens in sorted(by_tokens))
    return variant.model_copy(update={"curve": curve})


def _reference(candidate: Candidate, role: str) -> tuple[CurvePoint, ...]:
    """Return the curve of the original, or of all oracles together, under the same relearning."""
    record = candidate.record
    like = next(iter(relearning_curve(record, candidate.model)), None)
    names = [m.name for m in record.models if words.role(m.name) == role]
    return pooled([v for name in names for v in relearning_curve(record, name, like)])


def _series(name: str, role: str, points: Sequence[CurvePoint]) -> svg.Series:
    return svg.Series(
        name,
        role,
        tuple((p.tokens, p.score) for p in points),
        tuple((p.tokens, p.low, p.high) for p in points),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(spell=words.spell, plain=words.plain)
    return environment


def render_html(comparison: Comparison) -> str:
    """Return the page: one HTML file that needs no network, every text escaped."""
    groups: list[dict[str, Any]] = []
    for i, rows in enumerate(comparison.groups):
        groups.append(
            {
                "key": f"group-{i}",
                "title": "Candidates" if comparison.ranked else f"Table {i + 1}",
                "picture": picture(rows, f"relearning-{i}"),
                "table": table(rows),
                "levels": [(words.plain(r.label), r.levels, _solid(r)) for r in rows],
                "sentences": [
                    (words.plain(c.label), words.spell(c.verdict.sentence))
                    for r in rows
                    for c in r.candidates
                    if c.verdict
                ],
            }
        )
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            comparison=comparison,
            sentence=words.plain(comparison.sentence),
            groups=groups,
            heads=HEADS,
            note=NOTE,
            seed_note=_seed_note(comparison),
            status=words.STATUS,
            level_words=tuple(LEVELS.items()),
            embedded=_embedded(comparison),
        )
    )


def _solid(row: ComparedRow) -> dict[str, bool]:
    """Return for every level whether it counts."""
    solid, out = True, dict[str, bool]()
    for code, status in row.levels.items():
        solid = solid and status == "pass"
        out[code] = solid
    return out


def _embedded(comparison: Comparison) -> Markup:
    """Return the table as JSON that is safe inside a script element."""
    data = [
        [{k: v for cell in cells for k, v in cell.values.items()} for cells in table(group)]
        for group in comparison.groups
    ]
    text = json.dumps(data)
    for character in ("<", ">", "&"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def as_svg(comparison: Comparison) -> str:
    """Return the picture of the first group that has one, as a file of its own."""
    pictures = (picture(rows, "figure") for rows in comparison.groups)
    first = next((p for p in pictures if p is not None), None)
    if first is None:
        return ""
    names = Markup("").join(
        Markup('<g transform="translate({:.0f} {:.0f})">{}{}</g>').format(
            8, 236 + 18 * i, mark, svg.put(42, 12, name)
        )
        for i, (mark, name) in enumerate(first.legend)
    )
    return svg.standalone(first.plot, below=names, more=16 + 18 * len(first.legend))


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "csv": as_csv,
    "md": as_markdown,
    "latex": as_latex,
    "figure": as_svg,
}
"""Files that the command writes where a flag names them."""
