"""Loss and gradient of a few rows at once, formed in the memory of the student's probabilities.

Shape legend: n rows of one chunk, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from excise.train.vocab_targets import (
    Direction,
    Fixed,
    Label,
    Sampled,
    Target,
    TopK,
    Uniform,
    log_probs,
    shares,
    spread,
)


def form(
    target: Target,
    rows_n: Int[Tensor, " n"],
    logp_nV: Float[Tensor, "n V"],
    direction: Direction,
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
    kept_nK = logp_nV.gather(1, ids_nK)
    others = logp_nV.shape[1] - ids_nK.shape[1]
    rest_n = others * torch.xlogy(tail_n, tail_n) - tail_n * (logp_nV.sum(-1) - kept_nK.sum(-1))
    loss_n = (p_nK * (logt_nK - kept_nK)).sum(-1) + rest_n
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
