"""The tables of a leaderboard in Markdown, for `excise_studies.publish`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from excise.core.errors import UserError
from excise.record import Record, StudyRow
from excise_studies.leaderboard.tables import BOARD, FINAL, LEFT, TRIED, UNATTACKED

BESIDE = ("retain change", "left before", "came back", "seeds")
"""Further metrics of a method, labelled in full and not repaired, in their order."""

AT_LEAST = "\u2265"
"""What stands before a number that attacks were not shown to test."""


def markdown(record: Record) -> str:
    """Return the tables of a leaderboard in Markdown, and what they were made by.

    Args:
        record: What `excise run leaderboard` wrote.

    Raises:
        UserError: If it is another record.
    """
    study = record.study
    if study is None or not study.name.startswith("leaderboard"):
        raise UserError("this is no record of a leaderboard; name the output folder of one")
    took = {r.condition: r for t in study.tables if t.title == TRIED for r in t.rows
            if r.metric == "tuning TFLOPs"}  # fmt: skip
    parts = [study.decision[:1].upper() + study.decision[1:] + "."]
    for title, spec in ((FINAL, "final"), (BOARD, "audit")):
        rows = [row for t in study.tables if t.title == title for row in t.rows]
        if rows:
            budget = record.config.get(spec, {}).get("budget", "")
            parts += [f"{title}, budget {budget}:", _table(rows, took)]
    parts += [f"- {note}" for note in record.notes]
    trials = record.config.get("trials", "")
    parts.append(
        f"{trials} trials of each method at most, seeds {', '.join(map(str, record.seeds))}, "
        f"{record.seconds / 60:,.0f} minutes, commit {record.environment.git or 'unknown'}."
    )
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def _table(rows: Sequence[StudyRow], took: dict[str, StudyRow]) -> str:
    """Return one table: a method a line, what it leaves at worst as it was applied.

    The models that it is read against stand below, by the score that all of it is a share of.
    """
    methods: dict[str, dict[tuple[str, str], StudyRow]] = {}
    for row in rows:
        method, _, applied = row.condition.partition(", ")
        methods.setdefault(method, {})[applied, row.metric] = row
    ways = dict.fromkeys(way for cells in methods.values() for way, what in cells if what == LEFT)
    head = ("method", *(", ".join(filter(None, (LEFT, way))) for way in ways), *BESIDE)
    lines = [(*head, "tuning TFLOPs"), ("---",) * (len(head) + 1)]
    known = []
    for name, cells in methods.items():
        if ("", LEFT) not in cells:
            known.append(f"{name} {_cell(cells.get(('', 'held-out score')))}")
            continue
        left = [bound((way, UNATTACKED) in cells, _cell(cells.get((way, LEFT)))) for way in ways]
        rest = [_cell(cells.get(("", metric))) for metric in BESIDE]
        lines.append((name, *left, *rest, _cell(took.get(name))))
    parts = ["\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    if any(row.metric == UNATTACKED for row in rows):
        parts.append(f"{AT_LEAST}: relearning on it is invalid at some seed, a lower bound.")
    if known:
        parts.append(f"Held-out score: {', '.join(known)}.")
    return "\n\n".join(parts)


def bound(lower: bool, cell: str) -> str:
    """Return the cell, marked as a lower bound where it is one."""
    return f"{AT_LEAST} {cell}" if lower and cell else cell


def _cell(row: StudyRow | None) -> str:
    """Return a number with its interval, where it has one."""
    if row is None or row.value is None or not math.isfinite(row.value):
        return ""
    if row.metric == "seeds":
        return f"{row.value:.0f}"
    if row.low is None or row.high is None:
        return f"{row.value:.2f}"
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
