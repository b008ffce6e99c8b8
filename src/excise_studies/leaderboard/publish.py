"""From a leaderboard's record to its table in the docs.

`python -m excise_studies.leaderboard.publish OUT [FILE]` writes the table between the marks of that
leaderboard in FILE (docs/leaderboard.md), with the commit that it came from; nothing else writes
there.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.record import Record, StudyRow, load
from excise_studies.leaderboard.tables import BOARD, FINAL, LEFT

FILE = Path("docs/leaderboard.md")
"""Where tables are written when nothing else is said."""

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
    took = {r.condition: r for t in study.tables if t.title == "Search" for r in t.rows
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


def publish(out: Path, file: Path = FILE) -> str:
    """Write what a leaderboard found between its marks in a file; return it.

    Args:
        out: The study's output folder.
        file: A Markdown file with the marks `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        UserError: If the folder holds no leaderboard, or the file no such marks.
    """
    record = load(out)
    text = markdown(record)
    assert record.study is not None
    first, last = f"<!-- {record.study.name} -->", f"<!-- /{record.study.name} -->"
    page = file.read_text(encoding="utf-8") if file.is_file() else ""
    between = re.compile(f"{re.escape(first)}.*?{re.escape(last)}", re.DOTALL)
    if not between.search(page):
        raise UserError(f"{file} has no lines '{first}' and '{last}' to write between; add them")
    write_text(file, between.sub(lambda _: f"{first}\n{text}{last}", page))
    return text


def main(arguments: Sequence[str]) -> int:
    """Publish the leaderboard in the folder that the command line names."""
    if len(arguments) not in (1, 2):
        print("usage: python -m excise_studies.leaderboard.publish OUT [FILE]", file=sys.stderr)
        return 2
    try:
        print(publish(*map(Path, arguments)), end="")
    except UserError as error:
        print(f"excise: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
