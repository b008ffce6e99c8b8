"""Pictures of a record: scores between the rails, depth gaps, losses.

Each returns a `Figure`: a plot, a caption that says the same in words, and the numbers as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from excise.record import MethodRun, Record, Score, Verdict
from excise.report import svg, words


@dataclass(frozen=True)
class Figure:
    """A plot with its words and its numbers.

    Attributes:
        key: Unique on the page.
        title: What is shown, as a heading.
        caption: What can be seen, in words.
        plot: Inline SVG.
        header: Column names of the table.
        rows: Cells of the table.
        roles: Roles that occur, for the legend.
    """

    key: str
    title: str
    caption: str
    plot: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    roles: tuple[str, ...] = field(default=())


def score_figures(record: Record) -> tuple[Figure, ...]:
    """Return one interval plot per scored set and metric: every model before any attack."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in record.scores:
        groups.setdefault((score.set, score.metric), []).append(score)
    order = {"test": 0, "retain_test": 1, "adjacent_test": 2}
    ranked = sorted(groups, key=lambda k: order.get(k[0].partition(".")[0], 3))
    return tuple(_score_figure(f"score-{i}", groups[k]) for i, k in enumerate(ranked))


def _score_figure(key: str, scores: Sequence[Score]) -> Figure:
    first = scores[0]
    rank = {"original": 0, "candidate": 1, "positive": 2, "oracle": 3}
    ordered = sorted(scores, key=lambda s: rank[words.role(s.model)])
    chance = next((s.chance for s in scores if s.chance is not None), None)
    bands = list(_rails([s for s in ordered if words.role(s.model) == "original"], "original"))
    bands += _rails([s for s in ordered if words.role(s.model) == "oracle"], "oracle")
    values = [v for s in ordered for v in (s.value, s.low, s.high)]
    metric = words.metric_name(first.metric)
    axis = svg.linear_axis(f"{metric}; {first.direction} is more knowledge", values)
    rows = [
        svg.Row(
            words.clip(words.plain(s.model), 38),
            words.number(s.value),
            (svg.Dot(words.role(s.model), s.value, s.low, s.high),),
        )
        for s in ordered
    ]
    title = f"{words.set_name(first.set)}: {metric}"
    caption = "; ".join(f"{r.label} {r.note}" for r in rows[:12]) + "."
    if chance is not None:
        caption += f" A model that knows nothing scores {words.number(chance)}."
    table = tuple(
        (
            words.plain(s.model),
            words.number(s.value),
            words.interval(s.low, s.high) or words.MISSING,
            words.count(s.n),
        )
        for s in ordered
    )
    plot = svg.interval_plot(key, title, caption, axis, rows, bands)
    roles = tuple(dict.fromkeys(words.role(s.model) for s in ordered))
    return Figure(
        key, title, caption, plot, ("Model", "Score", "95 % interval", "Units"), table, roles
    )


def _rails(scores: Sequence[Score], role: str) -> Iterable[svg.Band]:
    lows = [s.low for s in scores if math.isfinite(s.low)]
    highs = [s.high for s in scores if math.isfinite(s.high)]
    if lows and highs:
        yield svg.Band(role, role, min(lows), max(highs))


def gap_figure(verdict: Verdict, key: str) -> Figure | None:
    """Return the depth gap of every level with its interval, or None where none was measured."""
    known = [r for r in verdict.levels if r.gap is not None and math.isfinite(r.gap)]
    if not known:
        return None
    nan = math.nan
    rows, values = [], [0.0, 1.0]
    for level in known:
        low, high = (nan if v is None else v for v in (level.low, level.high))
        values += [v for v in (level.gap or 0.0, low, high) if math.isfinite(v)]
        label = words.clip(words.level_words(level.level, verdict.levels), 38)
        rows += [
            svg.Row(
                label, words.number(level.gap), (svg.Dot("candidate", level.gap or 0.0, low, high),)
            )
        ]
    margins = [r.margin for r in known if r.margin is not None]
    bands = [svg.Band("original", "original", 1.0, 1.0)]
    edge = max(margins, default=0.0)
    bands += [svg.Band("oracle \u00b1 margin" if edge else "oracle", "oracle", -edge, edge)]
    inside = [v for v in values if -2 <= v <= 3]
    axis = svg.linear_axis("depth gap: 0 is the oracle, 1 the original", [*inside, -edge, 1.05])
    title = f"Depth gap by level: {words.plain(verdict.model)}"
    caption = "; ".join(
        f"{words.level_words(r.level, verdict.levels)} {words.number(r.gap)} "
        f"{words.interval(r.low, r.high)}".strip()
        for r in known
    )
    table = tuple(
        (
            f"{words.level_words(r.level, verdict.levels)} ({r.level})",
            words.number(r.gap),
            words.interval(r.low, r.high) or words.MISSING,
            words.number(r.margin),
        )
        for r in known
    )
    header = ("Level", "Depth gap", "90 % interval", "Margin")
    plot = svg.interval_plot(key, title, caption, axis, rows, bands)
    return Figure(
        key, title, caption + ".", plot, header, table, ("candidate", "original", "oracle")
    )


def history_figure(arm: MethodRun, key: str) -> Figure | None:
    """Return the method's named losses by step, or None where none were kept."""
    rows = [r for r in arm.history if "step" in r]
    names = list(dict.fromkeys(k for r in rows for k in r if k not in ("step", "lr", "tokens")))
    if len(rows) < 2 or not names:
        return None
    lines = []
    for index, name in enumerate(names[:4]):
        points = tuple((r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan)))
        lines.append(svg.Line(words.plain(name), f"k{index}", points))
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    x = svg.linear_axis("step", [a for line in lines for a, _ in line.points])
    y = replace(
        svg.linear_axis("loss", [b for line in lines for _, b in line.points]), label="loss"
    )
    said = "; ".join(svg.describe(line.name, line.points, "steps") for line in lines)
    title = f"Losses by step: {words.plain(arm.name)}"
    plot = svg.line_plot(key, title, said, x, y, lines)
    every = rows[:: max(1, len(rows) // 20)]
    table = tuple(
        (words.count(r["step"]), *(words.number(r.get(n)) for n in names[:4])) for r in every
    )
    header = ("Step", *(words.plain(n) for n in names[:4]))
    return Figure(key, title, said + ".", plot, header, table, tuple(x.role for x in lines))
