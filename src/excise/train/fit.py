"""The one training loop.

`fit` is a generator: it yields a record after every step, and the caller stops it by leaving the
loop. Each named term of the loss is divided by its count over all micro-batches and processes, so
that the weights do not depend (beyond rounding) on how a batch was cut. Gradients accumulate in
the parameters, or in float32 master weights of half-precision ones. Everything a step needs is a
function of its number, so that an interrupted run resumes to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch import distributed as dist

from excise.core.config import Config
from excise.core.context import Context
from excise.core.errors import Diverged, UserError
from excise.core.random_state import seeded
from excise.train.distributed import barrier, check_processes, gather, sum_dicts, sum_gradients
from excise.train.fsdp import sharded
from excise.train.optim import OptimizerGroup, OptimizerName, Slice, make_optimizer, schedule_share
from excise.train.recompute import recomputed
from excise.train.state import Log, buffers_of, drop_others, load_state, restore, save_state
from excise.train.utilisation import utilisation_on

M = TypeVar("M")
"""What the loss takes: usually a mapping of role to batch."""

SILENCE = 5.0
"""Seconds after which a step is told whatever `log_every` says."""

AUTOSAVE = 60.0
"""Seconds between states when `save_every` is 0."""


@dataclass(frozen=True)
class Term:
    """One named part of a loss.

    Attributes:
        sum: Differentiable scalar sum over what is scored in this micro-batch.
        count: How much that was; the sums of a step are divided by the sum of the counts.
        weight: Factor of the mean in the total; negative to ascend.
    """

    sum: Tensor
    count: float
    weight: float = 1.0


Beta = Annotated[float, Field(ge=0, lt=1)]
"""A decay rate."""


class FitConfig(Config):
    """How to train."""

    steps: int = Field(default=100, ge=0)
    """Optimizer steps."""
    lr: float = Field(default=1e-4, ge=0)
    """Learning rate."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per step over all processes."""
    micro_size: int = Field(default=0, ge=0)
    """Rows per micro-batch of one process at most; 0 for one micro-batch."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after warm-up."""
    min_lr: float = Field(default=0.0, ge=0, le=1)
    """Share of the learning rate at the end of the schedule."""
    optimizer: OptimizerName = "adamw"
    """`adamw_8bit` keeps its moments in bytes (the package bitsandbytes);
    `hf_adamw` is the AdamW of transformers up to 4.50, which published RMU used;
    `schedule_free` is AdamW of the package schedulefree, which ends at an average of its steps."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Adam's epsilon; empty for 1e-8, or 1e-6 with `hf_adamw`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of every trained parameter."""
    clip: float = Field(default=0.0, ge=0)
    """Largest norm of the gradient over all stepped parameters; 0 for no clipping."""
    master: Literal["float32", "model"] = "float32"
    """Precision in which half-precision weights are kept while they train."""
    in_backward: bool = False
    """Whether each parameter is stepped as soon as its gradient is whole, so that one gradient
    exists at a time, where a step reads one set of rows (of two, the gradients of one wait for
    those of the other); without clipping and with one micro-batch."""
    activation_checkpointing: bool = False
    """Whether blocks keep their inputs alone and run again in the backward pass: the same bits,
    less memory, one more forward pass."""
    save_every: int = Field(default=0, ge=0)
    """Steps between states on disk; 0 for about one a minute."""
    log_every: int = Field(default=10, ge=1)
    """Steps between progress events; slow steps are told one by one."""

    @model_validator(mode="after")
    def _check_in_backward(self) -> FitConfig:
        """Refuse what needs the whole gradient before a step, and averages of steps."""
        if not self.in_backward:
            return self
        if self.clip:
            raise ValueError("in_backward has no norm to clip by before it steps; set clip to 0")
        if 0 < self.micro_size < self.batch_size:
            raise ValueError("in_backward takes one micro-batch; set micro_size to 0")
        if self.optimizer == "schedule_free":
            raise ValueError("in_backward cannot count the steps of schedule_free; take adamw")
        return self

    @property
    def epsilon(self) -> float:
        """Adam's epsilon with its default filled in."""
        if self.eps is not None:
            return self.eps
        return 1e-6 if self.optimizer == "hf_adamw" else 1e-8

    def rate_at(self, step: int, lr: float | None = None) -> float:
        """Return the learning rate of a step.

        Args:
            step: Number of the step, from 0.
            lr: Rate before the schedule in place of the field, for a group of its own.
        """
        share = schedule_share(
            step, self.steps, warmup=self.warmup, schedule=self.schedule, min_lr=self.min_lr
        )
        return (self.lr if lr is None else lr) * share


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all processes.

    Attributes:
        step: Number of the step, from 0.
        loss: Weighted sum of the terms.
        terms: Mean of every term, without its weight; a term that counted nothing is left out.
        lr: Learning rate.
        grad_norm: Norm of the gradient over all stepped parameters, before clipping.
        tokens: Real tokens read in this step.
        seconds: Wall-clock time of the step.
        replayed: True for steps done before an interruption: the weights are already beyond.
    """

    step: int
    loss: float
    terms: dict[str, float]
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    replayed: bool = False


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
    change: Callable[[Tensor, int], Tensor] | None = None,
    gradient: Callable[[Passes[M]], Losses] | None = None,
    together: int = 1,
) -> Generator[StepRecord]:
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
        counts: The counts of a micro-batch's terms, where they are known without the model.
            Needed with several micro-batches or processes; without it an extra forward pass
            without gradients finds them.
        state_dir: Folder of the run's state; the same call resumes from it, first yielding the
            records of the steps already done (`replayed`). A state whose bytes have changed is
            not used, and a `note` says so. The folder stays when the run is finished; the caller
            removes it.
        rates: Learning rate by group, in place of `config.lr`.
        writes: Groups that a micro-batch may write. A group that none of a step's micro-batches
            writes, in any process, is not stepped: weights and optimizer state keep their bits.
        change: Returns what a step is taken with in place of a gradient. It is given each tensor's
            gradient, whole and summed over processes, before clipping, and a seed of its own.
        gradient: Leaves the gradient of a step in the weights, where that takes more than one
            pass forward and back; see `Passes`. It must be a function of the step and the weights.
        together: Steps that hang together, such as those against one adversary: a state is kept
            only where a group of so many begins.

    Yields:
        One record per step. The caller may stop at any of them; the state is saved then.

    Raises:
        Diverged: If a term or the gradient is not finite; the weights are those before the
            step, in the model and in the state.
        UserError: If groups share or lack parameters, or the state is of another run.
    """
    check_processes(ctx)
    if ctx.fsdp and (gradient is not None or change is not None):
        raise UserError(
            "a gradient that takes several passes, or is changed whole, cannot be cut over "
            "processes; leave --fsdp out"
        )
    if ctx.fsdp and config.optimizer == "adamw_8bit":
        raise UserError(
            "the moments of 'adamw_8bit' are scaled by blocks, which do not end where a model is "
            "cut over processes; set fit.optimizer to adamw, or leave --fsdp out"
        )
    if config.in_backward and (gradient or change or writes or ctx.world > 1):
        raise UserError(
            "fit.in_backward steps before a step's gradient is whole, and this method changes it, "
            "computes it in several passes, routes it or sums it over processes; leave it out"
        )
    with ExitStack() as stack:
        if config.activation_checkpointing:
            stack.enter_context(recomputed(model))
        cut = stack.enter_context(sharded(model, ctx))
        trained = _make_groups(model, groups, config, rates or {}, cut)
        run = _Run(model, trained, config, ctx, state_dir, together)
        stack.enter_context(_training_only(model, trained))
        yield from run.resume()
        try:
            while run.cursor < config.steps:
                began = time.perf_counter()
                micros = batches(run.cursor)
                passes = Passes(model, run.cursor, micros, loss, counts, trained, ctx, writes)
                if config.in_backward:
                    with run.meter.watch():
                        record = run.step_in_backward(passes, began)
                    yield record
                    continue
                with run.meter.watch():
                    losses = gradient(passes) if gradient else passes.backward(micros)
                if change is not None:
                    _change_gradients(trained, change, run.cursor, ctx)
                yield run.step(losses, began)
        except BaseException as error:
            # Of a cut model all processes must be there to save.
            run.end(saves=not ctx.fsdp or isinstance(error, (GeneratorExit, Diverged)))
            raise
        run.end()


def _settle(groups: Sequence[OptimizerGroup]) -> None:
    """Leave the weights where the optimizers mean them to be used."""
    for group in groups:
        group.settle()


def _make_groups(
    model: nn.Module,
    groups: Mapping[str, Sequence[nn.Parameter | Slice]] | None,
    config: FitConfig,
    rates: Mapping[str, float],
    cut: Mapping[int, nn.Parameter],
) -> list[OptimizerGroup]:
    """Give every group its master weights and optimizer; refuse empty and overlapping ones.

    `cut` says what stands in the place of a parameter that is cut over processes.
    """
    if groups is None:
        groups = {"all": [p for p in model.parameters() if p.requires_grad]}
    if unknown := set(rates) - set(groups):
        raise UserError(f"rates name the group '{min(unknown)}', known: {', '.join(groups)}")
    taken: dict[int, list[tuple[str, Slice]]] = {}
    trained = []
    for name, members in groups.items():
        parts = [p if isinstance(p, Slice) else Slice(p, None, 0, 0) for p in members]
        parts = [replace(part, param=cut.get(id(part.param), part.param)) for part in parts]
        parts = list({part.key: part for part in parts}.values())  # tied weights are listed twice
        if not parts:
            raise UserError(f"group '{name}' has no parameter to train; check its names")
        for part in parts:
            if not part.inside:
                raise UserError(
                    f"group '{name}' has the slice {part.start}:{part.stop} of dimension "
                    f"{part.dim}, which does not lie within a parameter of shape "
                    f"{tuple(part.param.shape)}"
                )
            for other, before in taken.get(id(part.param), []):
                if part.overlaps(before):
                    raise UserError(f"groups '{other}' and '{name}' share a parameter")
            taken.setdefault(id(part.param), []).append((name, part))
        weights = [_master_weight(part, config.master) for part in parts]
        lr = rates.get(name, config.lr)
        optimizer = make_optimizer(
            config.optimizer, weights, lr=lr, betas=config.betas, eps=config.epsilon,
            weight_decay=config.weight_decay,
        )  # fmt: skip
        trained.append(OptimizerGroup(name, parts, weights, optimizer, lr))
    return trained


def _master_weight(part: Slice, master: str) -> Tensor:
    """Return what the optimizer steps in place of a parameter or a slice of it."""
    if part.param.dtype in (torch.float16, torch.bfloat16) and master == "float32":
        return part.of(part.param.detach()).float()
    return part.of(part.param.detach()) if part.viewed else part.param


@contextmanager
def _training_only(model: nn.Module, groups: Sequence[OptimizerGroup]) -> Iterator[None]:
    """Let gradients reach the groups' parameters alone, and leave none behind."""
    trained = {id(p): p for g in groups for p in g.params}
    every = {id(p): p for p in model.parameters()} | trained
    before = {i: p.requires_grad for i, p in every.items()}
    try:
        for i, p in every.items():
            p.requires_grad_(i in trained)
        for p in trained.values():
            p.grad = None
        yield
    finally:
        for i, p in every.items():
            p.requires_grad_(before[i])
        for p in trained.values():
            p.grad = None


class _Run:
    """Where a run is: its cursor, its log, and whether the weights are between two steps."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[OptimizerGroup],
        config: FitConfig,
        ctx: Context,
        folder: Path | None,
        together: int,
    ) -> None:
        self.groups, self.config, self.ctx, self.folder = groups, config, ctx, folder
        self.together = together
        self.buffers = buffers_of(model)
        quiet = config.model_copy(update={"save_every": 0, "log_every": 1})
        self.run_id = {
            "settings": quiet.digest(),
            "seed": ctx.seed,
            "groups": {g.name: [part.shape for part in g.slices] for g in groups},
            "rates": {g.name: g.lr for g in groups},
        }
        self.cursor = self.saved = 0
        self.meter = utilisation_on(ctx.device, ctx.dtype)
        self.log = Log(None)
        self.saved_at = self.told_at = time.monotonic()
        self.between_steps = True

    def resume(self) -> list[StepRecord]:
        """Load the newest intact state and return the records of its steps."""
        if self.folder is None:
            return []
        barrier(self.ctx)  # process 0 may still be writing the state of an earlier call
        state = load_state(self.folder, self.run_id, self._note)
        cursor = state.cursor if state else 0
        if len(set(gather(cursor, self.ctx))) > 1:
            raise UserError(
                f"processes read different states from {self.folder}; it must lie on a disk "
                "that all of them share"
            )
        records = state.records if state else ()
        self.log = Log(self.folder if self.ctx.rank == 0 else None, records)
        if state is not None:
            if self.ctx.rank == 0:  # a kill may have come before the last state was dropped
                drop_others(self.folder, cursor)
            restore(self.groups, self.buffers, state)
            self.cursor = self.saved = cursor
            if state.world != self.ctx.world and cursor < self.config.steps:
                self._note(
                    f"training that {state.world} processes began resumes after step {cursor} "
                    f"with {self.ctx.world}, each taking its share of the same rows"
                )
        return [StepRecord(**record, replayed=True) for record in records]

    def _note(self, text: str) -> None:
        """Tell whoever listens, once over all processes."""
        if self.ctx.rank == 0:
            self.ctx.emit("note", {"text": text})

    def step(self, losses: Losses, began: float) -> StepRecord:
        """Check, clip and step; log the record and save when it is time."""
        self._check(losses.terms)
        norm = self._clip(losses)
        self.between_steps = False
        for group in self.groups:
            group.step(self.config.rate_at(self.cursor, group.lr))
        return self._stepped(losses, norm, began)

    def step_in_backward(self, passes: Passes[Any], began: float) -> StepRecord:
        """Step every parameter while the backward pass goes on; then as `step`.

        The terms are checked before that pass. A gradient that is not finite is found after it,
        when the weights are spoiled: the state on disk, of an earlier step, is what is left.
        """
        if len(passes.micros) > 1:
            raise UserError("fit.in_backward takes one micro-batch; set fit.micro_size to 0")

        def loss(model: nn.Module, micro: Any) -> Mapping[str, Term]:
            terms = passes.loss(model, micro)
            counted = {
                n: float(t.sum.detach()) / float(t.count) for n, t in terms.items() if t.count
            }
            self._check(counted)
            self.between_steps = False
            return terms

        norms: dict[tuple[int, int], Tensor] = {}
        for group in self.groups:
            group.optimizer.param_groups[0]["lr"] = self.config.rate_at(self.cursor, group.lr)
        with _stepping(self.groups, norms):
            losses = passes.backward(passes.micros, loss)
        norm = 0.0
        if norms:
            ordered = torch.stack([norms[at] for at in sorted(norms)])
            norm = float(torch.linalg.vector_norm(ordered))
        if not math.isfinite(norm):
            raise Diverged(
                f"the gradient has norm {norm} at step {self.cursor}, and fit.in_backward has "
                "stepped with it; lower the learning rate, and run again from the last state"
            )
        return self._stepped(losses, norm, began)

    def _check(self, terms: Mapping[str, float]) -> None:
        """Refuse a term that is not finite."""
        for name, value in terms.items():
            if not math.isfinite(value):
                raise Diverged(
                    f"term '{name}' of the loss is {value} at step {self.cursor}; lower the "
                    f"learning rate or the term's weight ({self._kept})"
                )

    def _stepped(self, losses: Losses, norm: float, began: float) -> StepRecord:
        """Count a step; log its record and save when it is time."""
        config, step = self.config, self.cursor
        self.cursor = step + 1
        seconds = time.perf_counter() - began
        busy = self.meter.of(losses.tokens / self.ctx.world, seconds)
        record = StepRecord(
            step=step,
            loss=losses.total,
            terms=losses.terms,
            lr=config.rate_at(step),
            grad_norm=norm,
            tokens=losses.tokens,
            seconds=seconds,
        )
        self._log(record, busy)
        self.between_steps = True
        every = config.save_every
        late = not every and time.monotonic() - self.saved_at > AUTOSAVE
        if self.ctx.fsdp:
            late = gather(late, self.ctx)[0]
        # The last step is saved by `end`, so that what is kept does not depend on `save_every`.
        if self.cursor < config.steps and ((every and self.cursor % every == 0) or late):
            self.save()
        return record

    def end(self, *, saves: bool = True) -> None:
        """Save and settle; after the last step what is saved is settled and has no moments."""
        if saves and self.cursor < self.config.steps:
            self.save()
        _settle(self.groups)
        if saves and self.cursor >= self.config.steps:
            self.save(finished=True)

    @property
    def _kept(self) -> str:
        """What is left of a run that diverges, for the sentence that says so."""
        where = f" in {self.folder}" if self.folder else ""
        return f"the weights before this step are kept{where}"

    def _clip(self, losses: Losses) -> float:
        """Return the norm of all gradients, after scaling them down to `clip`."""
        parts = [(g.name, part.cut, w.grad) for g in self.groups for part, w in g.parts()]
        grads = [(name, grad) for name, _, grad in parts if grad is not None]
        if not grads:
            return 0.0
        double = any(grad.dtype == torch.float64 for _, grad in grads)
        dtype = torch.float64 if double else torch.float32
        norms = torch.stack([torch.linalg.vector_norm(grad, dtype=dtype) for _, grad in grads])
        if self.ctx.fsdp:
            cut = torch.tensor([c for _, c, grad in parts if grad is not None], device=norms.device)
            squares = torch.where(cut, norms.square(), 0.0).sum()
            dist.all_reduce(squares)
            norms = torch.stack([*norms[~cut], squares.sqrt()])
        norm = float(torch.linalg.vector_norm(norms))
        if not math.isfinite(norm):
            bad = [name for name, grad in grads if not bool(grad.isfinite().all())]
            where = f"group '{bad[0]}'" if bad else "all groups together"
            raise Diverged(
                f"the gradient of {where} has norm {norm} at step {self.cursor} (terms: "
                f"{', '.join(losses.terms)}); lower the learning rate or set `clip` "
                f"({self._kept})"
            )
        if self.config.clip and norm > self.config.clip:
            for _, grad in grads:
                grad.mul_(self.config.clip / (norm + 1e-6))
        return norm

    def _log(self, record: StepRecord, busy: float | None) -> None:
        """Write the record and tell whoever listens, with the device's utilisation."""
        row = asdict(record)
        del row["replayed"]
        self.log.append(row)
        done = self.cursor == self.config.steps
        late = time.monotonic() - self.told_at > SILENCE
        if self.ctx.rank == 0 and (done or late or self.cursor % self.config.log_every == 0):
            self.told_at = time.monotonic()
            stage = self.ctx.work.name.removesuffix(".partial")
            facts: dict[str, Any] = {
                "stage": stage, "step": self.cursor, "steps": self.config.steps,
                "loss": record.loss, "terms": record.terms,
            }  # fmt: skip
            if record.tokens:
                facts["tokens_per_second"] = record.tokens / record.seconds
            if busy is not None:
                facts["model_flops_utilisation"] = busy
            self.ctx.emit("step", facts)

    def save(self, *, finished: bool = False) -> None:
        """Write the state unless it is on disk or in the middle of a step or of several."""
        if self.folder is None or not self.between_steps:
            return
        if self.ctx.rank and not self.ctx.fsdp:
            return
        if self.cursor % self.together and not finished:
            return
        missing = not any(self.folder.glob("step-*"))
        if self.ctx.fsdp:
            missing = gather(missing, self.ctx)[0]
        if self.cursor > self.saved or missing:
            save_state(
                self.folder, self.cursor, self.groups, self.buffers, self.run_id, self.log.sync(),
                moments=not finished, write=self.ctx.rank == 0, world=self.ctx.world,
            )  # fmt: skip
            self.saved = self.cursor
        self.saved_at = time.monotonic()


@dataclass(frozen=True)
class Losses:
    """What the forward passes of one step gave, over all processes.

    Attributes:
        total: Weighted sum of the terms.
        terms: Mean of every term, without its weight.
        tokens: Real tokens read.
    """

    total: float
    terms: dict[str, float]
    tokens: int

    def __add__(self, other: Losses) -> Losses:
        """Return both together; a term of both is that of `other`."""
        terms = {**self.terms, **other.terms}
        return Losses(self.total + other.total, terms, self.tokens + other.tokens)


@dataclass(frozen=True)
class Passes(Generic[M]):
    """The passes forward and back of one step, for a method whose gradient takes several.

    Attributes:
        model: The model.
        step: Number of the step.
        micros: This process's micro-batches of the step.
        loss: The loss of `fit`.
        counts: Its counts.
        groups: What is trained.
        ctx: Processes, seed, device.
        writes: As in `fit`.
    """

    model: nn.Module
    step: int
    micros: Sequence[M]
    loss: Callable[[nn.Module, M], Mapping[str, Term]]
    counts: Callable[[M], Mapping[str, float]] | None
    groups: Sequence[OptimizerGroup]
    ctx: Context
    writes: Callable[[M], Iterable[str]] | None = None

    @property
    def weights(self) -> list[Tensor]:
        """What the optimizer steps, in an order that stays: the place of gradients."""
        return [weight for group in self.groups for weight in group.master_weights]

    def backward(
        self,
        micros: Sequence[Any],
        loss: Callable[[nn.Module, Any], Mapping[str, Term]] | None = None,
        counts: Callable[[Any], Mapping[str, float]] | None = None,
    ) -> Losses:
        """Leave the gradient of a loss at the present weights in `weights`, which had none.

        Args:
            micros: Micro-batches of this process.
            loss: Named terms of one; None for the loss of `fit`, with its counts.
            counts: Counts of the terms, where they are known without the model.
        """
        if loss is None:
            loss, counts = self.loss, self.counts
        on_device = [_to_device(micro, self.ctx.device) for micro in micros]
        return _backward(
            self.model, on_device, loss, counts, self.step, self.groups, self.ctx, self.writes
        )

    def take(self) -> list[Tensor | None]:
        """Return the gradients of `weights`, which have none afterwards."""
        taken = [weight.grad for weight in self.weights]
        for group in self.groups:
            for part, weight in zip(group.slices, group.master_weights, strict=True):
                part.param.grad = weight.grad = None
        return taken

    def publish(self) -> None:
        """Round `weights` that were changed into the model."""
        for group in self.groups:
            group.copy_to_model()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Put the weights back at the end of the block, to the bit."""
        kept = [weight.detach().clone() for weight in self.weights]
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(self.weights, kept, strict=True):
                    weight.copy_(value)
            self.publish()


def _backward(
    model: nn.Module,
    micros: Sequence[Any],
    loss: Callable[[nn.Module, Any], Mapping[str, Term]],
    counts: Callable[[Any], Mapping[str, float]] | None,
    step: int,
    groups: Sequence[OptimizerGroup],
    ctx: Context,
    writes: Callable[[Any], Iterable[str]] | None,
) -> Losses:
    """Leave the gradient of one step in the master weights, each term over its count.

    Groups that no micro-batch of any process `writes` get no gradient.
    """
    seed = ctx.seed_for(f"fit/{step}/{ctx.rank}")
    counted: list[Mapping[str, float]] | None = None
    if len(micros) > 1 or ctx.world > 1:
        counted = [dict(counts(micro)) for micro in micros] if counts else []
        if counts is None:
            with seeded(seed, ctx.device), torch.no_grad():
                counted = [{k: t.count for k, t in loss(model, m).items()} for m in micros]
    totals = None if counted is None else sum_dicts(gather(sum_dicts(counted), ctx))
    values: list[tuple[str, float, Tensor]] = []
    copies = _copies(groups)
    with seeded(seed, ctx.device), _widening(copies):
        for i, micro in enumerate(micros):
            terms = loss(model, micro)
            if counted is not None:
                _check_counts(terms, counted[i], step)
            values += _accumulate(terms, totals)
            for param in copies:
                _widen(param, copies)  # what a loss wrote into `grad` past autograd's hooks
    written: set[str] | None = None
    if writes is not None:
        here = sorted({name for micro in micros for name in writes(micro)})
        written = {name for names in gather(here, ctx) for name in names}
    weighted, means = _read(values)
    tokens = sum(_tokens(micro) for micro in micros)
    all_weighted, all_means, all_tokens = zip(*gather([weighted, means, tokens], ctx), strict=True)
    _settle_gradients(groups, written)
    sum_gradients([w for g in groups for part, w in g.parts() if not part.cut], ctx)
    total = sum(sum_dicts(all_weighted).values())
    return Losses(total, sum_dicts(all_means), sum(all_tokens))


def _change_gradients(
    groups: Sequence[OptimizerGroup],
    change: Callable[[Tensor, int], Tensor],
    step: int,
    ctx: Context,
) -> None:
    """Put what `change` makes of every gradient in its place; the same in every process."""
    for group in groups:
        for i, weight in enumerate(group.master_weights):
            if weight.grad is not None:
                seed = ctx.seed_for(f"change/{step}/{group.name}/{i}")
                weight.grad = change(weight.grad, seed)


def _to_device(micro: Any, device: torch.device) -> Any:
    """Put a mapping's batches on `device`; anything else is the loss's own business."""
    if isinstance(micro, Mapping):
        return {k: b.to(device) if hasattr(b, "to") else b for k, b in micro.items()}
    return micro.to(device) if hasattr(micro, "to") else micro


def _tokens(micro: Any) -> int:
    """Count real tokens of a micro-batch."""
    batches = micro.values() if isinstance(micro, Mapping) else [micro]
    return sum(int(getattr(b, "num_tokens", 0)) for b in batches)


def _check_counts(terms: Mapping[str, Term], counted: Mapping[str, float], step: int) -> None:
    """Refuse counts that the loss contradicts: the gradient would be scaled wrongly."""
    real = {name: float(term.count) for name, term in terms.items()}
    for name in sorted(set(real) | set(counted)):
        if not math.isclose(real.get(name, 0.0), counted.get(name, 0.0), rel_tol=1e-9):
            raise UserError(
                f"at step {step} term '{name}' counted {real.get(name, 0.0):g} but `counts` had "
                f"said {counted.get(name, 0.0):g}; they must agree"
            )


def _accumulate(
    terms: Mapping[str, Term], totals: Mapping[str, float] | None
) -> list[tuple[str, float, Tensor]]:
    """Add one micro-batch's terms to the gradients.

    Returns:
        Name, weight and mean of every term, where they were computed: the device goes on.
    """
    values = []
    total: Tensor | None = None
    for name, term in terms.items():
        count = float(term.count) if totals is None else totals[name]
        if count == 0:
            continue  # nothing was scored anywhere: the term has no mean
        mean = term.sum / count
        part = mean if term.weight == 1 else term.weight * mean
        total = part if total is None else total + part
        values.append((name, term.weight, mean.detach()))
    if total is not None and total.requires_grad:
        total.backward()
    return values


def _read(
    values: Sequence[tuple[str, float, Tensor]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the weighted and the plain sums of terms by name; the host waits for them once."""
    weighted: dict[str, float] = {}
    means: dict[str, float] = {}
    if not values:
        return weighted, means
    # What a method only notes it may have counted on the host.
    device = next((mean.device for _, _, mean in values if not mean.is_cpu), None)
    double = any(mean.dtype == torch.float64 for _, _, mean in values)  # Apple's have none
    wide = torch.float64 if double else torch.float32
    read = torch.stack([mean.to(device, wide) for _, _, mean in values]).tolist()
    for (name, weight, _), value in zip(values, read, strict=True):
        means[name] = means.get(name, 0.0) + value
        weighted[name] = weighted.get(name, 0.0) + weight * value
    return weighted, means


Copies = Mapping[nn.Parameter, Sequence[tuple[Slice, Tensor]]]
"""The float32 master weights of slices of half-precision parameters."""


def _copies(groups: Sequence[OptimizerGroup]) -> Copies:
    """Return the master weights that have memory of their own, by parameter."""
    copies: dict[nn.Parameter, list[tuple[Slice, Tensor]]] = {}
    for group in groups:
        for part, weight in group.copies():
            copies.setdefault(part.param, []).append((part, weight))
    return copies


def _widen(param: nn.Parameter, copies: Copies) -> None:
    """Add a half-precision gradient to those of its master weights, and free it."""
    if param.grad is None:
        return
    for part, weight in copies[param]:
        grad = part.of(param.grad)
        if weight.grad is None:
            weight.grad = grad.to(weight.dtype)
        else:
            weight.grad.add_(grad)
    param.grad = None


@contextmanager
def _widening(copies: Copies) -> Iterator[None]:
    """Move every half-precision gradient as soon as it is whole, so that few exist at a time."""
    hook = partial(_widen, copies=copies)
    with ExitStack() as stack:
        for param in copies:
            stack.callback(param.register_post_accumulate_grad_hook(hook).remove)
        yield


@contextmanager
def _stepping(
    groups: Sequence[OptimizerGroup], norms: dict[tuple[int, int], Tensor]
) -> Iterator[None]:
    """Step every parameter once its gradient is whole, and note the norms of the gradients.

    By then no part of the graph needs its old value: its node runs after all that read it.
    """
    copies = _copies(groups)
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.slices))]

    def step(place: tuple[int, int]) -> None:
        g, i = place
        weight = groups[g].master_weights[i]
        if weight.grad is not None:
            double = weight.grad.dtype == torch.float64
            wide = torch.float64 if double else torch.float32
            norms[place] = torch.linalg.vector_norm(weight.grad, dtype=wide)
            groups[g].step_one(i)

    def hook(param: nn.Parameter, place: tuple[int, int]) -> None:
        if param in copies:
            _widen(param, copies)
        step(place)

    with ExitStack() as stack:
        for g, i in places:
            part = groups[g].slices[i]
            if part.dim is not None:
                raise UserError("fit.in_backward steps whole parameters, not slices; leave it out")
            at_once = part.param.register_post_accumulate_grad_hook(partial(hook, place=(g, i)))
            stack.callback(at_once.remove)
        yield
    for place in places:
        step(place)  # what a loss wrote into `grad` past autograd's hooks


def _settle_gradients(groups: Sequence[OptimizerGroup], written: set[str] | None) -> None:
    """Give slices their part of a parameter's gradient, and groups that nothing wrote none."""
    for group in groups:
        for part, weight in zip(group.slices, group.master_weights, strict=True):
            if written is not None and group.name not in written:
                weight.grad = None
            elif part.viewed and weight.dtype == part.param.dtype:
                weight.grad = None if part.param.grad is None else part.of(part.param.grad)
