"""Wrong results that cannot be had: run again after a change, the old answer never comes back.

Every test runs the command or the Python interface as a user does, and compares weights bit by bit
with those of a run into a fresh folder with a store of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import excise as ex
from excise import record as records
from excise.cli import main
from excise.core import disk, keys
from excise.core.code_files import load_code
from excise.core.disk import file_sum, part_of
from excise.methods.distillation.targets import FromOracle
from excise.methods.distillation.undo import Undo
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import byte_tokenizer, tiny_model
from excise.run import output
from excise.run import run as straight_line
from tests.cli import material as m
from tests.parity.toy import sentences, toy_checkpoint, toy_domain

FIT = ex.FitConfig(steps=2, lr=1e-2, batch_size=4)
DATA = "--forget f.jsonl --retain r.jsonl --workers 1 --quiet"
REMOVE = f"--model model {DATA} --fit.steps 2 --fit.batch-size 4 --max-length 24"
GRAD_DIFF = f"remove grad_diff {REMOVE}"
NO_TRAINING = "{steps: 1, checkpoints: [0, 1], max_test_rows: 4, max_other_rows: 4, max_length: 24"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of more than 1 MiB and its rows."""
    folder = tmp_path_factory.mktemp("inputs")
    m.save_tiny(folder / "model", width=96)
    assert (folder / "model" / "model.safetensors").stat().st_size > 1 << 20
    (folder / "f.jsonl").write_text(m.texts("f"))
    (folder / "r.jsonl").write_text(m.texts("r"))
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a copy of the inputs."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def excise(line: str) -> None:
    """Run a command line in this process."""
    assert main(shlex.split(line)) == 0, line


@pytest.fixture(scope="module")
def removed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which a removal was run into `out`."""
    folder = tmp_path_factory.mktemp("removed")
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        excise(f"{GRAD_DIFF} --out out")
    return folder


def refused(line: str, *words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command line that must end in one sentence with these words."""
    capsys.readouterr()
    assert main(shlex.split(line)) == 2, line
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    for word in words:
        assert word in said, said


def bits(model: Path) -> str:
    """Return the sum of the weights in a model folder."""
    return file_sum(model / "model.safetensors")


def made(store: Path) -> set[str]:
    """Return the stages in the store beside an output folder."""
    return {path.name for path in store.glob(".stages/v2/*-*")}


def flip(file: Path) -> None:
    """Change the last byte of a file; size and time stamp stay."""
    stat = file.stat()
    with file.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)[0]
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def halve(file: Path) -> None:
    """Cut a file in half."""
    os.truncate(file, file.stat().st_size // 2)


# 1. The Python interface, called again with something else.


def test_python_never_returns_an_earlier_model(tmp_path: Path) -> None:
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    swapped = replace(
        domain,
        forget={"a": tuple(replace(r, capability="a", label=1) for r in domain.retain)},
        retain=tuple(replace(r, capability="", label=0) for r in domain.forget["a"]),
    )
    more = replace(domain, retain=(*domain.retain, *sentences("x", 4, seed=9)))
    calls: dict[str, tuple[ex.Method, ex.Domain, int]] = {
        "first": (ex.GradDiff(fit=FIT), domain, 0),
        "alpha": (ex.GradDiff(fit=FIT, alpha=2.0), domain, 0),
        "seed": (ex.GradDiff(fit=FIT), domain, 1),
        "data": (ex.GradDiff(fit=FIT), more, 0),
        "swapped": (ex.GradDiff(fit=FIT), swapped, 0),
    }

    def removed(name: str, out: Path) -> str:
        method, data, seed = calls[name]
        removal = ex.remove(start, method, data, out=out, seed=seed)
        assert removal.checkpoint.path == out / "model"
        return bits(out / "model")

    fresh = {name: removed(name, tmp_path / name / "out") for name in calls}
    assert len(set(fresh.values())) == len(calls)
    for name in (*calls, "first"):
        assert removed(name, tmp_path / "one" / name) == fresh[name], name
    assert len(made(tmp_path / "one")) == len(calls), "the first model was made twice"
    for name in calls:  # a folder is that of one removal
        if name != "first":
            with pytest.raises(ex.UserError, match="holds another run; name a new folder"):
                removed(name, tmp_path / "one" / "first")
    assert bits(tmp_path / "one" / "first" / "model") == fresh["first"]


def test_python_leaves_a_run_of_the_command_alone(removed: Path, tmp_path: Path) -> None:
    start, out = toy_checkpoint(tmp_path), removed / "out"
    before = m.state(out)
    with pytest.raises(ex.UserError, match="out holds another run"):
        ex.remove(start, ex.GradDiff(fit=FIT), toy_domain(), out=out)
    with pytest.raises(ex.UserError, match="out holds another run"):
        ex.audit(out / "model", original=start, domain=toy_domain(), out=out)
    assert m.state(out) == before


def test_no_mode_that_the_caller_is_in_counts(tmp_path: Path) -> None:
    start, domain, sums = toy_checkpoint(tmp_path), toy_domain(), []
    modes: tuple[contextlib.AbstractContextManager[Any, Any], ...] = (
        contextlib.nullcontext(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        default_dtype(torch.float64),
    )
    for i, mode in enumerate(modes):
        out = tmp_path / str(i) / "out"
        torch.manual_seed(i)
        with mode:
            ex.remove(start, ex.GradDiff(fit=FIT), domain, out=out)
        sums.append(bits(out / "model"))
    assert len(set(sums)) == 1
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of another dtype for a while."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def test_python_waits_for_nobody_and_sweeps(tmp_path: Path) -> None:
    start, out = toy_checkpoint(tmp_path), tmp_path / "out"
    dead = out / part_of(out / "model").name.replace(str(os.getpid()), str(dead_process()))
    dead.mkdir(parents=True)
    with output.hold(out):
        assert not dead.exists()
        with pytest.raises(ex.UserError, match="in use by another run"):
            ex.remove(start, ex.GradDiff(fit=FIT), toy_domain(), out=out)
    dead.mkdir()
    ex.remove(start, ex.GradDiff(fit=FIT), toy_domain(), out=out)
    assert {path.name for path in out.iterdir()} == {
        "model", "recipe.yaml", "run.json", "items.parquet", "report.html"
    }  # fmt: skip


# 2. The same command after something it names has changed.

SCALE = """
from typing import ClassVar, Literal
from excise.methods.base import Cost, Method, Paper, Removal
{helper}

class Scale(Method):
    name: Literal["scale"] = "scale"
    paper: ClassVar[Paper] = Paper("t", "u")

    def apply(self, start, domain, ctx):
        {inner}
        name = start.parameter_names()[-1]
        to = ctx.work / "model"
        changed = {{name: start.weights_of([name])[name] * {factor}}}
        return Removal(start.write(changed, to), (name,), Cost())
"""


def new_model(here: Path) -> None:
    shutil.rmtree(here / "model")
    m.save_tiny(here / "model", width=96, seed=1)


def own_method(here: Path, factor: float) -> None:
    text = SCALE.format(helper="", inner="", factor=factor)
    (here / "mine.py").write_text(text)


def control_file(here: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.rand(96, generator=generator)
    save_file({"forget": vector / vector.norm()}, here / "c.safetensors")


CHANGES: dict[str, tuple[str, m.Break, m.Break]] = {
    "model": (GRAD_DIFF, lambda here: None, new_model),
    "data": (
        GRAD_DIFF, lambda here: None, m.write("f.jsonl", m.texts("g"))
    ),
    "code": (
        f"remove ./mine.py:Scale --allow-code --model model {DATA}",
        lambda here: own_method(here, 1.5),
        lambda here: own_method(here, 2.5),
    ),
    "control file": (
        f"remove rmu --layer 0 --controls c.safetensors {REMOVE}",
        lambda here: control_file(here, 0),
        lambda here: control_file(here, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_the_same_command_is_of_what_lies_there_now(what: str, here: Path) -> None:
    line, before, change = CHANGES[what]
    before(here)
    excise(f"{line} --out out")
    old, page = bits(here / "out" / "model"), (here / "out" / "report.html").read_text()
    change(here)
    excise(f"{line} --out out")
    excise(f"{line} --out fresh/out")
    assert bits(here / "out" / "model") == bits(here / "fresh" / "out" / "model") != old
    record = records.load(here / "out")
    fingerprint = Checkpoint(here / "out" / "model").fingerprint
    assert record.method_runs[0].model.fingerprint == fingerprint
    assert record.method_runs[0].model.path == "model"
    assert record.scores == records.load(here / "fresh" / "out").scores
    assert fingerprint in (here / "out" / "model" / "README.md").read_text()
    assert (here / "out" / "report.html").read_text() != page
    assert fingerprint[:12] in (here / "out" / "report.html").read_text()
    if what == "model":
        excise(f"audit out --out audited --workers 1 --quiet --audit.change '{NO_TRAINING},"
               " attacks: [quantize]}'")  # fmt: skip
        audited = records.load(here / "audited")
        assert audited.method_runs[0].model.fingerprint == fingerprint
        assert audited.models[0].fingerprint == Checkpoint(here / "model").fingerprint
        assert audited.scores == record.scores


@pytest.mark.parametrize("inner", [False, True], ids=["one name", "inside a function"])
def test_a_helper_of_ones_own_code_counts_however_it_is_imported(
    inner: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(here)
    imports = {"helper" if not inner else "inner": "from scaling import FACTOR"}
    text = SCALE.format(factor="FACTOR", **{"helper": "", "inner": "", **imports})
    (here / "mine.py").write_text(text)
    start = Checkpoint(here / "model")
    name = start.parameter_names()[-1]
    for factor in (1.5, 2.5):
        (here / "scaling.py").write_text(f"FACTOR = {factor}\n")
        as_in_a_new_process()
        excise(f"remove ./mine.py:Scale --allow-code --model model {DATA} --out out")
        edited = Checkpoint(here / "out" / "model").weights_of([name])[name]
        assert edited.equal(start.weights_of([name])[name] * factor)


def test_helpers_that_trade_their_contents_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    helper = "from scaling import FACTOR\nfrom weights import FACTOR as LESS"
    text = SCALE.format(helper=helper, inner="", factor="FACTOR / LESS")
    (tmp_path / "mine.py").write_text(text)
    seen = []
    for one, other in ((2, 4), (4, 2)):
        (tmp_path / "scaling.py").write_text(f"FACTOR = {one}\n")
        (tmp_path / "weights.py").write_text(f"FACTOR = {other}\n")
        as_in_a_new_process()
        cls = load_code(f"{tmp_path / 'mine.py'}:Scale", allow=True)
        seen.append(keys.source_of(cls))
    assert seen[0] != seen[1]


PROMPT = """
def factor():
    return 1.5
"""


def test_a_method_made_at_a_prompt_counts_with_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = types.ModuleType("prompt")
    monkeypatch.setitem(sys.modules, "prompt", prompt)
    start, out = toy_checkpoint(tmp_path), tmp_path / "out"
    exec(SCALE.format(helper=PROMPT, inner="", factor="factor()"), prompt.__dict__)
    sums = []
    for cell in ("", "other = 1", PROMPT.replace("1.5", "2.5"), PROMPT):
        exec(cell, prompt.__dict__)
        ex.remove(start, prompt.__dict__["Scale"](), toy_domain(), out=out)
        sums.append(bits(out / "model"))
    assert sums[0] == sums[1] == sums[3] != sums[2]


def as_in_a_new_process() -> None:
    """Forget the user's modules, which a new process would import again."""
    for name in list(sys.modules):
        if name in ("scaling", "weights") or name.startswith("excise_user_"):
            del sys.modules[name]
    keys.source_of.cache_clear()
    shutil.rmtree("__pycache__", ignore_errors=True)


# 3. Models of equal weights.


def save(to: Path, tokenizer: Any, temperature: float | None = None) -> Path:
    """Write the same weights with a tokenizer and a generation config."""
    model = tiny_model("llama", vocab=300)
    if temperature is not None:
        model.generation_config.do_sample = True
        model.generation_config.temperature = temperature
    return save_model(model, tokenizer, to).path


def test_models_of_equal_weights_keep_their_own_side_files(here: Path) -> None:
    other = byte_tokenizer(chat=True)
    other.chat_template = other.chat_template.replace("user", "human") + "{# another #}"
    models = {
        "plain": save(here / "plain", byte_tokenizer()),
        "tokenizer": save(here / "tokenizer", byte_tokenizer(bos=True)),
        "chat": save(here / "chat", byte_tokenizer(chat=True)),
        "template": save(here / "template", other),
        "generation": save(here / "generation", byte_tokenizer(), temperature=0.5),
    }
    assert len({bits(folder) for folder in models.values()}) == 1
    seen = []
    for name, folder in models.items():
        domain = ex.Files(forget={"forget": "f.jsonl"}, retain="r.jsonl")
        ex.remove(folder, ex.GradDiff(fit=FIT, max_length=24), domain, out=here / "side" / name)
        there = side_files(here / "side" / name / "model")
        assert there == side_files(folder), name
        seen.append(there)
    assert all(seen.count(files) == 1 for files in seen)


def edited(model: Path, to: Path) -> None:
    """Write a copy of a model with other weights."""
    shutil.copytree(model, to)
    m.tensors(lambda values: values.update({n: t * 1.5 for n, t in values.items()}))(to)


def side_files(folder: Path) -> dict[str, str]:
    """Return the sums of what lies beside the weights of a model."""
    return {p.name: file_sum(p) for p in folder.iterdir() if p.suffix in (".json", ".jinja")}


def test_positive_controls_of_equal_weights_keep_their_own_tokenizer(here: Path) -> None:
    save(here / "model-a", byte_tokenizer())
    save(here / "model-b", byte_tokenizer(bos=True))
    for which in "ab":
        edited(here / f"model-{which}", here / f"edited-{which}")
        excise(
            f"audit --model edited-{which} --original model-{which} {DATA} --out {which}"
            f" --audit.change '{NO_TRAINING}, attacks: [quantize]}}'"
        )
    controls = [file_sum(p) for p in here.glob(".stages/v2/control-*/model/tokenizer.json")]
    originals = [file_sum(here / f"model-{which}" / "tokenizer.json") for which in "ab"]
    assert sorted(controls) == sorted(originals)


# 4. An attack of one's own.

ATTACK = """
from typing import ClassVar, Literal
from pathlib import Path
from excise.auditor.base import Attack, AttackResult, VariantResult
from excise.record import AttackVariant, CurvePoint
{helper}

class Mine(Attack):
    name: Literal["mine"] = "mine"
    access: ClassVar[str] = "prompt"
    level: ClassVar[str] = "D1"
    table: str = ""

    def run(self, subject, domain, budget, ctx):
        score = {score}
        entry = AttackVariant(
            name="mine", subject=subject.name, access="prompt", variant="only", level="D1",
            status="ok", curve=(CurvePoint(score=score, low=score, high=score),), decisive=True,
        )
        return AttackResult("mine", subject.name, (VariantResult(entry, ({{"u": score}},)),), (0,))
"""


def test_an_attack_of_ones_own_is_run_again_after_any_change(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(here)
    edited(here / "model", here / "edited")
    line = (
        f"audit --model edited --original model {DATA} --allow-code --out out"
        " --audit.attacks \"[{name: './mine.py:Mine', table: t.txt}]\""
        f" --audit.change '{NO_TRAINING}, attacks: []}}'"
    )

    def score() -> float:
        as_in_a_new_process()
        excise(line)
        (entry,) = {a.curve[-1].score for a in records.load(here / "out").attacks if a.curve}
        return float(entry)

    (here / "t.txt").write_text("1")
    (here / "mine.py").write_text(ATTACK.format(helper="", score=0.25))
    assert score() == 0.25
    (here / "mine.py").write_text(ATTACK.format(helper="from weights import W", score="W"))
    (here / "weights.py").write_text("W = 0.5\n")
    assert score() == 0.5
    (here / "weights.py").write_text("W = 0.75\n")
    assert score() == 0.75
    reads = ATTACK.format(helper="", score="float(Path(self.table).read_text()) / 8")
    (here / "mine.py").write_text(reads)
    assert score() == 0.125
    (here / "t.txt").write_text("3")
    assert score() == 0.375
    stages = made(here)
    os.utime("t.txt", (1, 1))
    os.utime("mine.py", (1, 1))
    assert score() == 0.375
    assert made(here) == stages


# 5. Files by their bytes.


def test_places_and_time_stamps_of_files_do_not_count(here: Path) -> None:
    control_file(here, 0)
    line = f"remove rmu --layer 0 {REMOVE}"
    excise(f"{line} --controls c.safetensors --out a")
    stages = made(here)
    (here / "copy").mkdir()
    for name in ("c.safetensors", "f.jsonl", "r.jsonl"):
        shutil.copy(name, "copy")
    shutil.copytree("model", "copy/elsewhere")
    for path in (here / "copy").rglob("*"):
        os.utime(path, (1, 1))
    moved = line.replace("--model model", "--model copy/elsewhere")
    moved = moved.replace("f.jsonl", "copy/f.jsonl").replace("r.jsonl", "copy/r.jsonl")
    excise(f"{moved} --controls copy/c.safetensors --out b")
    assert made(here) == stages
    assert bits(here / "a" / "model") == bits(here / "b" / "model")


@pytest.mark.parametrize("field", ["student", "targets"])
def test_a_model_that_undo_names_without_a_slash_counts_by_its_bytes(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start, domain = toy_checkpoint(tmp_path), toy_domain()
    shutil.copytree(start.path, "other")
    named = {"student": {"student": "other"}, "targets": {"targets": FromOracle(path="other")}}
    unlearn = ex.GradDiff(fit=FIT)
    method = Undo(fit=FIT, max_length=16, unlearn=unlearn, **named[field])  # type: ignore[arg-type]

    def removed(out: str) -> str:
        ex.remove(start, method, domain, out=tmp_path / out)
        return bits(tmp_path / out / "model")

    first = removed("one/out")
    shutil.rmtree("other")
    edited(start.path, tmp_path / "other")
    assert removed("one/out") == removed("fresh/out") != first


# 6. An adapter beside a whole model.


def test_an_adapter_beside_a_model_is_refused_wherever_weights_are_read(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Checkpoint(here / "model")
    (here / "model" / "adapter_config.json").write_text("{}")
    reads: list[Callable[[Checkpoint], object]] = [
        lambda c: c.load(),
        lambda c: c.load_prefix(1),
        lambda c: c.fingerprint,
        lambda c: c.identity,
        lambda c: c.weights_of(["lm_head.weight"]),
        lambda c: c.write({}, here / "copy"),
        lambda c: ex.load(c.path),
        lambda c: ex.remove(c, ex.GradDiff(fit=FIT), toy_domain(), out=here / "out"),
    ]
    for read in reads:
        for checkpoint in (Checkpoint(here / "model"), opened):
            with pytest.raises(ex.UserError, match="a whole model and an adapter beside it"):
                read(checkpoint)
    refused(f"{GRAD_DIFF} --out out", "adapter beside it", capsys=capsys)


# 7. Bytes that changed under a stage or an output folder.

HARMS: dict[str, m.Break] = {"flipped": flip, "cut": halve, "gone": Path.unlink}


def test_a_stage_whose_bytes_changed_is_made_again(here: Path) -> None:
    line = f"{GRAD_DIFF} --out out"
    excise(line)
    whole = bits(here / "out" / "model")
    for name in ("model/model.safetensors", "state/step-00000002/state.safetensors"):
        for harm in HARMS.values():
            (stage,) = here.glob(".stages/v2/grad_diff-*")
            harm(stage / name)
            shutil.rmtree(here / "out" / "model")
            excise(line)
            assert bits(here / "out" / "model") == bits(stage / "model") == whole
    notes = (here / "out" / "events.jsonl").read_text()
    assert notes.count("is damaged") == 6


def test_a_clock_that_was_set_back_hides_no_damage(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{GRAD_DIFF} --out out"
    excise(line)
    whole = bits(here / "out" / "model")
    (stage,) = here.glob(".stages/v2/grad_diff-*")
    flip(stage / "model" / "model.safetensors")
    for stamp in here.glob(".stages/v2/.checked/*"):
        os.utime(stamp, (2**32, 2**32))
    shutil.rmtree(here / "out" / "model")
    excise(line)
    assert bits(here / "out" / "model") == whole


def linked(model: Path) -> None:
    """Put a link to another model in the place of a model."""
    shutil.rmtree(model)
    model.symlink_to(model.parents[1] / "model")


def dangling(model: Path) -> None:
    """Put a link to nothing in the place of a model."""
    shutil.rmtree(model)
    model.symlink_to(model.parent / "nowhere")


def added(model: Path) -> None:
    """Put an adapter beside a model."""
    (model / "adapter_config.json").write_text("{}")


def weights(harm: m.Break) -> m.Break:
    """Return what harms the weights of a model."""
    return lambda model: harm(model / "model.safetensors")


OUT_HARMS: dict[str, m.Break] = {
    **{f"weights {name}": weights(harm) for name, harm in HARMS.items()},
    "config": m.config(rope_theta=3.0),
    "tokenizer": byte_tokenizer(bos=True).save_pretrained,
    "another model": linked,
    "link to nothing": dangling,
    "adapter": added,
    "deleted": shutil.rmtree,
}


@pytest.mark.parametrize("harm", OUT_HARMS)
def test_a_model_that_is_not_the_records_is_refused_and_restored(
    harm: str,
    removed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(removed)
    model, original = removed / "out" / "model", m.state(removed / "model")
    whole = {name: entry[0] for name, entry in m.state(model).items()}
    OUT_HARMS[harm](model)
    for verb in ("audit", "inspect"):
        refused(f"{verb} out --out no --quiet", "out/model", capsys=capsys)
        assert not (removed / "no").exists()
    excise(f"{GRAD_DIFF} --out out")
    assert not model.is_symlink()
    restored = {name: entry[0] for name, entry in m.state(model).items() if name != "README.md"}
    assert restored == {name: sha for name, sha in whole.items() if name != "README.md"}
    assert m.state(removed / "model") == original
    assert not list((removed / "out").rglob(".*"))


def test_a_record_that_was_edited_is_refused_and_restored(
    removed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(removed)
    path = removed / "out" / "run.json"
    data = json.loads(path.read_text())
    data["method_runs"][0]["model"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(data))
    refused("audit out --out no --quiet", "does not hold the weights", capsys=capsys)
    excise(f"{GRAD_DIFF} --out out")
    fingerprint = Checkpoint(removed / "out" / "model").fingerprint
    assert records.load(removed / "out").method_runs[0].model.fingerprint == fingerprint


def test_a_recipe_that_was_edited_changes_no_audit(
    removed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(removed)
    recipe = removed / "out" / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("f.jsonl", "x").replace("r.jsonl", "f.jsonl"))
    excise(f"audit out --out audited --workers 1 --quiet --audit.change '{NO_TRAINING},"
           " attacks: []}'")  # fmt: skip
    assert records.load(removed / "audited").scores == records.load(removed / "out").scores
    recipe.write_text(text)


def test_an_audit_of_an_output_reads_the_original_with_the_runs_tokenizer(here: Path) -> None:
    byte_tokenizer(bos=True).save_pretrained(here / "words")
    (here / "tiny.yaml").write_text(
        "name: tiny\nmodel: {path: model, tokenizer: words}\naudit: {budget: none}\n"
        "domain: {name: files, forget: {forget: f.jsonl}, retain: r.jsonl}\n"
        "arms: {maxent: {name: maxent, max_length: 24, fit: {steps: 2, batch_size: 4}}}\n"
    )
    excise("run tiny.yaml --out out --workers 1 --quiet")
    change = f"--audit.change '{NO_TRAINING}, attacks: []}}'"
    excise(f"audit out --out audited --workers 1 --quiet {change}")
    assert records.load(here / "audited").scores == records.load(here / "out").scores


# 8. Names of reference models.


@pytest.mark.parametrize(
    "name", ["original", "oracle", "oracle-0", "oracle_0", "oracles", "positive-control"]
)
def test_no_method_run_takes_the_name_of_a_reference_model(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "tiny.yaml").write_text(m.TINY.replace("  rmu:", f"  {name}:"))
    words = (f"arms.{name}", "the name of a reference model or a control")
    refused("check tiny.yaml", *words, capsys=capsys)
    refused("run tiny.yaml --out out --quiet", *words, capsys=capsys)
    assert not (here / "out").exists()


# 9. Killed at the worst moment.


def dead_process() -> int:
    """Return the id of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def killed(line: str, patch: Callable[[], None]) -> None:
    """Run a command line in a process that is killed where `patch` says."""
    child = os.fork()
    if child == 0:
        try:
            patch()
            main(shlex.split(line))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_: object, **__: object) -> Any:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def on_replace(name: str) -> Callable[[], None]:
    """Return what kills a process before a half-made file or folder takes its name."""

    def patch() -> None:
        replace = os.replace

        def replaced(source: Any, to: Any) -> None:
            if Path(to).name == name:
                die()
            replace(source, to)

        os.replace = replaced  # type: ignore[assignment]

    return patch


def on_lock() -> None:
    """Kill the process when it has made the output folder and nothing in it."""
    vars(output).update(locked=die)


def on_copy() -> None:
    """Kill the process in the middle of the second file of a model."""
    clone, count = disk.clone_file, iter(range(99))

    def cloned(source: Path, to: Path) -> None:
        clone(source, to)
        if next(count) == 1:
            os.truncate(to, 1)
            die()

    vars(output).update(clone_file=cloned)


MOMENTS: dict[str, Callable[[], None]] = {
    "nothing written": on_lock,
    "recipe half written": on_replace("recipe.yaml"),
    "stage's model half written": on_replace("model"),
    "model half copied": on_copy,
    "record half written": on_replace("run.json"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_works_again_and_leaves_nothing(
    moment: str, removed: Path, here: Path
) -> None:
    line = f"{GRAD_DIFF} --out deep/out"
    killed(line, MOMENTS[moment])
    excise(line)
    assert bits(here / "deep" / "out" / "model") == bits(removed / "out" / "model")
    assert not list((here / "deep").rglob(".part-*"))
    assert not list((here / "deep" / "out").rglob(".*"))


def test_what_a_live_process_or_another_machine_makes_is_not_swept(here: Path) -> None:
    out = here / "out"
    live, host = part_of(out / "model"), disk._host()
    elsewhere = live.with_name(live.name.replace(host, "0" * 8))
    dead = live.with_name(live.name.replace(f"-{os.getpid()}-", f"-{dead_process()}-"))
    for folder in (live, elsewhere, dead):
        folder.mkdir(parents=True)
    excise(f"{GRAD_DIFF} --out out")
    assert live.is_dir()
    assert elsewhere.is_dir()
    assert not dead.exists()


def test_two_runs_of_one_output_do_not_mix(
    removed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(removed)
    before = m.state(removed / "out")
    with output.hold(removed / "out"):
        refused(f"{GRAD_DIFF} --out out", "in use by another run", capsys=capsys)
    assert m.state(removed / "out") == before


# What else a user would take for granted.


def test_a_file_written_twice_within_a_tick_is_read_twice(tmp_path: Path) -> None:
    path, sums = tmp_path / "f", set()
    for i in range(50):
        path.write_text(f"{i:02}")
        sums.add(file_sum(path))
    assert len(sums) == 50


def test_the_record_says_when_it_began_and_where_its_model_lies(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(straight_line, name)

        def call(*args: Any) -> Any:
            order.append(name)
            return function(*args)

        return call

    for name in ("now", "remove_all"):
        monkeypatch.setattr(straight_line, name, noted(name))
    excise(f"{GRAD_DIFF} --out out")
    assert order == ["now", "remove_all"]
    record = ex.load(here / "out")
    assert isinstance(record, ex.Record)
    model = ex.load(here / "out" / record.method_runs[0].model.path)
    assert isinstance(model, Checkpoint)
    assert model.fingerprint == record.method_runs[0].model.fingerprint


def test_a_store_of_the_version_before_is_left_alone_with_a_sentence(here: Path) -> None:
    old = here / ".stages" / "grad_diff-0123456789abcdef"
    old.mkdir(parents=True)
    (old / "done.json").write_text("{}")
    before = m.state(old)
    excise(f"{GRAD_DIFF} --out out")
    assert m.state(old) == before
    assert "written by an earlier version" in (here / "out" / "events.jsonl").read_text()


def test_neither_the_order_of_sets_nor_another_process_counts(
    removed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(removed)
    line = [sys.executable, "-m", "excise", *shlex.split(f"{GRAD_DIFF} --out apart/out")]
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path}
    subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert made(removed / "apart") <= made(removed), "other keys"
    assert bits(removed / "apart" / "out" / "model") == bits(removed / "out" / "model")


@pytest.fixture(autouse=True)
def no_module_left() -> Iterator[None]:
    """Forget the modules of users' files after each test."""
    yield
    as_in_a_new_process()
