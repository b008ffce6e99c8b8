"""Plots of a record: scores, depth gaps, relearning curves, ends of attacks, losses, absorption.

Each function returns a `Figure`: a plot, a caption that says the same in words, and the numbers as
a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from excise.record import AttackVariant, CurvePoint, MethodRun, Record, Score, Verdict
from excise.record.measured import pooled
from excise.report import svg, words

MIN_POINTS = 3
"""An attack that does not train is a dot, not a curve, with fewer checkpoints."""

NAMED = 10
"""Lines of the first picture that carry their names at most; the others are thin."""

PALETTE = ("candidate", "c1", "c2", "c3", "c4", "c5")
"""Roles of removed models in one picture, each with its colour, dash and mark."""

ABSORBED = {
    "retain": "retain rows",
    "labelled": "labelled forget rows",
    "missed": "missed forget rows",
}
"""Kinds of rows, as methods name them."""

CURVE_HEADER = (
    "Line", "Tokens", "Examples", "Held-out test set", "95 % interval", "Relearn set",
    "Retain set",
)  # fmt: skip
"""Columns of the numbers of a curve."""

BARS = 24
"""Bars of one plot at most; its table has all."""

LETTERS = 46
"""Letters above a bar at most, on both sides together; the table has all words and numbers."""

NOTE = 26
"""Of these, letters on the right."""


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
    ordered = sorted(scores, key=lambda s: words.RANK[words.role(s.model)])
    chance = next((s.chance for s in scores if s.chance is not None), None)
    bands = [band for role in ("original", "oracle") for band in _reference(ordered, role)]
    values = [v for s in ordered for v in (s.value, s.low, s.high)]
    metric = words.metric_name(first.metric)
    axis = svg.linear_axis(f"{metric}; {first.direction} is more knowledge", values)
    rows = [
        svg.IntervalRow(
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


def _reference(scores: Sequence[Score], role: str) -> Iterable[svg.Band]:
    """Yield the band that the intervals of one kind of reference model cover."""
    lows = [s.low for s in scores if words.role(s.model) == role and math.isfinite(s.low)]
    highs = [s.high for s in scores if words.role(s.model) == role and math.isfinite(s.high)]
    if lows and highs:
        yield svg.Band(role, role, min(lows), max(highs))


def gap_figure(verdict: Verdict, key: str) -> Figure | None:
    """Return the depth gap of every level with its interval, or None where none was measured."""
    measured = [r for r in verdict.levels if r.gap is not None and math.isfinite(r.gap)]
    if not measured:
        return None
    rows, table, said, values = [], [], [], [0.0, 1.0]
    for result in measured:
        low, high = (math.nan if end is None else end for end in (result.low, result.high))
        gap, name = result.gap or 0.0, words.level_words(result.level, verdict.levels)
        interval = words.interval(result.low, result.high)
        values += [v for v in (gap, low, high) if math.isfinite(v)]
        dot = svg.Dot("candidate", gap, low, high)
        rows.append(svg.IntervalRow(words.clip(name, 38), words.number(gap), (dot,)))
        said.append(f"{name} {words.number(gap)} {interval}".strip())
        table.append(
            (
                f"{name} ({result.level})",
                words.number(gap),
                interval or words.MISSING,
                words.number(result.margin),
            )
        )
    against = {r.against for r in measured}
    zero = "oracle" if "oracle" in against else " or ".join(sorted(against))
    edge = max((r.margin for r in measured if r.margin is not None), default=0.0)
    bands = [svg.Band("original", "original", 1.0, 1.0)]
    bands += [svg.Band(f"{zero} \u00b1 margin" if edge else zero, "oracle", -edge, edge)]
    inside = [v for v in values if -2 <= v <= 3]
    what = "0 is the oracle" if zero == "oracle" else "0 is what it is compared with"
    axis = svg.linear_axis(f"depth gap: {what}, 1 the original", [*inside, -edge, 1.05])
    title = f"Depth gap by level: {words.plain(verdict.model)}"
    caption = "; ".join(said)
    plot = svg.interval_plot(key, title, caption, axis, rows, bands)
    header = ("Level", "Depth gap", "90 % interval", "Margin")
    roles = ("candidate", "original", "oracle")
    return Figure(key, title, caption + ".", plot, header, tuple(table), roles)


def history_figure(method_run: MethodRun, key: str) -> Figure | None:
    """Return the method's named losses by step, or None where none were kept."""
    rows = [r for r in method_run.history if "step" in r]
    names = list(dict.fromkeys(k for r in rows for k in r if k not in ("step", "lr", "tokens")))
    if len(rows) < 2 or not names:
        return None
    lines = []
    for index, name in enumerate(names[:4]):
        points = tuple((r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan)))
        lines.append(svg.Series(words.plain(name), f"k{index}", points))
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    x = svg.linear_axis("step", [a for line in lines for a, _ in line.points])
    y = replace(
        svg.linear_axis("loss", [b for line in lines for _, b in line.points]), label="loss"
    )
    said = "; ".join(svg.describe(line.name, line.points, "steps") for line in lines)
    title = f"Losses by step: {words.plain(method_run.name)}"
    plot = svg.line_plot(key, title, said, x, y, lines)
    table = tuple(
        (words.count(r["step"]), *(words.number(r.get(n)) for n in names[:4]))
        for r in rows[:: max(1, len(rows) // 20)]
    )
    header = ("Step", *(words.plain(n) for n in names[:4]))
    return Figure(key, title, said + ".", plot, header, table, tuple(x.role for x in lines))


def _deciding(variants: Sequence[AttackVariant]) -> tuple[AttackVariant, ...]:
    """Return the variants that decide, of those that have a curve; all of those where none does."""
    ran = [a for a in variants if a.curve]
    return tuple([a for a in ran if a.decisive] or ran)


CurveKey = tuple[str, str, str, str]
"""Attack, variant, what was scored and by which metric: what rates and seeds share."""


def _setting(attack: AttackVariant) -> CurveKey:
    return (attack.name, attack.variant, attack.scored_on, attack.metric)


def _curves(record: Record, model: str) -> dict[CurveKey, list[AttackVariant]]:
    """Return the attacks on one removed model that ran, by setting."""
    groups: dict[CurveKey, list[AttackVariant]] = {}
    for attack in words.attacks_on(record, model):
        if not attack.control and attack.status in ("ok", "invalid"):
            groups.setdefault(_setting(attack), []).append(attack)
    return groups


def relearn_figures(record: Record, model: str, key: str) -> tuple[Figure, ...]:
    """Return one plot per attack with a curve: held-out score over the attacker's tokens.

    Args:
        record: The record.
        model: Which removed model.
        key: Prefix of the ids.
    """
    figures = []
    for index, (setting, variants) in enumerate(_curves(record, model).items()):
        deciding = _deciding(variants)
        if not any(_is_curve(a) for a in deciding):
            continue
        beside = {role: _alike(record, setting, role) for role in ("original", "oracle")}
        beside["control"] = tuple(
            a
            for a in words.attacks_on(record, model)
            if a.control and a.name == setting[0] and a.scored_on == setting[2]
        )
        figures.append(_relearn_figure(record, f"{key}-{index}", deciding, beside))
    return tuple(figures)


def _is_curve(attack: AttackVariant) -> bool:
    """Return whether an attack has a curve over its tokens: a training, or many checkpoints."""
    return len(attack.curve) >= (MIN_POINTS if attack.lr is None else 2)


def _relearned(record: Record, model: str) -> list[tuple[AttackVariant, ...]]:
    """Return the deciding variants of every relearning on a removed model, scored on V.

    Training on V's own units, as on the method's forget rows, brings back what it teaches.
    """
    groups = _curves(record, model)
    return [
        _deciding(variants)
        for variants in groups.values()
        if variants[0].level == "D4"
        and "trained_on_test_units" not in variants[0].facts
        and variants[0].scored_on.partition(".")[0] == "test"
        and any(_is_curve(a) for a in _deciding(variants))
    ]


def candidate_roles(names: Sequence[str]) -> dict[str, str]:
    """Return how each removed model is drawn wherever all of them stand together."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def lead_figure(record: Record, key: str = "lead") -> Figure | None:
    """Return what comes back against the attacker's tokens, for all removed models at once.

    Of several kinds of relearning on one model the one that ends with most knowledge is drawn.
    The models stand between the original and the oracle under the same attack; without an oracle,
    between the original and matched fresh text, which nobody was taught; where there is none,
    between the original and their own start.

    Args:
        record: The record.
        key: Prefix of the ids.

    Returns:
        None where no relearning was scored on the held-out test set. Of several capabilities or
        metrics the one scored on most models is drawn.
    """
    names = words.model_names(record)
    by_scored: dict[tuple[str, str], dict[str, tuple[AttackVariant, ...]]] = {}
    for name in names:
        for deciding in _relearned(record, name):
            first = deciding[0]
            drawn = by_scored.setdefault((first.scored_on, first.metric), {})
            drawn[name] = max(
                (group for group in (drawn.get(name), deciding) if group),
                key=lambda group: _knowledge(record, pooled(group)[-1:], first.metric),
            )
    if not by_scored:
        return None
    (scored_on, metric), drawn = max(by_scored.items(), key=lambda item: len(item[1]))
    curves = {name: curve for name, group in drawn.items() if (curve := pooled(group))}
    if not curves:
        return None
    first = next(iter(drawn.values()))[0]
    higher = words.direction(record, metric).startswith("higher")
    roles = candidate_roles(names)
    ranked = sorted(curves, key=lambda n: -_knowledge(record, curves[n][-1:], metric))
    lines = [
        svg.Series(
            words.plain(name) if name in ranked[:NAMED] else "",
            roles[name] if name in ranked[:NAMED] else "rest",
            tuple((p.tokens, p.score) for p in curves[name]),
            tuple((p.tokens, p.low, p.high) for p in curves[name]) if len(curves) == 1 else (),
        )
        for name in reversed(ranked)
    ]
    bands, oracle = _between(record, first, curves)
    lines = [*oracle, *lines]
    values = [v for line in lines for _, v in line.points]
    values += [v for line in lines for _, a, b in line.band for v in (a, b)]
    values += [v for band in bands for v in (band.low, band.high)]
    name = words.metric_name(metric) or "score"
    label = f"{name}, unseen test items (up: knows more)"
    y = svg.upward(svg.linear_axis(label, values), "higher" if higher else "lower")
    x = svg.log_axis("tokens the attacker trains on", [p for line in lines for p, _ in line.points])
    said = [f"{band.label} {words.number(band.said)}" for band in bands]
    said += [svg.describe(n, [(p.tokens, p.score) for p in curves[n]], "tokens") for n in ranked]
    title = f"What relearning brings back {_suffix(scored_on)}".strip()
    rows = [_point_row(words.plain(n), p) for n in ranked for p in curves[n]]
    caption = "; ".join(map(words.plain, said)) + "."
    plot = svg.line_plot(key, title, caption, x, y, lines, bands=bands, wide=True)
    return Figure(key, title, caption, plot, CURVE_HEADER, tuple(rows), tuple(roles.values()))


def _knowledge(record: Record, last: Sequence[CurvePoint], metric: str) -> float:
    """Return the end of a curve so that more is more knowledge; least for an empty one."""
    sign = 1 if words.direction(record, metric).startswith("higher") else -1
    return sign * last[0].score if last else -math.inf


def _between(
    record: Record, attack: AttackVariant, curves: Mapping[str, Sequence[CurvePoint]]
) -> tuple[list[svg.Band], list[svg.Series]]:
    """Return what the removed models stand between: bands, and the oracle's line if there is one.

    Args:
        record: The record.
        attack: What was done to the removed models, to find the same on the reference models.
        curves: The removed models' curves.
    """

    def on(role: str, *, fresh: bool = False) -> tuple[AttackVariant, ...]:
        return tuple(
            a
            for a in record.attacks
            if words.role(a.subject) == role
            and (a.name, a.metric, a.scored_on) == (attack.name, attack.metric, attack.scored_on)
            and a.control == fresh
            and (not fresh or a.trained_on == "fresh")
            and a.curve
        )

    bands = []
    original = next((a.curve[0] for a in on("original")), None)
    if original is not None and math.isfinite(original.score):
        low, high = original.low, original.high
        ends = (low, high) if math.isfinite(low + high) else (original.score, original.score)
        bands += [svg.Band("original", "original", *ends, original.score)]
    alike = [a for a in on("oracle") if a.variant == attack.variant]
    oracle = pooled(_deciding(alike or on("oracle")))
    if oracle:
        points = tuple((p.tokens, p.score) for p in oracle)
        edges = tuple((p.tokens, p.low, p.high) for p in oracle)
        return bands, [svg.Series("oracle", "oracle", points, edges)]
    fresh = [a for role in ("original", "candidate") for a in on(role, fresh=True)]
    level = next((a.curve[0].trained for a in fresh if a.curve[0].trained is not None), None)
    if level is not None and math.isfinite(level):
        bands += [svg.Band("never taught", "oracle", level, level)]
    elif len(curves) == 1:
        start = next(iter(curves.values()))[0].score
        bands += [svg.Band("before attack", "control", start, start)]
    return bands, []


def _alike(record: Record, setting: CurveKey, role: str) -> tuple[AttackVariant, ...]:
    """Return the deciding variants of one setting on the models of a role."""
    return _deciding(
        [
            a
            for a in record.attacks
            if _setting(a) == setting and words.role(a.subject) == role and not a.control
        ]
    )


def _relearn_figure(
    record: Record,
    key: str,
    deciding: tuple[AttackVariant, ...],
    beside: Mapping[str, tuple[AttackVariant, ...]],
) -> Figure:
    first = deciding[0]
    drawn = {role: pooled(variants) for role, variants in beside.items() if variants}
    drawn = {role: curve for role, curve in drawn.items() if len(curve) > 1}
    drawn["candidate"] = pooled(deciding)
    lines, rows, said = [], [], []
    for role, points in drawn.items():
        name = "controls" if role == "control" else role
        line = svg.Series(
            name,
            role,
            tuple((p.tokens, p.score) for p in points),
            tuple((p.tokens, p.low, p.high) for p in points),
        )
        trained = tuple((p.tokens, p.trained) for p in points if p.trained is not None)
        if role == "candidate" and trained:
            lines.append(svg.Series("candidate on the relearn set", "trained", trained))
        lines.append(line)
        said.append(svg.describe(name, line.points, "tokens"))
        rows += [_point_row(name, p) for p in points]
    metric = words.metric_name(first.metric) or "score"
    bands: list[svg.Band] = []
    if drawn["candidate"] and "oracle" not in drawn and first.level == "D4":
        bands, _ = _between(record, first, {"": drawn["candidate"]})
        bands = [band for band in bands if band.role == "oracle" or band.role not in drawn]
    values = [v for line in lines for _, v in line.points]
    values += [v for band in bands for v in (band.low, band.high)]
    values += [v for line in lines for _, a, b in line.band for v in (a, b)]
    y = svg.linear_axis(f"held-out {metric}; {words.direction(record, first.metric)}", values)
    x = svg.log_axis("attacker's tokens", [p for line in lines for p, _ in line.points])
    title = f"{words.attack_name(first)} {_suffix(first.scored_on)}".strip()
    if all(a.status == "invalid" for a in deciding):
        title += " (invalid)"
    seeds = len({a.seed for a in deciding})
    caption = "; ".join(reversed(said)) + "."
    caption += f" Mean of {seeds} seeds; bands cover all intervals." if seeds > 1 else ""
    roles = tuple(dict.fromkeys([*drawn, *(line.role for line in lines)]))
    plot = svg.line_plot(key, title, caption, x, y, lines, bands=bands)
    return Figure(key, title, caption, plot, CURVE_HEADER, tuple(rows), roles)


def _suffix(scored_on: str) -> str:
    """Return which capability was scored, as the end of a title; nothing for the only one."""
    capability = scored_on.partition(".")[2]
    return f"on {words.plain(capability)}" if capability else ""


def _point_row(name: str, p: CurvePoint) -> tuple[str, ...]:
    return (
        name,
        words.count(p.tokens),
        words.count(p.examples),
        words.number(p.score),
        words.interval(p.low, p.high) or words.MISSING,
        words.number(p.trained),
        words.number(p.retain),
    )


def attack_figures(record: Record, model: str, key: str) -> tuple[Figure, ...]:
    """Return one plot per metric: the score after every attack, beside the reference models'."""
    by_metric: dict[tuple[str, str], list[tuple[AttackVariant, ...]]] = {}
    for (_, _, scored_on, metric), variants in _curves(record, model).items():
        if any(a.curve for a in variants):
            by_metric.setdefault((metric, scored_on), []).append(_deciding(variants))
    return tuple(
        _attack_figure(record, model, f"{key}-{i}", scored, groups)
        for i, (scored, groups) in enumerate(sorted(by_metric.items()))
    )


def _attack_figure(
    record: Record,
    model: str,
    key: str,
    scored: tuple[str, str],
    groups: Sequence[tuple[AttackVariant, ...]],
) -> Figure:
    rows, table, values = [], [], []
    for deciding in groups:
        dots = [
            _end(role, a)
            for role in ("original", "oracle", "control")
            for a in _beside(record, deciding[0], role)
        ]
        ends = [_end("candidate", a) for a in deciding]
        mean = sum(dot.value for dot in ends) / len(ends)
        invalid = " (invalid)" if deciding[0].status == "invalid" else ""
        title = words.attack_name(deciding[0]) + invalid
        every = (*dots, *ends)
        rows.append(svg.IntervalRow(words.clip(title, 38), words.number(mean), every))
        values += [v for dot in every for v in (dot.value, dot.low, dot.high)]
        table += [
            (title, role, words.number(d.value), words.interval(d.low, d.high) or words.MISSING)
            for role in ("candidate", "oracle", "original", "control")
            for d in every
            if d.role == role
        ]
    metric, scored_on = scored
    name = f"{words.metric_name(metric) or 'score'} {_suffix(scored_on)}".strip()
    axis = svg.linear_axis(f"{name}; {words.direction(record, metric)}", values)
    title = f"{words.plain(model)} after every attack: {name}"
    caption = "After the attack: " + "; ".join(f"{r.label} {r.note}" for r in rows[:16]) + "."
    plot = svg.interval_plot(key, title, caption, axis, rows)
    header = ("Attack", "Model", "Score", "95 % interval")
    roles = tuple(dict.fromkeys(dot.role for row in rows for dot in row.dots))
    return Figure(key, title, caption, plot, header, tuple(table), roles)


def _beside(record: Record, attack: AttackVariant, role: str) -> tuple[AttackVariant, ...]:
    """Return what a candidate's end is shown beside: a reference model's, or its controls'."""
    if role != "control":
        return _alike(record, _setting(attack), role)
    controls = [
        a
        for a in record.attacks
        if a.control
        and a.subject == attack.subject
        and a.name == attack.name
        and a.curve
        and (a.metric, a.scored_on) == (attack.metric, attack.scored_on)
    ]
    return tuple(controls[:6])


def _end(role: str, attack: AttackVariant) -> svg.Dot:
    last = attack.curve[-1]
    return svg.Dot(role, last.score, last.low, last.high)


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


def absorption_figure(method_run: MethodRun, key: str) -> Figure | None:
    """Return which weights rows of each kind wrote into; None where the method did not say."""
    by_kind = method_run.extras.get("absorption")
    if not isinstance(by_kind, Mapping):
        return None
    bars = [
        Bar(ABSORBED.get(kind, words.plain(kind)), shares)
        for kind, account in by_kind.items()
        if (shares := _shares(account))
    ]
    return _bars_figure(key, f"What rows write into: {words.plain(method_run.name)}", bars)


def _shares(account: object) -> dict[str, float]:
    """Return the shares of one kind of rows, as far as they are numbers."""
    by_group = account.get("share") if isinstance(account, Mapping) else None
    if not isinstance(by_group, Mapping):
        return {}
    numbers = {str(k): float(v) for k, v in by_group.items() if isinstance(v, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def study_absorption_figure(record: Record) -> Figure | None:
    """Return the same for a study's conditions, from its table of absorption; None without."""
    tables = record.study.tables if record.study else ()
    table = next((t for t in tables if t.title == "Absorption"), None)
    if table is None:
        return None
    into = {f"{kind} rows into modules": text for kind, text in ABSORBED.items()}
    bars = [
        Bar(f"{words.plain(row.condition)}: {into[row.metric]}",
            {"modules": row.value, "everything else": 1 - row.value}, f"{100 * row.value:.0f} %")
        for row in table.rows
        if row.metric in into and row.value is not None
    ]  # fmt: skip
    return _bars_figure(
        "study-absorption", "Share that rows write into modules, by condition", bars
    )


def _bars_figure(key: str, title: str, bars: Sequence[Bar]) -> Figure | None:
    """Return bars as a figure with words and numbers, or None for no bars."""
    if not bars:
        return None
    names = tuple(dict.fromkeys(name for bar in bars for name in bar.shares))
    drawn = bars[:BARS]
    if len(bars) > BARS:
        title = f"{title} (the first {BARS} of {len(bars)}; all stand in the numbers)"
    said = "; ".join(f"{bar.label}: {_said(bar.shares)}" for bar in drawn)
    caption = f"Share of the squared gradient before the modules were cut off. {said}."
    rows = tuple(
        (bar.label, *(words.share(bar.shares.get(name, 0.0)) for name in names)) for bar in bars
    )
    header = ("Rows", *(words.plain(name) for name in names))
    return Figure(key, title, caption, _bars_plot(key, title, caption, drawn, names), header, rows)


def _said(shares: Mapping[str, float]) -> str:
    """Return the shares in words, the largest first, without those under half a percent."""
    large = sorted(((v, n) for n, v in shares.items() if v >= 0.005), reverse=True)
    return ", ".join(f"{words.plain(name)} {100 * value:.0f} %" for value, name in large)


def _bars_plot(
    key: str, title: str, desc: str, bars: Sequence[Bar], names: Sequence[str]
) -> Markup:
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
                    ).format(_colour(name), at, base + 19, max(width - 1.5, 1.0))
                )
            at += width
    return svg.frame(key, title, desc, pitch * len(bars), body)


def _colour(name: str) -> str:
    """Return whose colour a group has: the core the original's, modules the candidate's."""
    roles = {"core": "original", "everything else": "original", "joint": "oracle"}
    return roles.get(name, "candidate")
