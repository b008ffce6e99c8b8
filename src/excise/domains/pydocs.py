"""Computing without attacks: what the running Python says about itself.

Docstrings of the standard library and the language reference that `help()` shows lie on every
machine with Python. Sources are parsed, never imported. This module imports no torch.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from functools import cache
from pathlib import Path

_MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "cmd", "codecs", "collections",
    "concurrent", "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime",
    "decimal", "difflib", "dis", "email", "enum", "filecmp", "fileinput", "fnmatch", "fractions",
    "functools", "gettext", "glob", "graphlib", "gzip", "heapq", "html", "importlib", "inspect",
    "io", "ipaddress", "json", "keyword", "linecache", "locale", "logging", "mimetypes",
    "multiprocessing", "numbers", "operator", "optparse", "os", "pathlib", "pickletools", "pkgutil",
    "platform", "pprint", "profile", "pstats", "queue", "random", "re", "reprlib", "sched",
    "selectors", "shelve", "shlex", "shutil", "sqlite3", "statistics", "string", "subprocess",
    "sysconfig", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace",
    "traceback", "turtle", "typing", "unittest", "urllib", "uuid", "warnings", "wave", "weakref",
    "wsgiref", "xml", "zipfile", "zoneinfo",
)  # fmt: skip
"""Modules whose docstrings are read: none about cryptography, permissions or attacks."""

_SHORT = 25
"""Words a docstring must have at least."""


@cache
def stdlib_docstrings() -> tuple[tuple[str, str], ...]:
    """Return (name, text) of the standard library's longer docstrings, code examples left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    docstrings = []
    for module in _MODULES:
        folder = root / module
        sources = sorted(folder.rglob("*.py")) if folder.is_dir() else [root / f"{module}.py"]
        for source in sources:
            if "test" in source.parts or not source.is_file():
                continue
            name = source.relative_to(root).as_posix().removesuffix(".py")
            tree = ast.parse(source.read_text(encoding="utf-8", errors="replace"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = _words_only(ast.get_docstring(node) or "")
                    if len(text.split()) >= _SHORT:
                        part = getattr(node, "name", "")
                        line = getattr(node, "lineno", 0)
                        docstrings.append((f"{name}:{part}:{line}".rstrip(":0"), text))
    return tuple(docstrings)


@cache
def reference_topics() -> tuple[tuple[str, str], ...]:
    """Return (topic, text) of the language reference."""
    source = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    if not source.is_file():
        return stdlib_docstrings()
    tree = ast.parse(source.read_text(encoding="utf-8"))
    table = next(
        (node.value for node in tree.body if isinstance(node, ast.Assign) and _is_topics(node)),
        None,
    )
    topics: dict[str, str] = ast.literal_eval(table) if table is not None else {}
    texts = [(key, _words_only(text)) for key, text in sorted(topics.items())]
    return tuple((key, text) for key, text in texts if len(text.split()) >= _SHORT)


def _is_topics(node: ast.Assign) -> bool:
    return any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets)


def _words_only(text: str) -> str:
    """Return the paragraphs that are prose: no prompts, tables, grammars or underlines."""
    prose = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text)):
        joined = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c.isspace() for c in joined)
        if ">>>" in joined or "::=" in joined or not joined:
            continue
        if letters >= 0.85 * len(joined) and len(joined.split()) > 5:
            prose.append(re.sub(r"[*`]+", "", joined))
    return " ".join(prose)
