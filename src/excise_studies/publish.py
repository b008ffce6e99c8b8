"""From the record of a finished study to what the docs say of it.

`python -m excise_studies.publish OUT [NAME]` keeps a compact record in `docs/records/NAME.json`
(the study's own name when left out) and writes what is shown of it between the marks of that name,
in README.md and docs/*.md:

    <!-- NAME -->            paragraph, table, and where they come from; ends with <!-- /NAME -->
    <!-- NAME: decision -->  the decision and what it rests on; ends with <!-- /NAME: decision -->
    <!-- NAME: picture -->   the score that the study names by condition, else what it rests on, as
                             a picture, `docs/records/NAME.svg`; ends alike

Nothing else writes between marks; a test renders every block again and compares.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.core.plain import read_json
from excise.record import Record, StudyContrast, StudyRow, StudyTable, load, parse_record
from excise.record.error_rates import FILE, rates_by_budget
from excise.report.study import by_condition, decimals, forest, views
from excise.report.svg import standalone
from excise.run.study import study_named, study_points
from excise_studies.auditing import rates
from excise_studies.leaderboard.markdown import markdown as leaderboard

RECORDS = Path("docs", "records")
"""Where compact records lie, under the root of the repository."""

LIMIT = 40_000
"""Bytes of one of them."""

NOT_RUN = "Not run yet at its size.\n"
"""What stands between marks that have no record."""

NOT_DRAWN = "Nothing to draw: nothing has an interval.\n"

MARKS = re.compile(r"<!-- ([\w-]+)((?:: decision|: picture)?) -->\n(.*?)<!-- /\1\2 -->", re.DOTALL)
"""A block: its name, whether it is a decision or a picture alone, its text."""

ABSOLUTE = re.compile(r"(?<![\w.:/<])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\",;]+[/\\])+")
"""The folders of an absolute path."""

LINE = re.compile(r'\[\s+("(?:[^"\\\n]|\\.)*",(?:\s+(?:null|-?[\d.e-]+|\[[^][{}"]*\]),?)+)\s+\]')
"""A line of a table in a record: a condition, a seed and numbers."""

# -- the compact record ----------------------------------------------------------------------------


def compact(record: Record) -> Record:
    """Return of a study's record what docs quote and what it takes to hold them to it.

    Kept are question, statistic, margin, seeds, decision, contrasts, the quoted tables with their
    numbers by seed, notes, single-valued settings, commit, date and versions. Left out are models,
    items, pictures, plots and every absolute path.

    Args:
        record: What `excise study` wrote.

    Raises:
        UserError: If it is no record of a finished study.
    """
    study = record.study
    if study is None or not study.decision:
        raise UserError("this is no record of a finished study; name the output folder of one")
    cls = study_named(study.name) if study.name in study_points() else None
    titles = (cls.quoted if cls else ()) or tuple(t.title for t in study.tables[:1])
    tables = tuple(table for table in study.tables if table.title in titles)
    environment = record.environment.model_copy(update={"platform": ""})
    kept = Record(
        kind=record.kind,
        title=record.title,
        config=_settings(record.config),
        environment=environment,
        seeds=record.seeds,
        data={key: record.data[key] for key in ("name", "fingerprint") if key in record.data},
        study=study.model_copy(update={"tables": tables, "pictures": (), "plots": ()}),
        seconds=round(record.seconds),
        notes=record.notes,
    )
    return Record.model_validate(_rounded(kept.model_dump(mode="json", by_alias=True)))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that are single values or lists of them, and what an audit's budget was."""
    kept = {
        key: value
        for key, value in config.items()
        if not any(isinstance(v, dict | list) for v in (value if _many(value) else [value]))
    }
    parts = ("budget", "change", "attacks")
    budgets = {
        key: {part: config[key][part] for part in parts if part in config[key]}
        for key in ("audit", "final")
        if isinstance(config.get(key), dict)
    }
    return kept | budgets


def _many(value: object) -> bool:
    return isinstance(value, list | tuple)


def _rounded(value: Any) -> Any:
    """Return plain data with five digits of every fraction, and without folders of paths."""
    if isinstance(value, float) and value != round(value):
        return float(f"{value:.5g}")
    if isinstance(value, str):
        return ABSOLUTE.sub("", value)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if _many(value) else value


def text_of(record: Record) -> str:
    """Return a compact record as JSON: a table has a line a condition and a cell a metric.

    Args:
        record: What `compact` returned.

    Raises:
        UserError: If it is larger than what a repository should hold.
    """
    data = record.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    data["schema"] = record.version
    assert record.study is not None
    data["study"]["tables"] = [_packed(table) for table in record.study.tables]
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    flat = re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    flat = LINE.sub(lambda m: "[" + re.sub(r"\n +", " ", m[1]) + "]", flat) + "\n"
    if len(flat.encode()) > LIMIT:
        raise UserError(
            f"the record would take {len(flat.encode()):,} bytes of at most {LIMIT:,}; run fewer "
            "conditions, or let the study's `quoted` name fewer tables"
        )
    return flat


def _packed(table: StudyTable) -> dict[str, Any]:
    """Return a table by lines of condition, seed, and value, ends and n by metric."""
    metrics = list(dict.fromkeys(row.metric for row in table.rows))
    lines: dict[tuple[str, int | None], dict[str, StudyRow]] = {}
    for row in table.rows:
        lines.setdefault((row.condition, row.seed), {})[row.metric] = row
    rows = [
        [*key, *([r.value, r.low, r.high, r.n] if (r := cells.get(m)) else None for m in metrics)]
        for key, cells in lines.items()
    ]
    return {"title": table.title, "note": table.note, "metrics": metrics, "lines": rows}


def _unpacked(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as the record's schema has it."""
    names = ("condition", "seed", "metric", "value", "low", "high", "n")
    rows = [
        dict(zip(names, (condition, seed, metric, *cell), strict=True))
        for condition, seed, *cells in data["lines"]
        for metric, cell in zip(data["metrics"], cells, strict=True)
        if cell is not None
    ]
    return {"title": data["title"], "note": data["note"], "rows": rows}


def read(path: Path) -> Record:
    """Return the compact record that a file holds."""
    data = read_json(path)
    data["study"]["tables"] = [_unpacked(table) for table in data["study"]["tables"]]
    return parse_record(data)


# -- what is shown of it ---------------------------------------------------------------------------


def block(record: Record) -> str:
    """Return what stands between the marks of a study."""
    assert record.study is not None
    special = _special(record.study.name)
    if special is not None:
        return special(record)
    shown = record.study.model_copy(
        update={
            "tables": tuple(
                table.model_copy(update={"rows": tuple(r for r in table.rows if r.seed is None)})
                for table in record.study.tables
            )
        }
    )
    tables = [
        table_of([view.header, *view.rows])
        for view in views(record.model_copy(update={"study": shown}))
    ]
    return "\n\n".join([f"> {record.study.paragraph}", *tables, _source(record)]) + "\n"


def decision(record: Record) -> str:
    """Return what stands between the marks of a decision: its words whole, and the contrasts."""
    assert record.study is not None
    text = record.study.decision
    said = "; ".join(_contrast(contrast) for contrast in record.study.contrasts)
    parts = [f"{text[:1].upper()}{text[1:]}.", *([f"{said}."] if said else []), _source(record)]
    return " ".join(parts) + "\n"


def picture(record: Record) -> str:
    """Return what the study names `pictured`, else its contrasts, as an SVG file.

    Returns:
        The text of the file; empty where nothing has an interval.
    """
    study = record.study
    assert study is not None
    pictured = study_named(study.name).pictured if study.name in study_points() else ""
    drawn = by_condition(study, pictured) if pictured else forest(study)
    return "" if drawn is None else standalone(drawn)


def _shown(record: Record, name: str) -> str:
    """Return the line that shows a picture in a page of docs."""
    said = re.search(r"<desc[^>]*>(.*?)</desc>", picture(record))
    return f"![{said[1]}]({RECORDS.name}/{name}.svg)\n" if said else NOT_DRAWN


def _contrast(contrast: StudyContrast) -> str:
    """Return one comparison in words."""
    numbers = [contrast.value, contrast.low, contrast.high]
    value, low, high = (
        "not defined" if x is None else f"{x:.{decimals(contrast)}f}" for x in numbers
    )
    ends = "" if contrast.low is None else f" [{low}, {high}]"
    margin = " and ".join(f"{x:g}" for x in contrast.thresholds)
    open_ = contrast.verdict == "undecided"
    more = f", about {contrast.needed:,} seeds would decide" if open_ and contrast.needed else ""
    return f"{contrast.name} {value}{ends}, n = {contrast.n}, against {margin}{more}"


def _source(record: Record) -> str:
    """Return what a number was made with."""
    assert record.study is not None
    made, tuned = record.environment, record.study.tuned_on
    chosen = f" (settings chosen on {', '.join(map(str, tuned))})" if tuned else ""
    torch = f", torch {made.versions['torch']}" if "torch" in made.versions else ""
    return (
        f"Seeds {', '.join(map(str, record.seeds))}{chosen}; commit {made.git or 'unknown'}, "
        f"{made.started[:10]}, excise {made.excise}{torch}."
    )


def table_of(lines: Sequence[Sequence[str]]) -> str:
    """Return cells as a table in Markdown, the first line its head."""
    head, *rows = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    body = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in body)
    return text.replace("\u2212", "-").replace("\u2013", "").replace("  |", " |")


def _special(name: str) -> Callable[[Record], str] | None:
    """Return what renders studies that have tables of their own."""
    if name == "auditor-roc":
        return lambda record: rates.markdown(rates.rates_of(record), rates.budget_of(record))
    return leaderboard if name.startswith("leaderboard") else None


# -- pages -----------------------------------------------------------------------------------------


def pages(root: Path) -> list[Path]:
    """Return the pages that may quote studies."""
    return [p for p in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if p.is_file()]


def blocks(root: Path, file: Path = FILE) -> dict[str, str]:
    """Return all that may stand between marks.

    Args:
        root: The repository.
        file: Where the auditor's error rates are kept by budget; its block is all of them.

    Returns:
        By name; decisions and pictures as `NAME: decision` and `NAME: picture`.
    """
    found: dict[str, str] = {}
    for path in sorted((root / RECORDS).glob("*.json")):
        record = read(path)
        found |= {
            path.stem: block(record),
            f"{path.stem}: decision": decision(record),
            f"{path.stem}: picture": _shown(record, path.stem),
        }
    measured = [rates.markdown(each, budget) for budget, each in rates_by_budget(file).items()]
    return found | ({"auditor-roc": "\n".join(measured)} if measured else {})


def names_in(page: str) -> set[str]:
    """Return the names of the blocks in the text of a page."""
    return {match[1] for match in MARKS.finditer(page)}


def filled(page: str, known: Mapping[str, str]) -> str:
    """Return the text of a page with its blocks written anew.

    Args:
        page: The text.
        known: What stands between marks, by name; what is not there has not been run.
    """

    def again(match: re.Match[str]) -> str:
        name = match[1] + match[2]
        return f"<!-- {name} -->\n{known.get(name, NOT_RUN)}<!-- /{name} -->"

    return MARKS.sub(again, page)


def publish(out: Path, name: str = "", root: Path = Path(), file: Path = FILE) -> str:
    """Keep what a study found, and write it between its marks.

    Args:
        out: The study's output folder.
        name: Name of record and marks; the study's own when empty.
        root: The repository.
        file: Where the auditor's error rates are kept by budget.

    Returns:
        What stands between its marks now.

    Raises:
        UserError: If the folder holds no finished study, its record is too large, or no page has
            such marks.
    """
    full = load(out)
    record = compact(full)
    assert record.study is not None
    name = name or record.study.name
    text = text_of(record)
    named = [page for page in pages(root) if name in names_in(page.read_text("utf-8"))]
    if not named:
        raise UserError(
            f"no page has lines '<!-- {name} -->' and '<!-- /{name} -->' to write between; add "
            "them to README.md or to a page of docs, and run this in the repository's root"
        )
    if record.study.name == "auditor-roc":
        rates.keep(full, file)
    (root / RECORDS).mkdir(parents=True, exist_ok=True)
    write_text(root / RECORDS / f"{name}.json", text)
    if any(f"<!-- {name}: picture -->" in page.read_text("utf-8") for page in named):
        write_text(root / RECORDS / f"{name}.svg", picture(record))
    known = blocks(root, file)
    for page in named:
        write_text(page, filled(page.read_text("utf-8"), known))
    return known[name]


def main(arguments: Sequence[str]) -> int:
    """Publish the study in the folder that the command line names."""
    if len(arguments) not in (1, 2):
        print("usage: python -m excise_studies.publish OUT [NAME]", file=sys.stderr)
        return 2
    try:
        print(publish(Path(arguments[0]), "".join(arguments[1:])), end="")
    except UserError as error:
        print(f"excise: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
