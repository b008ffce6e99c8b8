"""Code of one's own: only on request, errors in a sentence, and into worker processes."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from excise.core.code_files import is_code, load_code, rebuild, where
from excise.core.config import Config
from excise.core.errors import UserError
from excise.core.keys import source_of
from excise.core.plugins import collect_code, default_name, entry_points, import_bitsandbytes
from excise.requests.registry import registry
from excise.run.study import study_points
from excise.train.pool import Processes

MINE = '''"""A method of one's own."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from excise.core.config import Config


class Inner(Config):
    """A nested configuration."""

    steps: int = 3


class Mine(Config):
    """Mine."""

    kind: ClassVar[str] = "method"
    name: Literal["mine"] = "mine"
    factor: float = 2.0
    inner: Inner = Inner()

    def apply(self, x: float) -> float:
        return self.factor * x * self.inner.steps


NOT_A_CLASS = 7


class Nameless(Config):
    """Has no name."""

    kind: ClassVar[str] = "method"


class Abstract(Config, ABC):
    """Lacks a part."""

    kind: ClassVar[str] = "method"
    name: Literal["abstract"] = "abstract"

    @abstractmethod
    def apply(self, x: float) -> float:
        """Is missing."""


class Unrelated:
    """Is no configuration."""
'''


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


def test_what_names_code() -> None:
    assert is_code("./mine.py:Cls")
    assert not any(map(is_code, ("rmu", "mine.py", "a:b", 7, None)))


def test_code_runs_only_when_allowed(tmp_path: Path) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\nX = 1\n")
    with pytest.raises(UserError, match="--allow-code"):
        load_code(f"{trap}:X", allow=False)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(UserError, match="--allow-code"):
        collect_code({"arms": {"a": {"name": f"{trap}:X"}}}, allow=False)
    assert not (tmp_path / "sprung").exists()
    assert load_code(f"{trap}:X", allow=True) == 1
    assert (tmp_path / "sprung").exists()


def test_a_file_is_imported_once_and_again_when_it_changed(mine: str) -> None:
    first = load_code(f"{mine}:Mine", allow=True)
    assert load_code(f"{mine}:Mine", allow=True) is first
    Path(mine).write_text(MINE.replace("= 2.0", "= 5.0"))
    second = load_code(f"{mine}:Mine", allow=True)
    assert second is not first
    assert second().factor == 5.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def broken(:\n", "cannot be imported: SyntaxError"),
        ("import not_there_at_all\n", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0\n", "cannot be imported: ZeroDivisionError"),
        ("class Mime:\n    pass\n", "has no 'Mine'; did you mean 'Mime'"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    before = set(sys.modules)
    with pytest.raises(UserError) as caught:
        load_code(f"{file}:Mine", allow=True)
    assert says in str(caught.value)
    assert "Traceback" not in str(caught.value)
    if "imported" in says:
        left = {m for m in set(sys.modules) - before if m.startswith("excise_user_")}
        assert left == set()


def test_a_copy_elsewhere_is_code_of_its_own(mine: str, tmp_path: Path) -> None:
    other = tmp_path / "copy" / "mine.py"
    other.parent.mkdir()
    other.write_text(MINE)
    first, second = (load_code(f"{p}:Mine", allow=True) for p in (mine, other))
    assert (where(first), where(second)) == (f"{mine}:Mine", f"{other}:Mine")


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        load_code(f"{tmp_path}/none.py:Mine", allow=True)
    with pytest.raises(UserError, match="is not a file"):
        load_code(f"{tmp_path}.py:Mine", allow=True)


def test_references_become_names(mine: str) -> None:
    data = {
        "title": "t",
        "arms": {"a": {"name": f"{mine}:Mine", "factor": 3}, "b": {"name": "rmu"}},
        "chain": [{"name": f"{mine}:Mine"}],
    }
    found, references, classes = collect_code(data, allow=True)
    assert found["arms"] == {"a": {"name": "mine", "factor": 3}, "b": {"name": "rmu"}}
    assert found["chain"] == [{"name": "mine"}]
    assert references == {"mine": f"{mine}:Mine"}
    assert classes["mine"](factor=3).apply(1.0) == 9.0  # type: ignore[call-arg, attr-defined]
    assert data["arms"]["a"]["name"].endswith(":Mine")  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NOT_A_CLASS", "is no method"),
        ("Unrelated", "is no method"),
        ("Inner", "is no method"),
        ("Nameless", "has no field `name"),
        ("Abstract", "lacks apply"),
    ],
)
def test_what_is_no_named_member_is_refused(mine: str, name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        default_name(load_code(f"{mine}:{name}", allow=True), f"{mine}:{name}")
    assert says in str(caught.value)
    assert str(caught.value).endswith("see docs/extending.md")


def test_code_counts_by_the_bytes_that_were_imported(mine: str) -> None:
    cls = load_code(f"{mine}:Mine", allow=True)
    assert hashlib.sha256(MINE.encode()).hexdigest() in source_of(cls)


def test_a_users_class_is_rebuilt_from_its_file(mine: str) -> None:
    cls = load_code(f"{mine}:Mine", allow=True)
    made = cls(factor=4.0, inner={"steps": 5})
    assert where(cls) == f"{mine}:Mine"
    again = rebuild(where(cls), made.model_dump())
    assert again == made
    data = pickle.dumps(made)
    assert b"mine.py" in data
    for name in [m for m in sys.modules if m.startswith("excise_user_mine_")]:
        del sys.modules[name]
    other = pickle.loads(data)
    assert type(other) is not cls
    assert other.model_dump() == made.model_dump()


def apply_in_worker(job: Any) -> tuple[float, int, str]:
    return job.apply(2.0), os.getpid(), type(job).__name__


def test_a_users_class_travels_into_worker_processes(mine: str) -> None:
    cls = load_code(f"{mine}:Mine", allow=True)
    jobs: list[Config] = [cls(factor=float(i)) for i in range(3)]
    with Processes(2) as pool:
        answers = pool.map(apply_in_worker, jobs)
    assert [a[0] for a in answers] == [0.0, 6.0, 12.0]
    assert all(a[1] != os.getpid() for a in answers)
    assert {a[2] for a in answers} == {"Mine"}


def package(folder: Path, name: str, points: str) -> None:
    """Install a package that offers `points`, as far as Python can tell."""
    (folder / f"{name}.py").write_text(MINE)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    importlib.invalidate_caches()


def test_entry_points_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package(tmp_path, "their_package", "[excise.methods]\ntheirs = their_package:Mine\n")
    found = entry_points("method")
    assert found["theirs"]().apply(1.0) == 6.0
    assert "theirs" not in entry_points("attack")


def test_a_name_that_two_packages_offer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package(tmp_path, "one_package", "[excise.studies]\nmine = one_package:Mine\n")
    assert "mine" in study_points()
    package(tmp_path, "another", "[excise.studies]\nmine = another:Mine\n")
    with pytest.raises(UserError, match=r"studies: both .* are called 'mine'; rename one"):
        study_points()


def test_a_name_that_excise_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package(tmp_path, "their_package", "[excise.methods]\nrmu = their_package:Mine\n")
    with pytest.raises(UserError, match="methods: both excise itself and their_package:Mine"):
        registry()


def test_code_with_a_name_that_is_there_is_refused(tmp_path: Path) -> None:
    twins = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in twins:
        path.write_text(MINE)
    named = [{"name": f"{path}:Mine"} for path in twins]
    with pytest.raises(UserError, match="are called 'mine'; give one another name"):
        collect_code({"arms": dict(zip("ab", named, strict=True))}, allow=True)
    twins[0].write_text(MINE.replace('"mine"', '"rmu"'))
    cls = load_code(f"{twins[0]}:Mine", allow=True)
    with pytest.raises(UserError, match="is called 'rmu' like a method that is there already"):
        registry({"rmu": cls})


FETCHES = """import logging
try:
    import kernels
    fetched = True
except ImportError:
    fetched = False
    logging.getLogger("bitsandbytes.backends").warning("no kernels")
"""


def test_what_bitsandbytes_says_and_fetches_while_it_is_imported_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bitsandbytes.py").write_text(FETCHES)
    (tmp_path / "kernels.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("bitsandbytes", "kernels"):  # so that both are gone again afterwards
        monkeypatch.setitem(sys.modules, name, sys)
        monkeypatch.delitem(sys.modules, name)
    package = import_bitsandbytes()
    assert package is not None
    assert not package.fetched
    assert caplog.messages == []
    assert importlib.import_module("kernels").__file__ == str(tmp_path / "kernels.py")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert import_bitsandbytes() is None
