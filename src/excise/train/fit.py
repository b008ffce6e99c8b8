"""The one training loop.

`fit` is a generator: it yields a record after every step, and the caller stops it by leaving the
loop. Each named term of the loss is divided by its count over all micro-batches and processes,
so that the weights do not depend (beyond rounding) on how a batch was cut. Everything a step
needs is a function of its number, so that an interrupted run goes on to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from excise.core.context import Context
from excise.core.errors import Diverged, UserError
from excise.train.gradient import Values, backward, move
from excise.train.groups import make_groups, only
from excise.train.reduce import check_processes, gather
from excise.train.slices import Slice
from excise.train.state import Group, Log, buffers_of, identity, load_state, save_state
from excise.train.terms import FitConfig, StepRecord, Term

__all__ = ["FitConfig", "Slice", "StepRecord", "Term", "fit"]

M = TypeVar("M")
"""What the loss takes: usually a mapping of role to batch."""

AUTOSAVE = 60.0
"""Seconds between states when `save_every` is 0."""


def fit(
    model: nn.Module,
    batches: Callable[[int], Sequence[M]],
    loss: Callable[[nn.Module, M], Mapping[str, Term]],
    config: FitConfig,
    ctx: Context,
    *,
    groups: Mapping[str, Sequence[nn.Parameter | Slice]] | None = None,
    counts: Callable[[M], Mapping[str, float]] | None = None,
    state_dir: Path | None = None,
    rates: Mapping[str, float] | None = None,
    writes: Callable[[M], Iterable[str]] | None = None,
) -> Iterator[StepRecord]:
    """Train `model` in place, yielding after every step.

    Args:
        model: The model, in the mode (train or eval) it shall be trained in.
        batches: This process's micro-batches of a step, as `Stream` and `zip_streams` give them;
            called once per step, so it must be a function of the step alone.
        loss: Named terms of one micro-batch.
        config: Steps, rates, optimizer.
        ctx: Device, processes, seed, sink of progress.
        groups: What is trained, parameters or slices of them; each group has optimizer state of
            its own and is not stepped where it received no gradient. All else keeps its bits.
            None for every parameter that requires a gradient.
        counts: The counts of a micro-batch's terms, where they can be told without the model.
            Needed with several micro-batches or processes; without it an extra forward pass
            without gradients finds them.
        state_dir: Folder of the run's state; the same call goes on from there, first yielding
            the records of the steps already done (`replayed`). It stays when the run is
            finished; the caller removes it.
        rates: Learning rate by group, in place of `config.lr`.
        writes: Groups that a micro-batch may write. A group that none of a step's micro-batches
            writes, in any process, is not stepped: weights and optimizer state keep their bits.

    Yields:
        One record per step. The caller may stop at any of them; the state is saved then.

    Raises:
        Diverged: If a term or the gradient is not finite; the weights are those before the
            step, in the model and in the state.
        UserError: If groups share or lack parameters, or the state is of another run.
    """
    check_processes(ctx)
    parts = make_groups(model, groups, config, rates or {})
    run = _Run(model, parts, config, ctx, state_dir)
    with only(model, parts):
        yield from run.resume()
        try:
            while run.cursor < config.steps:
                began = time.perf_counter()
                micros = [move(m, ctx.device) for m in batches(run.cursor)]
                values = backward(model, micros, loss, counts, run.cursor, parts, ctx, writes)
                record = run.apply(values, began)
                del values  # gradients as large as the weights, which the next pass makes anew
                yield record
        except BaseException:
            run.save()
            raise
        run.save(finished=True)


class _Run:
    """Where a run is: its cursor, its log, and whether the weights are between two steps."""

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Group],
        config: FitConfig,
        ctx: Context,
        folder: Path | None,
    ) -> None:
        self.parts, self.config, self.ctx, self.folder = parts, config, ctx, folder
        self.buffers = buffers_of(model)
        quiet = config.model_copy(update={"save_every": 0, "log_every": 1})
        self.who = identity(quiet.digest(), parts)
        self.log = Log(folder if ctx.rank == 0 else None)
        self.cursor = 0
        self.saved = 0
        self.saved_at = time.monotonic()
        self.whole = True

    def resume(self) -> list[StepRecord]:
        """Load the newest state and return the records of its steps."""
        if self.folder is None:
            return []
        gather("here", self.ctx)  # process 0 may still be writing the state of an earlier call
        self.cursor = self.saved = load_state(self.folder, self.parts, self.buffers, self.who)
        if len(set(gather(self.cursor, self.ctx))) > 1:
            raise UserError(
                f"processes read different states from {self.folder}; it must lie on a disk "
                "that all of them share"
            )
        rows = Log(self.folder).replay(self.cursor) if self.ctx.rank == 0 else None
        rows = gather(rows, self.ctx)[0]
        if rows is None:
            raise UserError(
                f"{self.folder}/steps.jsonl lacks steps that the saved weights have taken; "
                "remove the folder to start over"
            )
        return [replace(StepRecord(**row), replayed=True) for row in rows]

    def apply(self, values: Values, began: float) -> StepRecord:
        """Check, clip and step; log the record and save when it is time."""
        config, step = self.config, self.cursor
        for name, value in values.terms.items():
            if not math.isfinite(value):
                raise Diverged(
                    f"term '{name}' of the loss is {value} at step {step}; lower the learning "
                    "rate or the term's weight (the weights before this step are kept)"
                )
        norm = self._clip(values)
        self.whole = False
        for group, grads in zip(self.parts, values.grads, strict=True):
            group.optimizer.step(grads, config.rate_at(step, group.lr))
            group.publish()
            for param in group.params:
                param.grad = None
        self.cursor = step + 1
        record = StepRecord(
            step=step,
            loss=values.loss,
            terms=values.terms,
            lr=config.rate_at(step),
            grad_norm=norm,
            tokens=values.tokens,
            seconds=time.perf_counter() - began,
        )
        self._log(record)
        self.whole = True
        every = config.save_every
        late = not every and time.monotonic() - self.saved_at > AUTOSAVE
        if (every and self.cursor % every == 0) or late:
            self.save()
        return record

    def _clip(self, values: Values) -> float:
        """Return the norm of all gradients, after scaling them down to `clip`."""
        grads = [g for grads in values.grads for g in grads if g is not None]
        if not grads:
            return 0.0
        dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=dtype) for g in grads])
        total = torch.linalg.vector_norm(norms)
        norm = float(total)
        if not math.isfinite(norm):
            bad = [
                g.name
                for g, grads in zip(self.parts, values.grads, strict=True)
                if any(grad is not None and not bool(grad.isfinite().all()) for grad in grads)
            ]
            where = f"group '{bad[0]}'" if bad else "all groups together"
            raise Diverged(
                f"the gradient of {where} has norm {norm} at step {self.cursor} (terms: "
                f"{', '.join(values.terms)}); lower the learning rate or set `clip` "
                "(the weights before this step are kept)"
            )
        if self.config.clip and norm > self.config.clip:
            for g in grads:
                g.mul_(self.config.clip / (norm + 1e-6))
        return norm

    def _log(self, record: StepRecord) -> None:
        """Write the record and tell whoever listens."""
        row = asdict(record)
        del row["replayed"]
        if self.folder is not None and self.ctx.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log.append(row)
        done = self.cursor == self.config.steps
        if self.ctx.rank == 0 and (done or self.cursor % self.config.log_every == 0):
            stage = self.ctx.work.name.removesuffix(".partial")
            facts = {"stage": stage, "step": self.cursor, "steps": self.config.steps}
            self.ctx.emit("step", facts | {"loss": record.loss, "terms": record.terms})

    def save(self, *, finished: bool = False) -> None:
        """Write the state unless it is on disk or the weights are in the middle of a step."""
        if self.folder is None or self.ctx.rank or not self.whole:
            return
        if self.cursor > self.saved or not any(self.folder.glob("step-*")):
            self.log.sync()
            save_state(
                self.folder, self.cursor, self.parts, self.buffers, self.who, moments=not finished
            )
            self.saved = self.cursor
        self.saved_at = time.monotonic()
        if finished:
            (self.folder / "finished").write_text(f"{self.cursor}\n")
