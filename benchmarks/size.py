"""What a reader of the library meets: `python benchmarks/size.py [--root CHECKOUT] [--no-runs]`.

Prints, for this checkout or another one of the same project: files whose code runs for `excise
remove rmu` without an audit and for the demo (its steps cut short), lines of the library without
its studies, modules that one neighbour alone imports, circles of imports (those that only type
checkers see and those inside functions included), imports of our own inside functions, public
classes that share a name, and the names of ours that `grad_diff.py` must know.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]

TRACE = """
import sys, json, threading
root, out, *args = sys.argv[1:]
ran = set()
def note(frame, event, arg):
    code = frame.f_code
    named = code.co_flags & 1 and not code.co_name.startswith("<")
    if event == "call" and named and code.co_filename.startswith(root):
        ran.add(code.co_filename)
threading.setprofile(note)
sys.setprofile(note)
from excise.cli import main
code = main(args)
sys.setprofile(None)
json.dump({"code": code, "files": sorted(ran)}, open(out, "w"))
"""
"""Notes the files of which a function ran; those that are only imported do not count, nor do
templates and what stands in a comprehension."""


class House:
    """The modules of a checkout and what they import.

    Attributes:
        source: Its `src`.
        modules: Path by name, studies included.
    """

    def __init__(self, root: Path) -> None:
        """Read the sources."""
        self.source = root / "src"
        self.modules = {self.name(path): path for path in sorted(self.source.rglob("*.py"))}

    def name(self, path: Path) -> str:
        """Return the dotted name of a module."""
        parts = path.relative_to(self.source).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports(self, name: str, *, top: bool) -> set[str]:
        """Return the modules of ours that one imports, at its top alone or anywhere."""
        tree = ast.parse(self.modules[name].read_text(encoding="utf-8"))
        found: set[str] = set()
        for node in tree.body if top else ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in self.modules else node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        return {target for target in found if target in self.modules and target != name}

    def lone(self, *, presented: bool) -> list[str]:
        """Return the modules that one module of the same package imports and nobody else.

        Args:
            presented: Those that their folder's `__init__` imports, which puts its parts
                together (an attack in the union, an engine of RMU); else the others.
        """
        users: dict[str, set[str]] = {name: set() for name in self.modules}
        for name in self.modules:
            for target in self.imports(name, top=True):
                users[target].add(name)
        return [
            name
            for name, by in users.items()
            if len(by) == 1
            and name.rpartition(".")[0] in (u := next(iter(by)), u.rpartition(".")[0])
            and presented == (name.rpartition(".")[0] == u)
        ]

    def circles(self) -> list[list[str]]:
        """Return the groups of modules that import each other, however hidden."""
        graph = {name: self.imports(name, top=False) for name in self.modules}
        reach: dict[str, set[str]] = {}
        for start in graph:
            seen, todo = set[str](), [start]
            while todo:
                for target in graph[todo.pop()] - seen:
                    seen.add(target)
                    todo.append(target)
            reach[start] = seen
        groups = {tuple(sorted({m} | {x for x in reach[m] if m in reach[x]})) for m in graph}
        return sorted([*group] for group in groups if len(group) > 1)

    def pairs(self) -> int:
        """Return how many pairs of modules import each other directly."""
        graph = {name: self.imports(name, top=False) for name in self.modules}
        return sum(name in graph[target] for name in graph for target in graph[name]) // 2

    def lines(self) -> int:
        """Return the lines of the library without its studies."""
        kept = [p for n, p in self.modules.items() if "studies" not in ".".join(n.split(".")[:2])]
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in kept)

    def inner(self) -> int:
        """Return the imports of ours that stand inside functions."""
        count = 0
        for path in self.modules.values():
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    count += sum(_is_ours(inner) for inner in ast.walk(node))
        return count

    def doubles(self) -> list[str]:
        """Return the names that more than one public class has."""
        names = Counter(
            node.name
            for path in self.modules.values()
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        )
        return sorted(name for name, count in names.items() if count > 1)

    def concepts(self) -> list[str]:
        """Return the names of ours that the file of GradDiff imports."""
        (path,) = (p for p in self.modules.values() if p.name == "grad_diff.py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return sorted(
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and _is_ours(node)
            for alias in node.names
        )


def _is_ours(node: ast.AST) -> bool:
    """Return whether a statement imports something of ours."""
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("excise")


def ran(house: House, *args: str, cwd: Path) -> list[str]:
    """Run a command in one process, and return the files of which a function ran."""
    out = cwd / "ran.json"
    env = {
        **os.environ, "PYTHONPATH": str(house.source), "OMP_NUM_THREADS": "1", "EXCISE_WORKER": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", TRACE, str(house.source), str(out), *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if not out.is_file() or json.loads(out.read_text())["code"]:
        raise SystemExit(f"excise {' '.join(args)} failed:\n{done.stdout}{done.stderr}")
    return [
        Path(name).relative_to(house.source).as_posix()
        for name in json.loads(out.read_text())["files"]
        if name.endswith(".py")
    ]


def runs(house: House, *, demo: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield what runs for one everyday command, or two."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run(
            [sys.executable, "-c",
             "from excise.models.tiny import byte_tokenizer, tiny_model\n"
             "model, tokenizer = tiny_model('llama', blocks=3), byte_tokenizer()\n"
             "model.save_pretrained('model'); tokenizer.save_pretrained('model')"],
            cwd=root, env={**os.environ, "PYTHONPATH": str(house.source)}, check=True,
            capture_output=True,
        )  # fmt: skip
        for name in ("forget", "retain"):
            rows = [{"text": f"{name} {i} is {i * i}", "unit": f"{name}{i}"} for i in range(40)]
            (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        remove = ("remove", "rmu", "--model", "model", "--forget", "forget.jsonl", "--retain",
                  "retain.jsonl", "--out", "out", "--layer", "2", "--fit.steps", "2", "--quiet",
                  "--workers", "1")  # fmt: skip
        yield "excise remove rmu", ran(house, *remove, cwd=root)
        if not demo:
            return
        short = ("run", "demo", "--out", "demo", "--workers", "1", "--quiet",
                 "--pretrain.fit.steps", "30", "--oracles", "1",
                 "--audit.change.steps", "2")  # fmt: skip
        yield "excise run demo", ran(house, *short, cwd=root)


def main() -> None:
    """Print the measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=HERE, help="another checkout")
    parser.add_argument("--no-runs", action="store_true", help="leave out what needs running")
    parser.add_argument("--no-demo", action="store_true", help="leave out the demo, minutes long")
    parser.add_argument("--list", action="store_true", help="name the files, modules and circles")
    options = parser.parse_args()
    house = House(options.root.resolve())
    rows: list[tuple[str, list[str] | int]] = []
    if not options.no_runs:
        ran_by = runs(house, demo=not options.no_demo)
        rows += [(f"files run by `{name}`", files) for name, files in ran_by]
    rows += [
        ("library lines without studies", house.lines()),
        ("modules, studies included", len(house.modules)),
        ("modules that one neighbour alone imports", house.lone(presented=False)),
        ("modules that their folder's front alone imports", house.lone(presented=True)),
        ("circles of imports, hidden ones included", [" ".join(c) for c in house.circles()]),
        ("pairs of modules that import each other", house.pairs()),
        ("imports of ours inside functions", house.inner()),
        ("names of more than one public class", house.doubles()),
        ("concepts to write GradDiff", house.concepts()),
    ]
    for name, found in rows:
        count = found if isinstance(found, int) else len(found)
        print(f"{name:<48} {count:>7,}")
        if options.list and isinstance(found, list):
            print("".join(f"    {entry}\n" for entry in found), end="")
    concepts = house.concepts()
    print(f"\nGradDiff knows: {', '.join(concepts)}")


if __name__ == "__main__":
    main()
