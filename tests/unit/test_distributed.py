"""Two processes train like one: same weights, same records, whatever each of them saw."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn

from excise.core.context import Context
from excise.train.distributed import barrier, gather
from excise.train.fit import FitConfig, StepRecord, Term, fit

STEPS, ROWS = 5, 8
CONFIG = FitConfig(steps=STEPS, lr=1e-2, optimizer="sgd", clip=1.0, weight_decay=0.1)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Linear(1, 1))


def _loss(model: nn.Module, rows: list[int]) -> dict[str, Term]:
    x = torch.randn(STEPS * ROWS, 4, generator=torch.Generator().manual_seed(1))[rows]
    assert isinstance(model, nn.Sequential)
    error = model[:3](x).square().sum(-1)
    weight = torch.tensor([float(r % 3) for r in rows])  # uneven counts
    terms = {"a": Term((error * weight).sum(), float(weight.sum()))}
    if rows[0] % 2 == 0:  # a term, and a layer, that only process 0 reaches
        terms["b"] = Term(model[3](error[:1, None]).sum(), 1.0, weight=0.5)
    return terms


def _train(rank: int, world: int, micros: int, state: Path | None) -> tuple[nn.Module, Any]:
    model = _model()
    ctx = Context(work=Path("unused"), rank=rank, world=world)

    def batches(step: int) -> list[list[int]]:
        mine = list(range(step * ROWS + rank, (step + 1) * ROWS, world))
        size = len(mine) // micros
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    return model, list(fit(model, batches, _loss, CONFIG, ctx, state_dir=state))


def _process(rank: int, folder: str, micros: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ctx = Context(work=Path(folder), rank=rank, world=2)
    assert gather({"rank": rank, "text": "x" * rank}, ctx) == [
        {"rank": 0, "text": ""},
        {"rank": 1, "text": "x"},
    ]
    barrier(ctx)
    model, records = _train(rank, 2, micros, Path(folder) / "state")
    again, replayed = _train(rank, 2, micros, Path(folder) / "state")
    assert [r.loss for r in replayed] == [r.loss for r in records]
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    tensors = dict(model.state_dict()) | {"losses": torch.tensor([r.loss for r in records])}
    save_file(tensors, Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


def _expected() -> tuple[nn.Module, list[StepRecord]]:
    """One process that sees the rows of both, in an order in which row 0 comes first."""
    model = _model()

    def loss(m: nn.Module, rows: list[int]) -> dict[str, Term]:
        return _loss(m, rows)

    def batches(step: int) -> list[list[int]]:
        rows = list(range(step * ROWS, (step + 1) * ROWS))
        return [rows[0::2], rows[1::2]]

    return model, list(fit(model, batches, loss, CONFIG, Context(work=Path("unused"))))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "excise.train.fit"])
    model, records = _expected()
    processes = [
        context.Process(target=_process, args=(rank, str(tmp_path), 1), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        assert process.exitcode == 0
    ours = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[0][name], ours[1][name])
        torch.testing.assert_close(ours[0][name], tensor, rtol=1e-6, atol=1e-7)
        assert not torch.equal(tensor, _model().state_dict()[name])
    losses = torch.tensor([r.loss for r in records])
    assert torch.equal(ours[0]["losses"], ours[1]["losses"])
    torch.testing.assert_close(ours[0]["losses"], losses, rtol=1e-6, atol=1e-7)
