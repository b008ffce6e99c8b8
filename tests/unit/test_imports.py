"""The tree keeps its order: imports flow one way, files and functions are short, ASCII only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
EVERY = sorted(SRC.rglob("*.py"))

LAYERS: dict[int, tuple[str, ...]] = {
    0: (
        "errors", "inspection", "schema_study", "schema", "record", "config", "plugins", "context",
        "stages", "events",
    ),
    1: ("losses", "models", "domains"),
    2: ("train", "evals"),
    3: ("methods", "vision"),
    4: ("audit",),
    5: (
        "recipes", "environment", "plan", "registry", "output", "jobs", "recording", "run",
        "inspecting", "studies", "index", "testing", "api",
    ),
    6: ("verbs", "cli", "__main__", ""),
}  # fmt: skip
"""Packages and modules by layer, in the order in which siblings may import each other."""

MOVED = {"models.original": "domains"}
"""Modules that stand with another package: it finds models among what domains fetch."""

LAZY = {("config", "plugins"), ("audit", "api")}
"""Imports inside a function that close a circle on purpose."""

REPORT = {"report", "record", "schema", "schema_study", "errors"}
"""What the report may import: it is a pure function of the record."""

LIGHT = (
    "excise", "excise.errors", "excise.config", "excise.schema", "excise.record",
    "excise.plugins", "excise.stages", "excise.events", "excise.domains.base",
    "excise.domains.spec", "excise.index", "excise.cli", "excise.verbs.ls",
)  # fmt: skip
"""Modules that import neither torch nor transformers."""


@dataclass(frozen=True)
class Edge:
    """One import of one module of ours by another."""

    source: str
    target: str
    line: int
    inside: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in EVERY}


def imports(tree: ast.AST, *, inside: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield every import statement, those for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        else:
            deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, inside=inside or deeper)


def edges(text: str, source: str) -> Iterator[Edge]:
    """Yield what a module of ours imports of ours."""
    for node, inside in imports(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno} imports relatively"
            base = node.module or ""
            targets = [f"{base}.{alias.name}" for alias in node.names]
            targets = [t if t in NAMES else base for t in targets]
        else:
            assert isinstance(node, ast.Import)
            targets = [alias.name for alias in node.names]
        for target in targets:
            if target == "excise" or target.startswith("excise."):
                yield Edge(source, target, node.lineno, inside)


def unit(module: str) -> str:
    """Return the package or module of the table that a module belongs to."""
    inner = module.removeprefix("excise").removeprefix(".")
    return MOVED.get(inner, inner.split(".")[0])


def place(name: str) -> tuple[int, int]:
    for layer, members in LAYERS.items():
        if name in members:
            return layer, members.index(name)
    raise AssertionError(f"'{name}' stands in no layer; put it into the table and the docs")


def objection(edge: Edge) -> str:
    """Return what is wrong with an import, or nothing."""
    source, target = unit(edge.source), unit(edge.target)
    where = f"{edge.source}:{edge.line} imports {edge.target}"
    if source == target or (edge.inside and (source, target) in LAZY):
        return ""
    if source == "report":
        return "" if target in REPORT else f"{where}; the report reads the record alone"
    if target == "report":
        return "" if place(source)[0] >= 5 else f"{where}; only runs and verbs write reports"
    return "" if place(target) < place(source) else f"{where}, which stands above or beside it"


def test_imports_flow_one_way() -> None:
    found = [e for path in EVERY for e in edges(path.read_text(encoding="utf-8"), name_of(path))]
    assert len(found) > 300
    assert [text for text in map(objection, found) if text] == []


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("excise.models.hooks", "from excise.methods.base import Method"),
        ("excise.train.fit", "from excise.evals import score"),
        ("excise.config", "from excise.plugins import load_code"),
        ("excise.record", "def f():\n    import excise.stages"),
        ("excise.report.svg", "from excise.domains.base import Row"),
        ("excise.audit.base", "from excise.report.page import render"),
        ("excise.audit.base", "class A:\n    def f(self):\n        from excise.run import run"),
    ],
)
def test_an_import_against_the_order_is_found(source: str, code: str) -> None:
    assert any(objection(edge) for edge in edges(code, source))


def test_methods_and_attacks_do_not_import_each_other() -> None:
    """A method file stands on the base and the shared steps; the union alone knows them all."""
    shared = {
        "excise.methods.base", "excise.methods.tuning", "excise.methods.pretraining.pretrain",
        "excise.methods.pretraining.plain",
    }  # fmt: skip
    for path in EVERY:
        name = name_of(path)
        if not name.startswith(("excise.methods.posthoc.", "excise.methods.pretraining.")):
            continue
        stem = name.split("_")[0]
        for edge in edges(path.read_text(encoding="utf-8"), name):
            if edge.target.startswith("excise.methods"):
                own = edge.target.startswith((stem, "excise.methods.pretraining.routing."))
                assert own or edge.target in shared, f"{name} imports {edge.target}"


def test_the_documented_table_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for layer, members in LAYERS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {layer} |"))
        for name in members:
            if name and (SRC / "excise" / f"{name}.py").exists():
                assert f"`{name}`" in row, f"{name} is missing in layer {layer} of the docs"
            elif name and (SRC / "excise" / name).is_dir():
                assert f"`{name}.*`" in row, f"{name} is missing in layer {layer} of the docs"


def test_light_modules_import_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
        "import pkgutil, excise.report\n"
        "for found in pkgutil.iter_modules(excise.report.__path__, 'excise.report.'):\n"
        "    importlib.import_module(found.name)\n"
        "    assert 'torch' not in sys.modules, found.name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SRC), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    for path in EVERY:
        if path.parent == SRC / "excise":
            assert path.stem not in sys.stdlib_module_names, path
    clash = {p.stem for p in EVERY} & {"random", "types", "json", "copy", "statistics", "logging"}
    assert not clash


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function, its documentation left out."""
    body = node.body
    first = body[0]
    assert node.end_lineno is not None
    total = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        total -= first.end_lineno - first.lineno + 1
    return total


def test_files_and_functions_are_short() -> None:
    long: list[str] = []
    for path in EVERY:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 350:
            long.append(f"{path.relative_to(SRC)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > 60:
                long.append(f"{path.relative_to(SRC)}:{node.name} has {length(node)} lines")
    assert long == []


def tracked() -> list[Path]:
    """Return the texts of the repository: sources, tests, documents."""
    folders = ("src", "tests", "docs", "examples", "benchmarks")
    kinds = (".py", ".md", ".toml", ".yaml", ".html", ".json", ".txt")
    inner = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in kinds]
    return [*inner, *(p for p in ROOT.glob("*") if p.is_file() and p.suffix in kinds)]


def test_sources_are_ascii() -> None:
    others = [p for folder in ("benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")]
    for path in [*EVERY, *others]:
        assert path.read_bytes().isascii(), path


def test_nothing_names_the_machine_it_was_written_on() -> None:
    word = re.compile(r"/(?:work|root|home/\w+|Users/\w+)/|\.\./" + r"shared/|/tmp" + r"/\w")
    for path in tracked():
        text = path.read_text(encoding="utf-8", errors="replace")
        found = word.search(text)
        assert found is None, f"{path.relative_to(ROOT)} names '{found and found.group()}'"
