"""What gradient methods share: their streams, what they train, and what they hand back.

Nothing here runs a method; a method calls these in its own order.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import Diverged, UserError
from excise.data.domain import Domain, Rows, all_rows
from excise.data.stream import Batch, Example, Stream, Tokenizer, encode, zip_streams
from excise.losses import Summed, nll
from excise.methods.base import Cost, Method, PostHoc, Removal
from excise.methods.choosing import check_dev, dev_losses
from excise.methods.stopping import Looks, StopRule
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import trainable
from excise.models.lora import LoRA, adapted, merge, on_modules
from excise.models.names import Names
from excise.train.components import Components, without_top
from excise.train.distributed import barrier
from excise.train.fit import FitConfig, StepRecord, Term, fit
from excise.train.nearby import refuse_half, sharpness_aware


class TrainingMethod(PostHoc):
    """The settings of a method that runs `fit` on a trained model."""

    name: str
    fit: FitConfig
    """Steps, rows per step of each role, learning rate."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row."""
    stop: StopRule | None = None
    """Look at `dev` on the way and keep the best step; missing for the last step."""


class TuningMethod(TrainingMethod):
    """The settings of a method that minimises a loss over weights of a model; see `tune`."""

    modules: Names = ()
    """Modules to train, by name; empty for all."""
    lora: LoRA | None = None
    """Train an adapter instead."""
    drop_components: Components | None = None
    """Take the top principal components out of the gradient of every trained matrix."""
    sam: float = Field(default=0.0, ge=0)
    """Radius of sharpness-aware unlearning (published with 0.01); 0 for none. A step reads forget
    rows twice."""

    @model_validator(mode="after")
    def _whole_gradients(self) -> TuningMethod:
        """Refuse to look for what a gradient does not have."""
        if self.drop_components is not None and self.lora is not None:
            raise ValueError(
                "'drop_components' reads gradients of whole matrices, which an adapter of rank "
                f"{self.lora.rank} does not have; set 'lora' to null"
            )
        return self

    @property
    def change(self) -> Callable[[Tensor, int], Tensor] | None:
        """What `fit` does to gradients before a step."""
        taken = self.drop_components
        return None if taken is None else lambda gradient, seed: without_top(gradient, taken, seed)

    @property
    def step_cost(self) -> float:
        """A plain step with the forget half of it done twice, where there is a radius."""
        return 1.5 if self.sam else 1.0

    @property
    def extra_copies(self) -> int:
        """The weights before the move, and the gradient at its end."""
        return 2 if self.sam else 0


Terms = Mapping[str, tuple[float, Callable[[Tensor, Batch], Summed]]]
"""A loss by the role whose rows are read: each term's weight, and its sum and count given the
logits_BTV of a batch."""

NOTHING = Cost()
"""What a method spends before its first step that prepares nothing."""


RoleLoss = Callable[[nn.Module, Batch], Term]
"""The loss of a model on the rows of one role."""


def forget_rows(domain: Domain) -> Rows:
    """Return all rows to forget.

    Raises:
        UserError: If there is none.
    """
    rows = all_rows(domain.forget)
    if not rows:
        raise UserError(f"domain '{domain.name}' has no forget row for the method; check the split")
    return rows


def stream(
    rows: Rows,
    tokenizer: Tokenizer,
    fit: FitConfig,
    ctx: Context,
    *,
    purpose: str,
    max_length: int,
    batch_size: int = 0,
    shuffle: bool = True,
    pack: tuple[int, ...] = (1,),
    only_spans: bool = True,
) -> Stream:
    """Return a rank-aware stream over `rows`, shuffled by a seed of its own.

    Args:
        rows: What to read.
        tokenizer: The model's tokenizer.
        fit: Gives batch and micro-batch sizes.
        ctx: Gives seed and processes.
        purpose: Names the seed, so that two streams never share an order.
        max_length: Tokens per row.
        batch_size: Rows per step; 0 takes `fit.batch_size`.
        shuffle: Whether to shuffle.
        pack: Rows per text, in turn.
        only_spans: Whether of rows with spans only the tokens of capabilities are scored.
    """
    size = batch_size or fit.batch_size
    if purpose == "retain" and len(rows) <= size and not ctx.rank:
        counts = f"the retain set is one batch ({len(rows)} rows, {size} a step)"
        ctx.emit("note", {"text": f"{counts}, so that every step reads the same rows"})
    examples = encode(rows, tokenizer, max_length=max_length, only_spans=only_spans)
    if not ctx.rank and (cut := sum(example.cut for example in examples)):
        text = f"{purpose}: spans cover {cut} tokens in part; each is labelled whole"
        ctx.emit("note", {"text": text})
    return Stream(
        examples,
        size,
        ctx.seed_for(f"order.{purpose}"),
        pad_id=tokenizer.pad_token_id,
        rank=ctx.rank,
        world=ctx.world,
        micro_size=fit.micro_size,
        shuffle=shuffle,
        pack=pack,
        bos_id=tokenizer.bos_token_id,
    )


@contextmanager
def tuned(
    model: nn.Module, modules: Sequence[str], lora: LoRA | None, ctx: Context
) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Choose what a gradient method trains: modules by name, everything, or an adapter.

    Args:
        model: The model.
        modules: Patterns in PEFT's `target_modules` words; empty for every parameter.
        lora: An adapter instead of the weights themselves.
        ctx: Gives the adapter's seed.

    Yields:
        The model to run (wrapped when there is an adapter) and its trained parameters by name.
    """
    if lora is not None:
        with adapted(model, on_modules(lora, modules), seed=ctx.seed_for("lora")) as peft_model:
            parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
            yield peft_model, parameters
    else:
        with trainable(model, modules or ("*",)) as parameters:
            yield model, parameters


@dataclass
class Progress:
    """Collects the records of a loop of `fit`, which tells of its steps itself.

    Attributes:
        ctx: Gives `emit`.
        stage: What of the stage the loop is, shown beside the bar.
        steps: Expected steps.
        every: A step is kept in the history every so many.
        earlier: Seconds of the steps that a process before this one took, which was stopped.
    """

    ctx: Context
    stage: str
    steps: int
    every: int = 10
    history: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    done: int = 0
    earlier: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Say what is running."""
        stage = self.ctx.work.name.removesuffix(".partial")
        self.ctx.emit("part", {"stage": stage, "part": self.stage})

    def __call__(self, record: StepRecord) -> None:
        """Collect the record of one step."""
        self.tokens += record.tokens
        self.done = record.step + 1
        self.earlier += record.seconds if record.replayed else 0.0
        row = {"step": float(record.step), "loss": record.loss, **record.terms}
        if record.step % self.every == 0 or record.step + 1 == self.steps:
            self.history.append(row)

    def cost(self, parameters: int, *, flops_per_token: float = 0.0) -> Cost:
        """Return what the loop took.

        Args:
            parameters: N; a token costs 6 N FLOPs, 2 N forward and 4 N backward.
            flops_per_token: What it costs instead, where blocks are skipped or frozen; 0 for 6 N.
        """
        per_token = flops_per_token or 6.0 * parameters
        seconds = self.earlier + time.monotonic() - self.started
        return Cost(self.done, self.tokens, per_token * self.tokens, seconds)


def tell_cost(method: Method, steps: int, tokens: int, start: Checkpoint, ctx: Context) -> None:
    """Say before it starts what a method costs whose steps take more than one pass.

    Args:
        method: Gives `step_cost`.
        steps: Its steps.
        tokens: Tokens of one step that reads every role once.
        start: Gives the number of parameters.
        ctx: Is told.
    """
    if method.step_cost == 1 or ctx.rank:
        return
    flops = 6.0 * start.num_parameters * tokens * ctx.world * steps * method.step_cost
    text = (
        f"a step of {getattr(method, 'name', 'the method')} costs {method.step_cost:.3g} times "
        f"what reading forget and retain rows once, forward and back, costs; {steps} steps take "
        f"about {flops:.1e} FLOPs"
    )
    ctx.emit("note", {"text": text})


def tokens_of(micros: Iterable[Mapping[str, Batch]]) -> int:
    """Return the real tokens of micro-batches."""
    return sum(batch.num_tokens for micro in micros for batch in micro.values())


def run_fit(
    steps: Generator[StepRecord], progress: Progress, looks: Looks | None = None
) -> dict[str, Any]:
    """Run a loop of `fit` to its end, or as far as a stop rule lets it.

    Args:
        steps: The loop.
        progress: Is passed every record.
        looks: Looks at `dev` on the way, and puts the best step back in the end.

    Returns:
        What the record says of the choice, under `stop`; empty without looks.

    Raises:
        Diverged: If the loop does, or `dev` shows it first, and no look has seen a step that can be
            kept.
    """
    try:
        for record in steps:
            progress(record)
            if looks is not None and looks.after(record.step + 1):
                break
    except Diverged as error:
        if looks is None or looks.best is None:
            raise
        looks.stopped = str(error)
        progress.ctx.emit("warning", {"text": f"{error}; the best step before it is kept"})
    finally:
        steps.close()  # what `fit` does in the end to weights comes before the best are put back
    return {} if looks is None else {"stop": looks.restore()}


def looking(
    method: TrainingMethod,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    tokenizer: Tokenizer,
    domain: Domain,
    ctx: Context,
) -> Looks | None:
    """Return the looks at `dev` that a method's stop rule asks for. Call it before `fit`.

    Args:
        method: Gives rule, steps, tokens per row.
        model: What is trained.
        parameters: Its trained parameters.
        tokenizer: Its tokenizer.
        domain: Gives `dev`.
        ctx: Folder, processes.

    Returns:
        The looks; None where there is no rule.

    Raises:
        UserError: If `dev` is empty.
    """
    rule = method.stop
    if rule is None:
        return None
    check_dev(domain, "a stop rule")
    losses = partial(dev_losses, model, tokenizer, domain, rule.rows, method.max_length)
    return Looks(rule, losses, parameters, method.fit.steps, ctx)


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how many entries of the trained tensors changed, and how far, as they are stored.

    Rounding in half precision can swallow an update whole; the share says so.

    Args:
        before: Tensors by name before training, in the dtype they are stored in.
        after: The same names after.
    """
    after = {name: after[name].to(before[name].dtype) for name in before}
    count = sum(t.numel() for t in before.values())
    changed = sum(int((before[n] != after[n]).sum()) for n in before)
    square = sum(float((after[n].double() - before[n].double()).square().sum()) for n in before)
    return {
        "trained_tensors": sorted(before),
        "trained_entries": count,
        "share_moved": changed / max(1, count),
        "distance": square**0.5,
    }


def together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return of all tensors what `moved` says of parts of them."""
    count = sum(part["trained_entries"] for part in parts)
    changed = sum(part["share_moved"] * part["trained_entries"] for part in parts)
    return {
        "trained_tensors": [name for part in parts for name in part["trained_tensors"]],
        "trained_entries": count,
        "share_moved": changed / max(1, count),
        "distance": sum(part["distance"] ** 2 for part in parts) ** 0.5,
    }


def finish(
    start: Checkpoint,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    progress: Progress,
    ctx: Context,
    *,
    lora: LoRA | None = None,
    extras: Mapping[str, Any] | None = None,
    flops_per_token: float = 0.0,
) -> Removal:
    """Write the edited checkpoint and say what changed. Call it inside `tuned`.

    Args:
        start: What the method started from.
        model: The model as `tuned` gave it.
        parameters: Its trained parameters.
        progress: What collected the loop's records.
        ctx: Gives the folder.
        lora: The adapter, if there was one.
        extras: Facts for the record.
        flops_per_token: Cost per token where it is not 6 N.

    Returns:
        The removal, its model in `ctx.work/model`.
    """
    facts: dict[str, Any] = dict(extras or {})
    if lora is not None:
        changed, adapter = merge(model)
        facts["lora"] = {**lora.model_dump(), **adapter}
        if lora.output == "adapter":
            folder = ctx.work / "adapter"
            if ctx.rank == 0:
                _save_adapter(model, start, folder)
            facts["files"] = {**facts.get("files", {}), "adapter": folder.name}
    else:
        changed = {name: parameter.detach() for name, parameter in parameters.items()}
    cost = progress.cost(start.num_parameters, flops_per_token=flops_per_token)
    return write_edit(start, changed, ctx, extras=facts, cost=cost, history=progress.history)


def write_edit(
    start: Checkpoint,
    changed: Mapping[str, Tensor],
    ctx: Context,
    *,
    extras: Mapping[str, Any],
    cost: Cost,
    history: Sequence[Mapping[str, float]],
) -> Removal:
    """Write the tensors that differ from the start as the model of `ctx.work`.

    It is written once over all processes, in place of what a killed call left there, and is there
    when any process returns.

    Args:
        start: What the method started from.
        changed: Trained tensors by name, the same in every process, in any dtype, on any device.
        ctx: Gives the folder, and says which process writes.
        extras: Facts for the record, to which those of `moved` are added.
        cost: What the edit took.
        history: Its log.
    """
    different: dict[str, Tensor] = {}
    parts = []
    for name in sorted(changed):
        before = start.weights_of([name])  # of the start, one tensor is in memory at a time
        after = {name: changed[name].to("cpu", before[name].dtype)}
        parts.append(moved(before, after))
        if not torch.equal(after[name], before[name]):
            different |= after
    model = write_model(start, different, ctx)
    return Removal(model, tuple(different), cost, {**extras, **together(parts)}, tuple(history))


def write_model(start: Checkpoint, different: Mapping[str, Tensor], ctx: Context) -> Checkpoint:
    """Write a start with some tensors changed as the model of `ctx.work`; see `write_edit`."""
    to = ctx.work / "model"
    if ctx.rank == 0:
        if to.exists():
            shutil.rmtree(to)
        start.write(different, to)
    barrier(ctx)
    return Checkpoint(to, trust_remote_code=start.trust_remote_code)


def role_streams(
    domain: Domain,
    roles: Iterable[str],
    tokenizer: Tokenizer,
    fit: FitConfig,
    ctx: Context,
    *,
    max_length: int,
) -> dict[str, Stream]:
    """Return a stream of each of several roles: `fit.batch_size` rows a step.

    Args:
        domain: Rows by role.
        roles: Fields of the domain, such as `forget` and `retain`.
        tokenizer: The model's tokenizer.
        fit: Gives batch and micro-batch sizes.
        ctx: Gives seed and processes.
        max_length: Tokens per row.

    Raises:
        UserError: If `forget` is among the roles and has no row.
    """
    rows = {r: forget_rows(domain) if r == "forget" else getattr(domain, r) for r in roles}
    return {
        role: stream(rows[role], tokenizer, fit, ctx, purpose=role, max_length=max_length)
        for role in rows
    }


def role_batches(
    domain: Domain,
    roles: Iterable[str],
    tokenizer: Tokenizer,
    fit: FitConfig,
    ctx: Context,
    *,
    max_length: int,
) -> Callable[[int], list[dict[str, Batch]]]:
    """Return the batches of several roles by step; see `role_streams`."""
    return zip_streams(role_streams(domain, roles, tokenizer, fit, ctx, max_length=max_length))


def places_read(stream: Stream, steps: int) -> list[int]:
    """Return which examples a stream gives over all processes in its first steps, in order.

    Args:
        stream: A stream over one role.
        steps: Steps of the training.
    """
    whole = replace(stream, rank=0, world=1)
    seen: set[int] = set()
    for step in range(steps):
        if len(seen) == len(stream.examples):
            break
        seen.update(whole.indices(step))
    return sorted(seen)


def examples_read(stream: Stream, steps: int) -> list[Example]:
    """Return the examples of `places_read`."""
    return [stream.examples[i] for i in places_read(stream, steps)]


def numbered(
    batches: Callable[[int], Sequence[Mapping[str, Batch]]],
) -> Callable[[int], list[dict[str, Any]]]:
    """Tell a loss the number of its `step`."""
    return lambda step: [{**micro, "step": step} for micro in batches(step)]


def mean_nll(weight: float) -> RoleLoss:
    """Return the loss on scored tokens, times a weight."""
    return lambda model, batch: Term(*nll(logits_of(model, batch), batch), weight)


def nlls(model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
    """Return the loss on the scored tokens of every role of a micro-batch."""
    return {role: Term(*nll(logits_of(model, batch), batch)) for role, batch in micro.items()}


def role_counts(micro: Mapping[str, Batch]) -> dict[str, float]:
    """Return the number of scored tokens of each role."""
    return {role: float(batch.num_targets) for role, batch in micro.items()}


def tune(
    method: TuningMethod, start: Checkpoint, domain: Domain, terms: Terms, ctx: Context
) -> Removal:
    """Minimise a weighted sum of losses on the roles of a domain and write the edited checkpoint.

    Each term is its sum divided by its count, over all micro-batches and processes of a step. With
    `method.sam` the gradient of the forget term is taken at the worst point nearby.

    Args:
        method: Schedule, what is trained, tokens per row, and the name beside the progress.
        start: What the method starts from.
        domain: Rows by role.
        terms: Weight and loss by role; roles that are not named are not read.
        ctx: Seed, processes, folder.

    Returns:
        The removal, its model in `ctx.work/model`.
    """
    domain, quality = method.given(domain, ctx)
    batches = role_batches(
        domain, terms, start.tokenizer(), method.fit, ctx, max_length=method.max_length
    )

    def term(weight: float, summed: Callable[[Tensor, Batch], Summed]) -> RoleLoss:
        return lambda model, batch: Term(*summed(logits_of(model, batch), batch), weight)

    losses = {role: term(*pair) for role, pair in terms.items()}
    return minimise(method, start, domain, batches, losses, ctx, extras=quality)


def logits_of(model: nn.Module, batch: Batch) -> Float[Tensor, "B T V"]:
    """Return a causal model's logits on a batch."""
    logits_BTV: Tensor = model(**batch.inputs, use_cache=False).logits
    return logits_BTV


def minimise(
    method: TuningMethod,
    start: Checkpoint,
    domain: Domain,
    batches: Callable[[int], Sequence[Mapping[str, Batch]]],
    losses: Mapping[str, RoleLoss],
    ctx: Context,
    *,
    forget_count: Callable[[Batch], float] | None = None,
    before: Cost = NOTHING,
    extras: Mapping[str, Any] | None = None,
) -> Removal:
    """Minimise a loss by role on the weights that a method trains and write the edited checkpoint.

    With `method.sam` the gradient of the forget term is taken at the worst point nearby.

    Args:
        method: Schedule, what is trained, and the name beside the progress.
        start: What the method starts from.
        domain: Gives `dev`, where the method has a stop rule.
        batches: Micro-batches by step.
        losses: The loss on the rows of each role.
        ctx: Seed, processes, folder.
        forget_count: What the forget term of a batch is divided by; None for its scored tokens,
            which all others are divided by.
        before: What was spent before the first step.
        extras: Facts for the record.

    Returns:
        The removal, its model in `ctx.work/model`.
    """

    def loss(model: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
        return {role: losses[role](model, batch) for role, batch in micro.items()}

    def counts(micro: Mapping[str, Batch]) -> dict[str, float]:
        by_role = role_counts(micro)
        if forget_count is not None and "forget" in micro:
            by_role["forget"] = forget_count(micro["forget"])
        return by_role

    model, tokenizer = start.load(dtype=ctx.dtype, device=ctx.device), start.tokenizer()
    progress = Progress(ctx, method.name, method.fit.steps)
    with tuned(model, method.modules, method.lora, ctx) as (live, parameters):
        looks = looking(method, live, parameters, tokenizer, domain, ctx)
        groups = {"trained": list(parameters.values())}
        gradient = None
        if method.sam:
            refuse_half(live, parameters.values(), f"{method.name}: sam {method.sam:g}")
            gradient = sharpness_aware(method.sam)
            tell_cost(method, method.fit.steps, tokens_of(batches(0)), start, ctx)
        steps = fit(
            live, batches, loss, method.fit, ctx, groups=groups, counts=counts,
            state_dir=state_dir(ctx), gradient=gradient, change=method.change,
        )  # fmt: skip
        facts = {**(extras or {}), **run_fit(steps, progress, looks)}
        removal = finish(start, live, parameters, progress, ctx, lora=method.lora, extras=facts)
    return replace(removal, cost=before + removal.cost)


def _save_adapter(model: Any, start: Checkpoint, folder: Path) -> None:
    """Write the adapter, naming the folder of its base: peft reads the vocabulary from there."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(start.path)
    model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form


def state_dir(ctx: Context) -> Path:
    """Return the folder in which an interrupted loop of this stage keeps its state."""
    return ctx.work / "state"
