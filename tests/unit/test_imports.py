"""The house keeps its order: imports flow one way and in no circle, ASCII only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
EVERY = sorted(SRC.rglob("*.py"))

ORDER = (
    "core", "losses", "record", "report", "data", "models", "fetch", "train", "evals", "domains",
    "routing", "labelling", "methods", "diagnose", "auditor", "testing", "requests", "run",
    "recipes", "cli", "__main__", "excise", "excise_studies",
)  # fmt: skip
"""Packages, each of which may import those before it and itself."""

LIGHT = (
    "excise", "excise.core.errors", "excise.core.config", "excise.record", "excise.core.plugins",
    "excise.core.keys", "excise.core.events", "excise.data.domain", "excise.cli",
    "excise.cli.flags", "excise.cli.ls", "excise.cli.options", "excise.cli.gate",
    "excise.record.comparison", "excise.record.redaction",
)  # fmt: skip
"""Modules that import neither torch, transformers, numpy nor pyarrow."""


@dataclass(frozen=True)
class Edge:
    """One import of one module of ours by another."""

    source: str
    target: str
    line: int
    inside: bool
    typing: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in EVERY}


def statements(
    tree: ast.AST, *, inside: bool = False, typing: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """Yield every import, whether in a function, and whether only type checkers read it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside, typing
            continue
        only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(node, inside=inside or deeper, typing=typing or only)


def edges(text: str, source: str) -> Iterator[Edge]:
    """Yield what a module of ours imports of ours."""
    for node, inside, typing in statements(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno} imports relatively"
            base = node.module or ""
            targets = [f"{base}.{alias.name}" for alias in node.names]
            targets = [t if t in NAMES else base for t in targets]
        else:
            targets = [alias.name for alias in node.names]
        for target in targets:
            if target.split(".")[0] in ("excise", "excise_studies"):
                yield Edge(source, target, node.lineno, inside, typing)


def all_edges() -> list[Edge]:
    return [e for path in EVERY for e in edges(path.read_text(encoding="utf-8"), name_of(path))]


def package(module: str) -> str:
    """Return the package of `ORDER` that a module belongs to."""
    first, *rest = module.split(".")
    return first if first == "excise_studies" or not rest else rest[0]


def objection(edge: Edge) -> str:
    """Return what is wrong with an import, or nothing."""
    source, target = package(edge.source), package(edge.target)
    where = f"{edge.source}:{edge.line} imports {edge.target}"
    if source == target or edge.typing:
        return ""
    read = ("excise.record", "excise.core.errors", "excise.core.disk")
    if source == "report" and not edge.target.startswith(read):
        return f"{where}; the report reads the record alone"
    if target == "report" and ORDER.index(source) < ORDER.index("run"):
        return f"{where}; only runs and the command write reports"
    before = ORDER.index(target) < ORDER.index(source)
    return "" if before else f"{where}, which stands below it in the order"


def test_imports_flow_one_way() -> None:
    found = all_edges()
    assert len(found) > 300
    assert [text for text in map(objection, found) if text] == []


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("excise.models.hooks", "from excise.methods.base import Method"),
        ("excise.train.fit", "from excise.evals import score"),
        ("excise.core.config", "from excise.data.domain import Row"),
        ("excise.record", "def f():\n    import excise.models.tiny"),
        ("excise.report.svg", "from excise.data.domain import Row"),
        ("excise.auditor.base", "from excise.report.page import render"),
        ("excise.cli.study", "from excise_studies.base import Replicate"),
    ],
)
def test_an_import_against_the_order_is_found(source: str, code: str) -> None:
    assert any(objection(edge) for edge in edges(code, source))


def test_nothing_of_ours_is_imported_inside_a_function() -> None:
    """Only a heavy optional dependency may wait for its function."""
    assert next(edges("def f():\n    from excise.models import tiny", "excise.x")).inside
    assert [edge for edge in all_edges() if edge.inside] == []


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set[str](), [start]
        while todo:
            for target in graph.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        reach[start] = seen
    found = {tuple(sorted({m} | {x for x in reach[m] if m in reach.get(x, ())})) for m in graph}
    return sorted([*circle] for circle in found if len(circle) > 1)


def test_no_imports_run_in_a_circle() -> None:
    """Not even one that only type checkers walk, or that waits inside a function."""
    graph: dict[str, set[str]] = {name: set() for name in NAMES}
    for edge in all_edges():
        if edge.target != edge.source:
            graph[edge.source].add(edge.target)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles(graph) == []


def test_methods_and_attacks_do_not_import_each_other() -> None:
    """A method stands on the base and the shared steps; the union alone knows them all."""
    shared = (
        "excise.methods.base", "excise.methods.search", "excise.methods.choosing",
        "excise.methods.stopping", "excise.methods.importance", "excise.methods.tuning",
        "excise.methods.pretraining.pretrain",
        "excise.methods.pretraining.routed", "excise.methods.posthoc.answers",
        "excise.methods.posthoc.preference",
        "excise.methods.posthoc.reference", "excise.methods.distillation.cache_kinds",
        "excise.methods.distillation.sampling", "excise.methods.distillation.teacher_cache",
    )  # fmt: skip
    for path in EVERY:
        name = name_of(path)
        if not name.startswith(("excise.methods.posthoc.", "excise.methods.pretraining.")):
            continue
        stem = ".".join(name.split(".")[:4]).split("_")[0]
        for edge in edges(path.read_text(encoding="utf-8"), name):
            if edge.target.startswith("excise.methods"):
                assert edge.target.startswith((stem, *shared)), f"{name} imports {edge.target}"


def test_the_documented_order_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = [text.find(f"| `{name}`") for name in ORDER if name not in ("__main__", "excise")]
    assert -1 not in places
    assert places == sorted(places)


def test_light_modules_import_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
        "import excise.data.spec, excise.domains, excise.fetch\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
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


def test_everything_imports_where_a_system_has_no_posix_modules() -> None:
    """As on Windows, where these are not found."""
    names = sorted(NAMES - {name for name in NAMES if name.endswith("__main__")})
    code = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(('resource', 'fcntl', 'pwd', 'grp', 'termios')))\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "from excise.train.worker import peak_bytes\n"
        "assert peak_bytes() == 0\n"
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
    assert [path for path in EVERY if path.stem in sys.stdlib_module_names - {"__main__"}] == []


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
