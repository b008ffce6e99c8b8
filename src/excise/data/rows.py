"""From the records of a file to rows: four shapes, and a sentence for everything that is wrong.

This module imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, Literal

from excise.core.config import ConfigError
from excise.core.errors import UserError, counted
from excise.data.domain import Metric, Row, Rows, Span
from excise.data.spans import FORM, cut_spans, outside, parse_spans

MAX_PROBLEMS: Final = 5
"""Problems reported at once."""

SKIPPED: Final = 0.05
"""Share of a source's rows that may be left out because they cannot be used."""

ROLES: Final = ("system", "user", "assistant", "tool", "developer")
"""Speakers a conversation may have."""

SHAREGPT: Final[Mapping[str, str]] = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
}  # fmt: skip
"""Role of each `from` of a ShareGPT conversation."""

AnswerBase = Literal["", "zero-based", "one-based", "letters", "text"]
"""How answers are given: what digits count from, letters, or texts; empty where nobody said."""

METRICS: Final[Mapping[str, tuple[Metric, ...]]] = {
    "text": ("text_loss",),
    "completion": ("exact_match", "text_loss"),
    "choice": ("multiple_choice", "text_loss"),
    "chat": ("text_loss",),
}
"""Metrics of rows of each shape, the headline first."""

DOCUMENT: Final[tuple[Metric, ...]] = ("text_loss", "continuation", "extraction_strength")
"""Metrics of a document that was to be deleted: what it costs, how far it is continued, and from
how little of it."""

READS: Final[Mapping[Metric, tuple[str, ...]]] = {
    "text_loss": ("text", "completion", "choice", "chat"),
    "continuation": ("text", "completion", "chat"),
    "exact_match": ("completion", "choice"),
    "multiple_choice": ("choice",),
    "extraction_strength": ("text", "completion", "chat"),
    "probability": ("text", "completion", "choice", "chat"),
    "min_k": ("text", "completion", "chat"),
    "min_k_plus_plus": ("text", "completion", "chat"),
    "truth_ratio": ("choice",),
    "truth_ratio_geometric": ("choice",),
    "option_probability": ("choice",),
    "rouge_l": ("completion",),
    "verbmem": ("completion",),
    "knowmem": ("completion",),
    "rwku_recall": ("completion",),
}
"""Shapes of rows that each metric of a domain reads."""

SHAPES: Final = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "choice": ("question", "choices", "answer"),
    "chat": ("messages",),
}
"""Fields that make each shape."""

FIELDS: Final = (*(f for fields in SHAPES.values() for f in fields), "unit", "group",
                 "capability", "wording", "spans")  # fmt: skip
"""Every field that is read; others are ignored."""

NAMED: Final = (*FIELDS, "labels")
"""Fields that a source may name. `labels`, what `answer` calls the options, is read only then."""

_NEED = "give 'text', 'prompt'+'completion', 'question'+'choices'+'answer' or 'messages'"


class Ambiguous(UserError):
    """A row that can be read in two ways; it refuses its source, however many rows that has."""


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
        skipped: (place, reason) of rows left out because they cannot be used.
        documents: Whether units are names of files, which mean nothing outside their folder.
        near: Whether near duplicates of its rows are put into one unit.
    """

    rows: tuple[Located, ...]
    blank: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    documents: bool = False
    near: bool = True


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
        """Note one error, or the several that it holds; the same sentence is noted once."""
        for sentence in getattr(error, "problems", None) or (str(error),):
            if sentence in self.sentences:
                continue
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
    records: Iterable[tuple[str, Any]],
    *,
    file: str,
    fields: Mapping[str, str],
    answers: AnswerBase = "",
    sharegpt: bool = False,
    skip: float = SKIPPED,
) -> SourceRows:
    """Turn records into rows, without those that cannot be used, and report up to five problems.

    Args:
        records: (place, record); a `UserError` in place of a record is a problem of reading it.
        file: Name of the file, for errors.
        fields: For each field of a row that has another name in the file, that name or path; see
            `lookup`.
        answers: How answers are given; empty where nobody said.
        sharegpt: Whether conversations are `conversations` of `from` and `value`.
        skip: Share of the records that may be left out because they cannot be used.

    Returns:
        One row per record, in order; blank texts are left out and counted.

    Raises:
        UserError: If records are broken, ambiguous or more than `skip` of them cannot be used,
            there are none, all are blank, or shapes are mixed.
    """
    if sharegpt:
        fields = {"messages": "conversations", **fields}
    located = [(f"{file} {place}", record) for place, record in records]
    if not answers and "labels" not in fields:
        check_answers(located, fields)
    problems = Problems()
    out: list[Located] = []
    odd: list[tuple[str, str]] = []
    blank = 0
    for where, record in located:
        try:
            if isinstance(record, UserError):
                raise Ambiguous(str(record))
            row = parse_record(record, fields, answers=answers, sharegpt=sharegpt)
        except Ambiguous as error:
            problems.add(UserError(f"{where}: {error}"))
        except UserError as error:
            odd.append((where, str(error)))
        else:
            if row.kind == "text" and not row.text.strip():
                blank += 1
                continue
            worded = lookup(record, fields.get("wording", "wording")) not in (None, "")
            out.append(Located(row, where, worded))
    if len(odd) > skip * len(located):
        for problem in _too_many(odd, len(located), file, skip):
            problems.add(UserError(problem))
    problems.check()
    if blank and not out:
        raise UserError(f"{file} holds blank texts only; put text into at least one row")
    if not out:
        raise UserError(f"{file} holds no row; {_NEED}")
    check_one_shape(out)
    return SourceRows(_whole_numbers(out), blank, tuple(odd))


def reasons(odd: Sequence[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Return why rows cannot be used.

    Args:
        odd: (place, reason) of each.

    Returns:
        For each kind of reason, the commonest first: the place and reason of its first case, and
        in how many rows it is.
    """
    kinds = [re.sub(r"\d+", "#", reason) for _, reason in odd]
    first = {kind: odd[i] for i, kind in reversed([*enumerate(kinds)])}
    return [(*first[kind], count) for kind, count in Counter(kinds).most_common()]


def _too_many(odd: Sequence[tuple[str, str]], total: int, file: str, skip: float) -> list[str]:
    """Return the sentences on more rows than may be left out."""
    why = [(f"{where}: {reason}", count) for where, reason, count in reasons(odd)]
    if len(odd) == 1:
        return [why[0][0]]
    counts = (
        f"{len(odd)} of {total} rows cannot be used and up to {100 * skip:g}% may be left out; "
        "mend them or raise ?skip=SHARE"
    )
    if len(why) == 1:
        return [f"{why[0][0]} ({counts})"]
    return [f"{file}: {counts}", *(f"{case} ({count} of them)" for case, count in why)]


def _whole_numbers(rows: Sequence[Located]) -> tuple[Located, ...]:
    """Read units and groups as whole numbers where a column of them was written as 3.0, 4.0 ..."""
    out = [*rows]
    for name in ("unit", "group"):
        given = [getattr(located.row, name) for located in rows]
        if any(given) and all(re.fullmatch(r"-?\d+\.0", value) for value in given if value):
            out = [
                replace(located, row=replace(located.row, **{name: value.removesuffix(".0")}))
                for located, value in zip(out, given, strict=True)
            ]
    return tuple(out)


def check_answers(records: Sequence[tuple[str, Any]], fields: Mapping[str, str]) -> None:
    """Refuse answer keys that could be meant in two ways, by all keys of a file together.

    Args:
        records: (place, record) of the file.
        fields: For each field that has another name in the file, that name.

    Raises:
        UserError: If letters and digits are mixed, digits may count from one, or a key is the text
            of one option and the letter or index of another.
    """
    first: dict[str, tuple[str, Any]] = {}
    doubtful: dict[str, str] = {}
    by_text = False
    for where, record in records:
        try:
            options = _listed(lookup(record, fields.get("choices", "choices")))
            answer = lookup(record, fields.get("answer", "answer"))
        except Ambiguous:  # told with the row
            continue
        if not isinstance(options, list | tuple) or len(options) < 2 or answer is None:
            continue
        kind, index = _key(answer)
        if isinstance(answer, str) and answer in options:
            if kind == "text" or not 0 <= index <= len(options):
                by_text = True
            elif options.index(answer) != index:
                doubtful.setdefault(kind, where)
            continue
        first.setdefault(kind, (where, answer))
        if kind == "digits" and index in (0, len(options)):
            first.setdefault("last" if index else "zero", (where, (answer, len(options))))
    say = "add ?answers=zero-based or ?answers=one-based to the source, or ?labels=FIELD"
    if "letters" in first and "digits" in first:
        (letter, a), (digit, b) = first["letters"], first["digits"]
        raise UserError(
            f"{digit}: field 'answer' is the number {b} and {letter} has the letter {a}, so it is "
            f"not sure what numbers count from; {say} with what the options are called"
        )
    for kind, where in doubtful.items():
        if kind in first:
            raise UserError(
                f"{where}: field 'answer' is the text of one option and may be the place of "
                f"another, as in {first[kind][0]}; write every answer in one way"
            )
        if not by_text:
            place = "letters" if kind == "letters" else "zero-based"
            raise UserError(
                f"{where}: field 'answer' is the text of one option and may be the place of "
                f"another; add ?answers=text or ?answers={place} to the source"
            )
    if "last" in first and "zero" not in first:
        where, (answer, count) = first["last"]
        raise UserError(
            f"{where}: field 'answer' names option {answer!r} of {count}; give an index from 0 to "
            f"{count - 1} or a letter from A to {_letter(count - 1)}, or add ?answers=one-based to "
            "the source where it counts from 1"
        )


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


def parse_record(
    record: Any,
    fields: Mapping[str, str] | None = None,
    *,
    answers: AnswerBase = "",
    sharegpt: bool = False,
) -> Row:
    """Turn one record into a row.

    Args:
        record: A mapping with the fields of one shape and perhaps `unit`, `group`, `wording`,
            `capability` and `spans`; other fields are ignored.
        fields: For each field that has another name in the record, that name or path.
        answers: How an answer is given; digits count from 0 where nobody said.
        sharegpt: Whether messages have `from` and `value`.

    Returns:
        The row; its unit is empty where none was given.

    Raises:
        Ambiguous: If it can be read in two ways.
        UserError: If a field is missing, has the wrong type or makes no sense.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"is {_type(record)}, not an object with fields; {_NEED}")
    fields = fields or {}
    values = {name: lookup(record, fields.get(name, name)) for name in FIELDS}
    for name, path in fields.items():
        values[name] = lookup(record, path, absent=Ellipsis)
        if values[name] is Ellipsis:
            raise UserError(f"field '{path}' (for '{name}') is missing")
    shape = _shape(values, record)
    values["answers"] = answers
    if shape == "chat" and sharegpt:
        values["messages"] = _from_sharegpt(values["messages"])
    wording = values["wording"]
    row = Row(
        unit=_label(values["unit"], "unit"),
        group=_label(values["group"], "group"),
        capability=_label(values["capability"], "capability"),
        wording=0 if wording in (None, "") else _integer(wording, "wording"),
    )
    row = _FILL[shape](row, values)
    spans = _listed(values["spans"])
    if spans is None or spans == "":
        return row
    if not isinstance(spans, list | tuple):
        raise UserError(f"field 'spans' is {_type(spans)}, not a list of {FORM}")
    return replace(row, spans=parse_spans(_sure(spans), row))


def lookup(record: Any, path: str, absent: Any = None) -> Any:
    """Return a field of a record by its name, by a dotted path, or several fields as a list.

    Args:
        record: The record; what is no mapping has no fields.
        path: A name that is in the record; else `a.b` for field `b` of `a`, in which a number
            picks from a list and a name is taken of each of its members; else `a,b,c` for a list
            of fields, those of a field that is a list one by one, without the empty ones at its
            end.
        absent: What to return where it is not there.

    Raises:
        Ambiguous: If an object on the way names a field twice.
    """
    if isinstance(record, Mapping) and path in record:
        return _sure(record[path])
    if "," in path:
        parts = [lookup(record, part, absent=Ellipsis) for part in path.split(",")]
        if any(part is Ellipsis for part in parts):
            return absent
        values = [v for part in parts for v in (part if isinstance(part, list) else [part])]
        while values and values[-1] in (None, ""):
            values.pop()
        return values
    head, dot, rest = path.partition(".")
    while dot:
        if isinstance(record, Mapping) and head in record:
            return lookup(_sure(record[head]), rest, absent)
        if isinstance(record, list | tuple) and head.isdecimal() and int(head) < len(record):
            return lookup(_sure(record[int(head)]), rest, absent)
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    if isinstance(record, list | tuple) and path.isdecimal() and int(path) < len(record):
        return _sure(record[int(path)])
    if isinstance(record, list | tuple) and not path.split(".")[0].isdecimal():
        values = [lookup(_sure(member), path, absent=Ellipsis) for member in record]
        return absent if any(value is Ellipsis for value in values) else values
    return absent


def _sure(value: Any) -> Any:
    """Return a value, unless reading it found a fault, which stands in its place."""
    if isinstance(value, UserError):
        raise Ambiguous(str(value))
    return value


def _shape(values: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return which shape the record has, by the fields that are there."""
    present = [s for s, needs in SHAPES.items() if any(values[n] is not None for n in needs)]
    complete = [s for s in present if all(values[n] is not None for n in SHAPES[s])]
    if len(complete) == 1:
        return complete[0]
    if len(complete) > 1:
        both = " and ".join("+".join(f"'{n}'" for n in SHAPES[s]) for s in complete)
        raise Ambiguous(f"has both {both}; keep the fields of one shape")
    if present:
        missing = next(n for n in SHAPES[present[0]] if values[n] is None)
        other = "+".join(f"'{n}'" for n in SHAPES[present[0]] if values[n] is not None)
        hint = "" if missing not in ("choices",) else (
            ", or read it as ?prompt=question&completion=answer"
        )  # fmt: skip
        null = " is null" if missing in record else " is missing"
        raise UserError(f"field '{missing}'{null}, which belongs to {other}{hint}")
    if "conversations" in record:
        raise UserError("field 'conversations' is read where the source ends in ?format=sharegpt")
    named = ", ".join(f"'{k}'" for k in list(record)[:6]) or "no field"
    raise UserError(
        f"field 'text' is missing (there is {named}); {_NEED}, or name the column as ?text=NAME"
    )


def _fill_text(row: Row, values: Mapping[str, Any]) -> Row:
    return replace(row, text=_string(values["text"], "text", blank=True))


def _fill_completion(row: Row, values: Mapping[str, Any]) -> Row:
    prompt = _string(values["prompt"], "prompt", blank=True)
    return replace(row, prompt=prompt, completion=_string(values["completion"], "completion"))


def _listed(value: Any) -> Any:
    """Return the list that a text holds as JSON, as cells of a table do; else the value itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _options(value: Any) -> tuple[str, ...]:
    """Return the options of a question."""
    choices = _listed(value)
    if not isinstance(choices, list | tuple):
        raise UserError(
            f"field 'choices' is {_type(choices)}, not a list of texts; name a field in it or "
            "several fields as ?choices=a.b or ?choices=a,b,c"
        )
    options = tuple(_string(c, f"choices[{i}]") for i, c in enumerate(choices))
    if len(options) < 2:
        raise UserError(f"field 'choices' has {counted(len(options), 'option')}; give at least two")
    if len(set(options)) < len(options):
        raise UserError("field 'choices' has two equal options; make each one different")
    if len({_form(option) for option in options}) < len(options):
        raise UserError(
            "field 'choices' has two options that differ in blanks or in the Unicode form of "
            "equal characters only; make each one different"
        )
    return options


_STYLES: Final = ("<super>", "<sub>", "<font>")


def _form(option: str) -> str:
    """Return what two options have in common that look the same.

    Superscripts, subscripts and letter styles stay: 5 squared and 52 are different answers, and so
    are Aa and aa.
    """
    composed = unicodedata.normalize("NFC", option)
    return " ".join(
        "".join(
            c if unicodedata.decomposition(c).startswith(_STYLES)
            else unicodedata.normalize("NFKC", c)
            for c in composed
        ).split()
    )  # fmt: skip


def _fill_choice(row: Row, values: Mapping[str, Any]) -> Row:
    options = _options(values["choices"])
    question = _string(values["question"], "question")
    return replace(row, prompt=question, choices=options, answer=_answer(values, options))


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _key(value: Any) -> tuple[str, int]:
    """Return how an answer key is written, `letters`, `digits` or `text`, and the place it names.

    Letters count from 0, digits from whatever their file counts from.
    """
    if not isinstance(value, str):
        return ("digits", int(value)) if _is_whole(value) else ("", -1)
    letter = value.strip().strip("().").upper()
    if len(letter) == 1 and "A" <= letter <= "Z":
        return "letters", ord(letter) - ord("A")
    if re.fullmatch(r"[0-9]+(\.0)?", letter):
        return "digits", int(letter.removesuffix(".0"))
    return "text", -1


def _answer(values: Mapping[str, Any], options: Sequence[str]) -> int:
    """Return the place of the right option, given as label, index, letter or its text.

    Args:
        values: Fields of the row; `answers` says how they are given, where somebody said.
        options: What there is to choose from.
    """
    value, asked = values["answer"], values["answers"]
    base = int(asked == "one-based")
    if "labels" in values:
        labels = _listed(values["labels"])
        if not isinstance(labels, list | tuple):
            raise UserError(f"field 'labels' is {_type(labels)}, not a list of names of options")
        names = [_label(v, f"labels[{i}]") for i, v in enumerate(labels)]
        if len(names) != len(options) or len({*names}) < len(names):
            raise UserError(f"field 'labels' must name each of the {len(options)} options once")
        if _label(value, "answer") not in names:
            raise UserError(f"field 'answer' is {value!r}, which is none of its labels")
        return names.index(_label(value, "answer"))
    place = {"letters": "letters", "zero-based": "digits", "one-based": "digits"}.get(asked)
    if isinstance(value, str) and value in options and (not place or _key(value)[0] != place):
        return options.index(value)
    if asked == "text":
        raise UserError(f"field 'answer' is {value!r}, which is none of the options")
    kind, index = _key(value) if isinstance(value, str) else ("digits", _integer(value, "answer"))
    if kind == "text":
        raise UserError("field 'answer' is none of the options, nor an index, nor a letter")
    index -= base if kind == "digits" else 0
    if not 0 <= index < len(options):
        raise UserError(
            f"field 'answer' names option {value!r} of {len(options)}; give an index from {base} "
            f"to {len(options) - 1 + base} or a letter from A to {_letter(len(options) - 1)}"
        )
    return index


def _fill_chat(row: Row, values: Mapping[str, Any]) -> Row:
    messages = _listed(values["messages"])
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError("field 'messages' must be a list of objects with 'role' and 'content'")
    turns = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(_sure(message), Mapping):
            raise UserError(f"field '{at}' is {_type(message)}, not an object with 'role'")
        role = message.get("role")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise UserError(f"field '{at}.role' is {role!r}; known roles: {known}")
        content = _content(message.get("content"), f"{at}.content")
        content = _string(content, f"{at}.content", blank=role != "assistant")
        turns.append((str(role), content))
    if not any(role == "assistant" for role, _ in turns):
        raise UserError("field 'messages' has no 'assistant' turn, so nothing is scored; add one")
    return replace(row, messages=tuple(turns))


def _content(value: Any, at: str) -> Any:
    """Return the text of content parts, `[{"type": "text", "text": ...}, ...]`, joined.

    Raises:
        UserError: If a part is no text: how many, and of which types.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(p, Mapping) for p in value):
        return value
    others = [str(part.get("type")) for part in value if part.get("type") != "text"]
    if others or not value:
        kinds = ", ".join(sorted({*others})) or "no part"
        raise UserError(f"field '{at}' has {len(others)} part(s) that are no text ({kinds})")
    return "".join(_string(part.get("text"), f"{at}.text", blank=True) for part in value)


def _from_sharegpt(value: Any) -> Any:
    """Return a ShareGPT conversation, `from` and `value`, as messages with `role` and `content`.

    Raises:
        UserError: If a turn has another form, or an unknown speaker.
    """
    turns = _listed(value)
    if not isinstance(turns, list | tuple):
        raise UserError(f"field 'conversations' is {_type(turns)}, not a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(_sure(turn), Mapping) or "from" not in turn or "value" not in turn:
            raise UserError(f"field 'conversations[{i}]' is no object with 'from' and 'value'")
        if turn["from"] not in SHAREGPT:
            known = ", ".join(SHAREGPT)
            raise UserError(
                f"field 'conversations[{i}].from' is {turn['from']!r}; known speakers: {known}"
            )
        messages.append({"role": SHAREGPT[turn["from"]], "content": turn["value"]})
    return messages


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
    """Return an optional name: text, or a whole number as text; nothing for null, NaN and ''.

    A column of whole numbers with gaps is often stored as floats: 3.0 is 3.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and abs(value) >= 2**53:
        raise Ambiguous(
            f"field '{name}' is the float {value!r}, which stands for several whole numbers; store "
            "the column as text or whole numbers"
        )
    return str(int(value)) if _is_whole(value) else _string(value, name)


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number, perhaps stored as a float."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(value: Any, name: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.0)?", value):
        return int(value.removesuffix(".0"))  # cells of a table are texts
    if not _is_whole(value):
        raise UserError(f"field '{name}' is {_type(value)}, not a whole number")
    return int(value)


def _type(value: Any) -> str:
    """Return a word for a JSON value's type."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number",
             float: "a number", type(None): "null", bytes: "bytes"}  # fmt: skip
    return words.get(type(value), f"a {type(value).__name__}")


def as_letters(row: Row, *, topic: str = "") -> Row:
    """Return the question with its options listed by letter, to be answered by a letter.

    Args:
        row: A question with choices.
        topic: Named in the header line; without one there is no header.

    Returns:
        The row, prompt as in WMDP and MMLU, choices `A`, `B` ...
    """
    lines = [f"{_letter(i)}. {choice}" for i, choice in enumerate(row.choices)]
    head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    prompt = (head if topic else "") + "\n".join([row.prompt.strip(), *lines, "Answer:"])
    return replace(row, prompt=prompt, choices=tuple(map(_letter, range(len(row.choices)))))


def chunk_rows(rows: Iterable[Row], words: int) -> Rows:
    """Cut long plain texts into chunks of even length that keep their unit.

    A document is one unit with many chunks; rows of other shapes stay as they are. A chunk of a row
    with spans has those of its characters.

    Args:
        rows: Rows.
        words: Words (runs of non-blank characters) per chunk at most.

    Returns:
        The chunks, in reading order; joined, those of a row hold all its words.
    """
    if words < 1:
        raise UserError(f"chunks of {words} words are not possible; ask for at least one")
    out: list[Row] = []
    for row in rows:
        spans = [m.span() for m in re.finditer(r"\S+", row.text)] if row.kind == "text" else []
        if len(spans) <= words:
            out.append(row)
            continue
        count = -(-len(spans) // words)
        edges = [i * len(spans) // count for i in range(count + 1)]
        for a, b in pairwise(edges):
            start, end = spans[a][0], spans[b - 1][1]
            out.append(_part(row, start, end))
    return tuple(out)


def _part(row: Row, start: int, end: int) -> Row:
    """Return the row of some of a text's characters; where no span lies in it, all are core."""
    spans = cut_spans(row.spans, start, end)
    if row.spans and not spans:
        spans = (Span(0, end - start, label=outside(row)),)
    return replace(row, text=row.text[start:end], spans=spans)
