"""Losses over the vocabulary from hidden states and the head, without ever holding the logits.

Tokens are taken a chunk at a time: logits, loss and gradient of the chunk are formed in the
forward pass, and only the gradients of hidden states and head stay. The most memory any loss takes
beyond these is `chunk_bytes`, whatever the number of tokens. Every loss returns `(sum, count)`
like those of `excise.losses` and equals them in value and gradient; rows that teach nothing are
dropped before the head. Gradients have no gradients of their own.

Shape legend: B rows, T tokens of a row, N = B * T tokens, n tokens of a chunk, D hidden size,
V vocabulary, K tokens that a target lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from excise.core.errors import UserError
from excise.losses import Summed, TokenBatch, predicting
from excise.models.head import Head
from excise.train.vocab.liger import liger_nll
from excise.train.vocab.targets import (
    Dense,
    Fixed,
    HiddenTarget,
    KLDirection,
    Label,
    MixtureTarget,
    Sampled,
    Target,
    TopK,
    Uniform,
    as_kinds,
    check,
    log_probs,
    raw_logits,
    shares,
    spread,
    usable,
)

__all__ = [
    "CHUNK_BYTES",
    "SKIP",
    "Dense",
    "Fixed",
    "HiddenTarget",
    "KLDirection",
    "Label",
    "MixtureTarget",
    "Sampled",
    "Target",
    "TopK",
    "Uniform",
    "as_kinds",
    "chunked_kl",
    "chunked_nll",
    "chunked_splice",
    "chunked_uniform",
    "next_tokens",
]

CHUNK_BYTES = 1 << 28
"""Bytes that the tensors of one chunk take together, by default."""
BUFFERS = 4
"""[n, V] tensors that live at once in a chunk: logits, gradient, and two of a teacher."""
SKIP = -1
"""Kind of a row that picks no target."""


@dataclass(frozen=True)
class _Plan:
    """What the forward pass is to do beside its tensors."""

    parts: tuple[tuple[Target, Tensor], ...]
    """Targets with the rows that pick them."""
    direction: KLDirection
    temperature: float
    softcap: float | None
    scale: float
    rows: int
    """Rows of a chunk."""
    grad: tuple[bool, bool, bool]
    """Whether hidden states, weight and bias need gradients."""


def next_tokens(batch: TokenBatch) -> Int[Tensor, " N"]:
    """Return the token each position is scored on, flat over the batch; -100 where none is.

    Args:
        batch: Ids and which of them are scored; position t predicts token t + 1.
    """
    shifted_BT = batch.ids_BT.roll(-1, dims=1)
    return shifted_BT.masked_fill(~predicting(batch.target_BT), -100).flatten()


def chunked_nll(
    hidden_ND: Float[Tensor, "N D"],
    head: Head,
    target_N: Int[Tensor, " N"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    engine: str = "auto",
) -> Summed:
    """Return summed negative log-likelihood (nats) of one token per row, and how many there are.

    Args:
        hidden_ND: Hidden states that go into the head.
        head: The head; gradients reach its weight and bias.
        target_N: The right token of each row (`next_tokens`); a negative id drops the row.
        chunk_bytes: Bytes the tensors of a chunk may take.
        engine: `auto` takes `liger-kernel` on a GPU where it computes the same; `torch` does not.

    Returns:
        Differentiable sum, and the number of rows scored.

    Raises:
        UserError: If the numbers of rows differ.
    """
    kinds_N = torch.zeros_like(target_N, dtype=torch.long)
    if engine == "auto" and len(target_N) == len(hidden_ND):
        fused = liger_nll(hidden_ND, head, target_N)
        if fused is not None:
            return fused
    return chunked_splice(hidden_ND, head, kinds_N, [Label(target_N)], chunk_bytes=chunk_bytes)


def chunked_kl(
    hidden_ND: Float[Tensor, "N D"],
    head: Head,
    teacher: Target,
    *,
    direction: KLDirection = "forward",
    temperature: float = 1.0,
    mask_N: Bool[Tensor, " N"] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Summed:
    """Return summed KL (nats) between a teacher and the student, and the number of rows.

    Args:
        hidden_ND: Hidden states of the student.
        head: The student's head.
        teacher: What it is to match; no gradient reaches it.
        direction: `forward` for KL(teacher || student), `reverse` for the other.
        temperature: By which logits of both are divided; the sum is not multiplied by its square.
        mask_N: Which rows count; None for all.
        chunk_bytes: Bytes the tensors of a chunk may take.

    Raises:
        UserError: If the vocabularies differ, or rows are missing.
    """
    kinds_N = _kinds(hidden_ND, mask_N)
    return chunked_splice(
        hidden_ND, head, kinds_N, [teacher], direction=direction, temperature=temperature,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip


def chunked_uniform(
    hidden_ND: Float[Tensor, "N D"],
    head: Head,
    *,
    direction: KLDirection = "forward",
    mask_N: Bool[Tensor, " N"] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Summed:
    """Return summed KL(uniform || student) (nats), and the number of rows.

    Args:
        hidden_ND: Hidden states of the student.
        head: The student's head.
        direction: `reverse` for KL(student || uniform), the negative entropy plus log V.
        mask_N: Which rows count; None for all.
        chunk_bytes: Bytes the tensors of a chunk may take.
    """
    kinds_N = _kinds(hidden_ND, mask_N)
    return chunked_splice(
        hidden_ND, head, kinds_N, [Uniform()], direction=direction, chunk_bytes=chunk_bytes
    )


def chunked_splice(
    hidden_ND: Float[Tensor, "N D"],
    head: Head,
    kinds_N: Int[Tensor, " N"],
    targets: Sequence[Target],
    *,
    direction: KLDirection = "forward",
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Summed:
    """Return the summed loss (nats) of rows that each pick their own target, and their number.

    Args:
        hidden_ND: Hidden states of the student.
        head: The student's head.
        kinds_N: Index into `targets` of each row, or `SKIP`.
        targets: What rows may be taught, each given for all N rows.
        direction: `reverse` for KL(student || target).
        temperature: By which logits of student and teachers are divided.
        chunk_bytes: Bytes the tensors of a chunk may take.

    Returns:
        Differentiable sum, and the number of rows that were taught something.

    Raises:
        UserError: If vocabularies or numbers of rows differ, or a kind has no target.
    """
    rows, vocab = len(hidden_ND), head.vocab
    if len(kinds_N) != rows:
        raise UserError(f"{len(kinds_N)} targets were given for {rows} rows; give one per token")
    if not temperature > 0:
        raise UserError(f"temperature: must be more than 0, not {temperature}")
    if rows and int(kinds_N.max()) >= len(targets):
        raise UserError(f"a row picks target {int(kinds_N.max())} and there are {len(targets)}")
    parts: list[tuple[Target, Tensor]] = []
    for i, target in enumerate(targets):
        check(target, rows, vocab, direction, temperature)
        picked_N, fit_N = kinds_N == i, usable(target)
        parts.append((target, (picked_N if fit_N is None else picked_N & fit_N).nonzero()[:, 0]))
    inputs = (hidden_ND, head.weight_VD, head.bias_V)
    dh, dw, db = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
    wide = _wide(torch.promote_types(hidden_ND.dtype, head.weight_VD.dtype))
    chunk = max(1, chunk_bytes // (BUFFERS * vocab * wide.itemsize))
    cap, scale = head.softcap, head.scale
    plan = _Plan(tuple(parts), direction, temperature, cap, scale, chunk, (dh, dw, db))
    total: Tensor = _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, plan)
    return total, float(sum(len(r) for _, r in parts))


def _kinds(hidden_ND: Tensor, mask_N: Tensor | None) -> Int[Tensor, " N"]:
    """Return target 0 for every row of a mask."""
    if mask_N is None:
        return torch.zeros(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
    return torch.where(mask_N.bool(), 0, SKIP)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype losses and gradients are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FusedLoss(torch.autograd.Function):
    """A summed loss whose gradients are formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: _Plan
    ) -> Tensor:
        """Return the sum and save the gradients of hidden states, weight and bias."""
        wide = _wide(torch.promote_types(hidden_ND.dtype, weight_VD.dtype))
        head = Head(weight_VD.detach(), bias_V, plan.softcap, plan.scale)
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        inputs: tuple[Tensor | None, ...] = (hidden_ND, weight_VD, bias_V)
        grads = [
            torch.zeros_like(t, dtype=wide) if need and t is not None else None
            for t, need in zip(inputs, plan.grad, strict=True)
        ]
        for target, rows_N in plan.parts:
            for rows_n in rows_N.split(plan.rows):
                total += _chunk(target, rows_n, hidden_ND, head, plan, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward pass times that of the sum."""
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if g is None else (g * out[0]).to(dtype) for g, dtype in pairs), None)


def _chunk(
    target: Target,
    rows_n: Int[Tensor, " n"],
    hidden_ND: Tensor,
    head: Head,
    plan: _Plan,
    grads: Sequence[Tensor | None],
) -> Tensor:
    """Return the summed loss of a chunk of rows and add up what it gives to the gradients."""
    wide = _wide(torch.promote_types(hidden_ND.dtype, head.weight_VD.dtype))
    hidden_nD = hidden_ND[rows_n]
    z_nV = raw_logits(head, hidden_nD).to(wide)
    tanh_nV = None
    if plan.softcap is not None:
        tanh_nV = z_nV.div_(plan.softcap).tanh_()
        z_nV = tanh_nV * plan.softcap
    logp_nV = (z_nV.div_(plan.temperature) if plan.temperature != 1 else z_nV).log_softmax(-1)
    del z_nV
    loss_n = _loss_into_gradient(target, rows_n, logp_nV, plan.direction, plan.temperature)
    total: Tensor = loss_n.sum()
    if not any(plan.grad):
        return total
    grad_nV = logp_nV
    if tanh_nV is not None:  # d cap tanh(z / cap) / dz = 1 - tanh(z / cap)^2
        grad_nV.mul_(tanh_nV.square_().neg_().add_(1))
    if plan.scale != plan.temperature:
        grad_nV.mul_(plan.scale / plan.temperature)
    dh_ND, dw_VD, db_V = grads
    if dh_ND is not None:
        dh_ND[rows_n] = (grad_nV.to(head.weight_VD.dtype) @ head.weight_VD).to(wide)
    if dw_VD is not None:
        dw_VD.addmm_(grad_nV.T, hidden_nD.to(wide))
    if db_V is not None:
        db_V += grad_nV.sum(0)
    return total


def _loss_into_gradient(
    target: Target,
    rows_n: Int[Tensor, " n"],
    logp_nV: Float[Tensor, "n V"],
    direction: KLDirection,
    temperature: float,
) -> Float[Tensor, " n"]:
    """Return the loss of some rows and turn the student's `logp_nV` into its gradient in place.

    Args:
        target: What the rows are taught.
        rows_n: Which rows.
        logp_nV: Log-probabilities of the student at the temperature; afterwards the gradient of
            each row's loss in the student's logits divided by the temperature.
        direction: Of the divergence.
        temperature: Of both distributions.

    Returns:
        `loss_n`, nats.
    """
    if direction == "reverse":
        return _reverse(target, rows_n, logp_nV, temperature)
    vocab = logp_nV.shape[1]
    match target:
        case Label(ids_N):
            ids_n1 = ids_N[rows_n, None]
            loss_n = -logp_nV.gather(1, ids_n1).squeeze(1)
            logp_nV.exp_().scatter_add_(1, ids_n1, -torch.ones_like(loss_n)[:, None])
        case Uniform():
            loss_n = -logp_nV.mean(-1) - math.log(vocab)
            logp_nV.exp_().sub_(1 / vocab)
        case Fixed(prob_V):
            log_V = (prob_V.to(logp_nV.dtype).log() / temperature).log_softmax(-1)
            p_V = log_V.exp()
            loss_n = torch.xlogy(p_V, p_V).sum() - logp_nV @ p_V
            logp_nV.exp_().sub_(p_V)
        case Sampled(ids_NK):
            ids_nK, share_nK = ids_NK[rows_n].long(), shares(target, rows_n, logp_nV.dtype)
            loss_n = -(share_nK * logp_nV.gather(1, ids_nK)).sum(-1)
            logp_nV.exp_().scatter_add_(1, ids_nK, -share_nK)
        case TopK(ids_NK):
            loss_n = _top_k(target, ids_NK[rows_n].long(), rows_n, logp_nV)
        case _:
            logt_nV = log_probs(target, rows_n, logp_nV, temperature)
            p_nV = logt_nV.exp()
            loss_n = torch.einsum("nv,nv->n", p_nV, logt_nV.sub_(logp_nV))
            logp_nV.exp_().sub_(p_nV)
    return loss_n


def _top_k(
    target: TopK, ids_nK: Tensor, rows_n: Tensor, logp_nV: Float[Tensor, "n V"]
) -> Float[Tensor, " n"]:
    """Return the forward KL to kept tokens and an even tail, without a second [n, V]."""
    logt_nK, tail_n = spread(target, rows_n, logp_nV.dtype)
    p_nK = logt_nK.exp()
    student_nK = logp_nV.gather(1, ids_nK)
    others = logp_nV.shape[1] - ids_nK.shape[1]
    rest_n = others * torch.xlogy(tail_n, tail_n) - tail_n * (logp_nV.sum(-1) - student_nK.sum(-1))
    loss_n = (p_nK * (logt_nK - student_nK)).sum(-1) + rest_n
    logp_nV.exp_().sub_(tail_n[:, None]).scatter_add_(1, ids_nK, tail_n[:, None] - p_nK)
    return loss_n


def _reverse(
    target: Target, rows_n: Tensor, logp_nV: Float[Tensor, "n V"], temperature: float
) -> Float[Tensor, " n"]:
    """Return KL(student || target); the gradient is q (log q/p - loss)."""
    ratio_nV = log_probs(target, rows_n, logp_nV, temperature).neg_().add_(logp_nV)
    logp_nV.exp_()
    loss_n = torch.einsum("nv,nv->n", logp_nV, ratio_nV)
    logp_nV.mul_(ratio_nV.sub_(loss_n[:, None]))
    return loss_n
