"""torchrun: one command in several processes makes the models of one, and ends as one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from excise.cli import entry, main
from excise.core.errors import UserError
from excise.models.checkpoint import Checkpoint
from excise.record import Record, load
from excise.train.torchrun_pool import NEEDED, join
from tests.cli import material as m

LINE = (
    "remove grad_diff --model model --forget f.jsonl --retain r.jsonl --out {out} --quiet"
    " --fit.steps 4 --fit.batch_size 8 --max_length 32"
)
AUDIT = (
    "audit one/out --out {out} --quiet --budget smoke --audit.change"
    " '{{steps: 2, checkpoints: [0, 2], rates: [0.001], max_test_rows: 4, max_other_rows: 4}}'"
)
CANARY = (
    "audit {folder}/out --out {folder}/birds --canary --canary.units 8 --canary.repeats '[1, 20]'"
    " --canary.lr 0.01 --canary.max_length 48 --evaluate.max_length 48 --quiet --audit.change"
    " '{{attacks: [transfer], steps: 2, checkpoints: [0, 2], rates: [0.001], max_test_rows: 8,"
    " max_other_rows: 4, max_length: 48}}'"
)
PATIENCE = 400
"""Seconds after which processes hang, on a machine that may be busy with much else."""

OWN = """
from typing import Literal
from excise.methods import GradDiff
class Faulty(GradDiff):
    name: Literal["faulty"] = "faulty"
    def apply(self, start, domain, ctx):
        if ctx.rank == 1:
            {what}
        return super().apply(start, domain, ctx)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and its rows."""
    folder = tmp_path_factory.mktemp("torchrun")
    m.save_tiny(folder / "model")
    (folder / "f.jsonl").write_text(m.texts("f", 40))
    (folder / "r.jsonl").write_text(m.texts("r", 40))
    return folder


@pytest.fixture(scope="module")
def removed(inputs: Path) -> Path:
    """Return the output folder of a removal in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        assert main(shlex.split(LINE.format(out="one/out") + " --workers 1")) == 0
    return inputs / "one/out"


@pytest.fixture(scope="module")
def audited(inputs: Path, removed: Path) -> Path:
    """Return the output folder of an audit of `removed` in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        assert main(shlex.split(AUDIT.format(out="one/audit") + " --workers 1")) == 0
    return removed.with_name("audit")


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Return the variables of a process that finds this checkout and talks to its own machine."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", **more}


def torchrun(line: str, folder: Path, processes: int = 2) -> subprocess.Popen[str]:
    """Start a command with torchrun."""
    flags = f"--nproc-per-node {processes} --master-port {free_port()} -m excise {line}"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *shlex.split(flags)],
        cwd=folder, env=environment(OMP_NUM_THREADS="1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _process(line: str, folder: str, rank: int, world: int, port: int, second: Any) -> None:
    """Be one process of a command; what it prints goes to a file."""
    os.chdir(folder)
    facts: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
    }
    facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({name: str(value) for name, value in facts.items()})
    if rank and second is not None:
        sys.path.insert(0, second)
    file = os.open(f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["excise", *shlex.split(line)]
    entry()


def by_hand(
    line: str, folder: Path, processes: int = 2, second: str | None = None
) -> tuple[list[int | None], list[str]]:
    """Run a command in processes as torchrun would start them, and see how each one ends.

    Args:
        line: The command.
        folder: Where.
        processes: How many.
        second: A folder of packages that all but the first find before others.

    Returns:
        All exit codes, and every line that was printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["excise.cli.remove", "transformers.models.llama.modeling_llama"]
    )
    port = free_port()
    started = [
        context.Process(
            target=_process, args=(line, str(folder), rank, processes, port, second), daemon=True
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
        process.kill()
    texts = [(folder / f"said-{rank}").read_text() for rank in range(processes)]
    return [p.exitcode for p in started], [line for text in texts for line in text.splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the model in an output folder."""
    model = Checkpoint(out / "model")
    return dict(model.weights_of(model.parameter_names()))


def events_of(folder: Path) -> list[str]:
    """Return the events of the run in a folder, one a line."""
    return (folder / "out/events.jsonl").read_text().splitlines()


def steps(folder: Path) -> int:
    """Return how many steps of training were logged."""
    logs = list(folder.glob(".stages/*/*.partial/state/steps.jsonl"))
    return logs[0].read_bytes().count(b"\n") if logs else 0


def attacks(folder: Path) -> dict[str, int]:
    """Return the attacks that are done beside the output folders in `folder`, and since when."""
    return {
        p.parent.name: p.stat().st_mtime_ns for p in folder.glob(".stages/v2/attack-*/done.json")
    }


def findings(out: Path) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Return what an audit found and left, but for times, memory and what names the processes.

    Returns:
        The record, the items, and the keys of attacks, controls and what they stand on, by name.
    """
    record = json.loads((out / "run.json").read_text())
    for name in ("command", "seconds", "peak_memory_bytes"):
        del record[name]
    for name in ("started", "world"):
        del record["environment"][name]
    stages = {
        path.parent.name: json.loads(path.read_text())["key"]
        for path in out.parent.glob(".stages/v2/*/done.json")
        if not path.parent.name.startswith("grad_diff-")
    }
    return record, pq.read_table(out / "items.parquet").to_pylist(), stages


def terms(folder: Path) -> list[dict[str, float]]:
    """Return the terms of the loss in every step of the one training that is done."""
    (log,) = folder.glob(".stages/v2/grad_diff-*/state/steps.jsonl")
    return [json.loads(line)["terms"] for line in log.read_text().splitlines()]


def faulty(folder: Path, what: str) -> str:
    """Write a method whose second process fails, and return how it is run."""
    (folder / "faulty.py").write_text(OWN.format(what=what))
    line = LINE.format(out="faulty/out").replace("grad_diff", "./faulty.py:Faulty")
    return f"{line} --allow-code"


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_make_the_model_of_one(
    inputs: Path, removed: Path, processes: int
) -> None:
    folder = inputs / str(processes)
    codes, lines = by_hand(LINE.format(out=f"{processes}/out"), inputs, processes)
    assert codes == [0] * processes, lines
    assert sum("report.html" in line for line in lines) == 1
    one, many = weights(removed), weights(folder / "out")
    assert max(float((one[n] - many[n]).abs().max()) for n in one) <= 1e-6
    first, second = load(removed), load(folder / "out")
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert second.environment.world == processes
    assert f"torchrun --nproc-per-node {processes} -m excise remove" in second.command
    # What each process does alone is the stage that one process makes, and gives its number.
    scores = [{p.name for p in where.glob("scores-*")} for where in
              (inputs / "one/.stages/v2", folder / ".stages/v2")]  # fmt: skip
    assert scores[0] & scores[1]
    assert first.scores[0] == second.scores[0]
    kinds = [json.loads(text)["kind"] for text in events_of(folder)]
    assert kinds.count("done") == 1


def test_a_recipe_runs_from_nothing(tmp_path: Path) -> None:
    """The second process makes stages alone as well, and writes models in them."""
    recipe = m.TINY.replace("{steps: 2,", "{attacks: [quantize], steps: 2,")
    (tmp_path / "tiny.yaml").write_text(recipe)
    codes, lines = by_hand("run tiny.yaml --out out --quiet", tmp_path)
    assert codes == [0, 0], lines
    inits = list(tmp_path.glob(".stages/v2/init-*"))
    assert len(inits) == 3
    assert all((init / "model/model.safetensors").is_file() for init in inits)


REFUSED = {
    "fsdp": ("--fsdp --lora.rank 2", "lora: an adapter is small and its model is not cut"),
    "workers": ("--workers 2", "--workers says who does the jobs, and so does torchrun"),
    "batch": ("--fit.batch_size 9", "batch_size: 9 rows cannot be dealt to 2 processes"),
    "device": ("--device cuda:7", "device 'cuda:7' is not available here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_once(case: str, inputs: Path) -> None:
    more, sentence = REFUSED[case]
    codes, lines = by_hand(f"{LINE.format(out='refused/out')} {more}", inputs)
    assert codes == [2, 2]
    assert sum(line.startswith("excise: ") for line in lines) == len(lines) == 1
    assert sentence in lines[0]
    assert not (inputs / "refused/out").exists()


def test_an_error_of_one_process_ends_all_and_is_said_once(inputs: Path) -> None:
    line = faulty(inputs, "from excise import UserError; raise UserError('rank 1 dislikes it')")
    codes, lines = by_hand(line, inputs)
    assert codes == [2, 2]
    assert lines == ["excise: rank 1 dislikes it"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(inputs: Path) -> None:
    line = faulty(inputs, "import os; os._exit(9)")
    codes, lines = by_hand(line, inputs)
    assert codes == [1, 9]
    assert len(lines) == 1
    assert "another process of this run is gone" in lines[0]


def test_other_versions_are_refused(inputs: Path) -> None:
    """Process 1 finds another version of a library on its path."""
    fake = inputs / "fake/schedulefree-99.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: schedulefree\nVersion: 99.0\n")
    codes, lines = by_hand(LINE.format(out="versions/out"), inputs, second=str(fake.parent))
    assert codes == [2, 2]
    assert len(lines) == 1
    assert "the processes have different versions of schedulefree: " in lines[0]
    assert " and 99.0; install the same" in lines[0]


def test_an_address_that_nobody_answers_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in zip(NEEDED, ("1", "1", "2", "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"did not meet at 127.0.0.1:{port} within 1 s"):
        join(meeting=1.0)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR is not set; start with torchrun"):
        join(meeting=1.0)


@pytest.mark.slow
def test_a_stopped_run_resumes_with_any_number_of_processes(inputs: Path) -> None:
    line = LINE.replace("--fit.steps 4", "--fit.steps 60") + " --fit.save_every 5 --fit.log_every 1"
    line += " --fit.eps 1e-3"  # else Adam divides by what is rounding alone
    process = torchrun(line.format(out="stopped/out"), inputs, 4)
    until = time.monotonic() + PATIENCE
    try:
        while steps(inputs / "stopped") < 12:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    again = f"torchrun --nproc-per-node 4 -m excise {line.format(out='stopped/out')}"
    said = [line for line in err.splitlines() if line.startswith("excise: ")]
    assert said == [f"excise: terminated; to resume: {again}"]
    shutil.copytree(inputs / "stopped", inputs / "fewer")
    codes, lines = by_hand(line.format(out="stopped/out"), inputs)
    assert codes == [0, 0], lines
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        assert main(shlex.split(line.format(out="fewer/out") + " --workers 1")) == 0
        assert main(shlex.split(line.format(out="alone/out") + " --workers 1")) == 0
    alone = terms(inputs / "alone")
    assert len(alone) == 60
    for name, processes in (("stopped", 2), ("fewer", 1)):
        events = [json.loads(text) for text in events_of(inputs / name)]
        starts = [i for i, e in enumerate(events) if e["kind"] == "stage_start" and e["resumed"]]
        # The state of a signal, or the last saved before where that fell into a step.
        assert next(e for e in events[starts[0] :] if e["kind"] == "step")["step"] > 10
        notes = [e["text"] for e in events if e["kind"] == "note"]
        begun = [text for text in notes if text.startswith("training that 4 processes began")]
        assert len(begun) == 1
        assert f"with {processes}, each" in begun[0]
        # A term is 5.5 or so, of which two float32 lie 5e-7 apart, and the loss a difference.
        for found, wanted in zip(terms(inputs / name), alone, strict=True):
            assert found == pytest.approx(wanted, rel=1e-6, abs=0)


def test_processes_share_out_an_audit(inputs: Path, audited: Path) -> None:
    codes, lines = by_hand(AUDIT.format(out="two/audit"), inputs)
    assert codes == [0, 0], lines
    assert findings(inputs / "two/audit") == findings(audited)
    record = load(inputs / "two/audit")
    assert isinstance(record, Record)
    assert record.environment.world == 2


@pytest.mark.slow
def test_a_stopped_audit_resumes(inputs: Path, audited: Path) -> None:
    line = AUDIT.format(out="halted/audit")
    process = torchrun(line, inputs)
    until = time.monotonic() + PATIENCE
    try:
        while len(attacks(inputs / "halted")) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    said = [line for line in err.splitlines() if line.startswith("excise: ")]
    assert said == [f"excise: terminated; to resume: torchrun --nproc-per-node 2 -m excise {line}"]
    assert not (inputs / "halted/audit/run.json").exists()
    before = attacks(inputs / "halted")
    codes, lines = by_hand(line, inputs)
    assert codes == [0, 0], lines
    assert findings(inputs / "halted/audit") == findings(audited)
    assert attacks(inputs / "halted").items() > before.items()


@pytest.mark.slow
def test_processes_teach_remove_and_attack_canaries(inputs: Path, removed: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        shutil.copytree("one", "alone-canary")
        shutil.copytree("one", "two-canary")
        assert main(shlex.split(CANARY.format(folder="alone-canary") + " --workers 1")) in (0, 4)
    codes, lines = by_hand(CANARY.format(folder="two-canary"), inputs)
    assert codes in ([0, 0], [4, 4]), lines
    records = [load(inputs / name / "birds") for name in ("alone-canary", "two-canary")]
    alone, two = records
    assert isinstance(alone, Record)
    assert isinstance(two, Record)
    assert two.environment.world == 2
    assert alone.verdicts
    assert [v.model for v in two.verdicts] == [v.model for v in alone.verdicts]
    assert len(two.scores) == len(alone.scores) > 20
    for mine, theirs in zip(two.scores, alone.scores, strict=True):
        named = (theirs.model, theirs.set, theirs.metric)
        assert (mine.model, mine.set, mine.metric) == named
        assert mine.value == pytest.approx(theirs.value, abs=1e-3), named
