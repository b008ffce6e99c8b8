"""From the output folders of shards to the one of their run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from excise.core.disk import check_free, part_of, write_text
from excise.core.errors import UserError
from excise.core.plain import NotPlain, read_json
from excise.record import Record, load, save
from excise.report.page import write_report
from excise.run.output import LOCK, RECIPE, hold, same_run
from excise.run.pools import NOTE, Shard, ShardNote

EVENTS = "events.jsonl"
NUMBERS = {"seeds", "scores", "attacks", "verdicts", "study"}
"""What the records of shards have alike, whoever did the jobs and wherever that was."""


def shards_of(out: Path) -> list[Path]:
    """Return the folders that lie where the shards of an output folder leave theirs, by number.

    Raises:
        UserError: If there are none, some are missing, or they are shards of several numbers.
    """
    pattern = re.compile(re.escape(out.name) + r"\.shard-(\d+)-of-(\d+)")
    found: dict[int, dict[int, Path]] = {}
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        if (match := pattern.fullmatch(path.name)) and path.is_dir():
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        raise UserError(f"no shards of {out} lie beside it; name --out as they were given it")
    if len(found) > 1:
        counts = " and of ".join(map(str, sorted(found)))
        raise UserError(f"shards of {counts} lie beside {out}; remove those of the wrong number")
    ((of, folders),) = found.items()
    return [folders.get(i, Shard(i, of, out).folder) for i in range(1, of + 1)]


def merge(folders: Sequence[Path], out: Path) -> list[str]:
    """Make one output folder of those that shards left, which are gone afterwards.

    Args:
        folders: Theirs, in any order.
        out: The output folder; new or empty.

    Returns:
        What the user should know.

    Raises:
        UserError: If a shard is missing, not done or running, or they are not of one run.
    """
    check_free(out)
    with ExitStack() as stack:
        for folder in folders:
            if folder.is_dir():
                stack.enter_context(hold(folder))
        notes = _noted(folders)
        first = notes[min(notes)]
        records = {number: load(folder) for number, (folder, _) in sorted(notes.items())}
        _check_alike(notes, records)
        events = _joined([folder / EVENTS for folder, _ in notes.values()])
        part = part_of(out)
        shutil.move(first[0], part)
        (part / NOTE).unlink()
        (part / LOCK).unlink(missing_ok=True)  # of the shard's folder, which is gone
        write_text(part / EVENTS, events)
        change = {
            name: max(getattr(record, name) for record in records.values())
            for name in ("seconds", "peak_memory_bytes")
        }
        save(records[min(notes)].model_copy(update=change), part)
        write_report(part)
        if out.is_dir():
            out.rmdir()
        os.replace(part, out)
    for folder, _ in notes.values():
        shutil.rmtree(folder, ignore_errors=True)
    apart = Counter(note.store for _, note in notes.values())
    if len(apart) == 1:
        return []
    hosts = ", ".join(sorted({note.host for _, note in notes.values()}))
    return [
        f"the shards saw {len(apart)} stores of stages, and those that shared none did each "
        f"other's work again ({hosts}); give --out on a path that every machine sees"
    ]


Notes = Mapping[int, tuple[Path, ShardNote]]
"""By number of a shard its folder and what it left there."""


def _noted(folders: Sequence[Path]) -> Notes:
    """Return what every shard left, once it is sure that all are there."""
    notes: dict[int, tuple[Path, ShardNote]] = {}
    undone = [folder for folder in folders if not (folder / NOTE).is_file()]
    for folder in folders:
        if folder in undone:
            continue
        try:
            note = TypeAdapter(ShardNote).validate_python(read_json(folder / NOTE))
        except (NotPlain, ValidationError):
            raise UserError(
                f"{folder / NOTE} is no note of a shard; run its command again"
            ) from None
        if note.number in notes:
            raise UserError(
                f"{folder} and {notes[note.number][0]} are both shard {note.number} of {note.of}; "
                "name each once"
            )
        notes[note.number] = folder, note
    of = {note.of for _, note in notes.values()}
    if len(of) > 1:
        raise UserError(f"the folders are shards of {' and of '.join(map(str, sorted(of)))}")
    missing = sorted({*range(1, max(of, default=0) + 1)} - notes.keys())
    if undone and not notes:
        raise UserError(f"no shard is done: {', '.join(map(str, undone))}")
    if undone or missing:
        are = "shard is" if len(missing) == 1 else "shards are"
        listed = ", ".join(f"{number}/{max(of)}" for number in missing)
        raise UserError(
            f"{are} not done: {listed}; run their commands again, which takes what the others have "
            "made"
        )
    return notes


def _check_alike(notes: Notes, records: Mapping[int, Record]) -> None:
    """Refuse shards of several runs, or of one run that was computed in several ways."""
    one = min(notes)
    folder, note = notes[one]
    for number, (other, told) in notes.items():
        if not same_run(_recipe(folder), _recipe(other)):
            raise UserError(f"{folder} and {other} hold different runs; merge those of one")
        a, b = records[one].environment, records[number].environment
        versions = sorted(
            f"{name} {a.versions.get(name, 'missing')} and {b.versions.get(name, 'missing')}"
            for name in {*a.versions, *b.versions}
            if a.versions.get(name) != b.versions.get(name)
        )
        if _kind(a.device) != _kind(b.device):
            versions.append(f"device {a.device} and {b.device}")
        if told.source != note.source and not versions:
            versions.append("excise from two states of its source")
        if versions:
            raise UserError(
                f"shards {one} and {number} were computed in two ways: {', '.join(versions)}; "
                f"make them alike on {note.host} and {told.host} and run the commands again"
            )
        if _numbers(records[one]) != _numbers(records[number]):
            raise UserError(
                f"shards {one} ({note.host}) and {number} ({told.host}) have different numbers, "
                "which only machines that share no store of stages can; run the commands again "
                "with --out on a path that both see"
            )


def _kind(device: str) -> str:
    """Return the kind of a record's device, which is what stages are told apart by."""
    return re.split("[ :]", device)[0]


def _recipe(folder: Path) -> str:
    """Return what a shard was asked for."""
    path = folder / RECIPE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _numbers(record: Record) -> str:
    """Return what a record says but for times, paths and who made it."""
    return json.dumps(record.model_dump(mode="json", include=NUMBERS), sort_keys=True)


def _joined(paths: Sequence[Path]) -> str:
    """Return the events of all shards in the order of their times."""
    lines = [
        line
        for path in paths
        if path.is_file()
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return "".join(f"{line}\n" for line in sorted(lines, key=_time))


def _time(line: str) -> float:
    """Return when an event was, 0 for a line that was cut short."""
    try:
        return float(json.loads(line)["time"])
    except (ValueError, KeyError, TypeError):
        return 0.0
