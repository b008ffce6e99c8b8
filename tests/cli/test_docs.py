"""Every command that the docs show exists, with the flags they show."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from excise.cli import MODULES, VERBS
from excise.cli.flags import flags, overrides
from excise.cli.index import FAMILIES
from excise.recipes import RECIPES
from excise.requests.registry import registry

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if p.is_file())


def commands(text: str) -> list[str]:
    """Return the `excise ...` lines of fenced blocks, continued lines joined."""
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"^\s*(\$ )?(\S*/)?(?=excise )", "", line)
            if command.startswith("excise "):
                found.append(command.strip())
    return found


LINES = [(page.name, line) for page in PAGES for line in commands(page.read_text("utf-8"))]


def problem(line: str) -> str:
    """Return what is wrong with a command line; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    if not words or words[0] in ("--help", "--version"):
        return ""
    verb, *rest = words
    if verb not in VERBS:
        return f"no verb {verb}"
    if verb in ("ls", "show"):
        members = {name for family in registry().values() for name in family}
        known = set(FAMILIES) if verb == "ls" else members | set(RECIPES) | {"NAME"}
        return " ".join(word for word in rest if word not in known)
    module = importlib.import_module(f"excise.cli.{MODULES.get(verb, verb)}")
    (options,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and is_dataclass(value) and value.__module__ == module.__name__
    )
    given, left = flags(options, rest, f"excise {verb}")
    method = getattr(given, "method", "")
    changes = overrides(left)
    if changes and verb in ("report", "fetch"):
        return f"excise {verb} takes no settings"
    if verb == "remove" and ".py:" not in method and method != "METHOD":
        cls = registry()["method"].get(method)
        if cls is None:
            return f"no method {method}"
        return " ".join(path for path in changes if path.split(".")[0] not in cls.model_fields)
    return ""


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_of_the_docs_is_right(page: str, line: str) -> None:
    assert problem(line) == ""


def test_mistakes_in_the_docs_would_be_found() -> None:
    assert len(LINES) >= 2
    assert problem("excise remvoe rmu") == "no verb remvoe"
    assert problem("excise show rmuu") == "rmuu"
    line = "excise remove rmu --model DIR --forget f --retain r --out OUT"
    assert problem(f"{line} --lora.rank 4  # an adapter") == ""
    assert problem(f"{line} --lorra.rank 4") == "lorra.rank"
    assert problem(line.replace("rmu", "rnu")) == "no method rnu"
