"""Bad input through the real command: one clear sentence, the right exit code, nothing touched."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from excise.cli import main
from tests.cli import material as m
from tests.cli.mistakes import APART, DATA, FAMILIES, LENGTHS, MODELS, NUMBERS
from tests.cli.misuse import NAMES, OUTPUT, PUBLISHED

TABLE = {
    f"{name}: {case}": row
    for name, table in (
        ("data", DATA),
        ("apart", APART),
        ("model", MODELS),
        ("family", FAMILIES),
        ("lengths", LENGTHS),
        ("numbers", NUMBERS),
        ("names", NAMES),
        ("output", OUTPUT),
        ("published", PUBLISHED),
    )
    for case, row in table.items()
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with everything a removal needs."""
    folder = tmp_path_factory.mktemp("good")
    m.save_tiny(folder / "model")
    (folder / "f.jsonl").write_text(m.texts("f"))
    (folder / "r.jsonl").write_text(m.texts("r"))
    (folder / "tiny.yaml").write_text(m.TINY)
    return folder


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_one_sentence(
    name: str,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    case, work = TABLE[name], tmp_path / "work"
    shutil.copytree(good, work)
    for file, content in case.files.items():
        (work / file).parent.mkdir(exist_ok=True)
        m.write(file, content)(work)
    case.make(work)
    monkeypatch.chdir(work)
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    before = m.state(work)
    code = main(shlex.split(case.args))
    said = capsys.readouterr().err
    assert code == case.code, said
    lines = said.splitlines()
    assert len(lines) == case.lines, said
    assert lines[0].startswith("excise: "), said
    assert [word for word in case.words if word not in said] == [], said
    assert "Traceback" not in said
    after = {k: v for k, v in m.state(work).items() if not k.startswith(".stages")}
    assert after == before


@pytest.mark.parametrize(
    "name",
    ["names: unknown verb", "names: missing flag", "names: recipe no YAML", "output: list unknown"],
)
def test_a_process_of_its_own_says_the_same(name: str, tmp_path: Path) -> None:
    case = TABLE[name]
    for file, content in case.files.items():
        m.write(file, content)(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "excise", *shlex.split(case.args)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == case.code
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert [word for word in case.words if word not in done.stderr] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(case.files)


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 60
