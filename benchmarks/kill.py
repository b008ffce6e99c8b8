"""Jobs killed at random moments and run again: what they leave must be what nobody's kill left.

Each job runs undisturbed once. Then cases are drawn from the seed: a job, and one to four kills in
a row, each a signal (SIGKILL, SIGTERM, SIGINT) to the process, to all its processes or to a single
worker, right before the n-th change of a file, some milliseconds after it, or at a random time.
The same command follows until it ends, and every file is compared with the undisturbed run's:
models, items and labels byte by byte, records and stages but for times, and no name more or less.
Ends with 1 where anything differed, a sentence was no sentence, or a process hung or stayed.

    python benchmarks/kill.py [--kills 200] [--seed 0] [--minutes M] [--verbs run ...] [--case N]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LIMIT = 300.0
"""Seconds after which a process hangs."""

TIMES = frozenset({
    "seconds", "started", "peak_memory_bytes", "training_seconds", "seconds_per_word", "log_sha256",
})  # fmt: skip
"""Fields of records and stages that are times, memory of one process, or the sum of such."""

RECIPE = """\
name: tiny
domain: {name: facts, subjects: 24, relations: 2, objects: 4}
model: {scratch: {width: 16, blocks: 1}}
pretrain: {fit: {steps: 7, lr: 0.003, batch_size: 8, save_every: 3}, max_length: 16}
arms:
  rmu:
    {name: rmu, layer: 0, max_length: 16, fit: {steps: 5, lr: 0.01, batch_size: 8, save_every: 2}}
audit: {budget: none}
evaluate: {max_rows: 4, max_length: 16, samples: 1}
oracles: 1
"""

REMOVE = (
    "remove {method} --model model --forget f.jsonl --retain r.jsonl --out out --quiet"
    " --max-length 16 --fit.batch-size 4 --evaluate.max-rows 4 --evaluate.samples 1 --workers {n}"
)
AUDIT = {
    "steps": 2, "checkpoints": [0, 2], "rates": [0.001], "lora_rates": [0.001], "seeds": [0],
    "max_test_rows": 4, "max_other_rows": 4, "max_length": 16, "batch_size": 4,
    "attacks": ["relearn", "few_shot", "probe"],
}  # fmt: skip
STUDY = (
    "study rmu-is-shallow --out out --quiet --workers 1 --seeds [1] --domain.subjects 24"
    " --domain.relations 2 --domain.objects 8 --model.scratch.width 16 --model.scratch.blocks 2"
    " --pretrain.fit.steps 8 --pretrain.fit.batch-size 16 --rmu.layer 1 --rmu.blocks [0,1]"
    " --rmu.fit.steps 4 --rmu.fit.batch-size 8 --dims [1] --random-directions 1 --rates [0.001]"
    " --relearn-steps 2 --only '[not cleared, \"original, one\", random]'"
)

JOBS: dict[str, str] = {
    "run": "run tiny.yaml --out out --quiet --workers 1",
    "run, 2 workers": "run tiny.yaml --out out --quiet --workers 2",
    "remove": REMOVE.format(method="npo", n=1) + " --fit.steps 6 --fit.save-every 2 --keep all",
    "remove, 2 workers": REMOVE.format(method="npo", n=2) + " --fit.steps 6 --fit.save-every 2",
    "undo": REMOVE.format(method="undo", n=1)
    + " --cache.name hidden --fit.steps 8 --fit.save-every 3 --unlearn.name grad_diff"
    " --unlearn.fit.steps 4 --unlearn.fit.save-every 3 --unlearn.max-length 16",
    "audit": "audit --model edited --original model --forget f.jsonl --retain r.jsonl --out out"
    " --quiet --budget smoke --evaluate.max-rows 4 --evaluate.samples 1 --evaluate.max-length 16"
    f" --workers 1 --audit.change {shlex.quote(json.dumps(AUDIT))}",
    "label": "label --labels few.jsonl?duplicates=exact --unlabeled rest.jsonl?duplicates=exact"
    " --out out --quiet --labeller ngrams --labeller.buckets 4096",
    "study": STUDY,
}  # fmt: skip
"""Command lines by name; the first word is the verb."""

SLOW = ("run, 2 workers", "remove, 2 workers", "study")
"""Jobs that take long, such as those that start workers; drawn less often."""


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        signal: Which signal.
        whom: The process itself, its group, or one of its workers.
        moment: Right before the n-th change of a file, some milliseconds after it, or at a time.
        at: Which change or time, as a share of those of the undisturbed run.
        after: Seconds after the change.
    """

    signal: signal.Signals
    whom: Literal["process", "group", "worker"]
    moment: Literal["change", "after", "time"]
    at: float
    after: float = 0.0

    def __str__(self) -> str:
        wait = f" + {1000 * self.after:.1f} ms" if self.after else ""
        return f"{self.signal.name} to the {self.whom} at {self.moment} {self.at:.4f}{wait}"


@dataclass(frozen=True)
class Case:
    """A job and its kills, in order."""

    number: int
    job: str
    kills: tuple[Kill, ...]


@dataclass(frozen=True)
class Outcome:
    """What one process did.

    Attributes:
        code: Exit code, negative for a signal; None where it did not end in time.
        said: Its standard error.
        changes: Changes of files that its main process made; 0 where it was killed.
        seconds: How long it lived.
        sent: Whether the kill reached it.
    """

    code: int | None
    said: str
    changes: int
    seconds: float
    sent: bool


@dataclass(frozen=True)
class Undisturbed:
    """What a job leaves that nobody kills, and how many changes and seconds it takes."""

    contents: Mapping[str, Any]
    changes: int
    seconds: float


@dataclass
class Tally:
    """What happened to the cases of one job."""

    cases: int = 0
    sent: collections.Counter[str] = field(default_factory=collections.Counter)
    late: int = 0
    differences: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------- drawing


def drawn_kill(rng: random.Random, job: str, place: int, *, exact: bool) -> Kill:
    """Return a random kill, earlier the more kills came before it.

    Args:
        rng: What draws.
        job: The job; only one with workers loses a worker.
        place: How many kills of the case came before.
        exact: Whether it comes right before a change, so that the same seed is the same kill.
    """
    at = rng.random() ** (1 + place / 2)
    name = rng.choices(("SIGKILL", "SIGTERM", "SIGINT"), (6, 2, 2))[0]
    moments: tuple[Literal["change", "after", "time"], ...] = ("change", "after", "time")
    if exact:
        return Kill(signal.Signals[name], "process", "change", at)
    if job.endswith("workers") and rng.random() < 0.35:
        return Kill(signal.SIGKILL, "worker", "time", at)
    moment = rng.choices(moments, (5, 3, 3))[0]
    whom: Literal["process", "group"] = rng.choices(("process", "group"), (2, 1))[0]
    after = rng.expovariate(1 / 0.004) if moment == "after" else 0.0
    return Kill(signal.Signals[name], whom, moment, at, after)


def cases(kills: int, seed: int, jobs: Sequence[str], *, exact: bool = False) -> list[Case]:
    """Return cases with at least so many kills in all; the first ones do not depend on how many.

    Args:
        kills: How many.
        seed: Seed of what is drawn.
        jobs: Names of `JOBS`.
        exact: See `drawn_kill`.
    """
    made: list[Case] = []
    left = kills
    while left > 0:
        rng = random.Random(f"{seed} {len(made)}")
        job = rng.choices(jobs, [0.25 if job in SLOW else 1.0 for job in jobs])[0]
        count = rng.choices((1, 2, 3, 4), (4, 3, 2, 1))[0]
        drawn = tuple(drawn_kill(rng, job, place, exact=exact) for place in range(count))
        made.append(Case(len(made), job, drawn))
        left -= count
    return made


def good(folder: Path) -> None:
    """Write a folder with what the jobs read."""
    from excise.models.checkpoint import save_model
    from excise.models.tiny import byte_tokenizer, tiny_model

    for seed, name in enumerate(("model", "edited")):
        save_model(tiny_model("llama", seed=seed, width=16), byte_tokenizer(), folder / name)
    for name in "fr":
        rows = [{"text": f"{name}{i} " * 3 + str(i * 7919)} for i in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE)
    rng = random.Random(0)
    for name, start in (("few", 0), ("rest", 40)):
        lines = []
        for i in range(start, start + 40):
            words = rng.choices(("red", "old", "tall", "thin", "warm", "cold"), k=6)
            row: dict[str, Any] = {"unit": f"u{i}"}
            if i % 2:
                at = rng.randrange(6)
                words[at] = f"zyx{rng.choice('abc')}"
                begin = len(" ".join(words[:at])) + (at > 0)
                spans = [[begin, begin + len(words[at]), "secret"]]
                row |= {"spans": spans} if name == "few" else {}
            lines.append(json.dumps(row | {"text": " ".join(words)}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


# ------------------------------------------------------------------------------------- running

CHANGES = frozenset({
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod",
})  # fmt: skip
"""Events of Python's own audit that change a file system; `open` does where it is to write."""

WATCHED = CHANGES | {"open"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def changes_file(event: str, args: tuple[Any, ...], folder: str) -> bool:
    """Return whether an audit event is a change under a folder, which is the current one."""
    if event == "open" and not (isinstance(args[2], int) and args[2] & WRITES):
        return False
    path = args[0]
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return isinstance(path, str) and (not path.startswith("/") or path.startswith(folder))


def _child(args: Sequence[str], folder: Path, streams: Path, kill: Kill | None, n: int) -> None:
    """Be the command, and never return; die at the n-th change where a kill says so."""
    code, count = 70, 0
    try:
        os.setsid()
        os.chdir(folder)
        # What is started in the background ignores Ctrl-C, and its children with it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(EXCISE_CACHE=str(folder / "cache"), TMPDIR=str(folder / "tmp"),
                          HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",
                          PYTHONPATH=os.pathsep.join(p for p in sys.path if p))  # fmt: skip
        tempfile.tempdir = str(folder / "tmp")  # found already: finding it leaves files at a kill
        for number, name in enumerate(("in", "out", "err")):
            os.dup2(os.open(streams / name, os.O_RDWR | os.O_CREAT), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        mine, prefix = os.getpid(), f"{folder}/"

        def send() -> None:
            assert kill is not None
            (streams / "sent").touch()
            (os.killpg if kill.whom == "group" else os.kill)(mine, kill.signal)

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in WATCHED or os.getpid() != mine:
                return
            if not changes_file(event, args, prefix):
                return
            count += 1
            if count == n and kill is not None:
                if kill.after:
                    threading.Timer(kill.after, send).start()
                else:
                    send()

        sys.addaudithook(watch)
        from excise.cli import entry as command

        sys.argv = ["excise", *args]
        try:
            command()
        except SystemExit as end:
            code = int(end.code or 0)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            (streams / "changes").write_text(str(count))
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(
    line: str, folder: Path, work: Path, kill: Kill | None = None, like: Undisturbed | None = None
) -> Outcome:
    """Run a command line in a fork of this process, and kill it where that is asked for.

    Args:
        line: What comes after `excise`.
        folder: Current folder of the command.
        work: An empty folder for its streams; made.
        kill: How it is killed; None for not at all.
        like: The undisturbed run, of whose changes and seconds the kill takes its share.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    n = moment = 0.0
    if kill is not None and like is not None:
        n = 0 if kill.moment == "time" else 1 + int(kill.at * like.changes)
        moment = kill.at * like.seconds
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(shlex.split(line), folder, work, kill, int(n))
    code: int | None = None
    waiting = kill if kill is not None and kill.moment == "time" else None
    while time.monotonic() - began < LIMIT:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        late = time.monotonic() - began >= moment
        if waiting is not None and late and _send(waiting, pid):
            (work / "sent").touch()
            waiting = None
        time.sleep(0.002)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    changes = work / "changes"
    text = (work / "err").read_text(errors="replace") if (work / "err").is_file() else ""
    return Outcome(
        code,
        text,
        int(changes.read_text() or 0) if changes.is_file() else 0,
        time.monotonic() - began,
        (work / "sent").exists(),
    )


def _send(kill: Kill, pid: int) -> bool:
    """Send a kill from outside; return whether there was somebody to send it to."""
    with contextlib.suppress(ProcessLookupError):
        if kill.whom == "group":
            os.killpg(pid, kill.signal)
        elif kill.whom == "process":
            os.kill(pid, kill.signal)
        else:
            workers = workers_of(pid)
            if not workers:
                return False
            os.kill(workers[int(kill.at * 1000) % len(workers)], kill.signal)
        return True
    return False


def workers_of(pid: int) -> list[int]:
    """Return the workers of a process: grandchildren, which the server of its pool forked."""
    parents = dict(_group(pid))
    return sorted(p for p, parent in parents.items() if p != pid and parents.get(parent) == pid)


def _group(group: int) -> Iterator[tuple[int, int]]:
    """Yield every live process of a group with its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] not in "ZX":
                    yield int(entry.name), int(fields[1])


def left_alive(groups: Sequence[int], patience: float = 20.0) -> int:
    """Return how many processes of killed runs are still there after a while; they are ended."""
    end = time.monotonic() + patience
    while alive := [p for group in groups for p, _ in _group(group)]:
        if time.monotonic() > end:
            for p in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(p, signal.SIGKILL)
            return len(alive)
        time.sleep(0.05)
    return 0


# ----------------------------------------------------------------------------------- comparing


ABSENT = "nothing"
"""What stands for a file or a field that is not there."""


def untimed(data: Any) -> Any:
    """Return plain data with times and memory put to None."""
    if isinstance(data, Mapping):
        return {k: None if k in TIMES else untimed(v) for k, v in data.items()}
    return [untimed(v) for v in data] if isinstance(data, list) else data


def contents(folder: Path, given: frozenset[str]) -> dict[str, Any]:
    """Return what a run left: plain data of JSON but for times, and sums of other files.

    Args:
        folder: The folder it ran in.
        given: Names in it that were there before.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in given or "/pymp-" in name:  # the sockets of Python's own servers
            continue
        if path.is_dir():
            found[name] = "folder"
        elif path.name == "events.jsonl":
            found[name] = "events" if all(map(_is_json, path.read_text().splitlines())) else "torn"
        elif path.name == "report.html":
            found[name] = "of its record" if path.read_text() == _page(path.parent) else "stale"
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text().replace(str(folder), ".")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[name] = untimed([json.loads(line, parse_constant=str) for line in lines])
            if path.name == "done.json":  # sums of files that hold times; the files are compared
                for file, entry in found[name][0]["files"].items():
                    if file.endswith((".json", ".jsonl")):
                        entry.clear()
            elif path.name == "state.json":  # its own sum, over that of its log of timed steps
                found[name][0].pop("sha256")
        elif path.name == "README.md":
            found[name] = [x for x in path.read_text().splitlines() if "cost, seconds" not in x]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _page(out: Path) -> str:
    """Return the report as the record in a folder gives it."""
    from excise.record import load
    from excise.report.page import render_html

    return render_html(load(out))


def differences(one: Any, two: Any, at: str = "") -> list[str]:
    """Return where two values of plain data differ, as paths with both values."""
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        keys = sorted({*one, *two})
        pairs = [(f"/{key}", one.get(key, ABSENT), two.get(key, ABSENT)) for key in keys]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = [(f"[{i}]", a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    elif one != two:
        return [f"{at}: {str(one)[:70]} became {str(two)[:70]}"]
    return [said for name, a, b in pairs for said in differences(a, b, at + name)]


# ------------------------------------------------------------------------------------ campaign


BEGINS = 0.1
"""Seconds within which a forked process may not yet have begun the command."""


def fault_of(kill: Kill, outcome: Outcome) -> str:
    """Say what a killed process did that it must not do; empty if nothing."""
    if outcome.code is None:
        return "hung"
    if "Traceback" in outcome.said:
        return f"traceback: {outcome.said.strip().splitlines()[-1]}"
    if outcome.code == -kill.signal and not outcome.said and outcome.seconds < BEGINS:
        return ""  # before the first line of the command; a shell calls that 130 or 143
    code = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[kill.signal]
    if kill.whom == "worker" or not outcome.sent:
        code = 0
    if outcome.code not in (0, code):  # 0: it was done by then
        return f"exit {outcome.code}: {outcome.said.strip()[-300:]}"
    if code > 0 and outcome.code == code and len(outcome.said.splitlines()) != 1:
        return f"said: {outcome.said.strip()[-300:]}"
    return ""


class Campaign:
    """Jobs, what they leave undisturbed, and a folder in which they run."""

    def __init__(self, root: Path) -> None:
        """Prepare what the jobs read in a folder."""
        self.root, self.base = root, root / "good"
        self.base.mkdir()
        good(self.base)
        self.given = frozenset(p.name for p in self.base.iterdir())
        self.known: dict[str, Undisturbed] = {}

    def undisturbed(self, job: str) -> Undisturbed:
        """Return what a job leaves that nobody kills; it runs once."""
        if job not in self.known:
            folder, outcome = self._fresh(), None
            outcome = run(JOBS[job], folder, self.root / "streams")
            if outcome.code != 0:
                raise RuntimeError(f"{job} fails undisturbed ({outcome.code}): {outcome.said}")
            self.known[job] = Undisturbed(
                contents(folder, self.given), outcome.changes, outcome.seconds
            )
        return self.known[job]

    def _fresh(self) -> Path:
        """Return a fresh folder to run in, always of one name."""
        folder = self.root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base, folder)
        (folder / "tmp").mkdir()
        return folder

    def check(self, case: Case, tally: Tally) -> list[str]:
        """Run a case and return what it showed; the tally is added to."""
        like, folder, faults = self.undisturbed(case.job), self._fresh(), []
        streams, line = self.root / "streams", JOBS[case.job]
        tally.cases += 1
        for kill in case.kills:
            outcome = run(line, folder, streams, kill, like)
            if outcome.sent:
                tally.sent[kill.whom if kill.whom == "worker" else kill.signal.name] += 1
            tally.late += not outcome.sent
            fault = fault_of(kill, outcome)
            faults += [f"{kill}: {fault}"] if fault else []
        outcome = run(line, folder, streams)
        if outcome.code != 0:
            return [*faults, f"the same command ends with {outcome.code}: {outcome.said[-300:]}"]
        if (count := self._alive()) > 0:
            faults.append(f"{count} processes stayed")
        faults += differences(dict(like.contents), contents(folder, self.given))
        return faults

    def _alive(self) -> int:
        """Return how many processes work in the folder still, after a while."""
        here = str(self.root)
        groups = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, ValueError):
                    if os.readlink(entry / "cwd").startswith(here):
                        groups.add(os.getpgid(int(entry.name)))
        return left_alive([*groups])


def warm_up(jobs: Sequence[str]) -> None:
    """Import what the verbs need, so that a fork has no time to lose."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command does, before the import
    import pandas  # noqa: F401  (pyarrow imports it where it writes)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    for verb in {JOBS[job].split()[0] for job in jobs}:
        importlib.import_module(f"excise.cli.{verb}")


def campaign(
    chosen: Iterable[Case], jobs: Sequence[str], root: Path, tell: Callable[[Case, list[str]], None]
) -> dict[str, Tally]:
    """Run cases one after the other and return what happened, by job.

    Args:
        chosen: The cases.
        jobs: Names of their jobs.
        root: An empty folder to work in.
        tell: Called after every case with what it showed.
    """
    warm_up(jobs)
    where, tallies = Campaign(root), {job: Tally() for job in JOBS}
    for case in chosen:
        faults = where.check(case, tallies[case.job])
        tallies[case.job].differences += [f"case {case.number}: {fault}" for fault in faults]
        tell(case, faults)
    return {job: tally for job, tally in tallies.items() if tally.cases}


def table(tallies: Mapping[str, Tally]) -> str:
    """Return the tallies as lines of 80 columns at most."""
    names = ("SIGKILL", "SIGTERM", "SIGINT", "worker")
    heads = ("cases", *names, "late", "differ")
    lines = [f"{'job':<18}" + "".join(f"{head:>8}" for head in heads)]
    sums = [0] * len(heads)
    for job, tally in tallies.items():
        row = [tally.cases, *(tally.sent[n] for n in names), tally.late, len(tally.differences)]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        lines.append(f"{job:<18}" + "".join(f"{value:>8}" for value in row))
    lines.append(f"{'all':<18}" + "".join(f"{value:>8}" for value in sums))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--verbs", nargs="*", default=[], help="jobs whose name begins so")
    parser.add_argument("--case", type=int, help="this case alone, as a fault names it")
    parser.add_argument("--exact", action="store_true", help="kill right before changes alone")
    parser.add_argument("--save", action="store_true", help="append a row to results.csv")
    options = parser.parse_args()
    jobs = [j for j in JOBS if not options.verbs or j.startswith(tuple(options.verbs))]
    if options.case is None:
        chosen = cases(options.kills, options.seed, jobs, exact=options.exact)
    else:
        many = cases(5 * options.case + 5, options.seed, jobs, exact=options.exact)
        chosen = [case for case in many if case.number == options.case]

    def tell(case: Case, faults: list[str]) -> None:
        if options.case is not None or faults:
            print(f"seed {options.seed} case {case.number}: {case.job}", flush=True)
            print("".join(f"    {kill}\n" for kill in case.kills), end="", flush=True)
        for fault in faults[:12]:
            print(f"    | {fault[:300]}", flush=True)

    began = time.monotonic()
    timely = itertools.takewhile(lambda _: time.monotonic() < began + 60 * options.minutes, chosen)
    with tempfile.TemporaryDirectory(prefix="excise-kill-") as root:
        tallies = campaign(timely, jobs, Path(root).resolve(), tell)
    seconds = time.monotonic() - began
    print(table(tallies))
    sent = sum(sum(tally.sent.values()) for tally in tallies.values())
    ran = sum(tally.cases for tally in tallies.values())
    wrong = sum(len(tally.differences) for tally in tallies.values())
    print(f"{sent} kills in {ran} cases, {seconds:.0f} s, {wrong} differences")
    if options.save:
        results = importlib.import_module("results")  # which lies beside a script that is run
        facts: dict[str, Any] = {"kills": sent, "cases": ran, "differences": wrong}
        results.save(
            "kill", {"seconds": round(seconds), "variant": f"seed {options.seed}", **facts}
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
