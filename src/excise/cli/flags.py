"""From the words of a command line to the options of a verb.

`argparse` reads the flags that a verb declares. Whatever else begins with `--` is a dotted setting
of the method, recipe or study.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from excise.cli.options import POSITIONAL, Count, Options
from excise.core.errors import UserError, nearest

Asked = TypeVar("Asked", bound=Options)

WIDTH = 78
"""Columns of running text in a help."""


@dataclass(frozen=True)
class Flag:
    """One field of options, as the command line sees it.

    Attributes:
        name: The field.
        label: How a user writes it: `METHOD` by its place, `--dry-run` as a flag.
        kind: What it holds, or of what it holds several.
        several: Whether it may be given several times.
        default: Value where it is not given; `MISSING` where it must be.
        help: The docstring under it.
    """

    name: str
    label: str
    kind: Any
    several: bool
    default: Any
    help: str

    @property
    def positional(self) -> bool:
        """Whether it is given by its place."""
        return not self.label.startswith("--")


def read(cls: type[Asked], args: Sequence[str], prog: str) -> Asked:
    """Read the words after a verb.

    Args:
        cls: What the verb takes.
        args: The words.
        prog: The verb as the user writes it, `excise run`.

    Raises:
        UserError: If a word is unexpected, something is missing, or a value is wrong.
    """
    flags = flags_of(cls)
    known = [flag.label for flag in flags if not flag.positional]
    words, rest = _apart(args, known)
    try:
        parsed, stray = _parser(cls, prog).parse_known_intermixed_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; see {prog} --help") from None
    given = vars(parsed)
    if all(field.name != "settings" for field in fields(cls)):
        stray += rest
    else:
        given["settings"] = _settings(rest, known)
    if stray:
        mistyped = known and stray[0].startswith("-")
        hint = nearest(stray[0], known) if mistyped else f"see {prog} --help"
        raise UserError(f"unexpected argument '{stray[0]}'; {hint}")
    # An empty text for something that is required is as good as none.
    lacking = [f.label for f in flags if f.default is MISSING and not given.get(f.name)]
    if lacking:
        are = "are" if len(lacking) > 1 else "is"
        listed = " and ".join(filter(None, (", ".join(lacking[:-1]), lacking[-1])))
        raise UserError(f"{listed} {are} missing; see {prog} --help")
    for flag in flags:
        if flag.several and flag.name in given:
            given[flag.name] = tuple(given[flag.name])
    return cls(command=f"{prog} {shlex.join(args)}".rstrip(), **given)


def help_text(cls: type[Options], prog: str) -> str:
    """Return the help of a verb."""
    return _parser(cls, prog).format_help()


def flags_of(cls: type[Options]) -> list[Flag]:
    """Return the fields of options that stand on the command line each for itself."""
    hints = get_type_hints(cls, include_extras=True)
    texts = _docstrings(cls)
    return [
        _flag(field, hints[field.name], texts[field.name])
        for field in fields(cls)
        if field.name not in ("command", "settings", "torchrun")
    ]


def _flag(field: Field[Any], hint: Any, text: str) -> Flag:
    positional = POSITIONAL in getattr(hint, "__metadata__", ())
    kind = get_args(hint)[0] if positional else hint
    if NoneType in get_args(kind):  # `Path | None`
        kind = get_args(kind)[0]
    several = get_origin(kind) is tuple
    return Flag(
        field.name,
        field.name.upper() if positional else "--" + field.name.replace("_", "-"),
        get_args(kind)[0] if several else kind,
        several,
        field.default,
        text,
    )


def _docstrings(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, inherited fields included."""
    texts = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:]):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def _parser(cls: type[Options], prog: str) -> argparse.ArgumentParser:
    """Return a parser that fills in no defaults and demands nothing, but checks values."""
    flags = flags_of(cls)
    usage = [prog]
    for flag in flags:
        if flag.positional:
            word = f"{flag.label} ..." if flag.several else flag.label
            usage.append(word if flag.default is MISSING else f"[{word}]")
        elif flag.default is MISSING:
            usage.append(f"{flag.label} {flag.name.upper()}")
    usage.append("[options]")
    if any(field.name == "settings" for field in fields(cls)):
        usage.append("[--SETTING VALUE ...]")
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=textwrap.fill(
            " ".join(usage), 72, subsequent_indent=" " * len("usage: "), break_on_hyphens=False
        ),
        description="\n\n".join(textwrap.fill(text, WIDTH) for text in paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for flag in flags:
        _add(parser, flag)
    return parser


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    """Declare a flag or a word."""
    text = flag.help.replace("%", "%%")
    if flag.default not in (MISSING, None, False, "", (), 0):
        text += f" (default: {flag.default})"
    if flag.positional:
        nargs = "*" if flag.several else "?"
        parser.add_argument(flag.name, metavar=flag.label, nargs=nargs, type=flag.kind, help=text)
    elif flag.kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag.label, dest=flag.name, action=action, help=text)
    elif get_origin(flag.kind) is Literal:
        choices = get_args(flag.kind)
        parser.add_argument(flag.label, dest=flag.name, choices=choices, help=text)
    else:
        parser.add_argument(
            flag.label,
            dest=flag.name,
            action="append" if flag.several else "store",
            type={int: whole, float: number, Count: count}.get(flag.kind, flag.kind),
            help=text,
        )


def whole(text: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs a whole number, not '{text}'") from None


def number(text: str) -> float:
    """Return a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs a number, not '{text}'") from None


def count(text: str) -> int:
    """Return a whole number that is not negative."""
    number = whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {number}")
    return number


def _apart(args: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put a verb's own flags and words apart from dotted settings and their values.

    `argparse` would take the value of a flag that it does not know for a word of its own.
    """
    known = {*flags, *(f"--no-{flag[2:]}" for flag in flags)}
    words: list[str] = []
    rest: list[str] = []
    todo = list(args)
    while todo:
        word = todo.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            words.append(word)
        elif flag.replace("_", "-") in known:
            words.append(flag.replace("_", "-") + equals + value)
        else:
            rest.append(word)
            if not equals and todo and not todo[0].startswith("--"):
                rest.append(todo.pop(0))
    return words, rest


def _settings(rest: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Turn `--a.b VALUE` and `--a.b=VALUE` into a mapping of dotted path to value.

    Args:
        rest: Settings and values.
        known: The verb's own flags, for the sentence where a setting may be a flag mistyped.

    Raises:
        UserError: If a path has no value.
    """
    settings: dict[str, str] = {}
    todo = list(rest)
    while todo:
        path, equals, value = todo.pop(0)[2:].partition("=")
        if not path:
            raise UserError("unexpected argument '--'; write a setting as --a.b VALUE")
        if not equals:
            if not todo or todo[0].startswith("--"):
                close = get_close_matches(f"--{path}", known, n=1, cutoff=0.7)
                if close:
                    raise UserError(f"unknown flag '--{path}'; did you mean '{close[0]}'?")
                raise UserError(
                    f"--{path} needs a value; it is no flag of this command, so it is read as a "
                    "setting"
                )
            value = todo.pop(0)
        settings[path] = value
    return settings
