"""From the records of a file to rows: four shapes, and a sentence for everything that is wrong.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from excise.core.config import ConfigError
from excise.core.errors import UserError, counted
from excise.data.domain import Metric, Row

MAX_PROBLEMS: Final = 5
"""Problems reported at once."""

ROLES: Final = ("system", "user", "assistant", "tool", "developer")
"""Speakers a conversation may have."""

METRICS: Final[Mapping[str, tuple[Metric, ...]]] = {
    "text": ("text_loss",),
    "completion": ("exact_match", "text_loss"),
    "choice": ("multiple_choice", "text_loss"),
    "chat": ("text_loss",),
}
"""Metrics of rows of each shape, the headline first."""

SHAPES: Final = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "choice": ("question", "choices", "answer"),
    "chat": ("messages",),
}
"""Fields that make each shape."""

FIELDS: Final = (*(f for fields in SHAPES.values() for f in fields), "unit", "group", "id",
                 "capability", "wording")  # fmt: skip
"""Every field that is read; others are ignored."""

_NEED = "give 'text', 'prompt'+'completion', 'question'+'choices'+'answer' or 'messages'"


@dataclass(frozen=True, slots=True)
class Located:
    """A row and where it came from.

    Attributes:
        row: The row; its unit is empty where the file gave none.
        where: File and place in it, for errors and notes.
        worded: Whether the file numbered the paraphrases of its units (`wording`).
    """

    row: Row
    where: str
    worded: bool = False


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What one source holds.

    Attributes:
        rows: Its rows, in order.
        blank: Rows left out because their text was blank.
    """

    rows: tuple[Located, ...]
    blank: int = 0


class Problems:
    """Collects what is wrong, up to a number, and raises it all at once."""

    def __init__(self, limit: int = MAX_PROBLEMS) -> None:
        self.limit = limit
        self.sentences: list[str] = []
        self.more = 0

    @property
    def full(self) -> bool:
        """Whether further problems are only counted."""
        return len(self.sentences) >= self.limit

    def add(self, error: UserError) -> None:
        """Note one error, or the several that it holds."""
        for sentence in getattr(error, "problems", None) or (str(error),):
            if self.full:
                self.more += 1
            else:
                self.sentences.append(sentence)

    def check(self) -> None:
        """Raise what was noted, if anything.

        Raises:
            UserError: With every problem, one a line.
        """
        if self.sentences:
            more = (f"and {self.more} more like these",) if self.more else ()
            raise ConfigError((*self.sentences, *more))


def parse_records(
    records: Iterable[tuple[str, Any]], *, file: str, fields: Mapping[str, str]
) -> SourceRows:
    """Turn records into rows and report up to five problems at once.

    Args:
        records: (place, record); a `UserError` in place of a record is a problem of reading it.
        file: Name of the file, for errors.
        fields: For each field of a row that has another name in the file, that name.

    Returns:
        One row per record, in order; blank texts are left out and counted.

    Raises:
        UserError: If records are broken, there are none, all are blank, or shapes are mixed.
    """
    problems = Problems()
    out: list[Located] = []
    blank = 0
    for place, record in records:
        where = f"{file} {place}"
        try:
            if isinstance(record, UserError):
                raise record
            row = parse_record(record, fields)
        except UserError as error:
            problems.add(UserError(f"{where}: {error}"))
            continue
        if row.kind == "text" and not row.text.strip():
            blank += 1
            continue
        renamed = fields.get("wording", "wording")
        out.append(Located(row, where, _given(record, renamed) is not None))
    problems.check()
    if blank and not out:
        raise UserError(f"{file} holds blank texts only; put text into at least one row")
    if not out:
        raise UserError(f"{file} holds no row; {_NEED}")
    check_one_shape(out)
    return SourceRows(tuple(out), blank)


def check_one_shape(rows: Sequence[Located]) -> None:
    """Refuse rows that would be scored by different metrics.

    Raises:
        UserError: If two rows have different shapes.
    """
    first = rows[0]
    for other in rows:
        if other.row.kind != first.row.kind:
            raise UserError(
                f"{other.where} is {_words(other.row)} and {first.where} is {_words(first.row)}, "
                "which are scored differently; put them into files of their own"
            )


def _words(row: Row) -> str:
    return {"text": "plain text", "completion": "a prompt with completion",
            "choice": "a multiple-choice question", "chat": "a conversation"}[row.kind]  # fmt: skip


def parse_record(record: Any, fields: Mapping[str, str] | None = None) -> Row:
    """Turn one record into a row.

    Args:
        record: A mapping with the fields of one shape and perhaps `unit`, `group`, `wording`,
            `capability`; other fields are ignored.
        fields: For each field that has another name in the record, that name.

    Returns:
        The row; its unit is empty where none was given.

    Raises:
        UserError: If a field is missing, has the wrong type or makes no sense.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"is {_type(record)}, not an object with fields; {_NEED}")
    fields = fields or {}
    values = {name: _given(record, fields.get(name, name)) for name in FIELDS}
    for name, given in fields.items():
        if given not in record:
            raise UserError(f"field '{given}' (for '{name}') is missing")
    shape = _shape(values, record)
    row = Row(
        unit=_label(values["unit"], "unit"),
        group=_label(values["group"], "group"),
        capability=_label(values["capability"], "capability"),
        wording=_integer(values["wording"], "wording") if values["wording"] is not None else 0,
    )
    _label(values["id"], "id")
    return _FILL[shape](row, values)


def _given(record: Any, name: str) -> Any:
    """Return a field, or None where it is missing or null."""
    return record.get(name) if isinstance(record, Mapping) else None


def _shape(values: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return which shape the record has, by the fields that are there."""
    present = [s for s, needs in SHAPES.items() if any(values[n] is not None for n in needs)]
    complete = [s for s in present if all(values[n] is not None for n in SHAPES[s])]
    if len(complete) == 1:
        return complete[0]
    if len(complete) > 1:
        both = " and ".join("+".join(f"'{n}'" for n in SHAPES[s]) for s in complete)
        raise UserError(f"has both {both}; keep the fields of one shape")
    if present:
        missing = next(n for n in SHAPES[present[0]] if values[n] is None)
        other = "+".join(f"'{n}'" for n in SHAPES[present[0]] if values[n] is not None)
        hint = "" if missing not in ("choices",) else (
            ", or read it as ?prompt=question&completion=answer"
        )  # fmt: skip
        null = " is null" if missing in record else " is missing"
        raise UserError(f"field '{missing}'{null}, which belongs to {other}{hint}")
    named = ", ".join(f"'{k}'" for k in list(record)[:6]) or "no field"
    raise UserError(f"field 'text' is missing (there is {named}); {_NEED}")


def _fill_text(row: Row, values: Mapping[str, Any]) -> Row:
    return replace(row, text=_string(values["text"], "text", blank=True))


def _fill_completion(row: Row, values: Mapping[str, Any]) -> Row:
    prompt = _string(values["prompt"], "prompt", blank=True)
    return replace(row, prompt=prompt, completion=_string(values["completion"], "completion"))


def _fill_choice(row: Row, values: Mapping[str, Any]) -> Row:
    choices = values["choices"]
    if not isinstance(choices, list | tuple):
        raise UserError(f"field 'choices' is {_type(choices)}, not a list of texts")
    options = tuple(_string(c, f"choices[{i}]") for i, c in enumerate(choices))
    if len(options) < 2:
        raise UserError(f"field 'choices' has {counted(len(options), 'option')}; give at least two")
    if len(set(options)) < len(options):
        raise UserError("field 'choices' has two equal options; make each one different")
    question = _string(values["question"], "question")
    return replace(row, prompt=question, choices=options, answer=_answer(values["answer"], options))


def _answer(value: Any, options: Sequence[str]) -> int:
    """Return the index of the right option, given as index from 0, as letter or as its text."""
    count = len(options)
    if isinstance(value, str):
        if value in options:
            return options.index(value)
        letter = value.strip().strip("().").upper()
        if len(letter) == 1 and "A" <= letter <= "Z":
            index = ord(letter) - ord("A")
        elif letter.isdecimal():
            index = int(letter)
        else:
            raise UserError("field 'answer' is none of the options, nor an index, nor a letter")
    else:
        index = _integer(value, "answer")
    if not 0 <= index < count:
        raise UserError(
            f"field 'answer' names option {value!r} of {count}; give an index from 0 to {count - 1}"
            f" or a letter from A to {chr(ord('A') + count - 1)}"
        )
    return index


def _fill_chat(row: Row, values: Mapping[str, Any]) -> Row:
    messages = values["messages"]
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("field 'messages' must be a list of objects with 'role' and 'content'")
    turns = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise UserError(f"field '{at}' is {_type(message)}, not an object with 'role'")
        role = message.get("role")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise UserError(f"field '{at}.role' is {role!r}; known roles: {known}")
        content = _string(message.get("content"), f"{at}.content", blank=role != "assistant")
        turns.append((str(role), content))
    if not any(role == "assistant" for role, _ in turns):
        raise UserError("field 'messages' has no 'assistant' turn, so nothing is scored; add one")
    return replace(row, messages=tuple(turns))


_FILL: Final[Mapping[str, Callable[[Row, Mapping[str, Any]], Row]]] = {
    "text": _fill_text,
    "completion": _fill_completion,
    "choice": _fill_choice,
    "chat": _fill_chat,
}


def _string(value: Any, name: str, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"field '{name}' is {_type(value)}, not text")
    if "\0" in value:
        raise UserError(f"field '{name}' holds a NUL character; remove it")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"field '{name}' holds half a surrogate pair; remove it") from None
    if not blank and not value.strip():
        raise UserError(f"field '{name}' is blank; fill it or remove the row")
    return value


def _label(value: Any, name: str) -> str:
    """Return an optional name: text, or a whole number as text."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _string(value, name)


def _integer(value: Any, name: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # columns with gaps are stored as floats
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"field '{name}' is {_type(value)}, not a whole number")
    return value


def _type(value: Any) -> str:
    """Return a word for a JSON value's type."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number",
             float: "a number", type(None): "null", bytes: "bytes"}  # fmt: skip
    return words.get(type(value), f"a {type(value).__name__}")
