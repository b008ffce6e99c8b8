"""`excise verify DIR`: are the files of an output folder those that its record speaks of?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import pyarrow.parquet as pq

from excise.cli.options import VerifyOptions
from excise.core.disk import file_sum
from excise.core.errors import UserError
from excise.models.on_disk import Checkpoint
from excise.record import ModelRef, Record, load, parse_record
from excise.record.requirements import MISSED
from excise.report.page import render_html

ITEMS = 1e-6
"""Largest relative distance between a score and the mean of its items."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what, how it stands, and why."""

    what: str
    status: Literal["ok", "changed", "missing", "extra", "not here"]
    why: str = ""


def main(options: VerifyOptions) -> int:
    """Print every file that is not as recorded, and how many are.

    Raises:
        UserError: If the folder holds no record, or nothing that a record speaks of.
    """
    record = load(options.folder)
    findings = [*_models(options.folder, record), *_tables(options.folder, record)]
    if all(finding.status == "not here" for finding in findings):
        raise UserError(f"{options.folder} holds nothing but its record; name an output folder")
    for f in findings:
        if f.status != "ok" or f.why:
            print(f"{f.status:<9} {f.what}" + (f": {f.why}" if f.why else ""))
    wrong = sum(f.status in ("changed", "missing", "extra") for f in findings)
    good = sum(f.status == "ok" for f in findings)
    print(f"{good} as recorded, {wrong} not")
    return MISSED if wrong else 0


def _models(folder: Path, record: Record) -> Iterator[Finding]:
    """Check every model: those of the folder must be there, others where they still are."""
    runs = [run.model for run in record.method_runs]
    for ref in (*runs, *record.models):
        inside = bool(ref.path) and not Path(ref.path).is_absolute() and record.kind != "audit"
        path = folder / ref.path if inside and ref in runs else Path(ref.path)
        own = inside and ref in runs
        if ref.path and path.is_dir():
            yield from _by_files(path, ref, own=own) if ref.files else _by_fingerprint(path, ref)
        elif own:
            yield Finding(str(path), "missing", f"the model '{ref.name}'")
        else:
            where = ref.path or "nowhere that the record says"
            yield Finding(f"'{ref.name}'", "not here", f"it was in {where}; not checked")


def _by_files(path: Path, ref: ModelRef, *, own: bool) -> Iterator[Finding]:
    """Check a model file by file; what the record does not know counts in the folder's own."""
    for name, recorded in ref.files.items():
        file = path / name
        if not file.is_file():
            yield Finding(str(file), "missing")
        elif file_sum(file) != recorded:
            yield Finding(str(file), "changed", f"SHA-256 {file_sum(file)}, recorded {recorded}")
        else:
            yield Finding(str(file), "ok")
    for file in sorted(path.rglob("*")) if own else ():
        name = file.relative_to(path).as_posix()
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and name != "README.md" and name not in ref.files:
            yield Finding(str(file), "extra", "the record does not know it")


def _by_fingerprint(path: Path, ref: ModelRef) -> Iterator[Finding]:
    """Check a model of an older record, which holds one hash over all its files."""
    why = "an older record: weights and configuration by one hash, no file by its own"
    try:
        there = Checkpoint(path)
        same = there.fingerprint == ref.fingerprint
        same = same and ref.tokenizer in ("", there.tokenizer_fingerprint)
    except UserError as error:
        yield Finding(str(path), "changed", str(error))
        return
    yield Finding(str(path), "ok" if same else "changed", why)


def _tables(folder: Path, record: Record) -> Iterator[Finding]:
    """Check that report and items tell what the record tells."""
    page = folder / "report.html"
    if not page.is_file():
        yield Finding(str(page), "missing", f"excise report {folder} writes it again")
    else:
        text = page.read_text(encoding="utf-8", errors="replace")
        match = re.search(r'<script[^>]*id="record"[^>]*>(.*?)</script>', text, re.DOTALL)
        same = match is not None and _record_in(match[1], record)
        why = "" if same else "it tells of another record"
        if same and text != render_html(record):
            same, why = False, "it does not say what the record says"
        why += f"; excise report {folder} writes it again" if why else ""
        yield Finding(str(page), "ok" if same else "changed", why)
    items = folder / "items.parquet"
    if not items.is_file():
        yield Finding(str(items), "missing" if record.scores else "not here", "no items")
        return
    yield _items(items, record)


def _record_in(text: str, record: Record) -> bool:
    """Return whether the record that a page embeds is this one, as far as a page shows it."""
    shown = record
    if record.sensitive:
        inspection = record.inspection and record.inspection.model_copy(update={"strips": ()})
        shown = record.model_copy(update={"samples": (), "inspection": inspection})
    try:
        return parse_record(json.loads(text)).model_dump_json() == shown.model_dump_json()
    except ValueError:
        return False


def _items(path: Path, record: Record) -> Finding:
    """Check that the mean over units of every score is the record's."""
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        return Finding(str(path), "changed", str(error).splitlines()[0])
    units: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        key = (row["model"], row["set"], row["metric"])
        units.setdefault(key, {}).setdefault(row["unit"], []).append(row["value"])
    for s in record.scores:
        by_unit = units.get((s.model, s.set, s.metric))
        if not by_unit:
            continue
        value = fmean(fmean(values) for values in by_unit.values())
        if abs(value - s.value) > ITEMS * max(1.0, abs(s.value)) or len(by_unit) != s.n:
            what = f"{s.metric} of {s.model} on {s.set}"
            return Finding(str(path), "changed", f"{what} is {value:.6g}, recorded {s.value:.6g}")
    return Finding(str(path), "ok")
