"""Shards of one run, which find each other's stages, and what `excise merge` makes of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from excise.cli import main
from excise.core.disk import file_sum, locked
from excise.record import load, save
from excise.run.output import LOCK
from tests.cli import material as m

SMALL = m.TINY.replace("{steps: 2,", "{attacks: [relearn, quantize, few_shot], steps: 2,")
RUN = "run tiny.yaml --workers 1 --quiet"


def excise(line: str) -> int:
    """Run a command line in this process."""
    return main(shlex.split(line))


def started(line: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a command line in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "excise", *shlex.split(line)], cwd=folder, env=env
    )


def wait_for(path: Path) -> None:
    """Wait until another process has written a file."""
    for _ in range(9000):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def made(folder: Path) -> list[str]:
    """Return the stages that an output folder's run made, in their order."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [e["stage"] for e in events if e["kind"] == "stage_done" and not e["reused"]]


def timeless(folder: Path, name: str = "run.json") -> str:
    """Return a record or a page without times, memory, command and the name of its folder."""
    text = (folder / name).read_text()
    if name == "run.json":
        data = json.loads(text)
        for key in ("seconds", "peak_memory_bytes", "command"):
            del data[key]
        data["environment"].pop("started")
        for run in data["method_runs"]:
            run["cost"].pop("seconds", None)
        return json.dumps(data, indent=1)
    text = re.sub(r'"(seconds|peak_memory_bytes)":[\d.e+-]+', "", text)
    return re.sub(r"20\d\d-\d\d-\d\dT[\d:+]+|took [^<]*|( ?\d[\d.,]* (s|min|[MG]i?B)\b)+", "", text)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which two shards ran at the same time, beside a run without shards."""
    folder = tmp_path_factory.mktemp("shards")
    for place in ("alone", "shared"):
        (folder / place).mkdir()
        (folder / place / "tiny.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        other = started(f"{RUN} --out out --shard 1/2", folder / "shared")
        try:
            wait_for(folder / "shared" / "out.shard-1-of-2" / "recipe.yaml")
            patch.chdir(folder / "shared")
            assert excise(f"{RUN} --out out --shard 2/2") == 0
            assert other.wait(900) == 0
        finally:
            other.kill()
        patch.chdir(folder / "alone")
        assert excise(f"{RUN} --out out") == 0
    return folder


@pytest.fixture
def shared(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of the folder of the shards."""
    for path in done.glob("shared/out.shard-*"):
        shutil.copytree(path, tmp_path / path.name)
    shutil.copytree(done / "shared" / ".stages", tmp_path / ".stages")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_stage_was_made_once_by_one_of_both(done: Path) -> None:
    parts = [made(done / "shared" / f"out.shard-{i}-of-2") for i in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(made(done / "alone" / "out"))
    assert (done / "shared" / "out.shard-1-of-2" / "models").is_dir()
    assert not (done / "shared" / "out.shard-2-of-2" / "models").exists()


def test_merged_shards_are_the_run_without_shards(
    done: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, out = done / "alone" / "out", shared / "out"
    assert excise("merge out") == 0
    assert "note:" not in capsys.readouterr().out
    assert [path.name for path in shared.iterdir() if path.name != ".stages"] == ["out"]
    assert timeless(out) == timeless(alone)
    assert load(out).command == load(alone).command
    assert timeless(out, "report.html") == timeless(alone, "report.html")
    files = {p.relative_to(alone) for p in alone.rglob("*") if p.is_file()}
    assert {p.relative_to(out) for p in out.rglob("*") if p.is_file()} == files
    for name in files - {Path("run.json"), Path("report.html"), Path("events.jsonl")}:
        if name.name != "README.md":
            assert file_sum(out / name) == file_sum(alone / name), name
    assert sorted(made(out)) == sorted(made(alone))
    assert excise("verify out") == 0


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_torch(two: Path) -> None:
    record = load(two)
    versions = {**record.environment.versions, "torch": "1.0"}
    change = {"environment": record.environment.model_copy(update={"versions": versions})}
    save(record.model_copy(update=change), two)


def other_request(two: Path) -> None:
    data = yaml.safe_load((two / "recipe.yaml").read_text())
    (two / "recipe.yaml").write_text(yaml.safe_dump(data | {"seed": 9}))


def other_numbers(two: Path) -> None:
    record = load(two)
    first = record.scores[0].model_copy(update={"value": 0.125})
    save(record.model_copy(update={"scores": (first, *record.scores[1:])}), two)


def full_out(two: Path) -> None:
    out = two.with_name("out")
    out.mkdir()
    (out / "x").touch()


def no_shards(two: Path) -> None:
    for folder in two.parent.glob("out.*"):
        shutil.rmtree(folder)


def own_store(two: Path) -> None:
    edit(two / "shard.json", store="another", host="elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_torch, ("shards 1 and 2", "torch", "and 1.0")),
        (other_request, ("different runs",)),
        (other_numbers, ("have different numbers", "a path that both see")),
        (lambda two: edit(two / "shard.json", source="x"), ("two states of its source",)),
        (lambda two: edit(two / "shard.json", number=1), ("are both shard 1 of 2",)),
        (lambda two: edit(two / "shard.json", of=3), ("shards of 2 and of 3",)),
        (lambda two: (two / "shard.json").write_text("{"), ("shard.json is no note",)),
        (lambda two: (two / "shard.json").unlink(), ("shard is not done: 2/2;",)),
        (shutil.rmtree, ("shard is not done: 2/2;",)),
        (lambda two: two.rename("out.shard-3-of-4"), ("shards of 2 and of 4 lie beside out",)),
        (full_out, ("already holds files",)),
        (no_shards, ("no shards of out",)),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_and_left(
    shared: Path, capsys: pytest.CaptureFixture[str], change: Any, words: tuple[str, ...]
) -> None:
    change(shared / "out.shard-2-of-2")
    before = {p: p.read_bytes() for p in shared.glob("out*/**/*") if p.is_file()}
    assert excise("merge out") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert {p: p.read_bytes() for p in shared.glob("out*/**/*") if p.is_file()} == before


def test_a_running_shard_is_waited_for(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(shared / "out.shard-2-of-2" / LOCK):
        assert excise("merge out") == 2
        assert "out.shard-2-of-2 is in use" in capsys.readouterr().err
        (shared / "tiny.yaml").write_text(SMALL)
        assert excise(f"{RUN} --out out --shard 2/2") == 2  # two of one number
    assert "out.shard-2-of-2 is in use" in capsys.readouterr().err


def test_shards_that_shared_no_path_are_merged_with_a_note(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_store(shared / "out.shard-2-of-2")
    (shared / "there").mkdir()
    two = (shared / "out.shard-2-of-2").rename(shared / "there" / "two")
    assert excise(f"merge out.shard-1-of-2 {two}") == 2
    assert "--out" in capsys.readouterr().err
    assert excise(f"merge out.shard-1-of-2 {two} --out joined") == 0
    said = capsys.readouterr().out
    assert "2 stores of stages" in said
    assert "elsewhere" in said
    assert load(shared / "joined").scores
    assert not two.exists()


def test_without_ray_or_a_cluster_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SMALL)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert excise("run tiny.yaml --quiet --out out --pool ray") == 2
    assert "pip install 'excise[ray]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert excise(f"run tiny.yaml --quiet --out out --pool ray:127.0.0.1:{port}") == 2
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
