"""An interrupted run goes on to the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.train.fit import FitConfig, StepRecord, Term, fit

CONFIG = FitConfig(
    steps=60, lr=1e-2, schedule="cosine", warmup=5, weight_decay=0.1, clip=0.5, save_every=7
)


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.2), nn.Linear(7, 2))
    return model.to(dtype)


def _loss(model: nn.Module, step: int) -> dict[str, Term]:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
    out = model(x.to(next(model.parameters()).dtype))
    return {"mse": Term((out - 1).square().sum(), 12.0), "mean": Term(out.mean(), 1.0, 0.1)}


def _run(model: nn.Module, folder: Path | None, pause: float = 0.0) -> list[StepRecord]:
    records = []
    ctx = Context(work=Path("unused"), seed=3)
    for record in fit(model, lambda s: [s], _loss, CONFIG, ctx, state_dir=folder):
        records.append(record)
        time.sleep(0 if record.replayed else pause)
    return records


def _same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert all(torch.equal(left[k], right[k]) for k in left)


def _facts(records: list[StepRecord]) -> list[Any]:
    return [(r.step, r.loss, r.terms, r.lr, r.grad_norm) for r in records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 7, 20, 59])
def test_stopping_early_and_going_on_changes_nothing(
    stop: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = _model(dtype)
    expected = _run(whole, None)
    first = _model(dtype)
    run = fit(first, lambda s: [s], _loss, CONFIG, Context(Path("x"), seed=3), state_dir=tmp_path)
    for _ in range(stop):
        next(run)
    run.close()  # type: ignore[attr-defined]
    second = _model(dtype)
    records = _run(second, tmp_path)
    assert [r.replayed for r in records] == [True] * stop + [False] * (60 - stop)
    assert _facts(records) == _facts(expected)
    _same(second, whole)


def test_an_exception_in_the_callers_loss_keeps_what_was_done(tmp_path: Path) -> None:
    def broken(model: nn.Module, step: int) -> dict[str, Term]:
        if step == 11:
            raise KeyboardInterrupt
        return _loss(model, step)

    ctx = Context(Path("x"), seed=3)
    with pytest.raises(KeyboardInterrupt):
        list(fit(_model(), lambda s: [s], broken, CONFIG, ctx, state_dir=tmp_path))
    assert (tmp_path / "step-00000011").is_dir()
    whole, again = _model(), _model()
    _run(whole, None)
    _run(again, tmp_path)
    _same(again, whole)


def test_a_finished_run_is_read_back_at_once(tmp_path: Path) -> None:
    whole, again = _model(), _model()
    _run(whole, tmp_path)
    assert (tmp_path / "finished").is_file()
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000060"]

    def never(model: nn.Module, step: int) -> dict[str, Term]:
        raise AssertionError("trained again")

    ctx = Context(Path("x"), seed=3)
    records = list(fit(again, lambda s: [s], never, CONFIG, ctx, state_dir=tmp_path))
    assert len(records) == 60
    assert all(r.replayed for r in records)
    _same(again, whole)


def test_a_damaged_state_is_passed_over(tmp_path: Path) -> None:
    whole, again = _model(), _model()
    _run(whole, tmp_path)
    path = tmp_path / "step-00000060" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert not _run(again, tmp_path)[0].replayed
    _same(again, whole)


def test_a_torn_log_line_is_done_again(tmp_path: Path) -> None:
    run = fit(
        _model(), lambda s: [s], _loss, CONFIG, Context(Path("x"), seed=3), state_dir=tmp_path
    )
    for _ in range(10):
        next(run)
    del run
    log = tmp_path / "steps.jsonl"
    log.write_text(log.read_text() + '{"step": 10, "lo')
    whole, again = _model(), _model()
    _run(whole, None)
    _run(again, tmp_path)
    _same(again, whole)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(60))


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    _run(_model(), tmp_path)
    other = CONFIG.model_copy(update={"lr": 1.0})
    with pytest.raises(UserError, match="other settings"):
        list(fit(_model(), lambda s: [s], _loss, other, Context(Path("x")), state_dir=tmp_path))


def _victim(folder: str) -> None:
    torch.set_num_threads(1)
    _run(_model(), Path(folder), pause=0.004)


def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path) -> None:
    whole, survivor = _model(), _model()
    expected = _run(whole, None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "excise.train.fit"])
    draw = random.Random(0)
    kills, code = 0, None
    for _ in range(30):
        process = context.Process(target=_victim, args=(str(tmp_path),), daemon=True)
        process.start()
        log = tmp_path / "steps.jsonl"
        deadline = time.monotonic() + 60
        size = log.stat().st_size if log.exists() else 0
        while process.is_alive() and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size != size:
                break  # it trains
            time.sleep(0.002)
        process.join(draw.uniform(0.0, 0.1))
        process.kill()
        process.join()
        code = process.exitcode
        if code == 0:
            break
        kills += 1
    assert kills >= 3
    assert code == 0
    records = _run(survivor, tmp_path)
    assert all(r.replayed for r in records)
    assert _facts(records) == _facts(expected)
    _same(survivor, whole)
