"""Small grey images of a study as inline SVG: ink in the colour of the page, one path a level."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from excise.record import Record, StudyPicture
from excise.report import words
from excise.report.svg import WIDTH

GAP = 4.0
"""Between columns."""


@dataclass(frozen=True)
class Figure:
    """A drawing with its numbers in a table."""

    key: str
    title: str
    caption: str
    plot: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def figures(record: Record) -> tuple[Figure, ...]:
    """Return the pictures of a record's study; none where there is no study."""
    if record.study is None:
        return ()
    return tuple(_figure(p, f"picture-{i}") for i, p in enumerate(record.study.pictures))


def _figure(picture: StudyPicture, key: str) -> Figure:
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
        body.append(
            Markup('<text class="row" x="0" y="{:.1f}">{}</text>').format(
                y, words.clip(words.plain(row.name), 52)
            )
        )
        y += 4
        tall = 0.0
        for i, image in enumerate(row.images[: len(picture.columns)]):
            lines = -(-len(image) // picture.width)
            tall = max(tall, side * lines / picture.width)
            body.append(_image(image, picture.width, i * (side + GAP), y, side))
        y += tall + 6
    names = ", ".join(words.plain(r.name) for r in picture.rows)
    said = f"{len(picture.rows)} lines of {len(picture.columns)} images: {names}"
    return Markup(
        '<svg class="plot" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-labelledby="{}-t {}-d">'
        '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>{}</svg>'
    ).format(WIDTH, y, key, key, key, words.plain(picture.title), key, said, Markup("").join(body))


def _image(levels: str, width: int, x: float, y: float, side: float) -> Markup:
    """Return one image: a frame, and runs of equal ink joined into one path for each level."""
    runs: dict[str, list[str]] = {}
    for start in range(0, len(levels), width):
        column = 0
        for level, same in groupby(levels[start : start + width]):
            count = len(list(same))
            if level in "123456789":
                runs.setdefault(level, []).append(f"M{column} {start // width}h{count}v1h-{count}z")
            column += count
    scale = side / width
    tall = -(-len(levels) // width)
    paths = [
        Markup('<path fill="currentColor" fill-opacity=".{}" d="{}"/>').format(
            level, "".join(runs[level])
        )
        if level != "9"
        else Markup('<path fill="currentColor" d="{}"/>').format("".join(runs[level]))
        for level in sorted(runs)
    ]
    frame = Markup(
        '<path fill="none" stroke="currentColor" stroke-opacity=".3" stroke-width=".3" '
        'd="M0 0h{}v{}h-{}z"/>'
    ).format(width, tall, width)
    return Markup(
        '<g transform="translate({:.1f} {:.1f}) scale({:.3f})" stroke="none" '
        'shape-rendering="crispEdges">{}{}</g>'
    ).format(x, y, scale, Markup("").join(paths), frame)
