"""`excise report DIR`: rebuild the report from the record alone, for oneself or for the public."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from excise.cli.options import ReportOptions
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.record import load, save_as
from excise.record.redaction import public
from excise.report.page import render_html, write_report
from excise.report.terminal import finish


def main(options: ReportOptions) -> int:
    """Write the page and print the summary; of a public page, where it lies.

    Raises:
        UserError: If the folder holds no record, or the public page cannot be written there.
    """
    if options.public:
        return write_public(options.folder, options.out or options.folder / "report.public.html")
    if options.out is not None:
        raise UserError("--out goes with --public; the report itself is DIR/report.html")
    write_report(options.folder)
    finish(options.folder)
    return 0


def write_public(folder: Path, page: Path) -> int:
    """Write page and record without texts, names and paths, side by side."""
    if page.suffix != ".html" or page.is_dir():
        raise UserError(f"--out {page}: name an HTML file, such as report.public.html")
    record = public(load(folder), units_of(folder / "items.parquet"))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, render_html(record))
    beside = save_as(record, page.with_suffix(".json"))
    print(f"wrote   {page}\nwrote   {beside}")
    return 0


def units_of(items: Path) -> list[str]:
    """Return the unit ids of a folder's items, in order; none where no item was kept."""
    if not items.is_file():
        return []
    return list(dict.fromkeys(pq.read_table(items, columns=["unit"])["unit"].to_pylist()))
