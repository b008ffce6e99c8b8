"""Training under a policy: batches that carry their routes, and groups that are stepped apart.

Shape legend: B rows, T tokens, V vocabulary, N positions, G groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, device, nn

from excise.core.context import Context
from excise.data.domain import CORE, Rows
from excise.data.stream import Batch, Example, Stream, Tokenizer, collate, join
from excise.losses import token_nll
from excise.methods.base import Removal
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.tuning import Progress, finish, run_fit, state_dir, stream
from excise.models.checkpoint import Checkpoint
from excise.routing.attach import Routing, route
from excise.routing.groups import GroupMap
from excise.routing.policy import Policy, Routes, compile
from excise.train.fit import Term, fit

MoreTerms = Callable[[nn.Module, "RoutedBatch", Any], Mapping[str, Term]]
"""Further terms from model, batch and the model's output."""


@dataclass(frozen=True)
class RoutedBatch:
    """A batch with what its tokens read and write.

    Attributes:
        batch: The batch.
        routes: Its routes.
    """

    batch: Batch
    routes: Routes

    def to(self, where: device) -> RoutedBatch:
        """Return batch and routes on a device."""
        return RoutedBatch(self.batch.to(where), self.routes.to(where))

    @property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return self.batch.num_tokens

    @property
    def num_targets(self) -> int:
        """Number of scored tokens."""
        return self.batch.num_targets


@dataclass(frozen=True)
class RoutedStream:
    """A stream whose batches carry routes: like it, a pure function of the step.

    Draws among alternatives are keyed by seed, step and number of the text in the whole batch,
    so that neither the number of processes nor the size of micro-batches changes them.

    Attributes:
        stream: What is read.
        policy: The rules.
        map: Groups of the model.
        seed: Seed of the draws.
        soften_V: As `compile`.
        sizes: Rows of each capability, for `drawn`.
    """

    stream: Stream
    policy: Policy
    map: GroupMap
    seed: int
    soften_V: Tensor | None = None
    sizes: tuple[float, ...] = ()

    def draw(self, step: int, text: int) -> float:
        """Return the uniform number in [0, 1) of one text of a step."""
        digest = hashlib.sha256(f"{self.seed}:{step}:{text}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    def __call__(self, step: int) -> list[RoutedBatch]:
        """Return the micro-batches of this process at `step`."""
        s = self.stream
        picked: list[tuple[Example, float]] = []
        for i, text in enumerate(s.texts(step)):
            example = join([s.examples[k] for k in text], bos_id=s.bos_id)
            picked.append((example, self.draw(step, s.rank + i * s.world)))
        size = s.micro_size or len(picked)
        if size < len(picked):  # texts of like length share a micro-batch: less padding
            picked.sort(key=lambda pair: len(pair[0].ids))
        return [self._routed(picked[i : i + size]) for i in range(0, len(picked), size)]

    def _routed(self, picked: Sequence[tuple[Example, float]]) -> RoutedBatch:
        """Put texts into one batch, with their routes."""
        s = self.stream
        examples, draws = [e for e, _ in picked], [d for _, d in picked]
        batch = collate(examples, pad_id=s.pad_id, padding_side=s.padding_side)
        routes = compile(
            self.policy,
            self.map,
            batch,
            draw=draws,
            soften_V=self.soften_V,
            sizes=self.sizes,
        )
        return RoutedBatch(batch, routes)


def labels_of(rows: Rows) -> set[int]:
    """Return the labels that occur in rows."""
    return {row.label for row in rows}


def capability_sizes(rows: Rows, count: int) -> tuple[float, ...]:
    """Return the number of rows labelled as each of `count` capabilities; ones where none is."""
    sizes = [0.0] * count
    for row in rows:
        if CORE < row.label <= count:
            sizes[row.label - 1] += 1
    return tuple(sizes) if any(sizes) else (1.0,) * count


def routed_loss(
    model: nn.Module, routing: Routing, micro: RoutedBatch, more: MoreTerms | None = None
) -> dict[str, Term]:
    """Return the next-token loss of a micro-batch with its routes in force.

    Args:
        model: The model.
        routing: Its routing.
        micro: Batch and routes.
        more: Further terms.

    Returns:
        `nll`: the loss of scored tokens times their weights, over the number of scored tokens;
        a token of negative weight counts up to log V.
    """
    routing.set(micro.routes)
    batch = micro.batch
    output = model(**batch.inputs)
    nll_BT = token_nll(output.logits, batch.ids_BT).masked_fill(~batch.target_BT, 0)
    if micro.routes.loss_BT is not None:
        weight_BT = micro.routes.loss_BT.to(nll_BT.dtype)
        # Ascent has no upper bound: what is at least as unlikely as by chance is left alone.
        capped_BT = nll_BT.clamp(max=math.log(output.logits.shape[-1]))
        nll_BT = torch.where(weight_BT < 0, capped_BT, nll_BT) * weight_BT
    terms = {"nll": Term(nll_BT.sum(), float(batch.num_targets))}
    return terms | dict(more(model, micro, output) if more else {})


@dataclass
class Trained:
    """What a routed training leaves beside the trained model.

    Attributes:
        map: Who owned what.
        progress: What the loop said.
    """

    map: GroupMap
    progress: Progress


def routed_fit(
    model: nn.Module,
    policy: Policy,
    rows: Rows,
    tokenizer: Tokenizer,
    config: Pretrain,
    ctx: Context,
    *,
    stage: str,
    soften_V: Tensor | None = None,
    more: MoreTerms | None = None,
    more_counts: Callable[[RoutedBatch], Mapping[str, float]] | None = None,
    rates: Mapping[str, float] | None = None,
    zeroed: bool = False,
) -> Trained:
    """Train a model in place under a policy.

    Every group has optimizer state of its own and is not stepped where no token of the step may
    write it. Parameters that require no gradient are left alone.

    Args:
        model: The model; put into train mode, and back into eval mode at the end.
        policy: Groups and rules.
        rows: What is read, labelled as told.
        tokenizer: The model's tokenizer.
        config: The schedule.
        ctx: Seed of order and draws, device, processes, folder of the state.
        stage: Name shown beside the progress.
        soften_V: Confidence in capability labels by token, as `compile`.
        more: Further terms of the loss.
        more_counts: Their counts, for several micro-batches or processes.
        rates: Learning rate by group, in place of the schedule's.
        zeroed: Whether a frozen group gets a gradient of zeros in place of none, so that
            momentum and weight decay move it, as some published code does.

    Returns:
        The map and the progress.

    Raises:
        ConfigError: With every problem of groups, policy and labels, before training.
    """
    with route(model, policy, labels=labels_of(rows)) as routing:
        texts = stream(
            rows,
            tokenizer,
            config.fit,
            ctx,
            purpose="pretrain",
            max_length=config.max_length,
            pack=config.pack,
        )
        sizes = capability_sizes(rows, len(policy.capabilities))
        seed = ctx.seed_for("routes")
        batches = RoutedStream(texts, policy, routing.map, seed, soften_V, sizes)
        progress = Progress(ctx, stage, config.fit.steps)
        routing.zeroed = zeroed
        if config.fit.steps:
            _probe(model, routing, batches(0)[0].to(ctx.device))
        _loop(model, routing, batches, config, ctx, progress, (more, more_counts, rates))
    return Trained(routing.map, progress)


def _probe(model: nn.Module, routing: Routing, micro: RoutedBatch) -> None:
    """Refuse a model whose weights cannot all be routed, by one text before training."""
    b = micro.batch
    one = Batch(b.ids_BT[:1], b.attention_BT[:1], b.target_BT[:1], b.label_BT[:1], b.units[:1])
    routes = Routes(shape=(1, one.ids_BT.shape[1]))
    terms = routed_loss(model, routing, RoutedBatch(one, routes))
    try:
        if terms["nll"].sum.requires_grad:
            terms["nll"].sum.backward()
        routing.check()
    finally:
        for param in model.parameters():
            param.grad = None


def _loop(
    model: nn.Module,
    routing: Routing,
    batches: RoutedStream,
    config: Pretrain,
    ctx: Context,
    progress: Progress,
    extra: tuple[
        MoreTerms | None,
        Callable[[RoutedBatch], Mapping[str, float]] | None,
        Mapping[str, float] | None,
    ],
) -> None:
    """Run the steps."""
    more, more_counts, rates = extra
    groups = routing.map.slices(model)

    def loss(model: nn.Module, micro: RoutedBatch) -> dict[str, Term]:
        return routed_loss(model, routing, micro, more)

    def counts(micro: RoutedBatch) -> dict[str, float]:
        told = {"nll": float(micro.num_targets)}
        return told | dict(more_counts(micro) if more_counts else {})

    def writes(micro: RoutedBatch) -> frozenset[str]:
        return micro.routes.written

    model.train()
    steps = fit(
        model,
        batches,
        loss,
        config.fit,
        ctx,
        groups=groups,
        counts=counts if more is None or more_counts is not None else None,
        state_dir=state_dir(ctx),
        rates=None if rates is None else {n: r for n, r in rates.items() if n in groups},
        writes=None if routing.zeroed else writes,
    )
    run_fit(steps, progress)
    model.eval()


def routed_pretrain(
    start: Checkpoint,
    rows: Rows,
    policy: Policy,
    config: Pretrain,
    ctx: Context,
    *,
    stage: str,
    extras: Mapping[str, Any] | None = None,
) -> Removal:
    """Train every parameter of `start` under a policy; nothing is ablated.

    Args:
        start: The untrained model.
        rows: What is read, labelled as told.
        policy: Groups and rules.
        config: The schedule.
        ctx: Seed, device, dtype, folder.
        stage: Name shown beside the progress.
        extras: Facts for the record.

    Returns:
        The trained checkpoint, its map of groups in `extras["groups"]`.
    """
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    trained = routed_fit(model, policy, rows, start.tokenizer(), config, ctx, stage=stage)
    facts = {"groups": trained.map.table(), "group_notes": list(trained.map.notes)}
    return finish(
        start, model, parameters, trained.progress, ctx, extras={**facts, **(extras or {})}
    )
