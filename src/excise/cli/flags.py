"""What verbs share: flags by tyro, dotted overrides, recipes by name, progress on the terminal."""

from __future__ import annotations

import importlib.metadata
import inspect
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from excise.core.errors import UserError, nearest
from excise.core.events import Emit, JsonlSink, terminal

Options = TypeVar("Options")


def flags(cls: type[Options], args: Sequence[str], prog: str) -> tuple[Options, list[str]]:
    """Parse a verb's own flags with tyro; what is left are dotted overrides.

    Args:
        cls: Dataclass of the verb's flags.
        args: Arguments after the verb.
        prog: Shown in the help.

    Raises:
        UserError: If a flag's value is wrong.
    """
    import tyro

    own, settings = _apart(args, flag_names(cls))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            options, rest = tyro.cli(
                cls,
                args=own,
                prog=prog,
                return_unknown_args=True,
                description=inspect.cleandoc(cls.__doc__ or ""),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_first_sentence(said.getvalue(), flag_names(cls), prog)) from None
    workers: int = getattr(options, "workers", 0)
    if workers < 0:
        raise UserError(f"--workers {workers} is negative; give 0 or more")
    return options, [*rest, *settings]


def _apart(args: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put the verb's own flags and words apart from overrides and their values."""
    names = {"--help", "-h", *known, *(f"--no-{flag[2:]}" for flag in known)}
    own: list[str] = []
    rest: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word.partition("=")[0].replace("_", "-") in names:
            own.append(word)
            continue
        rest.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            rest.append(words.pop(0))
    return own, rest


def _first_sentence(text: str, known: Sequence[str], prog: str) -> str:
    """Return what tyro's box says, in our words where it is one of the common mistakes."""
    lines = [line.strip(" \u2502\u256d\u256e\u2570\u256f\u2500") for line in text.splitlines()]
    said = " ".join(line for line in lines if line)
    see = f"see {prog} --help"
    if "Required options" in said:
        words = [line.split()[0] for line in lines if line]
        lacking = [word for word in words if word in known or re.fullmatch("[A-Z]{4,}", word)]
        return f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing; {see}"
    choice = re.search(r"invalid choice '(.*?)' for argument '(.*?)'.*?\((.*?)\)", said)
    if choice:
        return f"{choice[2]}: '{choice[1]}' is none of {choice[3]}; {see}"
    value = re.search(r"Error parsing (\S+): (.*?) Argument helptext", said)
    if value:
        said = re.sub(r"^invalid literal for int.*: ", "needs a whole number, not ", value[2])
        return f"{value[1]}: {said}; {see}"
    value = re.search(r"Missing value for argument '(.*?)'", said)
    return f"{value[1]} needs a value; {see}" if value else f"{said or 'wrong arguments'}; {see}"


def overrides(rest: Sequence[str], known: Sequence[str] = ()) -> dict[str, Any]:
    """Turn `--a.b VALUE` and `--a.b=VALUE` into a mapping of dotted path to value.

    Args:
        rest: Arguments no flag took.
        known: Flags of the verb, for the error.

    Raises:
        UserError: If an argument is no override or has no value.
    """
    found: dict[str, Any] = {}
    at = 0
    while at < len(rest):
        word = rest[at]
        if not word.startswith("--") or len(word) < 3:
            raise UserError(f"unexpected argument '{word}'; {nearest(word, known)}")
        path, equals, value = word[2:].partition("=")
        if not equals:
            if at + 1 >= len(rest) or rest[at + 1].startswith("--"):
                raise UserError(f"--{path} needs a value")
            at += 1
            value = rest[at]
        try:
            found[path.replace("-", "_")] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            raise UserError(
                f"--{path}: cannot read the value {value!r}; write it as YAML"
            ) from None
        at += 1
    return found


def override(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with dotted paths set; numbers in a path index lists.

    Raises:
        UserError: If a path leads through something that has no fields.
    """
    out: dict[str, Any] = json.loads(json.dumps(data))
    for path, value in changes.items():
        node: Any = out
        *parents, last = path.split(".")
        for part in parents:
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict):
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
            else:
                raise UserError(f"--{path}: '{part}' leads nowhere; see excise show")
        if isinstance(node, list) and last.isdigit() and int(last) < len(node):
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise UserError(f"--{path}: '{last}' cannot be set there; see excise show")
    return out


def recipe_data(name: str, *, allow_code: bool = False) -> dict[str, Any]:
    """Return the plain data of a recipe: by name, from a YAML file, or `./mine.py:recipe`.

    Args:
        name: Which.
        allow_code: Whether the user asked for code of their own with `--allow-code`.

    Raises:
        UserError: If there is none of these, or it is no recipe.
    """
    from excise.core.code_files import is_code, load_code
    from excise.core.plugins import entry_points
    from excise.recipes import RECIPES, recipe_named

    if is_code(name):
        from excise.requests.recipe import Recipe

        made = load_code(name, allow=allow_code)
        made = made() if callable(made) else made
        if not isinstance(made, Recipe):
            raise UserError(f"'{name}' gives no recipe; let it return an excise.Recipe")
        return made.model_dump(mode="json")
    if name in RECIPES or name in entry_points("recipe"):
        return recipe_named(name).model_dump(mode="json")
    path = Path(name)
    if not path.exists():
        studies = importlib.metadata.entry_points(group="excise.studies").names
        if path.suffix in (".yaml", ".yml", ".json"):
            raise UserError(f"there is no recipe file {name}; check the path")
        raise UserError(f"unknown recipe '{name}'; {nearest(name, [*RECIPES, *studies])}")
    if path.is_dir():
        raise UserError(f"{name} is a folder; name a recipe or its YAML file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{name} is not valid UTF-8; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}{where} is not YAML: {getattr(error, 'problem', error)}") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{name} holds no mapping; see excise show demo for a recipe")
    return data


def flag_names(cls: type) -> list[str]:
    """Return the flags of a verb, as the user writes them."""
    named = [f.name for f in fields(cls) if "Positional" not in str(f.type)]
    return ["--" + name.replace("_", "-") for name in named]


@contextmanager
def progress(events: Path, *, quiet: bool) -> Iterator[Emit]:
    """Show progress on the terminal and append it to `events`.

    Nothing is written until the output folder is there: a refused run leaves nothing behind.

    Yields:
        A sink for the events of this process and its workers.
    """
    with terminal(quiet=quiet) as screen:

        def emit(kind: str, data: Mapping[str, Any]) -> None:
            if events.parent.is_dir():
                JsonlSink(events)(kind, data)
            screen(kind, data)

        yield emit
