"""`excise compare DIR ...`: edited models of several output folders in one table and one page."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from excise.cli.options import CompareOptions
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.record import Record, load
from excise.record.comparison import compare
from excise.report.comparison import FORMATS, render_html, render_terminal


def main(options: CompareOptions) -> int:
    """Read the records, print the table, write the page and what else was asked for.

    Raises:
        UserError: If a folder holds no record, two have one name, or a file cannot be written.
    """
    comparison = compare(records_of(options.folders))
    if (options.out / "run.json").is_file() or options.out.is_file():
        raise UserError(f"--out {options.out} holds something else; name a folder of its own")
    files = {options.out / "report.html": render_html(comparison)}
    for name, written in FORMATS.items():
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"--{name} {path} is a folder; name a file")
        if name == "figure" and path.suffix.lower() != ".svg":
            raise UserError(f"--figure {path}: name a file that ends in .svg")
        files[path] = written(comparison)
        if not files[path]:
            raise UserError(f"--{name}: no relearning was measured, so there is nothing to draw")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    console = Console()
    console.print(render_terminal(comparison))
    for path in files:
        console.print(f"wrote   {shlex.quote(str(path))}", markup=False, highlight=False)
    return 0


def records_of(folders: tuple[str, ...]) -> dict[str, Record]:
    """Return records by what their models shall be called.

    Args:
        folders: DIR or NAME=DIR; without a name, the folder's own.

    Raises:
        UserError: If a folder holds no record, or two have one name.
    """
    records: dict[str, Record] = {}
    for word in folders:
        name, equals, path = word.partition("=")
        if not equals or Path(word).exists() or "/" in name:
            name, path = "", word
        folder = Path(path)
        name = name or folder.resolve().name
        if name in records:
            raise UserError(f"two folders are called '{name}'; write NAME=DIR to tell them apart")
        records[name] = load(folder)
    return records
