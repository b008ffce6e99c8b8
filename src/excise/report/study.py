"""The page's and the terminal's account of a study: what was stated, what came out.

Small grey images are inline SVG: ink in the colour of the page, one path for each level of ink.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from excise.record import (
    Record,
    StudyContrast,
    StudyPicture,
    StudyPlot,
    StudyRecord,
    StudyRow,
    StudyTable,
)
from excise.report import words
from excise.report.figures import Figure
from excise.report.svg import (
    WIDTH,
    Band,
    Dot,
    IntervalRow,
    Series,
    describe,
    frame,
    interval_plot,
    line_plot,
    linear_axis,
    put,
)

GAP = 4.0
"""Between columns of images."""

LINES = 6
"""Lines in one plot at most, as many as there are marks to tell them apart; the rest follow in
plots of their own."""


@dataclass(frozen=True)
class TableView:
    """One table with a condition a line and a score a column, as text."""

    key: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def views(record: Record) -> tuple[TableView, ...]:
    """Return the tables of a record's study; none where there is no study."""
    if record.study is None:
        return ()
    return tuple(_view(table, f"study-{i}") for i, table in enumerate(record.study.tables))


def stated(record: Record) -> tuple[tuple[str, str], ...]:
    """Return what was stated before the study ran."""
    if record.study is None:
        return ()
    tuned = record.study.tuned_on
    chosen = "dev rows of the reported seeds" if tuned == () else ", ".join(map(str, tuned or ()))
    return (
        ("Question", words.plain(record.study.question)),
        ("Statistic", words.plain(record.study.statistic)),
        ("Margin", f"{record.study.margin:g}"),
        *([("Settings chosen on seeds", chosen)] if tuned is not None else []),
    )


def _view(table: StudyTable, key: str) -> TableView:
    """Turn numbers one a line into a table: lines are conditions (and seeds), columns scores."""
    columns = list(dict.fromkeys(r.metric for r in table.rows))
    lines: dict[str, dict[str, StudyRow]] = {}
    for r in table.rows:
        name = words.plain(r.condition) + ("" if r.seed is None else f", seed {r.seed}")
        lines.setdefault(name, {})[r.metric] = r
    rows = tuple(
        (name, *(_cell(cells.get(column)) for column in columns)) for name, cells in lines.items()
    )
    header = ("Condition", *(words.plain(c) for c in columns))
    return TableView(key, words.plain(table.title), words.plain(table.note), header, rows)


def _cell(row: StudyRow | None) -> str:
    """Return a number with its interval."""
    if row is None:
        return "\u2013"
    return f"{words.number(row.value)} {words.interval(row.low, row.high)}".strip()


def plots(record: Record) -> tuple[Figure, ...]:
    """Return the plots of a record's study, each with its numbers as a table."""
    if record.study is None:
        return ()
    return tuple(
        _plot(plot, start, f"plot-{i}-{start}")
        for i, plot in enumerate(record.study.plots)
        for start in range(0, len(plot.lines), LINES)
    )


def _plot(plot: StudyPlot, start: int, key: str) -> Figure:
    """Return lines of one plot, from a number on, over the axes of all of them."""
    x, y = (
        linear_axis(words.plain(label), [point[i] for line in plot.lines for point in line.points])
        for i, label in enumerate((plot.x, plot.y))
    )
    lines = [
        Series(words.plain(line.name), f"c{i}", line.points)
        for i, line in enumerate(plot.lines[start : start + LINES])
    ]
    said = "; ".join(describe(line.name, line.points, x.label) for line in lines)
    title = words.plain(plot.title)
    if len(plot.lines) > LINES:
        title += f" ({start + 1} to {start + len(lines)} of {len(plot.lines)})"
    caption = f"{words.plain(plot.note)} {said}.".strip()
    rows = tuple(
        (line.name, words.number(a), words.number(b)) for line in lines for a, b in line.points
    )
    picture = line_plot(key, title, caption, x, y, lines, wide=True)
    return Figure(key, title, caption, picture, ("Line", x.label, y.label), rows)


def decimals(contrast: StudyContrast) -> int:
    """Return how many decimals tell on which side of its thresholds a contrast lies."""
    return 3 if any(0 < abs(x) < 0.05 for x in contrast.thresholds) else 2


def forest(study: StudyRecord) -> Markup | None:
    """Return the contrasts a decision rests on with their intervals, margins behind them.

    Args:
        study: What it found; a contrast that is not defined has no row.

    Returns:
        The picture; None where no contrast has an interval.
    """
    shown = [c for c in study.contrasts if None not in (c.value, c.low, c.high)]
    if not shown:
        return None
    dots = [Dot("candidate", c.value or 0.0, c.low or 0.0, c.high or 0.0) for c in shown]
    rows = [
        IntervalRow(words.clip(c.name, 44), f"{dot.value:.{decimals(c)}f}", (dot,))
        for c, dot in zip(shown, dots, strict=True)
    ]
    margins = {c.thresholds for c in shown}
    ends = margins.pop() if len(margins) == 1 else ()
    bands = [Band("margin", "control", ends[0], ends[-1])] if ends else []
    values = [v for dot in dots for v in (dot.low, dot.high)]
    axis = linear_axis("value with its 95 % interval", [*values, *ends, 0.0])
    said = "; ".join(
        f"{c.name} {d.value:.{places}f} [{d.low:.{places}f}, {d.high:.{places}f}]"
        for c, d in zip(shown, dots, strict=True)
        for places in [decimals(c)]
    )
    return interval_plot("forest", f"What decides {study.name}", said, axis, rows, bands)


def by_condition(study: StudyRecord, metric: str) -> Markup | None:
    """Return one score of every condition with its interval, in the order of its table.

    Args:
        study: What it found.
        metric: Beginning of the score's name; the first such score of its tables is drawn,
            once a condition.

    Returns:
        The picture; None where no such score has an interval.
    """
    known = [r for t in study.tables for r in t.rows if r.seed is None and r.low is not None]
    name = next((r.metric for r in known if r.metric.startswith(metric)), None)
    if name is None:
        return None
    first: dict[str, StudyRow] = {}
    for each in known:
        if each.metric == name:
            first.setdefault(each.condition, each)
    dots = [
        (r, Dot("candidate", r.value or 0.0, r.low or 0.0, r.high or 0.0)) for r in first.values()
    ]

    def digits(x: float) -> str:
        return f"{x:.2f}".replace("-0.00", "0.00")

    shown = [IntervalRow(words.clip(r.condition, 44), digits(d.value), (d,)) for r, d in dots]
    ends = [end for _, d in dots for end in (d.low, d.high)]
    axis = linear_axis(f"{words.clip(name, 44)}, 95 % interval", [*ends, 0.0])
    said = "; ".join(
        f"{r.condition} {digits(d.value)} [{digits(d.low)}, {digits(d.high)}]" for r, d in dots
    )
    title = f"{name}, by condition of {study.name}"
    return interval_plot("by-condition", title, f"{name}: {said}", axis, shown)


def pictures(record: Record) -> tuple[Figure, ...]:
    """Return the pictures of a record's study; none where there is no study."""
    if record.study is None:
        return ()
    return tuple(_picture(p, f"picture-{i}") for i, p in enumerate(record.study.pictures))


def _picture(picture: StudyPicture, key: str) -> Figure:
    """Return one picture, and its numbers as a table."""
    header = ("Line", *(words.plain(c) for c in picture.columns))
    count = len(picture.columns)
    rows = tuple((words.plain(r.name), *_cells(r.values, count)) for r in picture.rows)
    caption = words.plain(picture.note) or words.plain(picture.title)
    return Figure(key, words.plain(picture.title), caption, _draw(picture, key), header, rows)


def _cells(values: tuple[float, ...], count: int) -> list[str]:
    return [words.number(v) for v in values[:count]] + ["\u2013"] * (count - len(values))


def _draw(picture: StudyPicture, key: str) -> Markup:
    """Return the lines one under the other, each under its name."""
    side = (WIDTH + GAP) / max(1, len(picture.columns)) - GAP
    body: list[Markup] = []
    y = 0.0
    for row in picture.rows:
        y += 14
        body.append(put(0, y, words.plain(row.name), kind="row"))
        y += 4
        tall = 0.0
        for i, image in enumerate(row.images[: len(picture.columns)]):
            lines = -(-len(image) // picture.width)
            tall = max(tall, side * lines / picture.width)
            body.append(_image(image, picture.width, i * (side + GAP), y, side))
        y += tall + 6
    names = ", ".join(words.plain(r.name) for r in picture.rows)
    said = f"{len(picture.rows)} lines of {len(picture.columns)} images: {names}"
    return frame(key, words.plain(picture.title), said, y, body)


def _image(image: str, width: int, x: float, y: float, side: float) -> Markup:
    """Return one image: a frame, and runs of equal ink joined into one path each."""
    runs: dict[str, list[str]] = {}
    for start in range(0, len(image), width):
        column = 0
        for ink, same in groupby(image[start : start + width]):
            count = len(list(same))
            if ink in "123456789":
                runs.setdefault(ink, []).append(f"M{column} {start // width}h{count}v1h-{count}z")
            column += count
    scale = side / width
    tall = -(-len(image) // width)
    paths = [
        Markup('<path fill="currentColor" fill-opacity=".{}" d="{}"/>').format(
            ink, "".join(runs[ink])
        )
        if ink != "9"
        else Markup('<path fill="currentColor" d="{}"/>').format("".join(runs[ink]))
        for ink in sorted(runs)
    ]
    border = Markup(
        '<path fill="none" stroke="currentColor" stroke-opacity=".3" stroke-width=".3" '
        'd="M0 0h{}v{}h-{}z"/>'
    ).format(width, tall, width)
    return Markup(
        '<g transform="translate({:.1f} {:.1f}) scale({:.3f})" stroke="none" '
        'shape-rendering="crispEdges">{}{}</g>'
    ).format(x, y, scale, Markup("").join(paths), border)
