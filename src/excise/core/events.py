"""Sinks of progress events: `emit(kind, data)`.

Kinds are `stage_start`, `stage_done`, `step` (stage, step, steps, loss, terms), `note` (text) and
`done`. The file is the truth; the terminal and trackers show it. This module imports no torch.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TextIO

from excise.core.disk import disk_full
from excise.core.errors import UserError

Emit = Callable[[str, Mapping[str, Any]], None]
"""Sink of progress events."""


def silent(kind: str, data: Mapping[str, Any]) -> None:
    """Drop an event: the default when nobody listens."""


CHANNEL: ContextVar[Emit] = ContextVar("CHANNEL", default=silent)
"""Where `emit` sends events; whoever runs a job sets it, a worker to the owner of the pool."""


def emit(kind: str, data: Mapping[str, Any]) -> None:
    """Pass an event to whoever runs this job."""
    CHANNEL.get()(kind, data)


Tracker = Literal["tensorboard", "trackio", "wandb"]


class JsonlSink:
    """Appends one line per event to a file; it holds a path only, so it may go to a worker.

    Attributes:
        path: The file; its folder is made if missing.
    """

    def __init__(self, path: Path) -> None:
        """Append to `path`."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Write one event in a single write, so that processes do not mix their lines."""
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **data}, default=str)
        with disk_full(self.path), self.path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")


def tee(*sinks: Emit) -> Emit:
    """Return a sink that passes every event to all of `sinks`."""

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        for sink in sinks:
            sink(kind, data)

    return emit


def duration(seconds: float) -> str:
    """Return a time for people: `40 s`, `3 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class _Pace:
    """Tells from the steps seen how long a stage will still take."""

    def __init__(self) -> None:
        self.first: dict[str, tuple[int, float]] = {}

    def left(self, stage: str, step: int, steps: int) -> float | None:
        """Return the seconds left, or None while there is one observation only."""
        start, began = self.first.setdefault(stage, (step, time.monotonic()))
        if step <= start:
            return None
        return (time.monotonic() - began) / (step - start) * (steps - step)


def _facts(data: Mapping[str, Any]) -> str:
    """Return the numbers of a step event in a line."""
    terms = dict(data.get("terms") or {})
    if not terms and "loss" in data:
        terms = {"loss": data["loss"]}
    return "  ".join(f"{name} {value:.4g}" for name, value in terms.items())


class _Lines:
    """Plain lines for logs and pipes: a step line every `interval` seconds at most."""

    def __init__(self, stream: TextIO, interval: float) -> None:
        self.stream, self.interval = stream, interval
        self.last = float("-inf")
        self.pace = _Pace()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        stage = data.get("stage", "")
        if kind == "stage_start":
            self._say(f"{stage}: {'resumes' if data.get('resumed') else 'starts'}")
        elif kind == "stage_done":
            took = duration(float(data.get("seconds", 0)))
            self._say(f"{stage}: {'reused' if data.get('reused') else f'done in {took}'}")
        elif kind == "note":
            self._say(str(data.get("text", "")))
        elif kind == "step":
            self._step(str(stage), data)

    def _step(self, stage: str, data: Mapping[str, Any]) -> None:
        step, steps = int(data["step"]), int(data["steps"])
        left = self.pace.left(stage, step, steps)
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        eta = "" if left is None else f"  about {duration(left)} left"
        self._say(f"{stage}: step {step}/{steps}  {_facts(data)}{eta}")

    def _say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class _Bars:
    """Live bars with time left on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=Console(file=stream),  # honours NO_COLOR
            transient=True,
        )
        self.tasks: dict[str, Any] = {}

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        stage = str(data.get("stage", ""))
        if kind == "step":
            self.progress.start()
            steps = int(data["steps"])
            if stage not in self.tasks:
                self.tasks[stage] = self.progress.add_task(stage, total=steps, facts="")
            step = int(data["step"])
            self.progress.update(self.tasks[stage], completed=step, total=steps, facts=_facts(data))
            if step >= steps:
                self._drop(stage)
        elif kind == "stage_done":
            self._drop(stage)
            if not data.get("reused"):
                self._say(f"{stage}: done in {duration(float(data.get('seconds', 0)))}")
        elif kind == "note":
            self._say(str(data.get("text", "")))
        elif kind == "done":
            self.close()

    def _drop(self, stage: str) -> None:
        if stage in self.tasks:
            self.progress.remove_task(self.tasks.pop(stage))

    def _say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bars away."""
        self.progress.stop()


class Terminal:
    """Progress on a terminal or in a log; a context manager and a sink."""

    def __init__(self, sink: _Lines | _Bars | None) -> None:
        """Show events with `sink`, or not at all."""
        self._sink = sink

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Show one event."""
        if self._sink is not None:
            self._sink(kind, data)

    def close(self) -> None:
        """Take live bars away; events after it are still shown."""
        if self._sink is not None:
            self._sink.close()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def terminal(
    stream: TextIO | None = None, *, quiet: bool = False, interval: float = 10.0
) -> Terminal:
    """Return the progress display that fits `stream`.

    Args:
        stream: Where to write; standard error if None.
        quiet: Whether to show nothing.
        interval: Seconds between step lines where the stream is no terminal.

    Returns:
        Live bars on a terminal, else plain lines.
    """
    out: TextIO = sys.stderr if stream is None else stream
    if quiet:
        return Terminal(None)
    return Terminal(_Bars(out) if out.isatty() else _Lines(out, interval))


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the step events of an `events.jsonl`; a torn last line is left out.

    Raises:
        UserError: If there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the events.jsonl of an output folder")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "step":
            rows.append(row)
    return rows


def _load(name: str, kind: str) -> Any:
    """Import a tracker's package late."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"the tracker '{kind}' is not installed; run `pip install excise[{kind}]`"
        ) from None


def track(path: Path, kind: Tracker, *, project: str = "excise") -> int:
    """Send the steps of an `events.jsonl` to a tracker; the run itself never talks to one.

    Args:
        path: The file.
        kind: Which tracker; its package is imported here and nowhere else.
        project: Project name where the tracker has projects.

    Returns:
        Number of steps sent.

    Raises:
        UserError: If the file or the tracker's package is missing.
    """
    rows = read_steps(path)
    values = [
        (f"{row.get('stage', '')}/{name}", int(row["step"]), float(value))
        for row in rows
        for name, value in {"loss": row.get("loss"), **(row.get("terms") or {})}.items()
        if value is not None
    ]
    if kind == "tensorboard":
        writer = _load("torch.utils.tensorboard", kind).SummaryWriter(str(path.parent / "tb"))
        for tag, step, value in values:
            writer.add_scalar(tag, value, step)
        writer.close()
        return len(rows)
    package = _load(kind, kind)
    run = package.init(project=project, name=path.parent.name)
    for at, (tag, step, value) in enumerate(values):
        # One global counter: stages overlap, and these trackers want steps that only rise.
        package.log({tag: value, f"{tag}/step": step}, step=at)
    (run.finish if hasattr(run, "finish") else package.finish)()
    return len(rows)
