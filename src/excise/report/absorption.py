"""The picture of absorption: which group of weights rows of each kind write into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from excise.record import MethodRun, Record
from excise.report import svg, words
from excise.report.figures import Figure

KINDS = {
    "retain": "rows that stay",
    "labelled": "labelled forget rows",
    "missed": "missed forget rows",
}
"""Kinds of rows, as methods name them."""

MOST = 24
"""Bars of one picture at most; its table has all."""

LETTERS = 46
"""Letters above a bar at most, on both sides together; the table has all words and numbers."""

NOTE = 26
"""Of these, letters on the right."""


@dataclass(frozen=True)
class Bar:
    """One kind of rows.

    Attributes:
        label: What it is.
        shares: Share of the squared gradient by group; they sum to 1.
        note: What stands above the bar on the right; all large shares in words when empty.
    """

    label: str
    shares: Mapping[str, float]
    note: str = ""


def of_arm(arm: MethodRun, key: str) -> Figure | None:
    """Return the picture of one routed removal, or None where the method told nothing."""
    held = arm.extras.get("absorption")
    if not isinstance(held, Mapping):
        return None
    bars = [
        Bar(KINDS.get(kind, words.plain(kind)), shares)
        for kind, told in held.items()
        if (shares := _shares(told))
    ]
    return _figure(key, f"What rows write into: {words.plain(arm.name)}", bars)


def _shares(told: object) -> dict[str, float]:
    """Return the shares of one kind of rows, as far as they are numbers."""
    held = told.get("share") if isinstance(told, Mapping) else None
    if not isinstance(held, Mapping):
        return {}
    numbers = {str(k): float(v) for k, v in held.items() if isinstance(v, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def of_study(record: Record) -> Figure | None:
    """Return the picture of a study's arms, drawn from its table of absorption, or None."""
    tables = record.study.tables if record.study else ()
    table = next((t for t in tables if t.title == "Absorption"), None)
    if table is None:
        return None
    into = {f"{kind} rows into modules": text for kind, text in KINDS.items()}
    bars = [
        Bar(f"{words.plain(row.condition)}: {into[row.metric]}",
            {"modules": row.value, "everything else": 1 - row.value}, f"{100 * row.value:.0f} %")
        for row in table.rows
        if row.metric in into and row.value is not None
    ]  # fmt: skip
    return _figure("study-absorption", "Share that rows write into modules, by arm", bars)


def _figure(key: str, title: str, bars: Sequence[Bar]) -> Figure | None:
    """Return bars as a figure with words and numbers, or None for no bars."""
    if not bars:
        return None
    names = tuple(dict.fromkeys(name for bar in bars for name in bar.shares))
    drawn = bars[:MOST]
    if len(bars) > MOST:
        title = f"{title} (the first {MOST} of {len(bars)}; all stand in the numbers)"
    said = "; ".join(f"{bar.label}: {_said(bar.shares)}" for bar in drawn)
    caption = f"Share of the squared gradient before the modules were cut off. {said}."
    rows = tuple(
        (bar.label, *(words.share(bar.shares.get(name, 0.0)) for name in names)) for bar in bars
    )
    header = ("Rows", *(words.plain(name) for name in names))
    return Figure(key, title, caption, _plot(key, title, caption, drawn, names), header, rows)


def _said(shares: Mapping[str, float]) -> str:
    """Return the shares in words, the largest first, without those under half a percent."""
    large = sorted(((v, n) for n, v in shares.items() if v >= 0.005), reverse=True)
    return ", ".join(f"{words.plain(name)} {100 * value:.0f} %" for value, name in large)


def _plot(key: str, title: str, desc: str, bars: Sequence[Bar], names: Sequence[str]) -> Markup:
    """Return one bar a row, cut into groups; what each part is stands above it in words."""
    pitch, body = 44.0, list[Markup]()
    for i, bar in enumerate(bars):
        base = pitch * i
        note = words.clip(bar.note or _said(bar.shares), NOTE)
        label = words.clip(bar.label, LETTERS - len(note))
        body.append(svg.put(0, base + 12, label, kind="row"))
        body.append(svg.put(svg.WIDTH, base + 12, note, "end", "row"))
        at = 0.0
        for name in names:
            width = max(0.0, min(1.0, bar.shares.get(name, 0.0))) * svg.WIDTH
            if width >= 1:
                body.append(
                    Markup(
                        '<rect class="share s-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" '
                        'height="16"/>'
                    ).format(_role(name), at, base + 19, max(width - 1.5, 1.0))
                )
            at += width
    return svg.frame(key, title, desc, pitch * len(bars), body)


def _role(name: str) -> str:
    """Return whose colour a group has: what stays that of the original, modules the candidate's."""
    kept = {"core": "original", "everything else": "original", "joint": "oracle"}
    return kept.get(name, "candidate")
