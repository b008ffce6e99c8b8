"""Pictures of the attacks: relearning curves between the rails, and where every attack ended."""

from __future__ import annotations

import math
from collections.abc import Sequence

from excise.record import AttackVariant, CurvePoint, Record
from excise.report import svg, words
from excise.report.figures import Figure

MIN_POINTS = 3
"""An attack with fewer checkpoints is a dot, not a curve."""


def _chosen(arms: Sequence[AttackVariant]) -> tuple[AttackVariant, ...]:
    ran = [a for a in arms if a.curve]
    return tuple([a for a in ran if a.decisive] or ran)


def pooled(arms: Sequence[AttackVariant]) -> tuple[CurvePoint, ...]:
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


def _key(arm: AttackVariant) -> tuple[str, str, str, str]:
    return (arm.name, arm.variant, arm.scored_on, arm.metric)


def _curves(record: Record, arm: str) -> dict[tuple[str, str, str, str], list[AttackVariant]]:
    groups: dict[tuple[str, str, str, str], list[AttackVariant]] = {}
    for attack in words.attacks_on(record, arm):
        if not attack.control and attack.status in ("ok", "invalid"):
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
                for role in ("original", "oracle", "positive")
            }
            mine = words.attacks_on(record, arm)
            controls = [
                a for a in mine if a.control and a.name == group[0] and a.scored_on == group[2]
            ]
            rivals["control"] = tuple(controls)
            figures.append(_relearn_figure(record, f"{key}-{index}", chosen, rivals))
    return tuple(figures)


def _relearn_figure(
    record: Record,
    key: str,
    chosen: tuple[AttackVariant, ...],
    rivals: dict[str, tuple[AttackVariant, ...]],
) -> Figure:
    first = chosen[0]
    drawn = {k: pooled(v) for k, v in rivals.items() if v and k != "positive"}
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
    title = f"{attack_title(first)} {_set_suffix(first)}".strip()
    if all(a.status == "invalid" for a in chosen):
        title += " (invalid)"
    seeds = len({a.seed for a in chosen})
    caption = "; ".join(reversed(said)) + "."
    caption += f" Mean of {seeds} seeds; bands cover all intervals." if seeds > 1 else ""
    header = ("Line", "Tokens", "Examples", "V", "95 % interval", "T", "Retain")
    roles = tuple(dict.fromkeys([*drawn, *(line.role for line in lines)]))
    plot = svg.line_plot(key, title, caption, x, y, lines)
    return Figure(key, title, caption, plot, header, tuple(rows), roles)


def attack_title(arm: AttackVariant) -> str:
    """Return the name of an attack with its variant, in words."""
    name = words.plain(arm.name).replace("_", " ")
    return f"{name}, {words.plain(arm.variant)}" if arm.variant else name


def _set_suffix(arm: AttackVariant) -> str:
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
    by_metric: dict[tuple[str, str], list[tuple[AttackVariant, ...]]] = {}
    for group, found in _curves(record, arm).items():
        if any(a.curve for a in found):
            by_metric.setdefault((group[3], group[2]), []).append(_chosen(found))
    items = sorted(by_metric.items())
    return tuple(_attack_figure(record, arm, f"{key}-{i}", m, g) for i, (m, g) in enumerate(items))


def _attack_figure(
    record: Record,
    arm: str,
    key: str,
    of: tuple[str, str],
    groups: Sequence[tuple[AttackVariant, ...]],
) -> Figure:
    rows, table, values = [], [], []
    for chosen in groups:
        dots = []
        for role in ("original", "oracle", "control"):
            arms = _beside(record, chosen[0], role)
            dots += [_end(role, a) for a in arms]
        ends = [_end("candidate", a) for a in chosen]
        mean = sum(d.value for d in ends) / len(ends)
        title = attack_title(chosen[0]) + (" (invalid)" if chosen[0].status == "invalid" else "")
        rows.append(svg.Row(words.clip(title, 38), words.number(mean), (*dots, *ends)))
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
    title = f"{words.plain(arm)} after every attack: {name}"
    caption = "After the attack: " + "; ".join(f"{r.label} {r.note}" for r in rows[:16]) + "."
    plot = svg.interval_plot(key, title, caption, axis, rows)
    header = ("Attack", "Model", "Score", "95 % interval")
    roles = tuple(dict.fromkeys(d.role for r in rows for d in r.dots))
    return Figure(key, title, caption, plot, header, tuple(table), roles)


def _beside(record: Record, arm: AttackVariant, role: str) -> tuple[AttackVariant, ...]:
    if role == "control":
        same = [
            a
            for a in record.attacks
            if a.control
            and a.subject == arm.subject
            and a.name == arm.name
            and a.curve
            and (a.metric, a.scored_on) == (arm.metric, arm.scored_on)
        ]
        return tuple(same[:6])
    found = [
        a
        for a in record.attacks
        if _key(a) == _key(arm) and words.role(a.subject) == role and not a.control
    ]
    return _chosen(found)


def _end(role: str, arm: AttackVariant) -> svg.Dot:
    last = arm.curve[-1]
    return svg.Dot(role, last.score, last.low, last.high)
