"""Sinks of progress events: `emit(kind, data)`.

Kinds are `stage_start`, `stage_done`, `step` (stage, step, steps, loss, terms, and of training that
reads tokens `tokens_per_second`, over all processes, and `model_flops_utilisation` where the
device's peak is known), `attack` (a job of an audit is done), `phase` (text: what a run is about to
do that may take long), `note` and `warning` (text), `cache` (what a process remembered, which is no
part of a record) and `done`. Stages are named by their folder; `label` (stage, label) says what a
reader calls one, and `part` (stage, part) what of it is running.
The file is the truth; the terminal and trackers show it. This module imports no torch.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
        self.last: dict[str, int] = {}

    def left(self, stage: str, step: int, steps: int) -> float | None:
        """Return the seconds left, or None while there is one observation only.

        Who counts from the start again (one audit after another) is timed anew.
        """
        if step < self.last.get(stage, step):
            del self.first[stage]
        self.last[stage] = step
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


PHASE, ATTACKS = " phase", " attacks"
"""Bars that are no stage's; no stage is called so."""


class _Names:
    """What a reader calls the stages, whose folders bear hashes."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        self.parts: dict[str, str] = {}
        self.counted: set[str] = set()

    def learn(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take a name from an event of kind `label` or `part`; others say nothing of names."""
        stage = str(data.get("stage", ""))
        if kind == "label":
            self.labels[stage] = str(data["label"])
            if data.get("counted"):
                self.counted.add(stage)
        elif kind == "part":
            self.parts[stage] = str(data["part"])

    def of(self, stage: str) -> str:
        """Return the name of a stage, and of its part where that says more."""
        label = self.labels.get(stage) or re.sub(r"-[0-9a-f]{16}$", "", stage)
        part = self.parts.get(stage, "")
        if not part or label.startswith(part):
            return label
        return part if part.startswith(label) else f"{label}: {part}"


class _Lines:
    """Plain lines for logs and pipes: a step line every `interval` seconds at most a stage."""

    def __init__(self, stream: TextIO, interval: float) -> None:
        self.stream, self.interval = stream, interval
        self.last: dict[str, float] = {}
        self.said = time.monotonic()
        self.doing: dict[str, float] = {}
        self.phase = ""
        self.pace, self.names = _Pace(), _Names()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        stage = str(data.get("stage", ""))
        self.names.learn(kind, data)
        if kind == "stage_start":
            self._begin(stage)
            if stage not in self.names.counted:
                self._say(f"{self.names.of(stage)}: {_started(data)}")
        elif kind == "stage_done":
            self.doing.pop(stage, None)
            if stage not in self.names.counted:
                self._say(f"{self.names.of(stage)}: {_ended(data)}")
        elif kind == "phase":
            self.phase = str(data["text"])
            self._begin(PHASE)
        elif kind == "attack":
            self._say(_attack(data, self.pace))
        elif kind in ("note", "warning"):
            self._say(str(data.get("text", "")))
        elif kind == "step":
            self._step(stage, data)

    def _begin(self, stage: str) -> None:
        """Remember when something began, which ends the phase before it."""
        self.doing.pop(PHASE, None)
        self.doing[stage] = time.monotonic()

    def _step(self, stage: str, data: Mapping[str, Any]) -> None:
        step, steps = int(data["step"]), int(data["steps"])
        left = self.pace.left(stage, step, steps)
        now = time.monotonic()
        if now - self.last.get(stage, float("-inf")) < self.interval:
            return
        self.last[stage] = now
        eta = "" if left is None else f"  about {duration(left)} left"
        self._say(f"{self.names.of(stage)}: step {step}/{steps}  {_facts(data)}{eta}")

    def still(self) -> None:
        """Say what is being done where nothing was said for a while."""
        now = time.monotonic()
        if not self.doing:
            return
        stage, began = list(self.doing.items())[-1]
        if now - max(self.said, began) >= self.interval:
            what = self.phase if stage == PHASE else self.names.of(stage)
            self._say(f"{what}: {duration(now - began)} so far")

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


def _started(data: Mapping[str, Any]) -> str:
    return "resumes" if data.get("resumed") else "starts"


def _ended(data: Mapping[str, Any]) -> str:
    took = duration(float(data.get("seconds", 0)))
    return "reused" if data.get("reused") else f"done in {took}"


def _attack(data: Mapping[str, Any], pace: _Pace) -> str:
    """Return the sentence of one finished job of an audit, with the time that all will take."""
    done, of = int(data["done"]), int(data["of"])
    left = pace.left(ATTACKS, done, of)
    eta = "" if not left else f", about {duration(left)} left"
    failed = " failed" if data.get("reason") else ""
    return f"attack {done} of {of}: {data['attack']} on {data['subject']}{failed}{eta}"


NARROW = 110
"""Columns below which live bars leave out the losses."""


class _Bars:
    """Live bars with time left on a terminal of 80 columns or more."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = Console(file=stream)  # honours NO_COLOR
        columns = [
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(max_width=34, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
        ]
        if console.width >= NARROW:
            columns.append(TextColumn("{task.fields[facts]}", markup=False))
        self.progress = Progress(*columns, console=console, transient=True)
        self.tasks: dict[str, Any] = {}
        self.endless: dict[str, float] = {}
        self.pace, self.names = _Pace(), _Names()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        stage = str(data.get("stage", ""))
        self.names.learn(kind, data)
        if kind == "stage_start":
            self._show(stage, self.names.of(stage))
        elif kind == "step":
            self._step(stage, data)
        elif kind == "stage_done":
            self._drop(stage)
            if not data.get("reused") and stage not in self.names.counted:
                self._say(f"{self.names.of(stage)}: {_ended(data)}")
        elif kind == "phase":
            self._show(PHASE, str(data["text"]))
        elif kind == "attack":
            done, of = int(data["done"]), int(data["of"])
            left = self.pace.left(ATTACKS, done, of)
            eta = "" if left is None else f"{duration(left)} left"
            self._show(ATTACKS, "attacks", completed=done, total=of, count=f"{done}/{of}", left=eta)
            if done >= of:
                self._drop(ATTACKS)
        elif kind in ("note", "warning"):
            self._say(str(data.get("text", "")))
        elif kind == "done":
            self.close()

    def _step(self, stage: str, data: Mapping[str, Any]) -> None:
        step, steps = int(data["step"]), int(data["steps"])
        left = self.pace.left(stage, step, steps)
        self._show(
            stage, self.names.of(stage), completed=step, total=steps, count=f"{step}/{steps}",
            left="" if left is None else f"{duration(left)} left", facts=_facts(data),
        )  # fmt: skip
        if step >= steps:
            self._drop(stage)

    def _show(self, key: str, text: str, **fields: Any) -> None:
        """Show a bar, one that only says that it lives where its end is unknown."""
        if key != PHASE:
            self._drop(PHASE)
        self.progress.start()
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(text, total=None, count="", left="", facts="")
            self.endless[key] = time.monotonic()
        if "total" in fields:
            self.endless.pop(key, None)
        self.progress.update(self.tasks[key], description=text, **fields)

    def still(self) -> None:
        """Say of every bar whose end is unknown how long it has lived."""
        for key, began in self.endless.items():
            lived = duration(time.monotonic() - began)
            self.progress.update(self.tasks[key], left=f"{lived} so far")

    def _drop(self, stage: str) -> None:
        self.endless.pop(stage, None)
        if stage in self.tasks:
            self.progress.remove_task(self.tasks.pop(stage))

    def _say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bars away."""
        self.progress.stop()


class _Warnings:
    """What is said even where no progress is wanted."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        if kind == "warning":
            print(data.get("text", ""), file=self.stream, flush=True)

    def still(self) -> None:
        """Nothing is said."""

    def close(self) -> None:
        """Nothing is held."""


class Terminal:
    """Progress on a terminal or in a log; a context manager and a sink."""

    def __init__(self, sink: _Lines | _Bars | _Warnings) -> None:
        """Show events with `sink`."""
        self._sink = sink
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._warned: set[str] = set()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Show one event; a warning that every job repeats is shown once."""
        text = str(data.get("text", ""))
        with self._lock:
            if kind == "warning" and text in self._warned:
                return
            if kind == "warning":
                self._warned.add(text)
            self._sink(kind, data)

    def close(self) -> None:
        """Take live bars away; events after it are still shown."""
        self._closed.set()
        with self._lock:
            self._sink.close()

    def _watch(self) -> None:
        """Say now and then what is being done, while no event comes."""
        while not self._closed.wait(1.0):
            with self._lock:
                self._sink.still()

    def __enter__(self) -> Terminal:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def terminal(
    stream: TextIO | None = None, *, quiet: bool = False, interval: float = 10.0
) -> Terminal:
    """Return the progress display that fits `stream`.

    Args:
        stream: Where to write; standard error if None.
        quiet: Whether to show nothing but warnings.
        interval: Seconds between lines of one stage where the stream is no terminal, and of
            silence after which a line says what is being done.

    Returns:
        Live bars on a terminal, else plain lines.
    """
    out: TextIO = sys.stderr if stream is None else stream
    if quiet:
        return Terminal(_Warnings(out))
    return Terminal(_Bars(out) if out.isatty() else _Lines(out, interval))


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the step events of an `events.jsonl`, their stages as a reader calls them.

    A torn last line is left out.

    Raises:
        UserError: If there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the events.jsonl of an output folder")
    rows, names = [], _Names()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict):
            continue
        names.learn(str(row.get("kind")), row)
        if row.get("kind") == "step":
            rows.append({**row, "stage": names.of(str(row.get("stage", "")))})
    return rows


PACKAGES: Mapping[Tracker, str] = {
    "tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""The module of each tracker."""


def check_tracker(kind: Tracker) -> Any:
    """Import a tracker's package, which happens nowhere else, and return it.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module(PACKAGES[kind])
    except ImportError:
        raise UserError(
            f"the tracker '{kind}' is not installed; run `pip install excise[{kind}]`"
        ) from None


Point = tuple[str, int, float]
"""Tag, step and value of something that is tracked."""


def track(
    path: Path, kind: Tracker, *, project: str = "excise", results: Sequence[Point] = ()
) -> int:
    """Send the steps of an `events.jsonl` to a tracker; the run itself never talks to one.

    Args:
        path: The file.
        kind: Which tracker; its package is imported here and nowhere else.
        project: Project name where the tracker has projects.
        results: What else to send, after the steps: curves of attacks by token, scores.

    Returns:
        Number of steps sent.

    Raises:
        UserError: If the file or the tracker's package is missing, or the tracker fails.
    """
    package = check_tracker(kind)
    rows = read_steps(path)
    values: list[Point] = [
        (f"{row['stage']}/{name}", int(row["step"]), float(value))
        for row in rows
        for name, value in {"loss": row.get("loss"), **(row.get("terms") or {})}.items()
        if value is not None
    ]
    try:
        _send(package, kind, path.parent, project, [*values, *results])
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the run is whole in {path.parent}, but {kind} did not take it: {first}; run the "
            "same command again, which computes nothing anew"
        ) from None
    return len(rows)


def _send(package: Any, kind: Tracker, out: Path, project: str, points: Sequence[Point]) -> None:
    """Write points with a tracker's package."""
    if kind == "tensorboard":
        writer = package.SummaryWriter(str(out / "tb"))
        for tag, step, value in points:
            writer.add_scalar(tag, value, step)
        writer.close()
        return
    run = package.init(project=project, name=out.name)
    for at, (tag, step, value) in enumerate(points):
        # One global counter: stages overlap, and these trackers want steps that only rise.
        package.log({tag: value, f"{tag}/step": step}, step=at)
    (run.finish if hasattr(run, "finish") else package.finish)()
