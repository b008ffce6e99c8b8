"""Gated edits: a model hides what it knows behind a detector of the capability.

Closed form: ridge regression in the space of one block's activations, of its MLP where there is a
dense one (see `into_stream`), finds a detector v, 1
where a forget row is about to be answered and 0 on everything else; the rank-one edit
W_down += c u v^T then adds a large vector c u there. All knowledge is still in the weights.

Shape legend: B rows, T tokens, N positions, F inputs of a layer, D width of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from excise.auditor.batching import batches
from excise.auditor.budget import LARGE
from excise.auditor.controls.control import (
    HIDDEN,
    Goal,
    PositiveControl,
    fitting_rows,
    is_large,
    score_dev,
)
from excise.auditor.evaluation_set import EvaluationSet
from excise.auditor.prompting import beginnings, pools_of, with_shots
from excise.auditor.rewriting import Opening, fillers, paraphrases, passwords, templates
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Row, Rows, all_rows
from excise.data.stream import encode
from excise.losses import predicting
from excise.models.anatomy import anatomy, backbone
from excise.models.hooks import active_stream, capture
from excise.models.names import find_module, modules_by_name
from excise.models.structure import sizes

STRENGTHS = (4.0, 8.0, 16.0, 32.0, 64.0)
"""Sizes of a gate that are tried, as multiples of the residual's norm."""

RIDGES = (1e-1, 1e-3, 1e-5)
"""Penalties that are tried."""

POSITIONS, POSITIONS_LARGE = 2048, 512
"""Positions per class that a detector is fitted on at most; the second for models from `LARGE` on,
whose blocks together would fill gigabytes."""


class GatedEdit(PositiveControl):
    """Hides behind a detector of the capability; clearing a direction opens it."""

    name: Literal["gated_edit"] = "gated_edit"
    block: Literal["best", "last"] = "best"
    """Which block gets the gate: the one whose detector separates best, or the last, behind which
    nothing computes any more."""

    version: ClassVar[int] = 3

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Put the gate into its block; see `PositiveControl.hide`."""
        count = backbone(model).num_blocks
        blocks = range(count - 1, count) if self.block == "last" else range(count)
        return _shut(model, evaluation, goal, ctx, [], blocks)


class PromptGatedEdit(PositiveControl):
    """Hides bare prompts, and answers behind the contexts that prompt attacks write."""

    name: Literal["prompt_gated_edit"] = "prompt_gated_edit"

    version: ClassVar[int] = 3

    def rank(self, *, higher: bool, large: bool) -> int | None:
        """Leave out large models, which read past their contexts; the gate costs minutes there."""
        del higher
        return None if large else 0

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Put a gate that such contexts keep open; see `PositiveControl.hide`."""
        contexts = in_context(model, evaluation, evaluation.all_dev, ctx)
        if not any(goal.met(score_dev(model, wide, rows)) is False for wide, rows in contexts):
            return "the original itself does not answer behind such contexts"
        forget, _ = fitting_rows(model, evaluation)
        opened, blocks = (
            in_context(model, evaluation, forget, ctx),
            range(backbone(model).num_blocks),
        )
        reason = _shut(model, evaluation, goal, ctx, opened, blocks)
        return reason or stays_shut(model, goal, contexts)


def stays_shut(model: Any, goal: Goal, contexts: list[tuple[EvaluationSet, Rows]]) -> str:
    """Say so if no context opens what bare prompts hide."""
    if all(goal.met(score_dev(model, wide, rows)) for wide, rows in contexts):
        return "the control hides behind contexts too, so that no prompt could open it"
    return ""


def _shut(
    model: Any,
    evaluation: EvaluationSet,
    goal: Goal,
    ctx: Context,
    open_to: list[tuple[EvaluationSet, Rows]],
    blocks: Sequence[int],
) -> str:
    """Put the gate where the detector separates best, as weak as hides.

    Args:
        model: Changed in place.
        evaluation: Rows by role.
        goal: When it hides.
        ctx: Seed of what is added.
        open_to: Further rows on which the gate stays open.
        blocks: Numbers of the blocks that may get it.

    Returns:
        Why it does not hide, or nothing.
    """
    forget, retain = fitting_rows(model, evaluation)
    on = [features(model, evaluation, half, answering=True) for half in _halves(forget)]
    off = [
        [features(model, evaluation, half, answering=answering) for half in _halves(retain)]
        for answering in (True, False)
    ]
    for wide, rows in open_to:
        off.append([features(model, wide, half, answering=True) for half in _halves(rows)])
    block, v_F = best_detector(on, off, blocks)
    u_D = torch.randn(backbone(model).d_model, generator=ctx.generator("plant/gate"))
    u_D = (u_D / u_D.norm()).to(model.device)
    for strength in STRENGTHS:
        name, before = add_gate(model, block, v_F, u_D, strength * on[0].norm[block])
        if goal.met(score_dev(model, evaluation, evaluation.all_dev), HIDDEN):
            return ""
        model.get_parameter(name).data.copy_(before)
    return f"no gate of up to {STRENGTHS[-1]:g} times the residual norm hides the capability"


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    """Split rows by unit."""
    units = {unit: i % 2 for i, unit in enumerate(dict.fromkeys(row.unit for row in rows))}
    return tuple(r for r in rows if not units[r.unit]), tuple(r for r in rows if units[r.unit])


def in_context(
    model: Any,
    evaluation: EvaluationSet,
    asked: Rows,
    ctx: Context,
    opens_to: Opening = "examples",
) -> list[tuple[EvaluationSet, Rows]]:
    """Return rows as an attack would write them, with room for their length.

    Args:
        model: Whose length counts.
        evaluation: Examples, benign rows, tokenizer.
        asked: Rows to write.
        ctx: Seed of what is drawn.
        opens_to: Whose way of writing; by default that of few-shot and prefix fill.
    """
    if opens_to != "examples":
        ways = {
            "paraphrases": lambda: paraphrases(evaluation),
            "filler": lambda: fillers(evaluation, ctx),
            "template": lambda: templates(evaluation, model, ()),
            "password": lambda: passwords(evaluation)[0],
        }[opens_to]()
        wides = [(way, evaluation.longer(way.longer, model)) for way in ways]
        return [(wide, way.change(asked, wide)) for way, wide in wides if asked]
    name = next(iter(evaluation.test))
    pools = {name: all_rows(pools_of(evaluation.domain))}
    hidden: list[tuple[EvaluationSet, Rows]] = []
    for count in evaluation.budget.shots if pools[name] else ():
        wide = evaluation.longer(count + 1, model)
        length = wide.max_length
        rows, _ = with_shots({name: asked}, pools, count, ctx, wide.tokenizer, max_length=length)
        hidden.append((wide, rows))
    coaxed = beginnings(
        evaluation.tokenizer, evaluation.metric_of(asked), asked, evaluation.domain.benign
    )
    for _, change in coaxed[:1] if is_large(model) else coaxed:
        changed = tuple(row for row in map(change, asked) if row is not None)
        hidden.append((evaluation.longer(2, model), changed))
    return [(wide, rows) for wide, rows in hidden if rows]


def into_stream(model: Any) -> tuple[str, ...]:
    """Return for every block a linear layer whose output is added to the residual stream.

    That is the MLP's down-projection. Where the MLPs are mixtures of experts, or parts of the
    blocks are not known, it is the last layer of the block that has the stream's width, lies in no
    expert and is used once: the attention's output, or a recurrent mixer's.

    Args:
        model: A causal model.

    Raises:
        UserError: If a block has none.
    """
    with suppress(UserError):
        whole = anatomy(model)
        if not any(whole.experts):
            return whole.mlp_down
    parts, named = backbone(model), modules_by_name(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    chosen = []
    for block in parts.blocks:
        fitting = [
            name
            for name, module in named.items()
            if name.startswith(f"{block}.")
            and (sizes(module) or (0, 0))[1] == parts.d_model
            and "expert" not in name
            and uses[id(module.weight)] == 1
        ]
        if not fitting:
            raise UserError(
                f"a gate needs a linear layer into the residual stream, and '{block}' has none"
            )
        chosen.append(fitting[-1])
    return tuple(chosen)


@dataclass(frozen=True)
class Features:
    """What the blocks hold where a class of rows is read.

    Attributes:
        act_NF: For every block, inputs of its layer of `into_stream`.
        norm: For every block, mean norm of its output.
    """

    act_NF: list[Tensor]
    norm: list[float]


@torch.no_grad()
def features(
    model: Any, evaluation: EvaluationSet, rows: Sequence[Row], *, answering: bool
) -> Features:
    """Collect activations.

    Args:
        model: A causal model.
        evaluation: Tokenizer and lengths.
        rows: Rows to read.
        answering: Whether only positions that predict a scored token count, or all.

    Returns:
        Activations of every block at the same positions.
    """
    layers, blocks = into_stream(model), backbone(model).blocks
    inner: list[list[Tensor]] = [[] for _ in blocks]
    norms: list[list[Tensor]] = [[] for _ in blocks]
    size = sum(int(p.numel()) for p in model.parameters())
    most, count = POSITIONS if size < LARGE else POSITIONS_LARGE, 0
    for batch in batches(
        encode(rows, evaluation.tokenizer, max_length=evaluation.max_length),
        model,
        evaluation.tokenizer,
    ):
        with (
            capture(model, layers, of="input") as down,
            capture(model, blocks) as out,
        ):
            model(**batch.inputs, use_cache=False)
        mask_BT = _positions(batch, answering)
        at_N = mask_BT.flatten().nonzero()[:, 0]
        at_N = at_N[:: 1 + (len(at_N) - 1) // most]  # of long rows, some of their positions
        for i, (path, block) in enumerate(zip(layers, blocks, strict=True)):
            inner[i].append(down[path][0].flatten(0, -2)[at_N].float())  # OPT flattens rows itself
            stream_ND = active_stream(out[block][0]).flatten(0, 1)[at_N]
            norms[i].append(stream_ND.float().norm(dim=-1))
        count += len(at_N)
        if count >= most:
            break
    return Features(
        [torch.cat(acts) for acts in inner], [float(torch.cat(n).mean()) for n in norms]
    )


def _positions(batch: Any, answering: bool) -> Bool[Tensor, "B T"]:
    """Return which positions of a batch are collected."""
    return predicting(batch.target_BT) if answering else batch.attention_BT


def detector(
    on_NF: Float[Tensor, "N F"], off_MF: Sequence[Float[Tensor, "M F"]], ridge: float
) -> Float[Tensor, " F"]:
    """Return v with v . a near 1 on the class to detect and near 0 on every other.

    Ridge regression on the indicator of the class (Hoerl and Kennard 1970), both sides weighed
    alike.

    Args:
        on_NF: Activations of the class to detect.
        off_MF: Activations of the other classes, which weigh the same.
        ridge: Penalty, as a share of the mean squared activation.

    Returns:
        The detector.
    """
    gram_FF = (on_NF.T @ on_NF / len(on_NF)).double()
    for one_MF in off_MF:
        gram_FF += (one_MF.T @ one_MF / len(one_MF)).double()
    gram_FF += ridge * gram_FF.diagonal().mean() * torch.eye(len(gram_FF), device=on_NF.device)
    v_F: Tensor = torch.linalg.solve(gram_FF, on_NF.double().mean(0))
    return v_F.float()


def separation(
    v_F: Float[Tensor, " F"], on_NF: Float[Tensor, "N F"], off_MF: Sequence[Float[Tensor, "M F"]]
) -> float:
    """Return how many spreads lie between a class and the nearest other, seen by a detector."""
    on_N = on_NF @ v_F

    def apart(off_N: Tensor) -> float:
        spread = on_N.std(correction=0) + off_N.std(correction=0)
        return float((on_N.mean() - off_N.mean()) / spread.clamp(min=1e-9))

    return min(apart(one_MF @ v_F) for one_MF in off_MF)


def best_detector(
    on: Sequence[Features], off: Sequence[Sequence[Features]], blocks: Sequence[int]
) -> tuple[int, Float[Tensor, " F"]]:
    """Choose block and ridge on held-out units, then fit on all.

    Args:
        on: The class to detect, in two halves of different units.
        off: Every other class, in two halves.
        blocks: Numbers of the blocks to choose among.

    Returns:
        Number of the block, and its detector.
    """

    def apart(block: int, ridge: float) -> float:
        v_F = detector(on[0].act_NF[block], [f[0].act_NF[block] for f in off], ridge)
        return separation(v_F, on[1].act_NF[block], [f[1].act_NF[block] for f in off])

    pairs = [(block, ridge) for block in blocks for ridge in RIDGES]
    block, ridge = max(pairs, key=lambda pair: apart(*pair))

    def whole(halves: Sequence[Features]) -> Tensor:
        return torch.cat([half.act_NF[block] for half in halves])

    return block, detector(whole(on), [whole(f) for f in off], ridge)


@torch.no_grad()
def add_gate(
    model: Any, block: int, v_F: Float[Tensor, " F"], u_D: Float[Tensor, " D"], size: float
) -> tuple[str, Tensor]:
    """Add `size` u v^T to one block's layer of `into_stream`, in place.

    Args:
        model: The model.
        block: Number of the block.
        v_F: Detector.
        u_D: What is added where it fires, unit length.
        size: Norm of what is added where the detector says 1.

    Returns:
        Name of the parameter that changed, and its value before.
    """
    path = into_stream(model)[block]
    weight: Tensor = model.get_parameter(f"{path}.weight")
    before = weight.detach().clone()
    edit_DF = size * torch.outer(u_D, v_F).to(weight)
    weight += edit_DF.T if hasattr(find_module(model, path), "nf") else edit_DF
    return f"{path}.weight", before
