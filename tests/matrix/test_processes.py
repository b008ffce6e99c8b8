"""Two processes remove what one does, whether the model is cut over them or not."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed as dist

from excise.core.config import ConfigError
from excise.core.context import Context
from excise.core.stages import Runtime
from excise.methods import (
    ELM,
    NPO,
    RMU,
    SEAM,
    SGTM,
    SSD,
    TAR,
    UNDIAL,
    CheckpointTransfer,
    Direction,
    Filtering,
    GradDiff,
    GradDiffPretrain,
    GradientAscent,
    MaxEnt,
    Method,
    Plain,
    Propagate,
    RepSelect,
    SimNPO,
    TaskVector,
    TokenFilter,
    Undo,
)
from excise.methods.base import ApplyMethod
from excise.methods.distillation.cache_kinds import HiddenStates
from excise.methods.distillation.corpora import RefusingSamples
from excise.methods.distillation.harmful import Implicit
from excise.methods.distillation.targets import Splice
from excise.methods.posthoc.elm import Guide
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.stopping import StopRule
from excise.models.checkpoint import Checkpoint
from excise.requests.processes import CUT, check_fsdp
from excise.requests.recipe import Recipe
from excise.testing import toy_domain, toy_start
from excise.train.components import Components
from excise.train.distributed import gather
from excise.train.fit import FitConfig, _Run
from excise.train.worker import in_place
from tests.matrix.test_methods import early

# A larger epsilon than usual: Adam divides by it, and rounding is all that may differ.
FIT = FitConfig(steps=3, lr=1e-3, batch_size=8, eps=1e-3)
SUBTRACT = FitConfig(steps=3, lr=0.05, batch_size=8, optimizer="sgd")
PRETRAIN = Pretrain(fit=FIT, max_length=16)
UNLEARN = MaxEnt(fit=FIT, max_length=16)
METHODS: dict[str, Method] = {
    "grad_diff": GradDiff(fit=FIT, max_length=16),
    "rmu": RMU(layer=2, fit=FIT, max_length=16),
    "elm": ELM(layers=(1, 2), lora=None, fit=FIT, max_length=16, guide=Guide(continuation=4)),
    "repselect": RepSelect(components=Components(count=4), fit=SUBTRACT, max_length=16),
    "sam": GradDiff(fit=FIT, max_length=16, sam=0.1),
    "task_vector": TaskVector(fit=FIT, max_length=16),
    "direction": Direction(max_length=16),
    "seam": SEAM(fit=FIT, max_length=16),
    # An attacker's AdamW has no other epsilon; few steps of it at a low rate.
    "tar": TAR(mapping=None, fit=FIT, max_length=16, inner_steps=2, every=1, inner_lr=(1e-4,)),
    "npo": NPO(fit=FIT, max_length=16),
    "undial": UNDIAL(fit=FIT, max_length=16),
    "ssd": SSD(alpha=1.5, max_length=16),
    "undo": Undo(unlearn=UNLEARN, fit=FIT, max_length=16),
    "undo_cached": Undo(unlearn=UNLEARN, fit=FIT, max_length=16, cache=HiddenStates(), repeats=2),
    "undo_implicit": Undo(
        unlearn=UNLEARN,
        fit=FIT,
        max_length=16,
        targets=Splice(harmful="skip", by=Implicit(tau=0.01)),
    ),
    "undo_refusing": Undo(
        unlearn=UNLEARN,
        fit=FIT,
        max_length=16,
        corpus=RefusingSamples(rows=16, new_tokens=4, refusal="w1 w2", prompt_tokens=2, fit=FIT),
    ),
    "undo_stopped": Undo(unlearn=RMU(layer=2, fit=FIT), fit=FIT, max_length=16, stop_tolerance=0.0),
    "gradient_ascent": GradientAscent(fit=FIT, max_length=16),
    "simnpo": SimNPO(fit=FIT, max_length=16),
    "maxent": MaxEnt(fit=FIT, max_length=16),
    "plain": Plain(pretrain=PRETRAIN),
    "filtering": Filtering(pretrain=PRETRAIN),
    "propagate": Propagate(pretrain=PRETRAIN),
    "token_filter": TokenFilter(pretrain=PRETRAIN),
    "grad_diff_pretrain": GradDiffPretrain(pretrain=PRETRAIN),
    "sgtm": SGTM(pretrain=PRETRAIN),
}
PATIENCE = 600
"""Seconds after which processes hang, on a machine that may be busy with much else."""


def methods(folder: str) -> dict[str, Method]:
    """Return all methods, with the model that one of them needs."""
    transfer = CheckpointTransfer(teacher=f"{folder}/early", fit=FIT, lora=None, max_length=16)
    return {**METHODS, "checkpoint_transfer": transfer}


def cuts(method: Method) -> bool:
    """Return whether `--fsdp` takes a method."""
    try:
        check_fsdp(cast(Recipe, SimpleNamespace(fsdp=True, arms={"it": method})), 2)
    except ConfigError:
        return False
    return True


def _apply(folder: str, work: str, rank: int, world: int) -> None:
    """Apply methods as one of `world` processes that share a folder."""
    start = Checkpoint(Path(folder) / "start")
    for name, method in methods(folder).items():
        if work == "cut" and not cuts(method):
            continue
        made = Path(folder) / f"{name}-{work}"
        made.mkdir(exist_ok=True)
        alike: dict[str, Any] = {"rank": rank, "world": world, "fsdp": work == "cut"}
        ctx = Context(made, seed=5, **alike)
        agree = partial(_agree, ctx=ctx)
        ctx = replace(
            ctx, stages=Runtime(Path(folder) / f"stages-{work}", agree=agree, **alike).run
        )
        removal = method.apply(start, toy_domain(), ctx)
        assert removal.checkpoint.path == ctx.work / "model"
        if rank == 0:
            (ctx.work / "history.json").write_text(json.dumps(removal.history))
        assert set(removal.checkpoint.weights_of(removal.changed)) == set(removal.changed)


def _agree(value: bool, ctx: Context) -> bool:
    """Return what process 0 says, once all are there."""
    return bool(gather(value, ctx)[0])


def _second(folder: str, rank: int) -> None:
    """Be one of two processes that apply every method, and some to a model that is cut."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for work in ("two", "cut"):
        _apply(folder, work, rank, 2)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which one process and two have applied every method."""
    root = tmp_path_factory.mktemp("processes")
    toy_start(root / "start")
    shutil.copytree(early("llama"), root / "early")
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["excise.methods", "transformers.models.llama.modeling_llama"])
    workers = [forked.Process(target=_second, args=(str(root), r), daemon=True) for r in range(2)]
    for worker in workers:
        worker.start()
    _apply(str(root), "one", 0, 1)
    for worker in workers:
        worker.join(PATIENCE)
        worker.kill()
        assert worker.exitcode == 0
    return root


RESUMED: dict[str, Method] = {
    "grad_diff": METHODS["grad_diff"],
    # What is kept beside the state: vectors scaled by all processes, and looks at dev.
    "adaptive": RMU(
        layer=2, adaptive=True, fit=FIT, max_length=16, stop=StopRule(every=1, stop="end")
    ),
    "undo": METHODS["undo"],
    "sgtm": METHODS["sgtm"],
}
"""Methods stopped with four processes and resumed with two."""


class Stopped(BaseException):
    """What stops a process after a step, as a signal would."""


def _resume(folder: str, rank: int, world: int, stops: bool) -> None:
    """Be one of several processes that begin methods or finish them."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meet = f"file://{folder}/resume-{world}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)

    def stop(run: Any, *args: Any, stepped: Any = _Run._stepped) -> Any:
        record = stepped(run, *args)
        if run.cursor == 2:
            raise Stopped
        return record

    with pytest.MonkeyPatch.context() as patch:
        if stops:
            patch.setattr(_Run, "_stepped", stop)
        _finish(folder, "resumed", rank, world, stops=stops)
    dist.destroy_process_group()


def _note(notes: list[str], kind: str, data: Mapping[str, Any]) -> None:
    """Keep what an event says."""
    notes.append(str(data.get("text", kind)))


def _finish(folder: str, work: str, rank: int, world: int, *, stops: bool = False) -> None:
    """Make the models of `RESUMED`, and note what is said meanwhile."""
    ctx = Context(Path(), rank=rank, world=world)
    runtime = Runtime(
        Path(folder) / work, rank=rank, world=world, agree=partial(_agree, ctx=ctx)
    )  # fmt: skip
    start = Checkpoint(Path(folder) / "start")
    for name, method in RESUMED.items():
        notes: list[str] = []
        with in_place(partial(_note, notes)):
            if stops:
                with pytest.raises(Stopped):
                    runtime.run(ApplyMethod(method, start, toy_domain(), 5))
                continue
            removal = runtime.run(ApplyMethod(method, start, toy_domain(), 5))
        if rank == 0:
            facts = [str(removal.checkpoint.path), removal.history, notes]
            (Path(folder) / f"{name}-{work}.json").write_text(json.dumps(facts))


def test_another_number_of_processes_resumes(tmp_path: Path) -> None:
    start = toy_start(tmp_path / "start")
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["excise.methods", "transformers.models.llama.modeling_llama"])
    for world, stops in ((4, True), (2, False)):
        workers = [
            forked.Process(target=_resume, args=(str(tmp_path), r, world, stops), daemon=True)
            for r in range(world)
        ]
        for worker in workers:
            worker.start()
        if stops:
            _finish(str(tmp_path), "alone", 0, 1)
        for worker in workers:
            worker.join(PATIENCE)
            worker.kill()
            assert worker.exitcode == 0
    names = start.parameter_names()
    for name in RESUMED:
        (to, one, _), (at, two, notes) = (
            json.loads((tmp_path / f"{name}-{work}.json").read_text())
            for work in ("alone", "resumed")
        )
        a, b = (Checkpoint(Path(path)).weights_of(names) for path in (to, at))
        assert max(float((a[n] - b[n]).abs().max()) for n in names) <= 1e-6, name
        losses = [[step["loss"] for step in steps if "loss" in step] for steps in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-6), name
        assert any("4 processes began resumes after step 2 with 2" in text for text in notes), name


CASES = [(name, "two") for name in methods("")] + [
    (n, "cut") for n, m in methods("").items() if cuts(m)
]


def test_every_method_that_is_cut_is_held_to_a_whole_model() -> None:
    assert {str(methods("")[name].name) for name, work in CASES if work == "cut"} == CUT  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "work"), CASES)
def test_two_processes_remove_what_one_does(name: str, work: str, folder: Path) -> None:
    start, one, two = (
        Checkpoint(folder / path) for path in ("start", f"{name}-one/model", f"{name}-{work}/model")
    )
    names = start.parameter_names()
    before, a, b = (checkpoint.weights_of(names) for checkpoint in (start, one, two))
    assert max(float((a[n] - b[n]).abs().max()) for n in names) <= 1e-6
    assert max(float((a[n] - before[n]).abs().max()) for n in names) > 1e-4
    losses = [
        [step["loss"] for step in json.loads(path.read_text()) if "loss" in step]
        for path in (folder / f"{name}-{n}/history.json" for n in ("one", work))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-6)
