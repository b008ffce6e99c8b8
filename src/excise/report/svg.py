"""Inline SVG: line plots with bands, rows of intervals, linear and logarithmic axes.

Text takes the colour of the page (`currentColor`); series take theirs from CSS classes `s-ROLE`,
and each role also has its own marker and dash, so that nothing hangs on colour alone.
All strings are escaped by `Markup.format`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup

from excise.report.words import clip, number, short

WIDTH = 340.0
LEFT, RIGHT = 44.0, 12.0
WIDE, TALL = 500.0, 320.0
"""Size of a wide line plot."""
NAMES = 138.0
"""Room at the right of a wide line plot for the names of its lines."""
LINE = 17.0
"""Least distance of two names."""
ZERO_SHARE = 0.14
"""Share of a logarithmic axis that lies between 0 and the smallest positive value."""


@dataclass(frozen=True)
class Axis:
    """One axis: its ends, its ticks, and whether it is logarithmic (with 0 at the left)."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Return where `value` lies, 0 to 1 along the axis (outside for what lies outside)."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return 0.0
        span = math.log(self.high / self.low) or 1.0
        return ZERO_SHARE + (1 - ZERO_SHARE) * math.log(value / self.low) / span


@dataclass(frozen=True)
class Series:
    """One series: points (x, y), and a band of (x, low, high)."""

    name: str
    role: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Dot:
    """One value with its interval; `low` and `high` may be NaN."""

    role: str
    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class IntervalRow:
    """One row of an interval plot: a label, what to print at its right end, and its dots."""

    label: str
    note: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Band:
    """A band across a plot: a reference model, a margin.

    It stands on the value axis: vertical in an interval plot, level in a line plot.
    """

    label: str
    role: str
    low: float
    high: float
    value: float | None = None

    @property
    def said(self) -> float:
        """The number that stands for it: its value where it has one of its own."""
        return (self.low + self.high) / 2 if self.value is None else self.value


def _step(span: float, most: int) -> float:
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= raw * 0.999), 10 * power)


def linear_axis(label: str, values: Iterable[float], most: int = 5) -> Axis:
    """Return an axis with round ticks around `values`; shares (all in 0..1) get 0 to 1."""
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if low >= 0 and 0.15 < high <= 1:
        low, high = 0.0, 1.0
    elif high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    step = _step(high - low, most)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    places = max(0, -math.floor(math.log10(step) + 1e-9) + (f"{step:.1e}"[:3] == "2.5"))
    values = [low + i * step for i in range(round((high - low) / step) + 1)]
    ticks = tuple((v, _tick(v, places)) for v in values)
    return Axis(label, low, high, ticks)


def _tick(value: float, places: int) -> str:
    if abs(value) >= 10_000:
        return short(value)
    text = f"{value:.{places}f}"
    return (text if text.strip("-0.") else text.lstrip("-")).replace("-", "\u2212")


def log_axis(label: str, values: Iterable[float], most: int = 5) -> Axis:
    """Return a logarithmic axis that shows 0 at its left end."""
    known = sorted(v for v in values if v > 0 and math.isfinite(v)) or [1.0, 10.0]
    low, high = known[0], known[-1] if known[-1] > known[0] else known[0] * 10
    for steps in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high * 1.001]
        if 2 <= len(ticks) <= most:
            break
    else:
        ticks = [low, high] if len(ticks) < 2 else ticks[:: math.ceil(len(ticks) / most)]
    return Axis(label, low, high, ((0.0, "0"), *((v, short(v)) for v in ticks)), log=True)


def upward(axis: Axis, direction: str) -> Axis:
    """Return an axis on which more knowledge lies higher, whichever way of the score that is."""
    return axis if direction == "higher" else replace(axis, low=axis.high, high=axis.low)


def marker(role: str, x: float, y: float) -> Markup:
    """Return the mark of a role: circle, square, diamond, triangle or cross."""
    square, diamond, triangle = "M-4 -4h8v8h-8z", "M0 -5.5L5.5 0L0 5.5L-5.5 0z", "M0 -5L5 4H-5z"
    shapes = {
        "original": square,
        "oracle": diamond,
        "control": triangle,
        "c1": square,
        "c2": triangle,
        "c3": diamond,
        "c4": "M0 5L5 -4H-5z",
        "c5": "M-5 -2h10v4h-10z",
        "positive": "M-4 -4L4 4M4 -4L-4 4",
    }
    circle = "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z"
    return Markup('<path class="m s-{}" transform="translate({:.1f} {:.1f})" d="{}"/>').format(
        role, x, y, shapes.get(role, circle)
    )


def swatch(role: str, line: bool = True) -> Markup:
    """Return a small decorative key for a legend."""
    stroke = Markup('<path class="l s-{}" d="M1 8H33"/>').format(role) if line else Markup("")
    mark = Markup("") if role == "trained" else marker(role, 17, 8)
    return Markup(
        '<svg class="swatch" width="34" height="16" viewBox="0 0 34 16" aria-hidden="true" '
        'focusable="false">{}{}</svg>'
    ).format(stroke, mark)


def frame(
    key: str, title: str, desc: str, height: float, body: Sequence[Markup], width: float = WIDTH
) -> Markup:
    """Return a picture with a name and a description for screen readers."""
    return Markup(
        '<svg class="plot" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-labelledby="{}-t {}-d">'
        '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>{}</svg>'
    ).format(width, height, key, key, key, title, key, desc, Markup("").join(body))


def standalone(plot: Markup, below: str = "", more: float = 0.0) -> str:
    """Return a picture as a file of its own.

    Colours and dashes are those of the page in its light theme, written out, for programs that know
    no CSS variables, on a ground of that theme.

    Args:
        plot: What `frame` returned.
        below: What else is drawn.
        more: Height that it takes.
    """
    style = "".join(
        (Path(__file__).parent / name).read_text(encoding="utf-8")
        for name in ("style.html", "comparison_style.html")
    )
    colours: dict[str, str] = {}
    for name, value in re.findall(r"--([a-z0-9]+): ?([^;]+);", style):
        colours.setdefault(name, value)  # the first theme is the light one
    named = re.compile(r"\.(plot|swatch|[libm]|s-[a-z0-9]+)(?![\w-])")
    parts = re.findall(r"([^{}]+)\{([^{}]*)\}", style)
    drawn = "\n".join(f"{n.strip()} {{{rule}}}" for n, rule in parts if named.match(n.strip()))
    rules = re.sub(r"var\(--([a-z0-9]+)\)", lambda m: colours.get(m[1], "#000"), drawn)
    head, _, rest = str(plot).partition(">")
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', head)[0]
    box = f"-8 -4 {int(width) + 16} {int(height) + 8 + more:.0f}"
    head = re.sub(
        r'viewBox="[^"]*"',
        f'xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="sans-serif"',
        head,
    )
    ground = f'<rect x="-8" y="-4" width="100%" height="100%" fill="{colours["page"]}"/>'
    end = f"{below}</svg>\n"
    return f"{head}><style>{rules}</style>{ground}{rest.removesuffix('</svg>')}{end}"


def put(x: float, y: float, said: str, anchor: str = "start", kind: str = "tick") -> Markup:
    """Return words at a place, cut to what fits."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, clip(said, 52)
    )


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> Markup:
    return Markup('<path class="{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
        kind, x1, y1, x2, y2
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def line_plot(
    key: str,
    title: str,
    desc: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Series],
    *,
    bands: Sequence[Band] = (),
    wide: bool = False,
) -> Markup:
    """Return a line plot.

    Args:
        key: Prefix of the ids, unique on the page.
        title: Short name, read by screen readers.
        desc: What can be seen, in a sentence.
        x: Horizontal axis.
        y: Vertical axis; its label stands above the plot.
        lines: Series, drawn in order; non-finite points are left out. Those without a name are
            drawn thin.
        bands: Level bands behind the lines.
        wide: Whether lines and bands carry their names at the right end, in a picture of
            `WIDE` x `TALL`.
    """
    top, bottom, height = 26.0, 190.0, 228.0
    width, right = WIDTH, RIGHT
    if wide:
        bottom, height, width, right = TALL - 38.0, TALL, WIDE, NAMES

    def sx(v: float) -> float:
        return LEFT + (width - LEFT - right) * x.at(v)

    def sy(v: float) -> float:
        return bottom - (bottom - top) * min(max(y.at(v), 0.0), 1.0)

    body = [put(0, 12, y.label, kind="label")]
    for value, text in y.ticks:
        body += [_rule(LEFT, sy(value), width - right, sy(value))]
        body += [put(LEFT - 8, sy(value) + 4, text, "end")]
    for value, text in x.ticks:
        body += [_rule(sx(value), bottom, sx(value), bottom + 4, "axis")]
        body += [put(sx(value), bottom + 17, text, "middle")]
    body += [_rule(LEFT, bottom, width - right, bottom, "axis")]
    if x.log:  # the axis is broken between 0 and the first positive value
        middle = LEFT + (width - LEFT - right) * ZERO_SHARE / 2
        body += [_rule(middle - 3, bottom, middle + 3, bottom, "break")]
    body += [put(width - right, bottom + 33, x.label, "end", "label")]
    names = []
    for band in bands:
        ends = sorted((sy(band.low), sy(band.high)))
        if ends[1] - ends[0] < 3:
            body += [_rule(LEFT, ends[0], width - right, ends[0], f"l s-{band.role}")]
        names += [(sum(ends) / 2, band.role, band.label)]
        body += [
            Markup(
                '<rect class="b s-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
            ).format(band.role, LEFT, ends[0], width - LEFT - right, max(ends[1] - ends[0], 2.0))
        ]
        if not wide:
            above = ends[0] - 4 if ends[0] > top + 14 else ends[1] + 13
            body += [put(width - right, above, band.label, "end", f"tick s-{band.role}")]
    for line in lines:
        edge = [(sx(a), sy(b)) for a, b, c in line.band if math.isfinite(b + c)]
        edge += [(sx(a), sy(c)) for a, b, c in reversed(line.band) if math.isfinite(b + c)]
        if len(edge) > 2:
            body += [Markup('<path class="b s-{}" d="{}z"/>').format(line.role, _path(edge))]
    for line in lines:
        points = [(sx(a), sy(b)) for a, b in line.points if math.isfinite(a + b)]
        if points:
            body += [Markup('<path class="l s-{}" d="{}"/>').format(line.role, _path(points))]
            names += [(points[-1][1], line.role, line.name)]
        if line.name and line.role != "trained" and len(points) <= 24:
            body += [marker(line.role, a, b) for a, b in points]
    if wide:
        shown = sorted(each for each in names if each[2])
        places = _spread([at for at, _, _ in shown], top, bottom)
        for place, (_, role, name) in zip(places, shown, strict=True):
            at = width - right + 9
            body += [put(at, place + 4, clip(name, 16), kind=f"name s-{role}")]
    return frame(key, title, desc, height, body, width)


def _spread(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """Return places at least a line of text apart, in the same order, inside the plot if it can."""
    out: list[float] = []
    for place in places:
        out.append(max(place, out[-1] + LINE if out else top))
    for i in range(len(out) - 1, -1, -1):
        below = out[i + 1] - LINE if i + 1 < len(out) else bottom
        out[i] = min(out[i], below)
    return out


def interval_plot(
    key: str,
    title: str,
    desc: str,
    x: Axis,
    rows: Sequence[IntervalRow],
    bands: Sequence[Band] = (),
) -> Markup:
    """Return rows of values with intervals on one axis, with vertical bands behind them.

    Args:
        key: Prefix of the ids, unique on the page.
        title: Short name, read by screen readers.
        desc: What can be seen, in a sentence.
        x: The axis, drawn below.
        rows: From top to bottom; a row's label stands above its track.
        bands: Reference models or margins, labelled at the top.
    """
    pad, pitch = 10.0, 40.0
    head = 32.0 if bands else 2.0
    bottom = head + pitch * len(rows)

    def sx(v: float) -> float:
        return pad + (WIDTH - 2 * pad) * min(max(x.at(v), 0.0), 1.0)

    known = sorted((b for b in bands if math.isfinite(b.low + b.high)), key=lambda b: b.low)
    body = _band_labels(known, sx)
    for index, row in enumerate(rows):
        base = head + pitch * index
        body += _track(base, x, known, sx)
        body += [put(0, base + 12, row.label, kind="row")]
        body += [put(WIDTH, base + 12, row.note, "end", "row")]
        for dot in row.dots:
            if math.isfinite(dot.low + dot.high):
                line = _path([(sx(dot.low), base + 26), (sx(dot.high), base + 26)])
                body += [Markup('<path class="i s-{}" d="{}"/>').format(dot.role, line)]
        body += [marker(d.role, sx(d.value), base + 26) for d in row.dots if math.isfinite(d.value)]
    body += [put(sx(value), bottom + 15, text, "middle") for value, text in x.ticks]
    body += [put(WIDTH, bottom + 33, x.label, "end", "label")]
    return frame(key, title, desc, bottom + 38, body)


def _track(
    base: float, x: Axis, bands: Sequence[Band], sx: Callable[[float], float]
) -> list[Markup]:
    """Return the ground of one row: a strip with the grid and the bands."""
    ground = [_rule(sx(value), base + 18, sx(value), base + 34) for value, _ in x.ticks]
    ground += [_rule(sx(x.low), base + 26, sx(x.high), base + 26)]
    for band in bands:
        width = max(sx(band.high) - sx(band.low), 2.0)
        ground += [
            Markup(
                '<rect class="b s-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="16"/>'
            ).format(band.role, sx(band.low), base + 18, width)
        ]
    return ground


def _band_labels(bands: Sequence[Band], sx: Callable[[float], float]) -> list[Markup]:
    """Return the names of the bands above them, on a second line where they would collide."""
    labels, last = [], -math.inf
    for band in bands:
        middle = (sx(band.low) + sx(band.high)) / 2
        anchor = "start" if middle < 45 else "end" if middle > WIDTH - 45 else "middle"
        at = {"start": sx(band.low), "end": sx(band.high), "middle": middle}[anchor]
        near = middle - last < 100
        labels += [put(at, 25 if near else 11, band.label, anchor, f"tick s-{band.role}")]
        last = -math.inf if near else middle
    return labels


def describe(name: str, points: Sequence[tuple[float, float]], unit: str) -> str:
    """Return "NAME goes from A at 0 tokens to B at 4,096 tokens", for descriptions."""
    known = [(a, b) for a, b in points if math.isfinite(a + b)]
    if not known:
        return f"{name}: not measured"
    (a, b), (c, d) = known[0], known[-1]
    if len(known) == 1:
        return f"{name} {number(b)} at {a:,.0f} {unit}"
    return f"{name} {number(b)} at {a:,.0f} {unit}, {number(d)} at {c:,.0f}"
