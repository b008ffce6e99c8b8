"""The built wheel in a bare environment elsewhere: `python tests/wheel.py`, as `make wheel-test`.

Builds the wheel from this checkout, installs it alone into a new environment that sees the
dependencies of the one that runs this script but not `src/`, and uses it from an empty folder.
Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.5
"""Seconds of CPU that `--help` and `ls` may take."""


class Wheel:
    """The wheel and the environment it is installed in.

    Attributes:
        source: The copy of the checkout that it was built from.
        file: The wheel.
        python: Interpreter of the environment.
        cwd: An empty folder to run in.
    """

    def __init__(self, root: Path) -> None:
        """Build and install under `root`."""
        self.source = copy_checkout(root / "source")
        self.file = build(self.source, root)
        self.python = install(self.file, root / "env")
        self.cwd = root / "elsewhere"
        self.cwd.mkdir()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment from the empty folder."""
        return subprocess.run(
            command, cwd=self.cwd, env=clean(), capture_output=True, text=True, check=False
        )

    def excise(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run the installed command."""
        return self.run(str(self.python.with_name("excise")), *args)

    def names(self) -> set[str]:
        """Return the files in the wheel."""
        with zipfile.ZipFile(self.file) as archive:
            return set(archive.namelist())


def clean() -> dict[str, str]:
    """Return an environment in which nothing points to this checkout or to a network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "EXCISE", "PIP"))}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "COLUMNS": "100",
    }


def call(*command: str, cwd: Path) -> None:
    """Run a command and stop with its output if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=clean(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def copy_checkout(to: Path) -> Path:
    """Copy what the wheel is made of, so that the checkout stays as it is."""
    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    shutil.copytree(ROOT / "src", to / "src", ignore=skip)
    return to


def build(source: Path, root: Path) -> Path:
    """Build the wheel with what is installed here."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    call(*pip, "--wheel-dir", str(root / "dist"), str(source), cwd=root)
    (file,) = (root / "dist").glob("*.whl")
    return file


def install(file: Path, env: Path) -> Path:
    """Install the wheel alone; what it depends on is found where this script finds it."""
    venv.create(env, with_pip=False, symlinks=True)
    python = env / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    call(*pip, "--no-deps", "--no-compile", str(file), cwd=env)
    site = next((env / "lib").glob("python*/site-packages"))
    # A plain line adds a folder but runs no .pth file in it, so that an editable install of this
    # checkout does not come along.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def files_are_inside(wheel: Wheel) -> None:
    """The wheel holds every file of both packages, data included, and nothing else."""
    source = wheel.source / "src"
    wanted = {
        str(path.relative_to(source))
        for package in ("excise", "excise_studies")
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    inside = {name for name in wheel.names() if ".dist-info/" not in name}
    assert inside == wanted, f"differ: {sorted(inside ^ wanted)}"
    for name in ("py.typed", "cli/index.json", "report/page.html", "report/style.html"):
        assert f"excise/{name}" in inside, f"{name} is missing"
    assert any(name.startswith("excise/domains/shipped/") for name in inside), "data is missing"


def licence_is_inside(wheel: Wheel) -> None:
    """The licence travels with the wheel."""
    assert any(".dist-info/" in n and n.endswith("LICENSE") for n in wheel.names())


def it_is_the_installed_one(wheel: Wheel) -> None:
    """The package comes from the environment, not from this checkout."""
    done = wheel.run(str(wheel.python), "-c", "import excise; print(excise.__file__)")
    where = Path(done.stdout.strip())
    assert wheel.python.parents[1] in where.parents, f"{where} {done.stderr}"
    assert ROOT not in where.parents, str(where)


def every_module_imports(wheel: Wheel) -> None:
    """Every module of the wheel can be imported."""
    files = sorted(n for n in wheel.names() if n.endswith(".py"))
    names = [n.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for n in files]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception as error:\n"
        "        sys.exit(f'{name}: {error!r}')\n"
    )
    done = wheel.run(str(wheel.python), "-c", code, *(n for n in names if n != "excise.__main__"))
    assert done.returncode == 0, done.stderr
    assert len(names) > 100, f"only {len(names)} modules"


def public_names_import(wheel: Wheel) -> None:
    """What `import excise` promises is there."""
    code = "import excise\nfor name in excise.__all__: getattr(excise, name)"
    done = wheel.run(str(wheel.python), "-c", code)
    assert done.returncode == 0, done.stderr


def help_and_version(wheel: Wheel) -> None:
    """The command says what it can do and what it is."""
    done = wheel.excise("--help")
    assert done.returncode == 0, done.stderr
    assert "usage: excise VERB" in done.stdout
    assert wheel.excise("--version").stdout.startswith("excise 0"), "no version"
    module = wheel.run(str(wheel.python), "-m", "excise", "--help")
    assert module.stdout == done.stdout, module.stderr


def ls_lists_everything(wheel: Wheel) -> None:
    """`ls` names every method and attack of the index."""
    done = wheel.excise("ls")
    assert done.returncode == 0, done.stderr
    file = wheel.source / "src" / "excise" / "cli" / "index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    for family, members in index.items():
        for member in members:
            assert member["name"] in done.stdout, f"{family}: {member['name']}"


def bad_usage(wheel: Wheel) -> None:
    """A mistake is one line on standard error and exit code 2."""
    done = wheel.excise("lss")
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.startswith("excise: unknown command 'lss'; did you mean")
    assert done.stderr.count("\n") == 1


def quick_and_light(wheel: Wheel) -> None:
    """`--help`, `--version` and `ls` import no torch and take under half a second of CPU."""
    code = (
        "import sys, time\n"
        "from excise.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules))\n"
        "print(code, time.process_time(), *heavy, file=sys.stderr)\n"
    )
    light = ("--help", "--version", "ls", "ls methods", "run --help", "remove rmu --help")
    for args in map(str.split, light):
        # The second call: the first one writes the compiled files, once after an installation.
        for _ in range(2):
            done = wheel.run(str(wheel.python), "-c", code, *args)
        exit_code, seconds, *heavy = done.stderr.split()
        assert exit_code == "0", f"{args}: {done.stderr}"
        assert not heavy, f"excise {' '.join(args)} imports {', '.join(heavy)}"
        assert float(seconds) < LIMIT, f"excise {' '.join(args)} takes {seconds} s"


def a_package_adds_to_it(wheel: Wheel) -> None:
    """What an installed package adds is listed, and its study runs."""
    source = wheel.source.parent / "plugin"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "examples" / "plugin", source, ignore=skip)
    pip = [sys.executable, "-m", "pip", "--python", str(wheel.python), "install", "--quiet"]
    call(*pip, "--no-deps", "--no-build-isolation", "--no-compile", str(source), cwd=source)
    listed = wheel.excise("ls").stdout
    for name in ("task_negation", "norm_reset", "answer_rank", "glossary", "negation-strength"):
        assert f"  {name} " in listed, f"{name} is not listed"
    out = wheel.source.parent / "runs" / "study"
    short = ("--pretrain.fit.steps", "2", "--strengths", "[1.0]", "--workers", "1", "--quiet")
    done = wheel.excise("study", "negation-strength", "--out", str(out), *short)
    assert done.returncode == 0, done.stderr
    made = [path.name for path in (out.parent / ".stages" / "v2").glob("task_negation-*")]
    assert len(made) == 1, made


def nothing_is_left_behind(wheel: Wheel) -> None:
    """None of this wrote into the folder it ran in."""
    assert list(wheel.cwd.iterdir()) == []


CHECKS: tuple[Callable[[Wheel], None], ...] = (
    files_are_inside,
    licence_is_inside,
    it_is_the_installed_one,
    every_module_imports,
    public_names_import,
    help_and_version,
    ls_lists_everything,
    bad_usage,
    quick_and_light,
    a_package_adds_to_it,
    nothing_is_left_behind,
)


def main() -> int:
    """Run every check and print how many passed."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="excise-wheel-") as folder:
        wheel = Wheel(Path(folder).resolve())
        for check in CHECKS:
            try:
                check(wheel)
            except Exception as error:
                failed += 1
                print(f"FAILED {check.__name__}: {error}")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
