"""The page's account of an inspection: figures by block, heat-strips of tokens, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from excise.record import BlockChange, Estimate, Inspection, Record, Strip, TokenKL
from excise.report import svg, words
from excise.report.figures import Figure

SHADES = (0.01, 0.1, 0.5, 2.0)
"""Nats at which a token takes the next shade."""

TENSORS = 30
"""Tensors that are listed."""

TOP = 5
"""Tokens of a strip whose numbers are listed."""

NORMS = (
    ("candidate", "forget text, edited", "norm_forget_edited"),
    ("original", "forget text, original", "norm_forget_original"),
    ("control", "retain text, edited", "norm_retain_edited"),
    ("oracle", "retain text, original", "norm_retain_original"),
)
"""Role, words and field of every line of the plot of norms."""

ROWS = {"fit": "dev forget", "forget": "held-out test", "retain": "retain test"}

SIDES = {"forget": "forget text", "retain": "retain text"}

PLACES = {"prompt": "in the prompt", "answer": "where an answer is due"}

Read = Callable[[BlockChange], Estimate | float]


def redacted(finding: Inspection | None) -> Inspection | None:
    """Return an inspection without texts."""
    return None if finding is None else finding.model_copy(update={"strips": ()})


def view(record: Record) -> dict[str, Any] | None:
    """Return what the template shows of an inspection, or None where there is none.

    Args:
        record: Any record.
    """
    finding = record.inspection
    if finding is None or not finding.blocks:
        return None
    peak = finding.blocks[min(max(finding.clearest, 0), len(finding.blocks) - 1)]
    return {
        "name": words.plain(finding.model),
        "headline": words.plain(finding.headline),
        "summary": words.plain(finding.summary),
        "facts": _facts(finding, peak),
        "norms": norm_figure(finding),
        "norm_legend": [(svg.swatch(role), text) for role, text, _ in NORMS],
        "change": change_figure(finding),
        "buckets": bucket_figures(finding),
        "direction": direction_figures(finding),
        "kl": kl_figure(finding),
        "splice": _splice(finding),
        "splice_auc": _with_answers(finding.splice.auc, finding.splice.auc_answers),
        "strips": [_strip(strip) for strip in finding.strips],
        "shades": _shades(),
        "tensors": _tensors(finding),
        "tensor_note": _tensor_note(finding),
        "weights": weight_figure(finding) if any(b.weights for b in finding.blocks) else None,
        "rows": ", ".join(
            f"{words.count(n)} {ROWS.get(k, words.plain(k))}" for k, n in finding.rows.items()
        ),
    }


def _facts(finding: Inspection, peak: BlockChange) -> tuple[tuple[str, str], ...]:
    forget, retain = (next((k for k in finding.kl if k.side == side), None) for side in SIDES)
    return (
        ('"If harmful, add a big vector"', finding.conjecture),
        ("Block where the change is clearest", str(finding.clearest)),
        ("Its share along one direction", words.share(peak.share)),
        ("AUC, forget against retain", _with_answers(peak.auc, peak.auc_answers)),
        ("KL per token, forget and retain", f"{_mean(forget)} and {_mean(retain)} nats"),
        (
            "Tensors that moved",
            f"{words.count(len(finding.tensors))} of {words.count(finding.tensors_total)}",
        ),
    )


def _mean(kl: TokenKL | None) -> str:
    return words.number(kl.mean.value if kl else None)


def _with_answers(every: Estimate, answers: float) -> str:
    band = words.interval(every.low, every.high)
    return f"{words.number(every.value)} {band}; {words.number(answers)} where an answer is due"


def _blocks_axis(count: int) -> svg.Axis:
    """Return an axis of whole blocks."""
    step = max(1, -(-count // 8))
    ticks = tuple((float(i), str(i)) for i in range(0, count, step))
    edge = 0.5 if count < 3 else 0.2
    return svg.Axis("after block", -edge, count - 1 + edge, ticks)


def _lines(
    finding: Inspection, named: Sequence[tuple[str, str, Read]]
) -> tuple[list[svg.Series], tuple[tuple[str, ...], ...], list[float]]:
    """Return series by block, the table of their numbers, and all values."""
    lines, values = [], []
    cells: list[list[str]] = [[str(block.block)] for block in finding.blocks]
    for role, name, read in named:
        points, band = [], []
        for block, row in zip(finding.blocks, cells, strict=True):
            value = read(block)
            at = float(block.block)
            if isinstance(value, Estimate):
                points.append((at, value.value))
                band.append((at, value.low, value.high))
                values += [value.value, value.low, value.high]
                row.append(f"{words.number(value.value)} {words.interval(value.low, value.high)}")
            else:
                points.append((at, value))
                values.append(value)
                row.append(words.number(value))
        lines.append(svg.Series(name, role, tuple(points), tuple(band)))
    return lines, tuple(tuple(row) for row in cells), values


def _figure(
    finding: Inspection, key: str, title: str, label: str, named: Sequence[tuple[str, str, Read]]
) -> Figure:
    lines, rows, values = _lines(finding, named)
    said = "; ".join(
        f"{line.name} {words.number(line.points[0][1])} after block 0, "
        f"{words.number(line.points[-1][1])} after block {len(finding.blocks) - 1}"
        for line in lines
    )
    plot = svg.line_plot(
        key, title, said, _blocks_axis(len(finding.blocks)), svg.linear_axis(label, values), lines
    )
    header = ("Block", *(name for _, name, _ in named))
    return Figure(key, title, said + ".", plot, header, rows, tuple(role for role, *_ in named))


def norm_figure(finding: Inspection) -> Figure:
    """Return the residual norm by block for forget and retain text, original and edited."""

    def read(field: str) -> Read:
        def norm(block: BlockChange) -> Estimate:
            value: Estimate = getattr(block, field)
            return value

        return norm

    named = [(role, text, read(field)) for role, text, field in NORMS]
    return _figure(finding, "norms", "Norm of the residual stream", "mean norm of a token", named)


FigureAndLegend = tuple[Figure, list[tuple[Any, str]]]


def _keyed(
    finding: Inspection, key: str, title: str, label: str, named: Sequence[tuple[str, str, Read]]
) -> FigureAndLegend:
    """Return a plot with its legend."""
    legend = [(svg.swatch(role), name) for role, name, _ in named]
    return _figure(finding, key, title, label, named), legend


def change_figure(finding: Inspection) -> FigureAndLegend:
    """Return how much the residual stream changed, in all and along the direction."""
    named: list[tuple[str, str, Read]] = [
        ("k0", "forget text", lambda b: b.change_forget),
        ("k1", "retain text", lambda b: b.change_retain),
        ("k2", "forget text, along the direction", lambda b: b.size_forget),
        ("k3", "retain text, along the direction", lambda b: b.size_retain),
    ]
    label = "change, share of the original's norm"
    return _keyed(finding, "change", "How much changed", label, named)


def bucket_figures(finding: Inspection) -> list[FigureAndLegend]:
    """Return the plots of the stream by kind of token; none where it was not read so."""
    kinds = dict.fromkeys((bucket.text, bucket.position) for bucket in finding.buckets)
    if not kinds:
        return []

    def read(kind: tuple[str, str], field: str) -> Read:
        by_block = {b.block: b for b in finding.buckets if (b.text, b.position) == kind}
        return lambda block: float(getattr(by_block[block.block], field))

    plots = (
        ("bucket-cosine", "Which tokens were turned?", "cosine with the original's", "cosine"),
        ("bucket-change", "Which tokens moved?", "change, share of the original's norm", "change"),
        ("bucket-top", "Is the edited stream squeezed?",
         "variance along its four principal directions", "top_edited"),
        ("bucket-top-original", "And the original's?",
         "variance along its four principal directions", "top_original"),
    )  # fmt: skip
    return [
        _keyed(finding, key, title, label, [
            (f"k{i}", f"{SIDES[kind[0]]}, {PLACES[kind[1]]}", read(kind, field))
            for i, kind in enumerate(kinds)
        ])
        for key, title, label, field in plots
    ]  # fmt: skip


def direction_figures(finding: Inspection) -> list[FigureAndLegend]:
    """Return the plots of the junk direction."""
    plots: list[tuple[str, str, str, list[tuple[str, str, Read]]]] = [
        (
            "direction",
            "Is it one direction?",
            "on forget text",
            [
                ("k0", "share of the change along its mean", lambda b: b.share),
                ("k1", "cosine of a token's change with its mean", lambda b: b.cosine),
            ],
        ),
        (
            "gate",
            "Does harm switch it on?",
            "AUC, forget against retain tokens",
            [
                ("k0", "change along the direction", lambda b: b.auc),
                ("k1", "the same where an answer is due", lambda b: b.auc_answers),
                ("k2", "edited model alone", lambda b: b.auc_edited),
                ("k3", "original alone", lambda b: b.auc_original),
            ],
        ),
    ]
    return [_keyed(finding, *plot) for plot in plots]


def weight_figure(finding: Inspection) -> Figure:
    """Return how far the weights of each block moved."""
    named: list[tuple[str, str, Read]] = [("k0", "weights of the block", lambda b: b.weights)]
    label = "change, share of the weights' norm"
    return _figure(finding, "weights", "Which blocks moved", label, named)


def kl_figure(finding: Inspection) -> Figure:
    """Return KL(edited || original) of both sides, with intervals."""
    rows, table, values = [], [], [0.0]
    for kl in finding.kl:
        role = "candidate" if kl.side == "forget" else "oracle"
        for name, value in (("every token", kl.mean), ("where an answer is due", kl.answers)):
            label = f"{SIDES[kl.side]}, {name}"
            dot = svg.Dot(role, value.value, value.low, value.high)
            rows.append(svg.IntervalRow(label, words.number(value.value), (dot,)))
            values += [value.value, value.high]
            band = words.interval(value.low, value.high) or words.MISSING
            table.append((label, words.number(value.value), band))
        table.append((f"{SIDES[kl.side]}, median of tokens", words.number(kl.median), "\u2013"))
        table.append((f"{SIDES[kl.side]}, 99 % lie below", words.number(kl.p99), "\u2013"))
    title = "KL(edited || original)"
    said = "; ".join(f"{row.label} {row.note}" for row in rows) + "."
    axis = svg.linear_axis("nats per token", values)
    plot = svg.interval_plot("token-kl", title, said, axis, rows)
    return Figure(
        "token-kl", title, said, plot, ("Text", "Nats", "95 % interval"), tuple(table), ()
    )


def _splice(finding: Inspection) -> list[tuple[str, ...]]:
    return [
        (
            kind.noise,
            words.share(kind.share),
            words.share(kind.share_answers),
            words.number(kind.kl_forget),
            words.number(kind.weight),
            words.share(kind.share_mixed),
            words.number(kind.weight_retain),
        )
        for kind in finding.splice.kinds
    ]


def shade(kl: float | None) -> int:
    """Return the shade of a token, 0 to 4."""
    return 0 if kl is None else sum(kl >= edge for edge in SHADES)


def _shades() -> list[tuple[int, str]]:
    names = [f"below {SHADES[0]}"]
    names += [f"{a} to {b}" for a, b in pairwise(SHADES)]
    return list(enumerate([*names, f"{SHADES[-1]} nats and more"]))


def _strip(strip: Strip) -> dict[str, Any]:
    pairs = list(zip(strip.tokens, strip.kl, strict=False))
    top = sorted((p for p in pairs if p[1] is not None), key=lambda p: -(p[1] or 0.0))[:TOP]
    return {
        "side": SIDES[strip.side],
        "unit": words.plain(strip.unit),
        "tokens": [(words.plain(t).replace("\n", "\u21b5\n"), shade(kl)) for t, kl in pairs],
        "rows": [(words.plain(t).strip() or "(space)", words.number(kl)) for t, kl in top],
    }


def _tensors(finding: Inspection) -> list[tuple[str, ...]]:
    return [
        (
            words.plain(t.name),
            " \u00d7 ".join(words.count(n) for n in t.shape),
            words.share(t.relative),
            words.share(t.moved),
            words.number(t.rank) if t.rank is not None else "\u2013",
            words.count(t.count90) if t.count90 is not None else "\u2013",
        )
        for t in finding.tensors[:TENSORS]
    ]


def _tensor_note(finding: Inspection) -> str:
    hidden = len(finding.tensors) - TENSORS
    return f"{words.count(hidden)} more moved less; they are in run.json." if hidden > 0 else ""
