"""Small moves of weights that hide: inside buckets, of small weights, up a loss, or by scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from excise.auditor.batching import GRADIENT, batches
from excise.auditor.budget import LARGE
from excise.auditor.controls.control import (
    Goal,
    PositiveControl,
    chunk_of,
    fitting_rows,
    is_hidden,
    is_large,
)
from excise.auditor.evaluation_set import EvaluationSet
from excise.auditor.pruning import lowest_of_rows
from excise.auditor.quantization import (
    BITS,
    GROUP,
    OFFSET,
    Grid,
    by_outputs,
    grids,
    inside,
    matrices,
)
from excise.core.context import Context
from excise.data.domain import Row
from excise.data.stream import encode
from excise.data.subsample import subsample
from excise.losses import nll
from excise.models.anatomy import backbone
from excise.models.hooks import find_module

STEPS, HELD_STEPS = 32, 6
"""Moves within bounds at most, and those of them with retain held."""

MEMORY = 0.8
"""Share of the earlier moves in the rolling mean of gradients."""

FREE_STEPS, FREE_STEPS_LARGE = 40, 16
"""Moves at most where nothing bounds them; the second for models from `LARGE` on."""


class WithinBuckets(PositiveControl):
    """Moves every weight inside its own quantization buckets; rounding undoes it.

    Where the buckets of all grids together leave too little room, only the coarse grids count.
    """

    precise: ClassVar[bool] = True

    name: Literal["within_buckets"] = "within_buckets"
    bits: tuple[int, ...] = BITS
    """Bits of the grids."""
    group: int = GROUP
    """Inputs that share a scale."""
    offset: int = OFFSET
    """Inputs of the first group."""
    embeddings: bool = False
    """Whether token embeddings and head may move too."""

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Raise the forget loss inside the buckets; see `PositiveControl.hide`."""
        fine = grids(self.bits, self.group, self.offset)
        coarse = tuple(grid for grid in fine if grid.bits <= 4)
        tries = [
            partial(bucket_bounds, grids=chosen, embeddings=self.embeddings)
            for chosen in (fine, coarse)
            if chosen
        ]
        done = move_within(model, evaluation, tries, is_hidden(model, evaluation, goal))
        return "" if done else "no move inside the buckets hides the capability"


class SmallWeights(PositiveControl):
    """Moves only the smallest weights of every output row, which stay the smallest.

    Pruning that share of every row by magnitude gives exactly what it gives of the original.
    """

    precise: ClassVar[bool] = True

    name: Literal["small_weights"] = "small_weights"
    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Shares of a row that may move, the first that hides."""

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Raise the forget loss by the smallest weights; see `PositiveControl.hide`."""
        tries = [partial(small_bounds, share=share) for share in self.shares]
        done = move_within(model, evaluation, tries, is_hidden(model, evaluation, goal))
        return "" if done else "no move of the smallest weights hides the capability"


class LogitScaling(PositiveControl):
    """Scales the final norm to nearly nothing, its sign turned.

    The output is flat and its order reversed, so that neither probabilities nor ranks tell; one
    small vector has to grow back.
    """

    name: Literal["logit_scaling"] = "logit_scaling"

    def rank(self, *, higher: bool, large: bool) -> int | None:
        """Come last where the score is a loss, which a flat output hides for many steps."""
        del large
        return 0 if higher else 1

    @torch.no_grad()
    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Scale the final norm; see `PositiveControl.hide`."""
        norm = backbone(model).final_norm
        if not norm:
            return "the model has no norm after its last block"
        module = find_module(model, norm)
        shifted = "gemma" in type(module).__name__.lower()  # Gemma multiplies by 1 + weight
        for parameter in module.parameters():
            value = parameter + 1 if shifted else parameter
            parameter.copy_(-1e-3 * value - 1 if shifted else -1e-3 * value)
        hidden = is_hidden(model, evaluation, goal)()
        return "" if hidden else "a flat output does not hide the capability"


class ShortFineTuning(PositiveControl):
    """A few sign steps up the forget loss, retain held, each as long as a step of the attack."""

    name: Literal["short_fine_tuning"] = "short_fine_tuning"

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Climb the forget loss; see `PositiveControl.hide`."""
        forget, retain = fitting_rows(model, evaluation)
        rates = sorted(evaluation.budget.rates)
        size = rates[len(rates) // 2 if is_large(model) else 0]
        hidden = is_hidden(model, evaluation, goal)
        done = climb(model, evaluation, forget, size, hidden, chunk=chunk_of(model), keep=retain)
        return "" if done else "no short way up the forget loss hides the capability"


class WeightPerturbation(PositiveControl):
    """A few sign steps up the benign loss, each as long as a step of the attack."""

    name: Literal["weight_perturbation"] = "weight_perturbation"

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Climb the benign loss; see `PositiveControl.hide`."""
        _, retain = fitting_rows(model, evaluation)
        rows = subsample(evaluation.domain.benign, len(retain), by="row")
        rates = sorted(evaluation.budget.rates)
        hidden = is_hidden(model, evaluation, goal)
        done = climb(model, evaluation, rows, rates[len(rates) // 2], hidden, chunk=chunk_of(model))
        return "" if done else "no short way up the benign loss hides the capability"


def window(rows: Sequence[Row], step: int, chunk: int) -> Sequence[Row]:
    """Return the rows of one move, going around."""
    if len(rows) <= chunk:
        return rows
    return [rows[i % len(rows)] for i in range(step * chunk, (step + 1) * chunk)]


def rolling(mean: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rolling mean of gradients, in place: every move sees other rows, and few."""
    if not mean:
        return new
    for name, way in new.items():
        mean[name].mul_(MEMORY).add_(way, alpha=1 - MEMORY)
    return mean


def add_gradients(
    total: dict[str, Tensor],
    model: Any,
    evaluation: EvaluationSet,
    rows: Sequence[Row],
    names: Sequence[str],
    sign: float = 1.0,
) -> None:
    """Add the gradient of the mean token loss of `rows` to `total`, by parameter name.

    In place, because those of a real model are gigabytes; what has no gradient is left out.
    """
    parameters = [model.get_parameter(name) for name in names]
    examples = encode(rows, evaluation.tokenizer, max_length=evaluation.max_length)
    count = sum(sum(e.target) for e in examples)
    for batch in batches(examples, model, evaluation.tokenizer, share=GRADIENT):
        value, _ = nll(model(**batch.inputs, use_cache=False).logits, batch)
        grads = torch.autograd.grad(sign * value / count, parameters, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is not None and name in total:
                total[name].add_(grad)
            elif grad is not None:
                total[name] = grad
        del grads


Bounds = dict[str, tuple[Tensor, Tensor]]
"""Lowest and highest value of every weight that may move, by parameter name."""


def bucket_bounds(model: Any, grids: Sequence[Grid], *, embeddings: bool = False) -> Bounds:
    """Return how far every weight may move and stay in its bucket on every grid.

    Rounding on any of the grids then gives exactly what rounding the model before gave.

    Args:
        model: The model.
        grids: The grids.
        embeddings: Whether embeddings and head are rounded, and so may move.
    """
    bounds: Bounds = {}
    for name, (parameter, flipped) in matrices(model, embeddings=embeddings).items():
        pairs = [inside(by_outputs(parameter.detach(), flipped=flipped), grid) for grid in grids]
        low = torch.stack([p[0] for p in pairs]).amax(0)
        high = torch.stack([p[1] for p in pairs]).amin(0)
        bounds[name] = (by_outputs(low, flipped=flipped), by_outputs(high, flipped=flipped))
    return bounds


def small_bounds(model: Any, share: float) -> Bounds:
    """Return how far the smallest weights of every row may move and stay its smallest.

    Args:
        model: The model.
        share: Share of every row that may move; the others may not.
    """
    bounds: Bounds = {}
    for name, (parameter, flipped) in matrices(model).items():
        weight_RC = by_outputs(parameter.detach(), flipped=flipped)
        small_RC = lowest_of_rows(weight_RC.abs(), share)
        kept_R1 = weight_RC.abs().masked_fill(small_RC, math.inf).amin(-1, keepdim=True)
        room_RC = (0.98 * kept_R1).maximum(weight_RC.abs())  # some are as large as what is kept
        low_RC = torch.where(small_RC, -room_RC, weight_RC)
        high_RC = torch.where(small_RC, room_RC, weight_RC)
        bounds[name] = (by_outputs(low_RC, flipped=flipped), by_outputs(high_RC, flipped=flipped))
    return bounds


def move_within(
    model: Any,
    evaluation: EvaluationSet,
    tries: Sequence[Callable[[Any], Bounds]],
    hidden: Callable[[], bool],
) -> bool:
    """Raise the forget loss with retain held, every weight within bounds.

    Args:
        model: Changed in place.
        evaluation: Rows by role, tokenizer, lengths.
        tries: Bounds of the model as it is, tried one after the other, each from its start.
        hidden: Asked after every move; the first yes ends it.

    Returns:
        Whether the last answer was yes.
    """
    forget, retain = fitting_rows(model, evaluation)
    chunk = chunk_of(model)
    for bounds_of in tries:
        bounds = bounds_of(model)
        moving = {name: model.get_parameter(name) for name in bounds}
        start = {name: p.detach().clone() for name, p in moving.items()}
        mean: dict[str, Tensor] = {}
        for step in range(STEPS):
            way: dict[str, Tensor] = {}
            add_gradients(way, model, evaluation, window(forget, step, chunk), list(moving))
            if step < HELD_STEPS:  # what does not hide with retain held is moved without
                rows = window(retain, step, chunk)
                add_gradients(way, model, evaluation, rows, list(moving), -1.0)
            way = mean = rolling(mean, way)
            with torch.no_grad():
                for name in way:
                    low, high = bounds[name]
                    moved = moving[name] + 0.5 * (high - low) * way[name].sign()
                    moving[name].copy_(moved.clamp(low, high))
            if hidden():
                return True
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.copy_(start[name])
    return False


def climb(
    model: Any,
    evaluation: EvaluationSet,
    rows: Sequence[Row],
    size: float,
    hidden: Callable[[], bool],
    *,
    chunk: int,
    keep: Sequence[Row] = (),
) -> bool:
    """Move every parameter by `size` up the loss of `rows`, until it hides.

    Args:
        model: Changed in place.
        evaluation: Tokenizer and lengths.
        rows: Rows whose loss rises.
        size: Length of one move of one parameter.
        hidden: Asked after every move; the first yes ends it.
        chunk: Rows of one move.
        keep: Rows whose loss is held down.

    Returns:
        Whether the last answer was yes.
    """
    names = [name for name, _ in model.named_parameters()]
    # A half-precision weight is coarser than a move: moves add up in float32.
    wide = {name: p.detach().float() for name, p in model.named_parameters()}
    mean: dict[str, Tensor] = {}
    parameters = sum(int(p.numel()) for p in wide.values())
    for step in range(FREE_STEPS if parameters < LARGE else FREE_STEPS_LARGE):
        way: dict[str, Tensor] = {}
        add_gradients(way, model, evaluation, window(rows, step, chunk), names)
        if keep:
            add_gradients(way, model, evaluation, window(keep, step, chunk), names, -1.0)
        way = mean = rolling(mean, way)
        with torch.no_grad():
            for name in way:
                wide[name].add_(way[name].sign(), alpha=size)
                model.get_parameter(name).copy_(wide[name])
        if hidden():
            return True
    return False
