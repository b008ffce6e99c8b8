"""Every command that the docs show exists, with its flags, and so does every message."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from excise.cli.flags import read
from excise.cli.ls import FAMILIES
from excise.cli.options import VERBS
from excise.cli.remove import of_rest
from excise.core.errors import UserError
from excise.recipes import RECIPES
from excise.requests.registry import registry
from excise.run.study import study_points

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
        members = {name for family in registry().values() for name in family} | {*study_points()}
        known = set(FAMILIES) if verb == "ls" else members | set(RECIPES) | {"NAME"}
        return " ".join(word for word in rest if word not in known)
    try:
        options = read(VERBS[verb], rest, f"excise {verb}")
    except UserError as error:
        return str(error)
    method = getattr(options, "method", "")
    if verb == "remove" and ".py:" not in method and method != "METHOD":
        cls = registry()["method"].get(method)
        if cls is None:
            return f"no method {method}"
        settings: dict[str, str] = getattr(options, "settings", {})
        own = [path for path in settings if not of_rest(path)]
        parts = {path: path.split(".")[0].replace("-", "_") for path in own}
        return " ".join(path for path, part in parts.items() if part not in cls.model_fields)
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
    assert "--base is missing" in problem("excise export DELTA --out DIR")
    assert "unexpected argument '--seed'" in problem("excise report DIR --seed 1")


def test_every_method_stands_once_in_the_table_of_the_readme() -> None:
    table = (ROOT / "README.md").read_text("utf-8").partition("| method | acts |")[2]
    first = [row.split("|")[1] for row in table.partition("\n\n")[0].splitlines()[2:]]
    names = re.findall(r"`(\w+)`", " ".join(first))
    assert sorted(names) == sorted(registry()["method"].keys() - {"plain"})


def sentences() -> set[str]:
    """Return the texts of the source, values left out, joined where Python joins them."""
    texts = set()
    for path in (ROOT / "src" / "excise").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                texts.add("".join(map(str, parts)))
    return texts


def test_a_message_of_the_page_on_trouble_is_one_that_is_said() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) >= 25
    known = "\n".join(sentences())
    unknown = [
        (message, part)
        for message in messages
        for part in (part.strip(" (),.:'") for part in message.split("…"))
        if part and part not in known
    ]
    assert unknown == []
    assert "the flux capacitor is empty" not in known
