"""How fast a removal or an audit goes here: a few steps of every kind of work, timed.

Methods run whole, every schedule cut to a few steps, and their models are thrown away; of the
audit, steps of relearning and the scoring of a few rows are timed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from excise.auditor.evaluation_set import evaluation_set
from excise.auditor.scoring import read
from excise.auditor.tuning import adapter, counts, loss, mixed_batches, relearn_rows
from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.events import Emit, silent
from excise.fetch.model import open_model
from excise.methods.base import ApplyMethod, Method, completed
from excise.methods.importance import ImportanceMethod
from excise.methods.pretraining.plain import Plain
from excise.models.checkpoint import Checkpoint
from excise.requests.audit import AuditRun
from excise.requests.recipe import Recipe, budget_for
from excise.run.environment import device_of
from excise.run.estimate import (
    ADAPTER,
    FULL,
    ON_THE_WAY,
    ORIGINAL,
    SCORING,
    DataSizes,
    Pace,
    Plan,
    attack_step,
    evaluation_tokens,
    existing,
    method_line,
)
from excise.run.stages import MakeModel
from excise.train.fit import FitConfig, fit
from excise.train.pool import Processes

STEPS = 4
"""Steps of every schedule: the first warms up, three are timed."""

Clock = Callable[[], float]
"""A clock in seconds."""


def measured(
    result: Plan,
    request: Recipe | AuditRun,
    *,
    emit: Emit = silent,
    clock: Clock = time.perf_counter,
) -> Plan:
    """Return a plan with the pace of every kind of work, timed on the model itself.

    Everything happens in a temporary folder beside the output, which is removed.

    Args:
        result: The plan, with its rows.
        request: What it is about.
        emit: Sink of progress events.
        clock: What the time is read from.

    Raises:
        UserError: If the model is not here or cannot be loaded.
    """
    assert result.domain is not None
    spec = request.model if isinstance(request, Recipe) else request.original
    paces: dict[str, Pace] = {}
    notes: list[str] = []
    with (
        tempfile.TemporaryDirectory(dir=existing(result.out), prefix=".measure-") as scratch,
        Processes(1, emit=emit) as pool,
    ):
        work = Path(scratch)
        ctx = Context(
            work,
            request.seed,
            torch.device(device_of(request.device)),
            getattr(torch, request.dtype),
            emit=silent,
        )
        if spec.scratch is not None:
            stage = MakeModel(spec.scratch, result.tokenizer, request.seed)
            stage.make(ctx)
            start = stage.read(work)
        else:
            emit("phase", {"text": "reading the weights of the model"})
            start = open_model(spec)
        jobs: dict[str, Callable[[Context], Mapping[str, Pace]]] = {}
        kinds = {line.pace for line in result.lines}
        sizes = DataSizes(start.num_parameters, start.tokenizer(), result.domain)
        jobs["the audit"] = partial(_time_attacks, request, start, sizes, kinds, clock)
        if isinstance(request, Recipe):
            arms = dict(request.arms)
            if ORIGINAL in kinds:
                arms = {ORIGINAL: Plain(pretrain=request.pretrain), **arms}
            known_fields = {"pretrain": request.pretrain, "pretrain_tokens": 1}
            for name, method in arms.items():
                short = _shortened(completed(method, known_fields))
                jobs[name] = partial(_time_method, name, short, start, sizes, clock)
        for i, (name, job) in enumerate(jobs.items()):
            emit("phase", {"text": f"timing three steps of {name}"})
            folder = work / f"job-{i}"
            folder.mkdir()
            try:
                paces.update(pool.map(job, [replace(ctx, work=folder)])[0])
            except UserError as error:
                notes.append(f"{name} could not be timed: {error}")
            shutil.rmtree(folder)
    if not paces:
        raise UserError(f"--measure timed nothing: {notes[0] if notes else 'nothing is trained'}")
    if FULL not in paces:
        paces[FULL] = next(iter(paces.values()))
    return replace(result, paces=paces, notes=(*result.notes, *notes))


def _shortened(config: Any) -> Any:
    """Return a configuration whose every schedule is a few steps, each of which is told."""
    if isinstance(config, FitConfig):
        return config.model_copy(
            update={"steps": STEPS, "log_every": 1, "save_every": 0, "warmup": 0}
        )
    if isinstance(config, tuple):
        return tuple(_shortened(item) for item in config)
    if isinstance(config, Mapping):
        return {name: _shortened(item) for name, item in config.items()}
    if not isinstance(config, Config):
        return config
    fields = {name: _shortened(getattr(config, name)) for name in type(config).model_fields}
    changed = {n: v for n, v in fields.items() if v != getattr(config, n)}
    if fields.get("sweep") is not None:
        changed["sweep"] = None
    return config.model_copy(update=changed)


def _range(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the fastest and the slowest of some times, at least a quarter and at most 2x apart.

    Three steps in a row see less of what disturbs a machine than hours do.
    """
    low = max(min(seconds), 1e-9)
    return low, min(2 * low, max(*seconds, 1.25 * low))


def _time_method(
    name: str, short: Method, start: Checkpoint, sizes: DataSizes, clock: Clock, ctx: Context
) -> Mapping[str, Pace]:
    """Run a method whose schedules were shortened, and time its steps; its model is thrown away."""
    assert sizes.domain is not None
    told: dict[str, list[float]] = {}

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "step":
            told.setdefault(str(data["stage"]), []).append(clock())

    began = clock()
    ApplyMethod(short, start, sizes.domain, ctx.seed).make(replace(ctx, emit=emit))
    total = clock() - began
    steps = [[b - a for a, b in pairwise(t)] for t in told.values() if len(t) > 1]
    line = method_line(name, short, sizes, 1, name)
    flops = line.flops
    if flops and not line.steps:  # rows are read once, and all of them were
        return {name: Pace(total / flops, 2 * total / flops)}
    if not steps or not flops:
        raise UserError("it trains in no steps that could be told apart")
    ranges = [_range(times) for times in steps]
    one = flops / (line.steps if isinstance(short, ImportanceMethod) else STEPS)
    low, high = (sum(r[side] for r in ranges) / one for side in (0, 1))
    fixed = max(0.0, total - sum(map(sum, steps)))
    return {name: Pace(low, high, fixed)}


def _time_attacks(
    request: Recipe | AuditRun,
    start: Checkpoint,
    sizes: DataSizes,
    kinds: Iterable[str],
    clock: Clock,
    ctx: Context,
) -> Mapping[str, Pace]:
    """Time steps of relearning and the scoring of a few rows, on the original."""
    assert sizes.domain is not None
    assert sizes.count is not None
    named = (
        request.audit.model_copy(update={"budget": "smoke"})
        if (request.audit.budget == "none")
        else request.audit
    )
    budget = budget_for(named, sizes.count).model_copy(
        update={"max_test_rows": 16, "max_other_rows": 16, "steps": STEPS}
    )
    began = clock()
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    loading = clock() - began
    evaluation = evaluation_set(sizes.domain, budget, sizes.tokenizer)
    paces: dict[str, Pace] = {}
    if SCORING in kinds:
        marks = [clock()]
        for _ in range(STEPS):
            read(model, evaluation, trained=evaluation.trained)
            marks.append(clock())
        flops = sizes.flops(2.0, evaluation_tokens(evaluation, budget, sizes))
        paces[SCORING] = _pace(marks, flops, loading)
        paces[ON_THE_WAY] = replace(paces[SCORING], fixed=0.0)
    rows, benign = relearn_rows(sizes.domain), 0.5
    for kind, per_token in ((FULL, 6.0), (ADAPTER, 4.0)):
        if kind not in kinds:
            continue
        batches = mixed_batches(model, evaluation, ctx, rows, benign)
        config = FitConfig(steps=STEPS, lr=1e-6, batch_size=budget.batch_size, clip=1.0)
        with adapter(model, 8) if kind == ADAPTER else nullcontext(model) as net:
            marks = [
                clock()
                for _ in fit(net, batches, loss, config, replace(ctx, emit=silent), counts=counts)
            ]
        _, padded = attack_step(budget, sizes, "relearn")
        paces[kind] = _pace(marks, sizes.flops(per_token, padded), loading)
    return paces


def _pace(marks: Sequence[float], flops: float | None, fixed: float) -> Pace:
    """Return the pace of steps that end at `marks`; the first is no step, or warms up."""
    low, high = _range([b - a for a, b in pairwise(marks)][-3:])
    return Pace(low / (flops or 1.0), high / (flops or 1.0), fixed)
