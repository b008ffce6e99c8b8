"""The pictures of a record: scores between the rails, gaps, attacks, relearning, losses.

Each returns a `Figure`: a plot, a caption that says the same in words, and the numbers as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from excise.record import ArmRecord, AttackArm, CurvePoint, Record, Score, Verdict
from excise.report import svg, words

MIN_POINTS = 3
"""An attack with fewer checkpoints is a dot, not a curve."""


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
    rank = {"original": 0, "candidate": 1, "planted": 2, "oracle": 3}
    ordered = sorted(scores, key=lambda s: rank[words.role(s.model)])
    chance = next((s.chance for s in scores if s.chance is not None), None)
    bands = list(_rails([s for s in ordered if words.role(s.model) == "original"], "original"))
    bands += _rails([s for s in ordered if words.role(s.model) == "oracle"], "oracle")
    values = [v for s in ordered for v in (s.value, s.low, s.high)]
    metric = words.metric_name(first.metric)
    axis = svg.linear_axis(f"{metric}; {first.direction} is more knowledge", values)
    rows = [
        svg.Row(
            words.plain(s.model),
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
    return Figure(key, title, caption, plot, ("Model", "Score", "95 % interval", "Units"), table, roles)


def _rails(scores: Sequence[Score], role: str) -> Iterable[svg.Band]:
    lows = [s.low for s in scores if math.isfinite(s.low)]
    highs = [s.high for s in scores if math.isfinite(s.high)]
    if lows and highs:
        yield svg.Band(role, role, min(lows), max(highs))


def gap_figure(verdict: Verdict, key: str) -> Figure | None:
    """Return the depth gap of every rung with its interval, or None where none was measured."""
    known = [r for r in verdict.rungs if r.gap is not None and math.isfinite(r.gap)]
    if not known:
        return None
    nan = math.nan
    rows, values = [], [0.0, 1.0]
    for rung in known:
        low, high = (nan if v is None else v for v in (rung.low, rung.high))
        values += [v for v in (rung.gap or 0.0, low, high) if math.isfinite(v)]
        label = f"{rung.rung} {_clip(words.rung_words(rung.rung, verdict.rungs), 34)}"
        rows += [svg.Row(label, words.number(rung.gap), (svg.Dot("candidate", rung.gap or 0.0, low, high),))]
    margins = [r.margin for r in known if r.margin is not None]
    bands = [svg.Band("original", "original", 1.0, 1.0)]
    edge = max(margins, default=0.0)
    bands += [svg.Band("oracle \u00b1 margin" if edge else "oracle", "oracle", -edge, edge)]
    inside = [v for v in values if -2 <= v <= 3]
    axis = svg.linear_axis("depth gap: 0 is the oracle, 1 the original", [*inside, -edge, 1.05])
    title = f"Depth gap by rung: {words.plain(verdict.arm)}"
    caption = "; ".join(
        f"{words.rung_words(r.rung, verdict.rungs)} {words.number(r.gap)} "
        f"{words.interval(r.low, r.high)}".strip()
        for r in known
    )
    table = tuple(
        (
            f"{words.rung_words(r.rung, verdict.rungs)} ({r.rung})",
            words.number(r.gap),
            words.interval(r.low, r.high) or words.MISSING,
            words.number(r.margin),
        )
        for r in known
    )
    header = ("Rung", "Depth gap", "90 % interval", "Margin")
    plot = svg.interval_plot(key, title, caption, axis, rows, bands)
    return Figure(key, title, caption + ".", plot, header, table, ("candidate", "original", "oracle"))


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "\u2026"


def _chosen(arms: Sequence[AttackArm]) -> tuple[AttackArm, ...]:
    ran = [a for a in arms if a.curve]
    return tuple([a for a in ran if a.decisive] or ran)


def pooled(arms: Sequence[AttackArm]) -> tuple[CurvePoint, ...]:
    """Return the mean curve of several seeds or oracles; its band covers all their intervals.

    Checkpoints are matched by position; the shortest curve decides how many there are.
    """
    result = []
    for points in zip(*(a.curve for a in arms), strict=False):
        known = [p for p in points if math.isfinite(p.score)]
        if not known:
            continue
        trained = [p.trained for p in known if p.trained is not None]
        retain = [p.retain for p in known if p.retain is not None]
        point = CurvePoint(
            examples=round(sum(p.examples for p in known) / len(known)),
            tokens=round(sum(p.tokens for p in known) / len(known)),
            flops=sum(p.flops for p in known) / len(known),
            score=sum(p.score for p in known) / len(known),
            low=min(p.low for p in known),
            high=max(p.high for p in known),
            trained=sum(trained) / len(trained) if trained else None,
            retain=sum(retain) / len(retain) if retain else None,
        )
        result.append(point)
    return tuple(result)


def _key(arm: AttackArm) -> tuple[str, str, str, str]:
    return (arm.name, arm.arm, arm.scored_on, arm.metric)


def _curves(record: Record, arm: str) -> dict[tuple[str, str, str, str], list[AttackArm]]:
    groups: dict[tuple[str, str, str, str], list[AttackArm]] = {}
    for attack in words.attacks_on(record, arm):
        if not attack.control and attack.status in ("ok", "void"):
            groups.setdefault(_key(attack), []).append(attack)
    return groups


def relearn_figures(record: Record, arm: str, key: str) -> tuple[Figure, ...]:
    """Return one plot per attack with a curve: score of V over the attacker's tokens.

    Args:
        record: The record.
        arm: Which removed model.
        key: Prefix of the ids.
    """
    figures = []
    for index, (group, found) in enumerate(_curves(record, arm).items()):
        chosen = _chosen(found)
        if max((len(a.curve) for a in chosen), default=0) >= MIN_POINTS:
            rivals = {
                role: _chosen(
                    [
                        a
                        for a in record.attacks
                        if _key(a) == group and words.role(a.subject) == role and not a.control
                    ]
                )
                for role in ("original", "oracle", "planted")
            }
            mine = words.attacks_on(record, arm)
            controls = [a for a in mine if a.control and a.name == group[0] and a.scored_on == group[2]]
            rivals["control"] = tuple(controls)
            figures.append(_relearn_figure(record, f"{key}-{index}", chosen, rivals))
    return tuple(figures)


def _relearn_figure(
    record: Record,
    key: str,
    chosen: tuple[AttackArm, ...],
    rivals: dict[str, tuple[AttackArm, ...]],
) -> Figure:
    first = chosen[0]
    drawn = {k: pooled(v) for k, v in rivals.items() if v and k != "planted"}
    drawn = {k: v for k, v in drawn.items() if len(v) > 1}
    drawn["candidate"] = pooled(chosen)
    lines, rows, said = [], [], []
    for role, points in drawn.items():
        name = "controls" if role == "control" else role
        line = svg.Line(
            name,
            role,
            tuple((p.tokens, p.score) for p in points),
            tuple((p.tokens, p.low, p.high) for p in points),
        )
        trained = tuple((p.tokens, p.trained) for p in points if p.trained is not None)
        if role == "candidate" and trained:
            lines.append(svg.Line("candidate on T", "trained", trained))
        lines.append(line)
        said.append(svg.describe(name, line.points, "tokens"))
        rows += [_point_row(name, p) for p in points]
    metric = words.metric_name(first.metric) or "score"
    values = [v for line in lines for _, v in line.points]
    values += [v for line in lines for _, a, b in line.band for v in (a, b)]
    y = svg.linear_axis(f"{metric} on V; {words.direction(record, first.metric)}", values)
    x = svg.log_axis("attacker's tokens", [p for line in lines for p, _ in line.points])
    title = f"{_title(first)} {_set_suffix(first)}".strip()
    if all(a.status == "void" for a in chosen):
        title += " (void)"
    seeds = len({a.seed for a in chosen})
    caption = "; ".join(reversed(said)) + "."
    caption += f" Mean of {seeds} seeds; bands cover all intervals." if seeds > 1 else ""
    header = ("Line", "Tokens", "Examples", "V", "95 % interval", "T", "Retain")
    roles = tuple(dict.fromkeys([*drawn, *(line.role for line in lines)]))
    plot = svg.line_plot(key, title, caption, x, y, lines)
    return Figure(key, title, caption, plot, header, tuple(rows), roles)


def _title(arm: AttackArm) -> str:
    name = words.plain(arm.name).replace("_", " ")
    return f"{name}, {words.plain(arm.arm)}" if arm.arm else name


def _set_suffix(arm: AttackArm) -> str:
    rest = arm.scored_on.partition(".")[2]
    return f"on {words.plain(rest)}" if rest else ""


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


def attack_figures(record: Record, arm: str, key: str) -> tuple[Figure, ...]:
    """Return one plot per metric: where V ended under every attack, beside the rails."""
    by_metric: dict[tuple[str, str], list[tuple[AttackArm, ...]]] = {}
    for group, found in _curves(record, arm).items():
        if any(a.curve for a in found):
            by_metric.setdefault((group[3], group[2]), []).append(_chosen(found))
    items = sorted(by_metric.items())
    return tuple(_attack_figure(record, f"{key}-{i}", m, g) for i, (m, g) in enumerate(items))


def _attack_figure(
    record: Record, key: str, of: tuple[str, str], groups: Sequence[tuple[AttackArm, ...]]
) -> Figure:
    rows, table, values = [], [], []
    for chosen in groups:
        dots = []
        for role in ("original", "oracle", "control"):
            arms = _beside(record, chosen[0], role)
            dots += [_end(role, a) for a in arms]
        ends = [_end("candidate", a) for a in chosen]
        mean = sum(d.value for d in ends) / len(ends)
        title = _title(chosen[0]) + (" (void)" if chosen[0].status == "void" else "")
        rows.append(svg.Row(_clip(title, 44), words.number(mean), (*dots, *ends)))
        values += [v for d in (*dots, *ends) for v in (d.value, d.low, d.high)]
        for role in ("candidate", "oracle", "original", "control"):
            said = [d for d in (*dots, *ends) if d.role == role]
            table += [
                (title, role, words.number(d.value), words.interval(d.low, d.high) or words.MISSING)
                for d in said
            ]
    metric, scored = of
    suffix = scored.partition(".")[2]
    name = f"{words.metric_name(metric) or 'score'}{f' on {words.plain(suffix)}' if suffix else ''}"
    axis = svg.linear_axis(f"{name}; {words.direction(record, metric)}", values)
    title = f"V after every attack: {name}"
    caption = "After the attack: " + "; ".join(f"{r.label} {r.note}" for r in rows[:16]) + "."
    plot = svg.interval_plot(key, title, caption, axis, rows)
    header = ("Attack", "Model", "Score", "95 % interval")
    roles = tuple(dict.fromkeys(d.role for r in rows for d in r.dots))
    return Figure(key, title, caption, plot, header, tuple(table), roles)


def _beside(record: Record, arm: AttackArm, role: str) -> tuple[AttackArm, ...]:
    if role == "control":
        same = [
            a
            for a in record.attacks
            if a.control and a.subject == arm.subject and a.name == arm.name and a.curve
            and (a.metric, a.scored_on) == (arm.metric, arm.scored_on)
        ]
        return tuple(same[:6])
    found = [
        a
        for a in record.attacks
        if _key(a) == _key(arm) and words.role(a.subject) == role and not a.control
    ]
    return _chosen(found)


def _end(role: str, arm: AttackArm) -> svg.Dot:
    last = arm.curve[-1]
    return svg.Dot(role, last.score, last.low, last.high)


def history_figure(arm: ArmRecord, key: str) -> Figure | None:
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
    y = replace(svg.linear_axis("loss", [b for line in lines for _, b in line.points]), label="loss")
    said = "; ".join(svg.describe(line.name, line.points, "steps") for line in lines)
    title = f"Losses by step: {words.plain(arm.name)}"
    plot = svg.line_plot(key, title, said, x, y, lines)
    every = rows[:: max(1, len(rows) // 20)]
    table = tuple(
        (words.count(r["step"]), *(words.number(r.get(n)) for n in names[:4])) for r in every
    )
    header = ("Step", *(words.plain(n) for n in names[:4]))
    return Figure(key, title, said + ".", plot, header, table, tuple(x.role for x in lines))
