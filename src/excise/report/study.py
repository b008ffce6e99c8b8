"""The page's and the terminal's account of a study: what was stated, what came out."""

from __future__ import annotations

from dataclasses import dataclass

from excise.record import Record, StudyRow, StudyTable
from excise.report import words


@dataclass(frozen=True)
class View:
    """One table with an arm a line and a score a column, as text."""

    key: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def views(record: Record) -> tuple[View, ...]:
    """Return the tables of a record's study; none where there is no study."""
    if record.study is None:
        return ()
    return tuple(_view(table, f"study-{i}") for i, table in enumerate(record.study.tables))


def stated(record: Record) -> tuple[tuple[str, str], ...]:
    """Return what was stated before the study ran."""
    if record.study is None:
        return ()
    found = record.study
    draws = ", ".join(map(str, found.tuned_on))
    return (
        ("Question", words.plain(found.question)),
        ("Statistic", words.plain(found.statistic)),
        ("Margin", f"{found.margin:g}"),
        ("Chosen on draws", draws or "dev rows of the reported draws"),
    )


def _view(table: StudyTable, key: str) -> View:
    """Turn numbers one a line into a table: lines are arms (and draws), columns are scores."""
    columns = list(dict.fromkeys(r.metric for r in table.rows))
    lines: dict[str, dict[str, StudyRow]] = {}
    for r in table.rows:
        name = words.plain(r.condition) + ("" if r.seed is None else f", draw {r.seed}")
        lines.setdefault(name, {})[r.metric] = r
    rows = tuple(
        (name, *(_cell(cells.get(column)) for column in columns)) for name, cells in lines.items()
    )
    header = ("Arm", *(words.plain(c) for c in columns))
    return View(key, words.plain(table.title), words.plain(table.note), header, rows)


def _cell(found: StudyRow | None) -> str:
    """Return a number with its interval."""
    if found is None:
        return "\u2013"
    return f"{words.number(found.value)} {words.interval(found.low, found.high)}".strip()
