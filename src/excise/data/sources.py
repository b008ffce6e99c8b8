"""Where rows come from: jsonl, json, parquet, csv, text, folders and hub ids.

A source is one string: `PATH`, or `owner/name:config@revision#split` on the hub, with options
after a question mark: `notes.txt?by=line`, `qa.parquet?prompt=question&completion=answer`,
`arc.jsonl?choices=choices.text&labels=choices.label&answer=answerKey`. Input files are only ever
read. This module imports no torch.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field

from excise.core.config import Config
from excise.core.disk import check_regular, expand
from excise.core.errors import UserError, counted, nearest
from excise.core.keys import ByContent
from excise.data.hub import READABLE, folder_files, hub_files, saved_files, text_folder
from excise.data.rows import (
    FIELDS,
    NAMED,
    SKIPPED,
    Ambiguous,
    AnswerBase,
    Located,
    SourceRows,
    chunk_rows,
    lookup,
    parse_records,
)

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
    by: Literal["", "blank", "line", "file"] = ""
    """What separates documents of a text file: blank lines, line ends, or nothing; empty for blank
    lines, and for nothing in a folder of texts."""
    format: Literal["", "sharegpt"] = ""
    """`sharegpt` for conversations of `from` and `value`."""
    answers: AnswerBase = ""
    """What the digits of answer keys count from; empty for 0 where the file leaves no doubt."""
    duplicates: Literal["near", "exact"] = "near"
    """Which duplicates are put into one unit: `exact` leaves rows of one template apart."""
    skip: float = Field(default=SKIPPED, ge=0, lt=1)
    """Share of the rows that may be left out because they cannot be used."""
    where: str = ""
    """`FIELD:VALUE` for the rows whose field has that value, `FIELD:V|W` for one of several,
    `FIELD:!V|W` for all others; empty for every row."""
    rows: int = Field(default=0, ge=0)
    """Rows that are read at most, from the first on; 0 for all."""
    pieces: int = Field(default=0, ge=0)
    """Words of the pieces that a text is cut into, each a unit of its own; 0 leaves it whole."""
    fields: dict[str, str] = Field(default={})
    """For each field that has another name in the file, that name or path."""

    @property
    def chosen(self) -> tuple[str, tuple[str, ...], bool]:
        """The field that `where` reads, the values it names, and whether it means these."""
        field, _, values = self.where.partition(":")
        return field, tuple(values.removeprefix("!").split("|")), not values.startswith("!")

    def spec(self) -> str:
        """Return the string that `parse_source` reads back."""
        at = f":{self.config}" if self.config else ""
        at += f"@{self.revision}" if self.revision else ""
        at += f"#{self.split}" if self.split else ""
        asked = self.model_dump(exclude_defaults=True, include={*_CHOICES, *_OTHERS})
        options = [f"{k}={v}" for k, v in (asked | self.fields).items()]
        return self.path + at + ("?" + "&".join(options) if options else "")


_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    name: tuple(value for value in get_args(Source.model_fields[name].annotation) if value)
    for name in ("by", "format", "answers", "duplicates")
}
"""Options that take one of a few words."""

_OTHERS: Final = ("skip", "where", "rows", "pieces")
"""The other options that name no field."""


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
        if key in out or key in fields:
            raise UserError(f"option '{key}' of source '{spec}' is given twice; keep one")
        if key in NAMED:
            fields[key] = value
        elif key == "skip":
            if not re.fullmatch(r"0?\.\d+|0", value):
                raise UserError(f"'{part}' of source '{spec}' must be a share from 0 to below 1")
            out[key] = float(value)
        elif key == "where":
            if not re.fullmatch(r"[^:]+:.+", value):
                raise UserError(f"'{part}' of source '{spec}' must be where=FIELD:VALUE")
            out[key] = value
        elif key in ("rows", "pieces"):
            if not re.fullmatch(r"[1-9]\d{0,17}", value):
                raise UserError(f"'{part}' of source '{spec}' must be a whole number from 1 on")
            out[key] = int(value)
        elif key not in _CHOICES:
            hint = nearest(key, (*_CHOICES, *_OTHERS, *NAMED))
            raise UserError(f"unknown option '{key}' of source '{spec}'; {hint}")
        elif value not in _CHOICES[key]:
            *others, last = _CHOICES[key]
            words = f"{', '.join(others)} or {last}" if others else last
            raise UserError(f"'{part}' of source '{spec}' must be {words}")
        else:
            out[key] = value
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
    names = _names(source, files)
    documents = _documents(source) is not None
    by = source.by or ("file" if documents else "blank")
    every = (
        item
        for file, name in zip(files, names, strict=True)
        for item in _records(file, source, by, document=name if documents else "",
                             before="" if len(files) == 1 and not documents else f"{name} ")
    )  # fmt: skip
    records = [*islice(every, source.rows or None)]
    if source.where:
        records = _where(records, source)
    lone = len(files) == 1 and not source.hub and not documents
    rows = parse_records(
        records,
        file=str(files[0]) if lone else source.path,
        fields=source.fields,
        answers=source.answers,
        sharegpt=source.format == "sharegpt",
        skip=source.skip,
    )
    if source.pieces:
        rows = replace(rows, rows=tuple(_pieces(rows.rows, source.pieces)))
    return replace(rows, documents=documents and by == "file", near=source.duplicates == "near")


def _pieces(rows: Iterable[Located], words: int) -> Iterator[Located]:
    """Yield the pieces of texts, each a unit of its own."""
    for located in rows:
        for i, row in enumerate(chunk_rows([located.row], words)):
            unit = f"{row.unit}/{i}" if row.unit else ""
            yield replace(located, row=replace(row, unit=unit))


def _where(records: Sequence[tuple[str, Any]], source: Source) -> list[tuple[str, Any]]:
    """Return the records that a source asks for, and those that could not be read.

    Raises:
        UserError: If the field is not there, or no record has one of the values.
    """
    field, wanted, inside = source.chosen
    out, seen = [], set()
    for place, record in records:
        if isinstance(record, UserError):
            out.append((place, record))
            continue
        value = lookup(record, field, absent=Ellipsis)
        if value is Ellipsis:
            raise UserError(
                f"{source.path} {place}: field '{field}' is missing, by which ?where chooses rows"
            )
        seen.add(str(value))
        if (str(value) in wanted) == inside:
            out.append((place, record))
    lacking = next((value for value in wanted if value not in seen), None)
    if lacking is not None:
        raise UserError(
            f"{source.path} has no row whose '{field}' is '{lacking}'; {nearest(lacking, seen)}"
        )
    return out


def source_hashes(source: Source) -> dict[str, str]:
    """Return the SHA-256 of every file of a source, by file name.

    Raises:
        UserError: If a file is not there.
    """
    out: dict[str, str] = {}
    files = source_files(source)
    for file, name in zip(files, _names(source, files), strict=True):
        with open_input(file) as stream:
            out[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return out


def source_identity(spec: str) -> Any:
    """Return the identity of a source: its options and the bytes of its files, not where they lie.

    Args:
        spec: As `parse_source` takes it; empty for none. One that cannot be read counts as text.
    """
    try:
        source = parse_source(spec) if spec else None
        hashes = {} if source is None else source_hashes(source)
    except UserError:
        return spec
    if source is None:
        return spec
    return {"options": source.model_dump(mode="json", exclude={"path"}), "files": hashes}


SourceSpec = Annotated[str, ByContent(source_identity)]
"""A field that names a source; empty for none."""


def _names(source: Source, files: Sequence[Path]) -> list[str]:
    """Return what the files of a source are called: by name, documents by path in their folder."""
    if _documents(source) is not None:
        folder = expand(source.path)
        return [file.relative_to(folder).as_posix() for file in files]
    names: list[str] = []
    for file in files:
        names.append(file.name if file.name not in names else f"{file.parent.name}/{file.name}")
    return names


def source_files(source: Source) -> list[Path]:
    """Return the files a source stands for, fetched where it is a hub id, in reading order.

    Raises:
        UserError: If there are none.
    """
    if source.hub:
        return hub_files(source.path, source.config, source.revision, source.split)
    path = expand(source.path)
    if not path.is_dir():
        return [path]
    saved = saved_files(path, source.split)
    if saved is None:
        saved = _documents(source)
    return saved if saved is not None else folder_files(path, source.config, source.split)


def _documents(source: Source) -> list[Path] | None:
    """Return the files of a folder of texts, each a document, or None for any other source."""
    path = expand(source.path)
    if source.hub or source.config or source.split or not path.is_dir():
        return None
    return text_folder(path)


def open_input(path: Path) -> Any:
    """Open a file for reading bytes.

    Raises:
        UserError: If it is missing, a folder, or not ours to read.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file; name a file in it")
    check_regular(path)
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
    if path.is_symlink():
        return f"{path} is a link to a file that is not there; check where it points"
    hint = nearest(path.name, beside)
    return f"there is no file {path}; {hint if hint.startswith('did') else 'check the path'}"


def _records(
    file: Path, source: Source, by: str, *, document: str, before: str
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of one file.

    Args:
        file: The file.
        source: What it is of.
        by: What separates documents of a text file.
        document: Name of the document that it is, or empty.
        before: What places begin with: the file's name where there are several.
    """
    extension = file.suffix.lower()
    if file.is_file() and extension not in READABLE:
        raise UserError(
            f"{file} has the unknown extension '{file.suffix}'; use {', '.join(READABLE[:-1])}, "
            "a folder or a hub id"
        )
    with open_input(file) as stream:
        if extension in (".parquet", ".arrow"):
            records: Iterable[tuple[str, Any]] = _columns(file, source)
        else:
            data = stream.read()
            if not data.strip(b"\xef\xbb\xbf \t\r\n") and not document:
                raise UserError(f"{file} is empty; put at least one row into it")
            check_bytes(data, file)
            if extension == ".txt":
                records = _txt(data, by)
            else:
                records = _READ[extension](data, source, file)
    for place, record in records:
        if document and by == "file":
            record = {**record, "unit": document}
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
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        why = error.msg.lower().removesuffix(" at")
        return UserError(f"is not valid JSON ({why} at column {error.colno})")
    except ValueError as error:
        return UserError(f"is not valid JSON ({error})")
    except RecursionError:
        return UserError("is nested too deeply")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: Sequence[tuple[str, Any]]) -> Any:
    """Return an object, or an error in its place where it has a key twice: which is meant?"""
    out = dict(pairs)
    if len(out) == len(pairs):
        return out
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return Ambiguous(f"has the key '{twice}' twice; keep the one that is meant")


def _jsonl(data: bytes, source: Source, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            yield f"line {number}", _loads(line)


def _json(data: bytes, source: Source, file: Path) -> Iterator[tuple[str, Any]]:
    """Read a list of objects; files with one object per line are often called .json too."""
    text = data.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            why = error.msg.lower().removesuffix(" at")
            raise UserError(
                f"{file} line {error.lineno}: is not valid JSON ({why} at column {error.colno})"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: is not valid JSON ({error})") from None
        yield from ((f"item {i}", item) for i, item in enumerate(items, 1))
        return
    whole = _loads(text)
    if isinstance(whole, Mapping | Ambiguous):
        yield "item 1", whole
    else:
        yield from _jsonl(data, source, file)


def _txt(data: bytes, by: str) -> Iterator[tuple[str, Any]]:
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


def _csv(data: bytes, source: Source, file: Path) -> Iterator[tuple[str, Any]]:
    """Read a table of commas or tabs whose first line names the columns."""
    tabs = file.suffix.lower() == ".tsv"
    lines = io.StringIO(data.decode("utf-8-sig"), newline="")
    reader = csv.reader(lines, "excel-tab" if tabs else "excel", strict=True)
    usual = csv.field_size_limit(2**31 - 1)  # a cell may hold a book
    try:
        yield from _table(reader, source, file)
    except csv.Error as error:
        raise UserError(
            f"{file} line {reader.line_num}: {str(error) or 'is broken'}; close every quote, and "
            "double those inside a cell"
        ) from None
    finally:
        csv.field_size_limit(usual)


def _table(reader: Any, source: Source, file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the lines of a table as objects."""
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        cells = next(reader, None)
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
            _check_header(header, source, f"{file} line {line}")
        elif len(cells) != len(header):
            raise UserError(
                f"{file} line {line}: has {counted(len(cells), 'cell')} and the first line names "
                f"{len(header)} columns; quote cells that hold a separator"
            )
        else:
            yield f"line {line}", dict(zip(header, cells, strict=True))


def _check_header(header: Sequence[str], source: Source, where: str) -> None:
    """Refuse a first line that does not name columns."""
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: names the column '{twice}' twice; give each its own name")
    record = dict.fromkeys(header, "")
    if all(lookup(record, path) is None for path in _paths(source)):
        other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), "")
        if other:
            raise UserError(
                f"{where}: columns are separated by {other!r}; separate them by commas, or by tabs "
                "in a file called .tsv"
            )
        named = ", ".join(f"'{name[:40]}'" for name in header[:6])
        raise UserError(
            f"{where}: must name the columns, and names none that is read (there is {named}); put "
            "a line such as 'text' above, or name a column as ?text=NAME"
        )


_READ: Final = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}


def _paths(source: Source) -> list[str]:
    """Return the names and paths that are read of every record."""
    fields = {"messages": "conversations"} if source.format == "sharegpt" else {}
    fields |= source.fields
    paths = (*(fields.get(name, name) for name in FIELDS), *fields.values())
    paths += (source.chosen[0],) if source.where else ()
    return [*dict.fromkeys(part for path in paths for part in (path, *path.split(",")))]


def _columns(file: Path, source: Source) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a parquet or arrow file; columns that nobody asked for stay unread."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix.lower() == ".parquet":
            opened = pq.ParquetFile(file)
            names = opened.schema_arrow.names
            table = opened.read(columns=[n for n in names if _wanted(n, source)])
        else:
            with pa.OSFile(str(file)) as stream:
                table = _arrow_reader(pa, stream).read_all()
            names = table.column_names
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is not a readable {file.suffix[1:]} file ({reason}); make it again"
        ) from None
    if not table.num_rows:
        raise UserError(f"{file} is empty; put at least one row into it")
    unread = dict.fromkeys(names)
    number = 0
    for batch in table.to_batches():
        columns = {
            path: _values(array, f"{file} row", number, path)
            for path, array in _arrays(batch, source)
        }
        for i in range(batch.num_rows):
            number += 1
            yield f"row {number}", unread | {path: values[i] for path, values in columns.items()}


def _arrow_reader(pa: Any, stream: Any) -> Any:
    """Open an arrow file: data sets save the stream format, other tools the file format."""
    try:
        return pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_file(stream)


def _wanted(column: str, source: Source) -> bool:
    """Whether a column, or a field in it, is read."""
    return any(path == column or path.startswith(f"{column}.") for path in _paths(source))


def _arrays(batch: Any, source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (path, values) of what is read: a column, or the field of a struct that a path names.

    Only the field is decoded then, whatever lies beside it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for path in _paths(source):
        name = next((n for n in batch.schema.names if path == n or path.startswith(f"{n}.")), None)
        if name is None:
            continue
        array, rest = batch.column(name), path.removeprefix(name).removeprefix(".")
        while rest and pa.types.is_struct(array.type):
            head, _, after = rest.partition(".")
            if array.type.get_field_index(head) < 0:
                break
            array, name, rest = pc.struct_field(array, head), f"{name}.{head}", after
        yield name, array


def _values(array: Any, where: str, before: int, path: str) -> list[Any]:
    """Return the values of a column.

    Raises:
        UserError: Naming the row of the first that cannot be read.
    """
    try:
        return list(array.to_pylist())
    except (ValueError, OverflowError, KeyError, ImportError):  # `pytz.UnknownTimeZoneError` is one
        pass
    for i in range(len(array)):
        try:
            array[i].as_py()
        except UnicodeDecodeError:
            reason = "is text that is not valid UTF-8; write it as UTF-8"
        except (ValueError, OverflowError, KeyError, ImportError) as error:
            reason = f"cannot be read as {array.type} ({str(error)[:80]}); store it as text"
        else:
            continue
        raise UserError(f"{where} {before + i + 1}: field '{path}' {reason}")
    raise UserError(f"{where} {before + 1}: field '{path}' cannot be read as {array.type}")
