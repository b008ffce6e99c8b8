"""Sinks: a file of lines, plain or live progress, and trackers that read the file alone."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from excise.core.errors import UserError
from excise.core.events import JsonlSink, duration, read_steps, tee, terminal, track


def _step(step: int, stage: str = "base", steps: int = 100) -> Mapping[str, Any]:
    return {"stage": stage, "step": step, "steps": steps, "loss": 1.0, "terms": {"nll": 0.12345}}


def test_lines_are_whole_and_in_order(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "new" / "events.jsonl")
    sink("stage_start", {"stage": "base"})
    sink("step", _step(1))
    sink("note", {"text": "café", "path": Path("x")})
    rows = [json.loads(line) for line in sink.path.read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["stage_start", "step", "note"]
    assert rows[0]["time"] <= rows[2]["time"]
    assert rows[2]["text"] == "café"


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="is full"):
        JsonlSink(tmp_path / "events.jsonl")("note", {"text": "x"})


def test_tee_passes_everything_on() -> None:
    seen: list[str] = []
    emit = tee(lambda k, d: seen.append("a" + k), lambda k, d: seen.append("b" + k))
    emit("note", {})
    assert seen == ["anote", "bnote"]


def test_plain_lines_now_and_then_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with terminal(out, interval=10) as show:
        show("stage_start", {"stage": "base", "resumed": False})
        for step in range(1, 101):
            clock[0] += 1
            show("step", _step(step))
        show("stage_done", {"stage": "base", "reused": False, "seconds": 100.0})
        show("stage_done", {"stage": "old", "reused": True, "seconds": 0})
        show("note", {"text": "as it is [bold]"})
    lines = out.getvalue().splitlines()
    assert lines[0] == "base: starts"
    assert lines[1] == "base: step 1/100  nll 0.1235"
    assert lines[2] == "base: step 11/100  nll 0.1235  about 89 s left"
    assert len(lines) == 1 + 10 + 3
    assert lines[-3:] == ["base: done in 2 min", "old: reused", "as it is [bold]"]


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def _bars(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = _Tty()
    with terminal(out) as show:
        show("stage_start", {"stage": "base[red]"})
        show("step", _step(50, stage="base[red]"))
        show("note", {"text": "as it is [bold]"})
        show("step", _step(100, stage="base[red]"))
        show("stage_done", {"stage": "base[red]", "reused": False, "seconds": 4})
        show("done", {})
    return out.getvalue()


def test_live_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = _bars(monkeypatch)
    assert "base[red]: done in 4 s" in text
    assert "as it is [bold]" in text
    assert "\x1b[?25h" in text  # the cursor is given back
    assert "\x1b[3" in text


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in _bars(monkeypatch)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal(quiet=True) as show:
        show("note", {"text": "x"})
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3.2, "3 s"), (89, "89 s"), (150, "2 min"), (4800, "80 min"), (7300, "2 h 2 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_stages_are_named_and_not_hashed() -> None:
    out = io.StringIO()
    with terminal(out) as show:
        rmu, inner = f"rmu-{'0' * 16}", f"undo-{'a' * 16}"
        show("label", {"stage": rmu, "label": "my-run"})
        show("stage_start", {"stage": rmu})
        show("part", {"stage": rmu, "part": "rmu 2/9"})
        show("step", _step(5, stage=rmu))
        show("stage_start", {"stage": inner})
        show("part", {"stage": inner, "part": "undo"})
        show("stage_done", {"stage": inner, "seconds": 4})
    assert out.getvalue().splitlines() == [
        "my-run: starts",
        "my-run: rmu 2/9: step 5/100  nll 0.1235",
        "undo: starts",
        "undo: done in 4 s",
    ]


def test_an_audit_tells_of_every_job_and_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with terminal(out) as show:
        for i in range(1, 4):
            stage = f"attack-relearn-{i:016x}"
            label = {"stage": stage, "label": f"relearn full {i}", "counted": True}
            show("label", label)
            show("stage_start", {"stage": stage})
            clock[0] += 20
            show("step", _step(10, stage=stage))
            show("stage_done", {"stage": stage, "seconds": 20})
            job = {"attack": "relearn", "subject": "rmu", "done": i, "of": 3}
            show("attack", {**job, "reason": "no rows" if i == 3 else ""})
    assert out.getvalue().splitlines() == [
        "relearn full 1: step 10/100  nll 0.1235",
        "attack 1 of 3: relearn on rmu",
        "relearn full 2: step 10/100  nll 0.1235",
        "attack 2 of 3: relearn on rmu, about 20 s left",
        "relearn full 3: step 10/100  nll 0.1235",
        "attack 3 of 3: relearn on rmu failed",
    ]


def test_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    show = terminal(out, interval=10)

    def wait(seconds: float) -> None:
        clock[0] += seconds
        show._sink.still()

    wait(50)  # nothing is going on
    show("phase", {"text": "reading the data"})
    wait(9)
    wait(3)
    wait(3)
    show("stage_start", {"stage": f"scores-{'0' * 16}"})
    wait(12)
    show("stage_done", {"stage": f"scores-{'0' * 16}", "seconds": 12})
    wait(99)
    assert out.getvalue().splitlines() == [
        "reading the data: 12 s so far",
        "scores: starts",
        "scores: 12 s so far",
        "scores: done in 12 s",
    ]


def test_a_second_audit_is_timed_from_its_own_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    job = {"attack": "relearn", "subject": "x", "of": 12, "reason": ""}
    with terminal() as show:
        for wait, done in ((0, 1), (6000, 12), (6000, 1), (60, 2)):
            clock[0] += wait
            show("attack", {**job, "done": done})
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "attack 2 of 12: relearn on x, about 10 min left"


def test_bars_fit_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = _Tty()
    stage = f"attack-relearn-{'0' * 16}"
    with terminal(out) as show:
        show("label", {"stage": stage, "label": "relearn full 0.0003 seed 2 on my-long-run-name"})
        show("phase", {"text": "reading the data"})
        clock[0] += 12
        show._sink.still()
        show._sink.progress.refresh()  # type: ignore[union-attr]
        for step in (1, 9_000):
            clock[0] += 4000
            terms = {"retain": 1.2345, "forget": 2.3456}
            show("step", {"stage": stage, "step": step, "steps": 10_000, "terms": terms})
        job = {"attack": "relearn", "subject": "x", "of": 36, "reason": ""}
        show("attack", {**job, "done": 1})
        clock[0] += 60
        show("attack", {**job, "done": 2})
        show._sink.progress.refresh()  # type: ignore[union-attr]
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "\n", out.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 80
    assert any("reading the data" in line and "12 s so far" in line for line in lines)
    assert any("9000/10000" in line and line.rstrip().endswith("7 min left") for line in lines)
    assert any("attacks" in line and "2/36" in line and "34 min left" in line for line in lines)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_warning_that_every_job_repeats_is_said_once(
    quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal(quiet=quiet) as show:
        for text in ("no such word", "another", "no such word"):
            show("warning", {"text": text})
    assert capsys.readouterr().err.splitlines() == ["no such word", "another"]


def test_warnings_are_said_even_where_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal(quiet=True) as show:
        show("warning", {"text": "f.jsonl changed"})
    assert capsys.readouterr().err == "f.jsonl changed\n"


def _written(tmp_path: Path) -> Path:
    sink = JsonlSink(tmp_path / "run" / "events.jsonl")
    sink("stage_start", {"stage": "base"})
    sink("step", _step(10))
    sink("step", _step(10, stage="arm"))
    with sink.path.open("a") as f:
        f.write('{"kind": "step", "st')
    return sink.path


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    assert [r["stage"] for r in read_steps(_written(tmp_path))] == ["base", "arm"]
    with pytest.raises(UserError, match="does not exist"):
        read_steps(tmp_path / "none")


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_trackers_read_the_file(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    ended: list[str] = []
    fake = types.ModuleType(kind)
    fake.__dict__.update(
        init=lambda project, name: ended.append(f"{project}/{name}"),
        log=lambda values, step: logged.append((values, step)),
        finish=lambda: ended.append("finish"),
    )
    monkeypatch.setitem(sys.modules, kind, fake)
    assert track(_written(tmp_path), kind) == 2
    assert logged[1] == ({"base/nll": 0.12345, "base/nll/step": 10}, 1)
    assert [step for _, step in logged] == [0, 1, 2, 3]
    assert ended == ["excise/run", "finish"]


def test_tensorboard_gets_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            logged.append((tag, value, step))

        def close(self) -> None:
            logged.append((Path(self.folder).name, 0, 0))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.__dict__["SummaryWriter"] = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    track(_written(tmp_path), "tensorboard")
    assert logged[:2] == [("base/loss", 1.0, 10), ("base/nll", 0.12345, 10)]
    assert logged[-1][0] == "tb"


def test_a_tracker_gets_results_after_the_steps_under_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []

    def fail(project: str, name: str) -> None:
        raise OSError("no route to host")

    fake = types.ModuleType("wandb")
    fake.__dict__.update(
        init=lambda project, name: None,
        log=lambda values, step: logged.append(values),
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = tmp_path / "run" / "events.jsonl"
    JsonlSink(path)("label", {"stage": "named-0123456789abcdef", "label": "my-run"})
    JsonlSink(path)("step", _step(20, stage="named-0123456789abcdef"))
    track(path, "wandb", results=[("scores/rmu/test/loss", 0, 1.5)])
    assert logged[-2:] == [
        {"my-run/nll": 0.12345, "my-run/nll/step": 20},
        {"scores/rmu/test/loss": 1.5, "scores/rmu/test/loss/step": 0},
    ]
    fake.__dict__["init"] = fail
    with pytest.raises(UserError, match=r"is whole in .*run, but wandb .* no route to host"):
        track(path, "wandb")


def test_a_missing_tracker_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"pip install excise\[trackio\]"):
        track(_written(tmp_path), "trackio")


def test_no_torch_is_imported() -> None:
    code = "import sys, excise.core.events, excise.core.keys; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
