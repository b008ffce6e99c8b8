"""An interrupted run resumes to the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.train.fit import FitConfig, StepRecord, Term, fit
from excise.train.optim import Slice

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


def _run(
    model: nn.Module, folder: Path | None, pause: float = 0.0, notes: list[str] | None = None
) -> list[StepRecord]:
    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "note" and notes is not None:
            notes.append(data["text"])

    records = []
    ctx = Context(work=Path("unused"), seed=3, emit=emit)
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
def test_stopping_early_and_resuming_changes_nothing(
    stop: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = _model(dtype)
    expected = _run(whole, None)
    first = _model(dtype)
    run = fit(first, lambda s: [s], _loss, CONFIG, Context(Path("x"), seed=3), state_dir=tmp_path)
    for _ in range(stop):
        next(run)
    run.close()
    second = _model(dtype)
    records = _run(second, tmp_path)
    assert [r.replayed for r in records] == [True] * stop + [False] * (60 - stop)
    assert _facts(records) == _facts(expected)
    _same(second, whole)


@pytest.mark.parametrize("master", ["float32", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "hf_adamw", "sgd"])
def test_slices_and_groups_that_are_not_always_written_resume(
    optimizer: str, dtype: torch.dtype, master: str, tmp_path: Path
) -> None:
    config = FitConfig.model_validate(
        {**CONFIG.model_dump(), "steps": 12, "optimizer": optimizer, "master": master}
    )

    def run(folder: Path | None, steps: int) -> nn.Module:
        model = _model(dtype)
        first, last = model[0], model[3]  # type: ignore[index]
        groups: dict[str, Any] = {
            "top": [Slice(first.weight, 0, 0, 4), first.bias],
            "rest": [Slice(first.weight, 0, 4, 7), *last.parameters()],
        }
        ctx = Context(work=Path("unused"), seed=3)
        steps_of_run = fit(
            model, lambda s: [s], _loss, config, ctx, groups=groups, state_dir=folder,
            rates={"rest": 3e-3}, writes=lambda step: ["top", "rest"] if step % 3 else ["top"],
        )  # fmt: skip
        for _ in itertools.islice(steps_of_run, steps):
            pass
        steps_of_run.close()
        return model

    whole = run(None, 12)
    run(tmp_path, 7)
    assert (tmp_path / "step-00000007").is_dir()
    _same(run(tmp_path, 12), whole)


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
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000060"]
    names = load_file(tmp_path / "step-00000060" / "state.safetensors").keys()
    assert {name.split("/")[0] for name in names} == {"weight", "buffer"}  # moments are dropped

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


def _interrupted(folder: Path, stop: int = 20) -> None:
    """Train for a few steps and leave the state of the last."""
    ctx = Context(Path("x"), seed=3)
    run = fit(_model(), lambda s: [s], _loss, CONFIG, ctx, state_dir=folder)
    for _ in range(stop):
        next(run)
    run.close()


STATE = "step-00000020/"


@pytest.mark.parametrize(
    ("name", "where", "reason"),
    [
        (STATE + "state.safetensors", -5, "state.safetensors was changed"),
        (STATE + "state.safetensors", 40, "state.safetensors was changed"),
        (STATE + "state.json", 20, "state.json was changed"),
        (STATE + "state.json", 0, "state.json cannot be read"),
        ("steps.jsonl", 300, "steps.jsonl beside it lacks steps or was changed"),
        ("steps.jsonl", 0, "steps.jsonl beside it lacks steps or was changed"),
    ],
)
def test_one_flipped_bit_is_noticed_and_the_run_starts_over(
    name: str, where: int, reason: str, tmp_path: Path
) -> None:
    whole, again = _model(), _model()
    expected = _run(whole, None)
    _interrupted(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[where] ^= 1
    (tmp_path / name).write_bytes(data)
    notes: list[str] = []
    records = _run(again, tmp_path, notes=notes)
    assert len(notes) == 1
    assert reason in notes[0]
    assert notes[0].endswith("; training starts over")
    assert "\n" not in notes[0]
    assert not any(record.replayed for record in records)
    assert _facts(records) == _facts(expected)
    _same(again, whole)
    assert [p.name for p in tmp_path.glob("*step-*")] == ["step-00000060"]


def test_an_intact_state_is_resumed_without_a_note(tmp_path: Path) -> None:
    """The other side of the test above: nothing is noticed where nothing happened."""
    _interrupted(tmp_path)
    notes: list[str] = []
    assert _run(_model(), tmp_path, notes=notes)[19].replayed
    assert notes == []


def test_an_older_intact_state_serves_where_the_newest_is_damaged(tmp_path: Path) -> None:
    whole, again = _model(), _model()
    _run(whole, None)
    _interrupted(tmp_path, stop=9)
    shutil.copytree(tmp_path / "step-00000009", tmp_path / "copy")
    _run(_model(), tmp_path)
    (tmp_path / "copy").rename(tmp_path / "step-00000009")
    (tmp_path / "step-00000060" / "state.safetensors").unlink()
    notes: list[str] = []
    records = _run(again, tmp_path, notes=notes)
    assert [record.replayed for record in records] == [True] * 9 + [False] * 51
    assert notes[0].endswith("; training resumes after step 9")
    _same(again, whole)
    assert not (tmp_path / "step-00000009").exists()


def test_a_state_of_another_version_is_not_used(tmp_path: Path) -> None:
    whole, again = _model(), _model()
    _run(whole, None)
    _interrupted(tmp_path)
    path = tmp_path / STATE / "state.json"
    facts = json.loads(path.read_text())
    del facts["sha256"]
    path.write_text(json.dumps({**facts, "version": 1}))
    notes: list[str] = []
    assert not _run(again, tmp_path, notes=notes)[0].replayed
    assert "written by another version" in notes[0]
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


@pytest.mark.parametrize("what", ["settings", "seed", "rates", "groups"])
def test_another_runs_state_is_refused(what: str, tmp_path: Path) -> None:
    _run(_model(), tmp_path)
    config = CONFIG.model_copy(update={"lr": 1.0}) if what == "settings" else CONFIG
    ctx = Context(Path("x"), seed=4 if what == "seed" else 3)
    model = _model()
    rates = {"all": 0.5} if what == "rates" else None
    groups = {"other" if what == "groups" else "all": list(model.parameters())}
    with pytest.raises(UserError, match="other settings"):
        list(
            fit(
                model, lambda s: [s], _loss, config, ctx,
                state_dir=tmp_path, rates=rates, groups=groups,
            )
        )  # fmt: skip


def _victim(folder: str) -> None:
    torch.set_num_threads(1)
    _run(_model(), Path(folder), pause=0.004)


def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path) -> None:
    whole, survivor = _model(), _model()
    expected = _run(whole, None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "excise.train.fit"])
    rng = random.Random(0)
    kills, code = 0, None
    log = tmp_path / "steps.jsonl"
    for _ in range(30):
        saved = max((int(p.name[5:]) for p in tmp_path.glob("step-*")), default=0)
        process = context.Process(target=_victim, args=(str(tmp_path),), daemon=True)
        process.start()
        lines = saved + rng.randint(1, 15)  # killed after so many, between saves or in one
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.001)
        process.join(rng.uniform(0.0, 0.02))
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


@pytest.mark.parametrize("save_every", [0, 7, 10])
def test_what_a_finished_run_keeps_does_not_depend_on_how_it_was_stopped(
    save_every: int, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"steps": 20, "save_every": save_every})

    def steps(folder: Path) -> Any:
        ctx = Context(work=Path("unused"), seed=3)
        return fit(_model(), lambda s: [s], _loss, config, ctx, state_dir=folder)

    kept = []
    for stop in (20, 13, None):
        folder = tmp_path / str(stop)
        run = steps(folder)
        for _ in itertools.islice(run, stop):
            pass
        run.close()
        if stop == 13:  # killed when the next state was there and this one not yet dropped
            shutil.copytree(folder / "step-00000013", folder / "step-00000005")
            (folder / ".step-00000009.1").mkdir()
        for _ in steps(folder):
            pass
        assert {path.name for path in folder.iterdir()} == {"step-00000020", "steps.jsonl"}
        kept.append((folder / "step-00000020" / "state.safetensors").read_bytes())
    assert kept[0] == kept[1] == kept[2]
    assert not any(b"optimizer/" in data for data in kept)


def test_no_state_is_kept_between_steps_that_hang_together(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 10, "save_every": 1})

    def steps(model: nn.Module) -> Any:
        ctx = Context(work=Path("unused"), seed=3)
        return fit(
            model, lambda s: [s], _loss, config, ctx, state_dir=tmp_path / "state", together=4
        )

    for record in itertools.islice(steps(_model()), 7):
        assert not record.replayed
    again, whole = _model(), _model()
    replayed = [record.replayed for record in steps(again)]
    assert replayed == [True] * 4 + [False] * 6
    for _ in fit(whole, lambda s: [s], _loss, config, Context(work=Path("unused"), seed=3)):
        pass
    _same(again, whole)
