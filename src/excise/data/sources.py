"""Where rows come from: jsonl, json, parquet, text, saved data-set folders and hub ids.

A source is one string: `PATH`, or `owner/name:config@revision#split` on the hub, with options
after a question mark: `notes.txt?by=line`, `qa.parquet?prompt=question&completion=answer`. Input
files are only ever read. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from excise.core.config import Config
from excise.core.errors import UserError, nearest
from excise.data.hub import READABLE, folder_files, hub_files, saved_files
from excise.data.rows import FIELDS, SourceRows, parse_records

_HUB = re.compile(
    r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?::(?P<config>[^@#:]+))?(?:@(?P<revision>[^#@]+))?(?:#(?P<split>[^#]+))?"
)


class Source(Config):
    """Where the rows of one role come from."""

    path: str
    """File, folder, or hub id `owner/name`."""
    hub: bool = False
    """Whether `path` is a hub id."""
    config: str = ""
    """Configuration of a data set."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty for the newest."""
    split: str = ""
    """Split of a data set; empty where it has one only, else `train`."""
    by: Literal["blank", "line", "file"] = "blank"
    """What separates documents of a text file: blank lines, line ends, or nothing."""
    fields: dict[str, str] = Field(default={})
    """For each field that has another name in the file, that name."""

    def spec(self) -> str:
        """Return the string that `parse_source` reads back."""
        at = f":{self.config}" if self.config else ""
        at += f"@{self.revision}" if self.revision else ""
        at += f"#{self.split}" if self.split else ""
        options = [f"by={self.by}"] if self.by != "blank" else []
        options += [f"{k}={v}" for k, v in self.fields.items()]
        return self.path + at + ("?" + "&".join(options) if options else "")


def parse_source(spec: str) -> Source:
    """Read a source from one string.

    Args:
        spec: `PATH[?option=value&...]` or `owner/name[:config][@revision][#split][?...]`; a path
            that exists is always a path. A folder takes `:config` and `#split` too.

    Returns:
        The source; nothing is opened yet.

    Raises:
        UserError: If an option is unknown or the string is empty.
    """
    if not spec.strip():
        raise UserError("a source is empty; give a file, a folder or a hub id")
    head, _, options = (spec, "", "") if Path(spec).exists() else spec.partition("?")
    chosen = _options(options, spec)
    if Path(head).exists():
        return Source.model_validate({"path": head, **chosen})
    match = re.fullmatch(r"(?P<path>[^#]+?)(?::(?P<config>[^:@#/]+))?(?:#(?P<split>[^#]+))?", head)
    if match and Path(match["path"]).is_dir():
        given = {k: v for k, v in match.groupdict().items() if v}
        return Source.model_validate({**given, **chosen})
    hub = _HUB.fullmatch(head)
    if hub and Path(hub["path"]).suffix.lower() not in READABLE:
        given = {k: v for k, v in hub.groupdict().items() if v}
        return Source.model_validate({"hub": True, **given, **chosen})
    return Source.model_validate({"path": head, **chosen})


def _options(text: str, spec: str) -> dict[str, Any]:
    """Return the options after the question mark."""
    out: dict[str, Any] = {}
    fields: dict[str, str] = {}
    for part in text.split("&") if text else ():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise UserError(f"option '{part}' of source '{spec}' needs the form name=value")
        if key == "by":
            if value not in ("blank", "line", "file"):
                raise UserError(f"'by={value}' of source '{spec}' must be blank, line or file")
            out["by"] = value
        elif key in FIELDS:
            fields[key] = value
        else:
            hint = nearest(key, ("by", *FIELDS))
            raise UserError(f"unknown option '{key}' of source '{spec}'; {hint}")
    return {**out, "fields": fields}


def read_source(source: Source) -> SourceRows:
    """Read every row of a source.

    Args:
        source: Where from.

    Returns:
        Rows with the place each came from.

    Raises:
        UserError: With up to five problems, each naming file and line.
    """
    files = source_files(source)
    records = [
        (place, record)
        for file in files
        for place, record in _records(file, source.by, prefix=len(files) > 1)
    ]
    lone = len(files) == 1 and not source.hub
    shown = str(files[0]) if lone else source.path
    return parse_records(records, file=shown, fields=source.fields)


def source_hashes(source: Source) -> dict[str, str]:
    """Return the SHA-256 of every file of a source, by file name.

    Raises:
        UserError: If a file is not there.
    """
    out: dict[str, str] = {}
    for file in source_files(source):
        name = file.name if file.name not in out else f"{file.parent.name}/{file.name}"
        with open_input(file) as stream:
            out[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return out


def source_files(source: Source) -> list[Path]:
    """Return the files a source stands for, fetched where it is a hub id, in reading order.

    Raises:
        UserError: If there are none.
    """
    if source.hub:
        return hub_files(source.path, source.config, source.revision, source.split)
    path = Path(source.path).expanduser()
    if not path.is_dir():
        return [path]
    saved = saved_files(path, source.split)
    return saved if saved is not None else folder_files(path, source.config, source.split)


def open_input(path: Path) -> Any:
    """Open a file for reading bytes.

    Raises:
        UserError: If it is missing, a folder, or not ours to read.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file; name a file in it")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from None


def _missing(path: Path) -> str:
    """Return the sentence for a file that is not there, with the nearest that is."""
    folder = path.parent
    beside: list[str] = []
    if folder.is_dir():
        beside = [p.name for p in folder.iterdir() if p.suffix in READABLE or p.is_dir()]
    hint = nearest(path.name, beside) if beside else "check the path"
    return f"there is no file {path}; {hint}"


def _records(file: Path, by: str, *, prefix: bool) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of one file; places name the file where there are several."""
    extension = file.suffix.lower()
    if file.is_file() and extension not in READABLE:
        raise UserError(
            f"{file} has the unknown extension '{file.suffix}'; use {', '.join(READABLE[:4])}, "
            "a saved data set folder or a hub id"
        )
    before = f"{file.name} " if prefix else ""
    with open_input(file) as stream:
        if extension in (".parquet", ".arrow"):
            records: Iterable[tuple[str, Any]] = _columns(file)
        else:
            data = stream.read()
            if not data.strip(b"\xef\xbb\xbf \t\r\n"):
                raise UserError(f"{file} is empty; put at least one row into it")
            check_bytes(data, file)
            records = _READ[extension](data, by, file)
    for place, record in records:
        yield before + place, record


def check_bytes(data: bytes, file: Path) -> None:
    """Refuse bytes that are not UTF-8 text.

    Raises:
        UserError: Naming the line of the first NUL or of the first byte that is not UTF-8.
    """
    at = data.find(b"\0")
    if at >= 0:
        hint = "save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else (
            "it may be a binary file, or half written"
        )  # fmt: skip
        raise UserError(f"{file} line {_line(data, at)}: holds a NUL byte; {hint}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _line(data, error.start)
        byte = data[error.start]
        raise UserError(
            f"{file} line {line}: byte 0x{byte:02x} is not valid UTF-8; save the file as UTF-8"
        ) from None


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def _loads(text: str) -> Any:
    """Parse JSON; an error becomes a value, so that all lines are looked at."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return UserError(f"is not valid JSON ({error.msg.lower()} at column {error.colno})")
    except ValueError as error:
        return UserError(f"is not valid JSON ({error})")
    except RecursionError:
        return UserError("is nested too deeply")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _jsonl(data: bytes, by: str, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            yield f"line {number}", _loads(line)


def _json(data: bytes, by: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Read a list of objects; files with one object per line are often called .json too."""
    text = data.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file} line {error.lineno}: is not valid JSON ({error.msg.lower()} at column "
                f"{error.colno})"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: is not valid JSON ({error})") from None
        yield from ((f"item {i}", item) for i, item in enumerate(items, 1))
        return
    whole = _loads(text)
    if isinstance(whole, Mapping):
        yield "item 1", whole
    else:
        yield from _jsonl(data, by, file)


def _txt(data: bytes, by: str, file: Path) -> Iterator[tuple[str, Any]]:
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    if by == "file":
        yield "line 1", {"text": text.strip("\n")}
        return
    lines: list[str] = []
    start = 1
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if by == "line" and line.strip():
            yield f"line {number}", {"text": line}
        elif line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield f"line {start}", {"text": "\n".join(lines)}
            lines = []


_READ: Final = {".jsonl": _jsonl, ".json": _json, ".txt": _txt}


def _columns(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a parquet or arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix.lower() == ".parquet":
            table = pq.ParquetFile(file).read()
        else:
            with pa.OSFile(str(file)) as stream:
                table = _arrow_reader(pa, stream).read_all()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is not a readable {file.suffix[1:]} file ({reason}); make it again"
        ) from None
    if not table.num_rows:
        raise UserError(f"{file} is empty; put at least one row into it")
    number = 0
    for batch in table.to_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", record


def _arrow_reader(pa: Any, stream: Any) -> Any:
    """Open an arrow file: data sets save the stream format, other tools the file format."""
    try:
        return pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_file(stream)
