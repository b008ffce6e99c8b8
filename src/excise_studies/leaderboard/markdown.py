"""The tables of a leaderboard in Markdown, for `excise_studies.publish`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from excise.core.errors import UserError
from excise.record import Record, StudyRow
from excise_studies.leaderboard.tables import BOARD, FINAL, LEFT, TRIED

COLUMNS = (LEFT, "retain change", "left before", "held-out score", "came back", "levels", "seeds")
"""Metrics of the table that are published, in their order."""


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
    """Return one table: a condition a line, and the tuning compute of its method."""
    conditions: dict[str, dict[str, StudyRow]] = {}
    for row in rows:
        conditions.setdefault(row.condition, {})[row.metric] = row
    lines = [("method", *COLUMNS, "tuning TFLOPs"), ("---",) * (len(COLUMNS) + 2)]
    for name, cells in conditions.items():
        cost = took.get(name)
        lines.append((name, *(_cell(cells.get(c)) for c in COLUMNS), _cell(cost)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(row: StudyRow | None) -> str:
    """Return a number with its interval, where it has one."""
    if row is None or row.value is None or not math.isfinite(row.value):
        return ""
    if row.metric in ("levels", "seeds"):
        return f"{row.value:.0f}"
    if row.low is None or row.high is None:
        return f"{row.value:.2f}"
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"
