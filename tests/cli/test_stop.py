"""Stopped by a signal or a full disk, the same command resumes to the same model."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from excise.cli import main
from excise.models.checkpoint import Checkpoint
from excise.record import load
from tests.cli import material as m

LINE = (
    "remove grad_diff --model model --forget f.jsonl --retain r.jsonl --out {out} --quiet"
    " --fit.steps 200 --fit.save_every 5 --max_length 32 --workers {workers}"
)


@dataclass(frozen=True)
class Stop:
    """How a run was stopped, and what it said."""

    folder: Path
    line: str
    code: int
    said: str
    steps: int


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and its rows."""
    folder = tmp_path_factory.mktemp("stop")
    m.save_tiny(folder / "model")
    (folder / "f.jsonl").write_text(m.texts("f"))
    (folder / "r.jsonl").write_text(m.texts("r"))
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """Return the output of a run that nobody stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        assert main(shlex.split(LINE.format(out="whole/out", workers=1))) == 0
    return inputs / "whole" / "out"


def start(inputs: Path, name: str, workers: int) -> tuple[str, subprocess.Popen[str]]:
    """Start a run in a process of its own, its output in the folder `name`."""
    line = LINE.format(out=f"{name}/out", workers=workers)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "excise", *shlex.split(line)]
    return line, subprocess.Popen(
        command, cwd=inputs, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def steps(folder: Path) -> int:
    """Return how many steps of training were logged."""
    logs = list(folder.glob(".stages/*/*.partial/state/steps.jsonl"))
    return logs[0].read_bytes().count(b"\n") if logs else 0


def stopped(inputs: Path, name: str, workers: int) -> Stop:
    """Start a run, send it a signal in the middle of its training, and wait for its end."""
    line, process = start(inputs, name, workers)
    deadline = time.monotonic() + 120
    try:
        while steps(inputs / name) <= 12 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.Signals[name])
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    return Stop(inputs / name, line, process.returncode, said, steps(inputs / name))


@pytest.mark.parametrize(
    ("name", "code", "workers"),
    [
        ("SIGINT", 130, 1),
        ("SIGTERM", 143, 2),
        pytest.param("SIGKILL", -9, 1, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_model(
    name: str, code: int, workers: int, whole: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = stopped(inputs, name, workers)
    assert stop.code == code, stop.said
    assert 12 < stop.steps < 200
    if code > 0:
        assert len(stop.said.splitlines()) == 1, stop.said
        assert stop.said.startswith("excise: ")
        assert f"to resume: excise {stop.line}" in stop.said
    assert not (stop.folder / "out" / "model").exists()
    assert not (stop.folder / "out" / "run.json").exists()
    monkeypatch.chdir(inputs)
    assert main(shlex.split(stop.line)) == 0
    assert Checkpoint(stop.folder / "out" / "model").fingerprint == (
        Checkpoint(whole / "model").fingerprint
    )
    assert load(stop.folder / "out").scores == load(whole).scores
    assert not list(stop.folder.glob(".stages/*/*.partial"))


@pytest.mark.parametrize("at", ["model", "items.parquet", "run.json", "report.html"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    at: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace = os.replace

    def full(source: Any, to: Any) -> None:
        if Path(to).name == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))
        replace(source, to)

    line = (
        f"remove rmu --layer 0 --model model --forget f.jsonl --retain r.jsonl --out {tmp_path}/out"
        " --quiet --fit.steps 2 --max_length 32 --workers 1"
    )
    monkeypatch.chdir(inputs)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert main(shlex.split(line)) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert "full" in said
    assert "free" in said
    left = [p.name for p in (tmp_path / "out").rglob("*")]
    assert at not in left
    assert not [name for name in left if name.startswith(".")]
    assert main(shlex.split(line)) == 0
    assert load(tmp_path / "out").method_runs[0].changed
