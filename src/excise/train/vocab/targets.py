"""What a token may be taught: targets of the losses in `excise.train.vocab`, a chunk at a time.

A target belongs to all N rows of the hidden states it is used with; a loss asks for a few rows at
a time, so that no more than a chunk of [rows, vocabulary] is ever held.

Shape legend: N rows (tokens), n rows of one chunk, D hidden size, V vocabulary, K listed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from excise.core.errors import UserError
from excise.models.head import Head

KLDirection = Literal["forward", "reverse"]
"""KL(target || student), or KL(student || target)."""


@dataclass(frozen=True)
class Label:
    """The right token.

    Attributes:
        ids_N: Token ids; a negative one drops its row.
    """

    ids_N: Int[Tensor, " N"]


@dataclass(frozen=True)
class Uniform:
    """Every token alike."""


@dataclass(frozen=True)
class Fixed:
    """One distribution for all rows, such as the unigram of a corpus.

    Attributes:
        prob_V: Probabilities; they are divided by their sum.
    """

    prob_V: Float[Tensor, " V"]


@dataclass(frozen=True)
class HiddenTarget:
    """A teacher by its last hidden states and its head.

    Attributes:
        hidden_ND: Hidden states that go into its head.
        head: Its head; no gradient reaches either.
        lowered_N: Token of each row whose logit is lowered; None for none.
        by: By how much.
    """

    hidden_ND: Float[Tensor, "N D"]
    head: Head
    lowered_N: Int[Tensor, " N"] | None = None
    by: float = 0.0


@dataclass(frozen=True)
class Dense:
    """A distribution for each row, held in full: for small vocabularies and for tests.

    Attributes:
        logits_NV: Logits, or logarithms of probabilities; minus infinity for what cannot be.
    """

    logits_NV: Float[Tensor, "N V"]


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of a teacher, and what is left spread evenly over all others.

    Attributes:
        ids_NK: Token ids, each once in a row.
        logp_NK: Logarithms of their probabilities.
        vocab: Size of the teacher's vocabulary.
        temperature: Temperature the probabilities are of.
        tail_N: Probability of all other tokens together; None takes what is left, which for
            very confident teachers is rounding alone.
    """

    ids_NK: Int[Tensor, "N K"]
    logp_NK: Float[Tensor, "N K"]
    vocab: int
    temperature: float = 1.0
    tail_N: Float[Tensor, " N"] | None = None


@dataclass(frozen=True)
class Sampled:
    """Tokens sampled from a teacher, with how often each was sampled.

    The loss is the cross-entropy to the samples: its gradient is that of the forward KL on average,
    its value larger by the teacher's entropy.

    Attributes:
        ids_NK: Token ids, each once in a row; entries with count 0 are padding.
        count_NK: How often each was sampled.
        vocab: Size of the teacher's vocabulary.
        temperature: Temperature they were sampled at.

    Source:
        Random sampling knowledge distillation, arXiv 2503.16870.
    """

    ids_NK: Int[Tensor, "N K"]
    count_NK: Int[Tensor, "N K"]
    vocab: int
    temperature: float = 1.0


@dataclass(frozen=True)
class MixtureTarget:
    """A weighted mean of distributions.

    Attributes:
        parts: The distributions.
        share_NM: Weight of each part in each row; rows sum to one.
    """

    parts: tuple[Target, ...]
    share_NM: Float[Tensor, "N M"]


Target = Label | Uniform | Fixed | HiddenTarget | Dense | TopK | Sampled | MixtureTarget


def check(
    target: Target, rows: int, vocab: int, direction: KLDirection, temperature: float
) -> None:
    """Refuse a target that does not fit a student.

    Args:
        target: The target.
        rows: Rows of hidden states of the student.
        vocab: Size of the student's vocabulary.
        direction: Of the divergence.
        temperature: Of the loss.

    Raises:
        UserError: If the vocabularies, the numbers of rows or the temperatures differ, or there
            is no such divergence.
    """
    teacher_vocab, length = _sizes(target, vocab)
    what = type(target).__name__
    if teacher_vocab != vocab:
        raise UserError(
            f"the teacher ({what}) has a vocabulary of {teacher_vocab} tokens and the student one "
            f"of {vocab}; take a teacher with the student's tokenizer"
        )
    if length is not None and length != rows:
        raise UserError(
            f"the target ({what}) has {length} rows and the student {rows}; give one per token"
        )
    if isinstance(target, Label | Sampled) and direction == "reverse":
        raise UserError(f"a target of kind {what} has no reverse KL; use direction 'forward'")
    if isinstance(target, TopK | Sampled) and target.temperature != temperature:
        raise UserError(
            f"the target ({what}) was made at temperature {target.temperature:g} and the loss is "
            f"at {temperature:g}; make the cache again at that temperature"
        )
    if direction == "reverse" and isinstance(target, Fixed | Dense):
        zero = target.prob_V == 0 if isinstance(target, Fixed) else target.logits_NV.isneginf()
        if bool(zero.any()):
            raise UserError(
                f"the target ({what}) gives some tokens no probability, so that its reverse KL is "
                "infinite; smooth it"
            )
    if isinstance(target, MixtureTarget):
        if len(target.parts) != target.share_NM.shape[1]:
            raise UserError(
                f"a mixture of {len(target.parts)} targets has {target.share_NM.shape[1]} "
                "columns of shares; give one per target"
            )
        for part in target.parts:
            check(part, rows, vocab, "forward", temperature)


def _sizes(target: Target, vocab: int) -> tuple[int, int | None]:
    """Return vocabulary and rows of a target; None where it fits any number of rows."""
    match target:
        case Label(ids_N):
            return vocab, len(ids_N)
        case Fixed(prob_V):
            return len(prob_V), None
        case HiddenTarget(hidden_ND, head):
            return head.vocab, len(hidden_ND)
        case Dense(logits_NV):
            return logits_NV.shape[1], len(logits_NV)
        case TopK(ids_NK, vocab=teacher_vocab) | Sampled(ids_NK, vocab=teacher_vocab):
            return teacher_vocab, len(ids_NK)
        case MixtureTarget(share_NM=share_NM):
            return vocab, len(share_NM)
        case Uniform():
            return vocab, None


def usable(target: Target) -> Tensor | None:
    """Return a mask of the rows that a target teaches; None for all."""
    return target.ids_N >= 0 if isinstance(target, Label) else None


def log_probs(
    target: Target, rows_n: Int[Tensor, " n"], like_nV: Float[Tensor, "n V"], temperature: float
) -> Float[Tensor, "n V"]:
    """Return logarithms of what a target gives every token, for some rows.

    Args:
        target: The target.
        rows_n: Which rows.
        like_nV: A tensor of the wanted shape, dtype and device; it is not changed.
        temperature: By which logits are divided first.

    Returns:
        A new tensor; tokens that cannot be have a very low finite number.
    """
    n, vocab = like_nV.shape
    low = torch.finfo(like_nV.dtype).min
    match target:
        case HiddenTarget(hidden_ND, head, lowered_N, by):
            z_nV = raw_logits(head, hidden_ND[rows_n].detach()).to(like_nV.dtype)
            if head.softcap is not None:
                z_nV = z_nV.div_(head.softcap).tanh_().mul_(head.softcap)
            if lowered_N is not None:
                z_nV[torch.arange(n, device=z_nV.device), lowered_N[rows_n]] -= by
            if temperature != 1:
                z_nV = z_nV.div_(temperature)
            return z_nV.log_softmax(-1)
        case Dense(logits_NV):
            z_nV = logits_NV[rows_n].detach().to(like_nV.dtype)
            return (z_nV / temperature).log_softmax(-1).clamp_(min=low)
        case Fixed(prob_V):
            log_V = prob_V.detach().to(like_nV.dtype).log() / temperature
            return log_V.log_softmax(-1).clamp(min=low).repeat(n, 1)
        case Uniform():
            return torch.full_like(like_nV, -math.log(vocab))
        case Label(ids_N):
            return torch.full_like(like_nV, low).scatter_(1, ids_N[rows_n, None], 0.0)
        case TopK(ids_NK):
            logp_nK, tail_n = spread(target, rows_n, like_nV.dtype)
            out_nV = tail_n.log().clamp(min=low)[:, None].repeat(1, vocab)
            return out_nV.scatter_(1, ids_NK[rows_n].long(), logp_nK)
        case Sampled(ids_NK):
            share_nK = shares(target, rows_n, like_nV.dtype)
            out_nV = torch.zeros_like(like_nV).scatter_add_(1, ids_NK[rows_n].long(), share_nK)
            return out_nV.log_().clamp_(min=low)
        case MixtureTarget(parts, share_NM):
            log_nM = share_NM[rows_n].to(like_nV.dtype).log().clamp(min=low)
            out_nV = torch.full_like(like_nV, low)
            for i, part in enumerate(parts):
                more_nV = log_probs(part, rows_n, like_nV, temperature).add_(log_nM[:, i, None])
                out_nV = torch.logaddexp(out_nV, more_nV.clamp_(min=low))
            return out_nV


def spread(
    target: TopK, rows_n: Int[Tensor, " n"], dtype: torch.dtype
) -> tuple[Float[Tensor, "n K"], Float[Tensor, " n"]]:
    """Return the listed logarithms, and the probability of each token that is not listed.

    What the listed tokens leave of the probability is spread evenly over the V - K others.

    Args:
        target: The likeliest tokens of N rows.
        rows_n: Which rows.
        dtype: Of the result.
    """
    logp_nK = target.logp_NK[rows_n].to(dtype)
    others = target.vocab - logp_nK.shape[1]
    if target.tail_N is None:
        left_n = 1 - logp_nK.exp().sum(-1)
    else:
        left_n = target.tail_N[rows_n].to(dtype)
    # Never quite zero, so that a reverse KL stays finite.
    return logp_nK, (left_n / others).clamp(min=1e-30) if others else torch.zeros_like(left_n)


def shares(target: Sampled, rows_n: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n K"]:
    """Return which share of a row's samples fell on each of its tokens.

    Args:
        target: Sampled tokens of N rows and how often each was sampled.
        rows_n: Which rows.
        dtype: Of the result.
    """
    count_nK = target.count_NK[rows_n].to(dtype)
    return count_nK / count_nK.sum(-1, keepdim=True)


def raw_logits(head: Head, hidden_nD: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
    """Return new logits before the soft cap, in the precision the head itself multiplies in."""
    z_nV = hidden_nD.to(head.weight_VD.dtype) @ head.weight_VD.detach().T
    if head.bias_V is not None:
        z_nV = z_nV.add_(head.bias_V.detach())
    return z_nV.mul_(head.scale) if head.scale != 1 else z_nV


def as_kinds(masks: Sequence[Tensor]) -> Int[Tensor, " N"]:
    """Return which target each row picks: the first mask it is in, or -1 for none."""
    kinds_N = torch.full_like(masks[0], -1, dtype=torch.long)
    for i in reversed(range(len(masks))):
        kinds_N = kinds_N.masked_fill(masks[i], i)
    return kinds_N
