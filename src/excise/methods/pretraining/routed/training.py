"""Training under a policy: batches that carry their routes, and groups that are stepped apart.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import CORE, Rows
from excise.data.spans import labels_of
from excise.data.stream import Batch, Example, Stream, Tokenizer, collate, join
from excise.losses import token_nll
from excise.methods.pretraining.pretrain import Pretrain, texts
from excise.methods.tuning import Progress, run_fit, state_dir
from excise.routing import GroupMap, Policy, Routes, Routing, compile, route
from excise.train.fit import Term, fit

MoreTerms = Callable[[nn.Module, "RoutedBatch", Any], Mapping[str, Term]]
"""Further terms from model, batch and the model's output."""
MoreCounts = Callable[["RoutedBatch"], Mapping[str, float]]
"""Their counts."""


@dataclass(frozen=True)
class RoutedBatch:
    """A batch with what its tokens read and write.

    Attributes:
        batch: The batch.
        routes: Its routes.
    """

    batch: Batch
    routes: Routes

    def to(self, device: torch.device) -> RoutedBatch:
        """Return batch and routes on a device."""
        return RoutedBatch(self.batch.to(device), self.routes.to(device))

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
    soften_V: Float[Tensor, "V"] | None = None
    sizes: tuple[float, ...] = ()

    def draw(self, step: int, text: int) -> float:
        """Return the uniform number in [0, 1) of one text of a step."""
        digest = hashlib.sha256(f"{self.seed}:{step}:{text}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    def __call__(self, step: int) -> list[RoutedBatch]:
        """Return the micro-batches of this process at `step`."""
        s = self.stream
        drawn: list[tuple[Example, float]] = []
        for i, text in enumerate(s.texts(step)):
            example = join([s.examples[k] for k in text], bos_id=s.bos_id)
            drawn.append((example, self.draw(step, s.rank + i * s.world)))
        size = s.micro_size or len(drawn)
        if size < len(drawn):  # texts of like length share a micro-batch: less padding
            drawn.sort(key=lambda pair: len(pair[0].ids))
        return [self._routed(drawn[i : i + size]) for i in range(0, len(drawn), size)]

    def _routed(self, drawn: Sequence[tuple[Example, float]]) -> RoutedBatch:
        """Put texts into one batch, with their routes."""
        s = self.stream
        examples, draws = [e for e, _ in drawn], [d for _, d in drawn]
        batch = collate(examples, pad_id=s.pad_id, padding_side=s.padding_side)
        routes = compile(
            self.policy, self.map, batch, draw=draws, soften_V=self.soften_V, sizes=self.sizes
        )
        return RoutedBatch(batch, routes)


@dataclass(frozen=True)
class RoutedTraining:
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
    soften_V: Float[Tensor, "V"] | None = None,
    more: MoreTerms | None = None,
    more_counts: MoreCounts | None = None,
    rates: Mapping[str, float] | None = None,
    zeroed: bool = False,
) -> RoutedTraining:
    """Train a model in place under a policy.

    Every group has optimizer state of its own and is not stepped where no token of the step may
    write it. Parameters that require no gradient are left alone.

    Args:
        model: The model; put into train mode, and back into eval mode at the end.
        policy: Groups and rules.
        rows: What is read, with the given labels.
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
        UserError: If the model reads a routed weight behind its module's back.
    """
    with route(model, policy, labels=labels_of(rows)) as routing:
        read = texts(rows, tokenizer, config, ctx, purpose="pretrain")
        sizes = _capability_sizes(rows, len(policy.capabilities))
        seed = ctx.seed_for("routes")
        batches = RoutedStream(read, policy, routing.map, seed, soften_V, sizes)
        progress = Progress(ctx, stage, config.fit.steps)
        routing.zeroed = zeroed
        if config.fit.steps:
            _probe(model, routing, batches(0)[0].to(ctx.device))
        groups = routing.map.slices(model)

        def loss(model: nn.Module, micro: RoutedBatch) -> dict[str, Term]:
            return routed_loss(model, routing, micro, more)

        def counts(micro: RoutedBatch) -> dict[str, float]:
            targets = {"nll": float(micro.num_targets)}
            return targets | dict(more_counts(micro) if more_counts else {})

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
            writes=None if zeroed else lambda micro: micro.routes.written,
        )
        run_fit(steps, progress)
        model.eval()
    return RoutedTraining(routing.map, progress)


def _capability_sizes(rows: Rows, count: int) -> tuple[float, ...]:
    """Return the number of rows labelled as each of `count` capabilities; ones where none is."""
    sizes = [0.0] * count
    for row in rows:
        if CORE < row.label <= count:
            sizes[row.label - 1] += 1
    return tuple(sizes) if any(sizes) else (1.0,) * count


def _probe(model: nn.Module, routing: Routing, micro: RoutedBatch) -> None:
    """Refuse a model whose weights cannot all be routed, by one text before training."""
    b = micro.batch
    text = Batch(b.ids_BT[:1], b.attention_BT[:1], b.target_BT[:1], b.label_BT[:1], b.units[:1])
    routes = Routes(shape=(1, text.ids_BT.shape[1]))
    terms = routed_loss(model, routing, RoutedBatch(text, routes))
    try:
        if terms["nll"].sum.requires_grad:
            terms["nll"].sum.backward()
        routing.check()
    finally:
        for param in model.parameters():
            param.grad = None


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
    output = model(**batch.inputs, use_cache=False)
    nll_BT = token_nll(output.logits, batch.ids_BT).masked_fill(~batch.target_BT, 0)
    if micro.routes.loss_BT is not None:
        weight_BT = micro.routes.loss_BT.to(nll_BT.dtype)
        # Ascent has no upper bound: what is at least as unlikely as by chance is left alone.
        capped_BT = nll_BT.clamp(max=math.log(output.logits.shape[-1]))
        nll_BT = torch.where(weight_BT < 0, capped_BT, nll_BT) * weight_BT
    terms = {"nll": Term(nll_BT.sum(), float(batch.num_targets))}
    return terms | dict(more(model, micro, output) if more else {})
