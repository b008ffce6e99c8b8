"""Axes and plots: positions, ticks, holes in the data, escaping."""

from __future__ import annotations

import math
import re

import pytest
from tests.report.pages import read

from excise.report import svg


def test_log_axis_shows_zero_and_decades() -> None:
    axis = svg.log_axis("tokens", [0, 100, 1000, 100_000])
    assert axis.at(0) == 0
    assert axis.at(100) == pytest.approx(svg.ZERO_SHARE)
    assert axis.at(100_000) == pytest.approx(1)
    step = axis.at(1000) - axis.at(100)
    assert axis.at(10_000) - axis.at(1000) == pytest.approx(step)
    assert axis.ticks[0] == (0.0, "0")
    assert [t for _, t in axis.ticks[1:]] == ["100", "1k", "10k", "100k"]


@pytest.mark.parametrize(
    "values", [[], [0], [7], [512, 8192], [3, 4], [1, 1e12], [math.nan, 10], [1000, 1001]]
)
def test_log_axis_always_has_ticks_in_order(values: list[float]) -> None:
    axis = svg.log_axis("tokens", values)
    places = [axis.at(v) for v, _ in axis.ticks]
    assert places == sorted(places)
    assert 2 <= len(places) <= 7
    assert all(0 <= p <= 1.01 for p in places)


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.2, 0.9], (0, 1)),
        ([3.15, 10.05], (2, 12)),
        ([-0.3, 1.1], (-0.5, 1.5)),
        ([5.0], (4.4, 5.6)),
    ],
)
def test_linear_axis_is_round_and_covers(values: list[float], ends: tuple[float, float]) -> None:
    axis = svg.linear_axis("score", values)
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    assert (axis.low, axis.high) == pytest.approx(ends, abs=0.11)
    assert axis.ticks[0][0] == pytest.approx(axis.low)
    assert axis.ticks[-1][0] == pytest.approx(axis.high)
    shown = [float(t.replace("\u2212", "-")) for _, t in axis.ticks]
    assert shown == pytest.approx([v for v, _ in axis.ticks])


@pytest.mark.parametrize("values", [[0.0], [math.nan], [], [1e-9, 2e-9], [1e6, 3e6], [-1.0, -1.0]])
def test_linear_axis_of_odd_values(values: list[float]) -> None:
    axis = svg.linear_axis("score", values)
    assert axis.high > axis.low
    assert 2 <= len(axis.ticks) <= 9


def test_line_plot_leaves_holes_out_and_escapes() -> None:
    x, y = svg.log_axis("tokens", [0, 10, 100]), svg.linear_axis("<b>", [0, 1])
    line = svg.Series("<i>", "candidate", ((0, 0.1), (10, math.nan), (100, 0.9)), ((0, 0.0, 0.2),))
    plot = svg.line_plot("k", "<script>", "a & b", x, y, [line])
    root = read(plot)
    assert root.all("title")[0].text() == "<script>"
    assert not root.all("script", "b", "i")
    drawn = [n for n in root.all("path") if n.attrs.get("class") == "l s-candidate"]
    assert drawn[0].attrs["d"].count("L") == 1
    assert len([n for n in root.all("path") if n.attrs["class"] == "m s-candidate"]) == 2
    assert "nan" not in plot


def test_interval_plot_puts_values_in_order() -> None:
    axis = svg.linear_axis("score", [0, 1])
    rows = [
        svg.IntervalRow(f"r{v}", "", (svg.Dot("candidate", v, v - 0.1, v + 0.1),))
        for v in (0.2, 0.5, 0.8)
    ]
    rows.append(svg.IntervalRow("hole", "not measured", (svg.Dot("candidate", math.nan),)))
    bands = (svg.Band("oracle", "oracle", 0.0, 0.1), svg.Band("original", "original", 0.9, 1.0))
    plot = svg.interval_plot("k", "t", "d", axis, rows, bands)
    marks = re.findall(r'm s-candidate" transform="translate\(([\d.]+) ([\d.]+)\)', plot)
    xs, ys = zip(*((float(a), float(b)) for a, b in marks), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert plot.count("<rect") == 2 * len(rows)


def test_roles_differ_without_colour() -> None:
    shapes = {
        re.sub(r' s-\w+"', '"', svg.marker(r, 0, 0))
        for r in ("candidate", "original", "oracle", "control")
    }
    assert len(shapes) == 4
