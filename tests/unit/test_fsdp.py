"""A model cut over processes trains like a whole one, and any number of them resumes its state."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from excise.core.context import Context
from excise.models.tiny import tiny_model
from excise.train.fit import FitConfig, StepRecord, Term, fit
from excise.train.optim import Slice

STEPS, STOP, ROWS = 6, 4, 8
CONFIG = FitConfig(steps=STEPS, lr=1e-2, clip=0.5, eps=1e-3, save_every=2, weight_decay=0.1)


def _loss(model: nn.Module, ids_BT: Tensor) -> dict[str, Term]:
    logits_BTV: Any = model(ids_BT, use_cache=False).logits[:, :-1]
    total = nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
    )
    return {"nll": Term(total, ids_BT[:, 1:].numel())}


def _train(
    folder: Path, rank: int, world: int, steps: int, *, fsdp: bool, again: bool = False
) -> tuple[nn.Module, list[StepRecord]]:
    """Train everything in a block, its `mlp` matrices as slices by rows and by columns."""
    model: Any = tiny_model("llama", seed=0, width=32, blocks=2)
    named = dict(model.named_parameters())
    down, up = (named[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("down", "up"))
    groups = {
        "rows": [Slice(up, 0, 3, up.shape[0] - 5)],
        "columns": [Slice(down, 1, 0, 7)],
        "rest": [p for p in named.values() if p is not up and p is not down],
    }
    ids = torch.randint(90, (STEPS, ROWS, 9), generator=torch.Generator().manual_seed(1))
    ctx = Context(work=Path("unused"), rank=rank, world=world, fsdp=fsdp)
    config = CONFIG.model_copy(update={"activation_checkpointing": again})
    records = []

    def loss(model: nn.Module, ids_BT: Tensor) -> dict[str, Term]:
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor) == fsdp  # type: ignore[union-attr,index]
        return _loss(model, ids_BT)

    run = fit(
        model, lambda step: [ids[step, rank::world]], loss, config, ctx, groups=groups,
        rates={"rows": 3e-2}, state_dir=folder,
    )  # fmt: skip
    for record in run:
        records.append(record)
        if record.step + 1 == steps:
            break
    run.close()
    for name, p in model.named_parameters():
        assert p is named[name], name
        assert not isinstance(p, DTensor)
    model(ids[0])  # whole again, and no hook is left
    return model, records


Job = tuple[str, int, bool]
"""Name of the state's folder, steps to take, and whether the model is cut; blocks of `again` run
again in the backward pass."""


def _process(rank: int, world: int, folder: str, jobs: Sequence[Job]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{world}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    for name, steps, fsdp in jobs:
        model, records = _train(
            Path(folder) / name, rank, world, steps, fsdp=fsdp, again=name == "again"
        )
        tensors = dict(model.state_dict()) | {"losses": torch.tensor([r.loss for r in records])}
        save_file(tensors, Path(folder) / f"{name}-{world}-{rank}.safetensors")
    dist.destroy_process_group()


@contextmanager
def _processes(world: int, folder: Path, *jobs: Job) -> Iterator[None]:
    """Train in several processes while the block runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "excise.train.fit"])
    processes = [
        context.Process(target=_process, args=(rank, world, str(folder), jobs), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.join(120)
        process.kill()
        assert process.exitcode == 0


def test_a_cut_model_trains_like_a_whole_one(tmp_path: Path) -> None:
    jobs: list[Job] = [("cut", STEPS, True), ("stopped", STOP, True), ("again", STEPS, True)]
    with _processes(2, tmp_path, *jobs):
        model, records = _train(tmp_path / "whole", 0, 1, STEPS, fsdp=False)
    resumed, rest = _train(tmp_path / "stopped", 0, 1, STEPS, fsdp=False)
    assert [r.replayed for r in rest] == [True] * STOP + [False] * (STEPS - STOP)
    losses = [r.loss for r in records]
    assert [r.loss for r in rest] == pytest.approx(losses, rel=0, abs=1e-6)
    start = tiny_model("llama", seed=0, width=32, blocks=2).state_dict()
    for rank in range(2):
        cut = load_file(tmp_path / f"cut-2-{rank}.safetensors")
        again = load_file(tmp_path / f"again-2-{rank}.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in cut.items())
        assert cut["losses"].tolist() == pytest.approx(losses, rel=0, abs=1e-6)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(cut[name], tensor, rtol=0, atol=1e-6)
            torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=1e-6)
    assert not torch.equal(cut["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_another_number_of_processes_resumes(tmp_path: Path) -> None:
    with _processes(4, tmp_path, ("whole", STOP, False), ("cut", STOP, True)):
        model, records = _train(tmp_path / "alone", 0, 1, STEPS, fsdp=False)
    for name in ("whole", "cut"):  # each is also resumed the other way
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-turned")
        assert (tmp_path / name / f"step-{STOP:08d}").is_dir()
    turned: list[Job] = [("whole-turned", STEPS, True), ("cut-turned", STEPS, False)]
    jobs: list[Job] = [("whole", STEPS, False), ("cut", STEPS, True), *turned]
    with _processes(2, tmp_path, *jobs, ("two", STOP, False)):
        pass
    resumed, rest = _train(tmp_path / "two", 0, 1, STEPS, fsdp=False)
    assert [r.replayed for r in rest] == [True] * STOP + [False] * (STEPS - STOP)
    two = dict(resumed.state_dict()) | {"losses": torch.tensor([r.loss for r in rest])}
    alone = dict(model.state_dict()) | {"losses": torch.tensor([r.loss for r in records])}
    names = [f"{name}-2-{rank}" for name, _, _ in jobs for rank in range(2)]
    for found in (two, *(load_file(tmp_path / f"{name}.safetensors") for name in names)):
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
