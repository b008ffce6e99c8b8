"""Losses as pure functions of tensors, for the library's own methods and for anybody's loop.

Every loss returns `(sum, count)`: the sum over what is scored and how much that was, so that the
caller can divide by the count of the whole batch, however it was cut into micro-batches or
spread over processes. Half-precision inputs are computed in float32 unless `upcast=False`.

Shape legend: B rows, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

Summed = tuple[Tensor, float]
"""A differentiable scalar sum and the number of things it sums over."""


class TokenBatch(Protocol):
    """What `nll` needs of a batch; `excise.data.stream.Batch` is one."""

    @property
    def ids_BT(self) -> Int[Tensor, "B T"]:
        """Token ids."""
        ...

    @property
    def target_BT(self) -> Bool[Tensor, "B T"]:
        """True where the token is scored."""
        ...


def _wide(x: Tensor, upcast: bool) -> Tensor:
    """Return `x` in float32 when it is half precision and `upcast` asks for it."""
    return x.float() if upcast and x.dtype in (torch.float16, torch.bfloat16) else x


def _masked(value_BT: Tensor, mask_BT: Tensor, count: int | None = None) -> Summed:
    """Sum where the mask is set; what lies outside may be infinite or NaN without harm.

    Args:
        value_BT: What is summed.
        mask_BT: Where.
        count: How often the mask is set, where that is known without asking the device.
    """
    mask_BT = mask_BT.bool()
    total = value_BT.masked_fill(~mask_BT, 0).sum()
    return total, float(mask_BT.sum() if count is None else count)


def _known_count(batch: TokenBatch) -> int | None:
    """Return how many scored tokens are predicted, of a batch that counted them on the host."""
    count: int | None = getattr(batch, "num_predicted", None)
    return count


def predicting(target_BT: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return the positions whose logits predict the scored tokens: `target_BT` one to the left.

    Args:
        target_BT: True where a token is scored; position t is predicted from t - 1.
    """
    return F.pad(target_BT[:, 1:], (0, 1), value=False)


def token_nll(
    logits_BTV: Float[Tensor, "B T V"], ids_BT: Int[Tensor, "B T"], *, upcast: bool = True
) -> Float[Tensor, "B T"]:
    """Return the negative log-likelihood of every token but the first, in nats.

    Args:
        logits_BTV: Logits of a causal model; position t - 1 predicts token t.
        ids_BT: The tokens.
        upcast: Whether to compute half-precision logits in float32.

    Returns:
        `nll_BT`, aligned with `ids_BT`; column 0 is 0 because nothing predicts it.
    """
    logits_BTV = _wide(logits_BTV[:, :-1], upcast)
    nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return F.pad(nll_BT, (1, 0))


def nll(logits_BTV: Float[Tensor, "B T V"], batch: TokenBatch, *, upcast: bool = True) -> Summed:
    """Return summed negative log-likelihood (nats) and number of the batch's scored tokens.

    Args:
        logits_BTV: Logits of a causal model on `batch.ids_BT`.
        batch: Ids and which of them are scored; nothing predicts the first token of a row.
        upcast: Whether to compute half-precision logits in float32.
    """
    target_BT = batch.target_BT.clone()
    target_BT[:, 0] = False
    nll_BT = token_nll(logits_BTV, batch.ids_BT, upcast=upcast)
    return _masked(nll_BT, target_BT, _known_count(batch))


def sequence_nll(
    logits_BTV: Float[Tensor, "B T V"], batch: TokenBatch, *, upcast: bool = True
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return the negative log-likelihood (nats) of each row's scored tokens, and their number.

    Args:
        logits_BTV: Logits of a causal model on `batch.ids_BT`.
        batch: Ids and which of them are scored; nothing predicts the first token of a row.
        upcast: Whether to compute half-precision logits in float32.
    """
    target_BT = batch.target_BT.clone()
    target_BT[:, 0] = False
    nll_BT = token_nll(logits_BTV, batch.ids_BT, upcast=upcast)
    return nll_BT.masked_fill(~target_BT, 0).sum(1), target_BT.sum(1).to(nll_BT.dtype)


def npo(nll_B: Float[Tensor, " B"], reference_B: Float[Tensor, " B"], beta: float) -> Summed:
    """Return -2/beta log sigmoid(beta (s - s0)), summed over sequences, and their number.

    Args:
        nll_B: Negative log-likelihood s of each sequence.
        reference_B: The same s0 of the model before the edit.
        beta: Inverse temperature.

    Source:
        NPO, arXiv 2404.05868.
    """
    return preference(nll_B - reference_B, beta)


def simnpo(
    nll_B: Float[Tensor, " B"], tokens_B: Float[Tensor, " B"], beta: float, delta: float = 0.0
) -> Summed:
    """Return -2/beta log sigmoid(beta (s / n - delta)), summed over sequences, and their number.

    Args:
        nll_B: Negative log-likelihood s of each sequence.
        tokens_B: Number n of its scored tokens.
        beta: Inverse temperature.
        delta: Margin, nats per token.

    Source:
        SimNPO, arXiv 2410.07163, where the margin is called gamma.
    """
    return preference(nll_B / tokens_B - delta, beta)


def dpo(
    preferred_B: Float[Tensor, " B"],
    rejected_B: Float[Tensor, " B"],
    preferred_reference_B: Float[Tensor, " B"],
    rejected_reference_B: Float[Tensor, " B"],
    beta: float,
) -> Summed:
    """Return -2/beta log sigmoid(beta ((l - l0) - (w - w0))), summed over pairs, and their number.

    Args:
        preferred_B: Negative log-likelihood w of each preferred answer.
        rejected_B: The same l of each rejected one.
        preferred_reference_B: w0, of the model before the edit.
        rejected_reference_B: l0, of the model before the edit.
        beta: Inverse temperature.

    Source:
        DPO, arXiv 2305.18290, times 2 / beta as in TOFU, arXiv 2401.06121.
    """
    further_B = rejected_B - rejected_reference_B
    return preference(further_B - (preferred_B - preferred_reference_B), beta)


def preference(margin_B: Float[Tensor, " B"], beta: float) -> Summed:
    """Return -2/beta log sigmoid(beta m), summed over margins, and their number.

    Args:
        margin_B: By how many nats each sequence is further from what is unwanted.
        beta: Inverse temperature.
    """
    return -2.0 / beta * F.logsigmoid(beta * margin_B).sum(), float(len(margin_B))


def kl_to_uniform(
    logits_BTV: Float[Tensor, "B T V"], mask_BT: Bool[Tensor, "B T"], *, upcast: bool = True
) -> Summed:
    """Return KL(uniform || p) in nats: `logsumexp(z) - mean(z) - log V`, zero at uniform.

    Args:
        logits_BTV: Logits.
        mask_BT: Which positions *of the logits* count; `predicting(target_BT)` takes those that
            predict scored tokens.
        upcast: Whether to compute half-precision logits in float32.

    Source:
        MaxEnt of UNDO, arXiv 2506.06278 (equal up to a constant to the mean over the vocabulary
        of -log p).
    """
    z_BTV = _wide(logits_BTV, upcast)
    kl_BT = z_BTV.logsumexp(-1) - z_BTV.mean(-1) - math.log(z_BTV.shape[-1])
    return _masked(kl_BT, mask_BT)


def negative_entropy(
    logits_BTV: Float[Tensor, "B T V"], mask_BT: Bool[Tensor, "B T"], *, upcast: bool = True
) -> Summed:
    """Return KL(p || uniform) in nats: `log V + sum p log p`, zero at uniform.

    Minimising it maximises entropy, the other MaxEnt of the literature; unlike `kl_to_uniform`
    its gradient vanishes where p is already certain.

    Args:
        logits_BTV: Logits.
        mask_BT: Which positions of the logits count.
        upcast: Whether to compute half-precision logits in float32.
    """
    logp_BTV = _wide(logits_BTV, upcast).log_softmax(-1)
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    return _masked(math.log(logits_BTV.shape[-1]) - entropy_BT, mask_BT)


def forward_kl(
    teacher_BTV: Float[Tensor, "B T V"],
    student_BTV: Float[Tensor, "B T V"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    upcast: bool = True,
) -> Summed:
    """Return KL(teacher || student) in nats; no gradient reaches the teacher.

    Args:
        teacher_BTV: Logits of the teacher.
        student_BTV: Logits of the student.
        mask_BT: Which positions of the logits count.
        upcast: Whether to compute half-precision logits in float32.

    Source:
        The distillation loss of UNDO, arXiv 2506.06278, at temperature 1.
    """
    t_BTV = _wide(teacher_BTV.detach(), upcast).log_softmax(-1)
    s_BTV = _wide(student_BTV, upcast).log_softmax(-1)
    return _masked((t_BTV.exp() * (t_BTV - s_BTV)).sum(-1), mask_BT)


def reverse_kl(
    teacher_BTV: Float[Tensor, "B T V"],
    student_BTV: Float[Tensor, "B T V"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    upcast: bool = True,
) -> Summed:
    """Return KL(student || teacher) in nats; no gradient reaches the teacher.

    The direction in which a student gives up what it cannot match (MiniLLM, arXiv 2306.08543).

    Args:
        teacher_BTV: Logits of the teacher.
        student_BTV: Logits of the student.
        mask_BT: Which positions of the logits count.
        upcast: Whether to compute half-precision logits in float32.
    """
    t_BTV = _wide(teacher_BTV.detach(), upcast).log_softmax(-1)
    s_BTV = _wide(student_BTV, upcast).log_softmax(-1)
    return _masked((s_BTV.exp() * (s_BTV - t_BTV)).sum(-1), mask_BT)


def _squared(a_BTD: Tensor, b_BTD: Tensor, mask_BT: Tensor, upcast: bool) -> Summed:
    """Sum squared differences over masked tokens and the hidden axis."""
    difference_BTD = _wide(a_BTD, upcast) - _wide(b_BTD.to(a_BTD.dtype), upcast)
    total, tokens = _masked(difference_BTD.square().sum(-1), mask_BT)
    return total, tokens * a_BTD.shape[-1]


def rmu_forget(
    hidden_BTD: Float[Tensor, "B T D"],
    control_D: Float[Tensor, " D"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    upcast: bool = True,
) -> Summed:
    """Return squared distance to the control vector and the number of entries it sums over.

    Args:
        hidden_BTD: Output of a block on forget text.
        control_D: Control vector `c * u / |u|`.
        mask_BT: Which tokens count.
        upcast: Whether to compute half-precision activations in float32.

    Source:
        arXiv 2403.03218, section 4; as in centerforaisafety/wmdp@bc5e1ba (MIT), rmu/unlearn.py,
        the mean runs over tokens and the hidden axis.
    """
    return _squared(hidden_BTD, control_D.expand_as(hidden_BTD), mask_BT, upcast)


def rmu_retain(
    hidden_BTD: Float[Tensor, "B T D"],
    frozen_BTD: Float[Tensor, "B T D"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    upcast: bool = True,
) -> Summed:
    """Return squared distance to the frozen model's activations and the number of entries.

    Args:
        hidden_BTD: Output of a block on retain text.
        frozen_BTD: The same of the frozen start; it receives no gradient.
        mask_BT: Which tokens count.
        upcast: Whether to compute half-precision activations in float32.

    Source:
        arXiv 2403.03218, section 4; as in centerforaisafety/wmdp@bc5e1ba (MIT), rmu/unlearn.py,
        the mean runs over tokens and the hidden axis, and alpha weighs this term alone.
    """
    return _squared(hidden_BTD, frozen_BTD.detach(), mask_BT, upcast)


def reroute(
    hidden_BTD: Float[Tensor, "B T D"],
    frozen_BTD: Float[Tensor, "B T D"],
    mask_BT: Bool[Tensor, "B T"],
) -> Summed:
    """Return the summed positive part of the cosine to frozen activations, and the tokens.

    Args:
        hidden_BTD: Output of a block.
        frozen_BTD: The same of the frozen start; it receives no gradient.
        mask_BT: Which tokens count.

    Source:
        Circuit breakers, arXiv 2406.04313, `relu(cosine_sim(rep_M, rep_cb))`.
    """
    cosine_BT = F.cosine_similarity(
        _wide(hidden_BTD, upcast=True), _wide(frozen_BTD.detach(), upcast=True), dim=-1
    )
    return _masked(cosine_BT.relu(), mask_BT)


def displacement(
    hidden_BTD: Float[Tensor, "B T D"],
    frozen_BTD: Float[Tensor, "B T D"],
    mask_BT: Bool[Tensor, "B T"],
) -> Summed:
    """Return the summed L2 distance of each token to frozen activations, and the tokens.

    Unlike `rmu_retain` it is not squared, so that its gradient does not fade near the goal.

    Args:
        hidden_BTD: Output of a block.
        frozen_BTD: The same of the frozen start; it receives no gradient.
        mask_BT: Which tokens count.

    Source:
        Circuit breakers, arXiv 2406.04313, `||rep_M - rep_cb||_2`.
    """
    apart_BTD = _wide(hidden_BTD, upcast=True) - _wide(frozen_BTD.detach(), upcast=True)
    return _masked(apart_BTD.norm(dim=-1), mask_BT)


def not_p(logits_BTV: Float[Tensor, "B T V"], batch: TokenBatch, *, floor: float = -5.0) -> Summed:
    """Return the summed `-log(1 - p)` of the batch's scored tokens, and their number.

    Args:
        logits_BTV: Logits of a causal model on `batch.ids_BT`.
        batch: Ids and which of them are scored.
        floor: Tokens with a smaller log p are unlikely enough and give 0; they are counted.

    Source:
        HarmBench's `log_1_minus_p_loss`, threshold -5, as in aengusl/latent-adversarial-training
        (MIT), latent_at/utils.py.
    """
    z_BTV = _wide(logits_BTV[:, :-1], upcast=True)
    ids_BT1 = batch.ids_BT[:, 1:, None]
    all_BT = z_BTV.logsumexp(-1)
    logp_BT = z_BTV.gather(-1, ids_BT1).squeeze(-1) - all_BT
    others_BT = z_BTV.scatter(-1, ids_BT1, float("-inf")).logsumexp(-1)
    loss_BT = (all_BT - others_BT).masked_fill(logp_BT < floor, 0)
    return _masked(loss_BT, batch.target_BT[:, 1:], _known_count(batch))


def mmd(
    one_ND: Float[Tensor, "N D"], two_ND: Float[Tensor, "N D"], *, kernels: int = 5
) -> Float[Tensor, ""]:
    """Return the squared maximum mean discrepancy of two sets of equally many points.

    The kernel is a sum of Gaussians whose widths double, centred on the mean squared distance of
    all points. A mean over pairs: it is not the mean of what parts of a batch give.

    Args:
        one_ND: Points.
        two_ND: As many others.
        kernels: Number of Gaussians.

    Source:
        RepNoise, arXiv 2405.14577; domenicrosati/representation-noising@a1c3298 (Apache-2.0),
        representation_noising/loss.py. Distances are formed from products, so that nothing of
        size N x N x D exists.
    """
    count = len(one_ND)
    all_ND = torch.cat([_wide(one_ND, upcast=True), _wide(two_ND, upcast=True)])
    gram_NN = all_ND @ all_ND.T
    square_N = gram_NN.diagonal()
    apart_NN = (square_N[:, None] + square_N[None] - 2 * gram_NN).clamp(min=0)
    width = apart_NN.detach().sum() / (4 * count**2 - 2 * count) / 2 ** (kernels // 2)
    alike_NN = torch.stack([(-apart_NN / (width * 2**i)).exp() for i in range(kernels)]).sum(0)
    within = alike_NN[:count, :count] + alike_NN[count:, count:]
    return (within - 2 * alike_NN[:count, count:]).mean()


def logit_norm(
    logits_BTV: Float[Tensor, "B T V"],
    mask_BT: Bool[Tensor, "B T"],
    *,
    squared: bool = True,
    upcast: bool = True,
) -> Summed:
    """Return summed lengths of the logits, squared or not, and how many positions that are.

    Args:
        logits_BTV: Logits.
        mask_BT: Which positions of the logits count.
        squared: Whether lengths are squared.
        upcast: Whether to compute half-precision logits in float32.

    Source:
        Squared: loss-free SSD, arXiv 2402.19308. Not squared: XLF of Potion, arXiv 2406.09173.
    """
    square_N = _wide(logits_BTV[mask_BT.bool()], upcast).square().sum(-1)
    return (square_N if squared else square_N.sqrt()).sum(), float(square_N.numel())


class _SquaredLogits(torch.autograd.Function):
    """h^T (W^T W) h for every token; gradients of h and W without any logits."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, gram_DD: Tensor) -> Tensor:
        """Return the squared length of W h for every h."""
        wide_ND = hidden_ND.float()
        ctx.save_for_backward(hidden_ND, weight_VD, gram_DD)
        return ((wide_ND @ gram_DD) * wide_ND).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return 2 g W^T W h, and 2 W (sum of g h h^T)."""
        hidden_ND, weight_VD, gram_DD = ctx.saved_tensors
        wide_ND = hidden_ND.float()
        scaled_ND = 2 * grad_N[:, None] * wide_ND
        outer_DD = (scaled_ND.T @ wide_ND).to(weight_VD.dtype)
        return (scaled_ND @ gram_DD).to(hidden_ND.dtype), weight_VD @ outer_DD, None


def head_norm(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    gram_DD: Float[Tensor, "D D"],
    *,
    squared: bool = True,
) -> Summed:
    """Return what `logit_norm` returns of the logits W h, which are never made.

    Args:
        hidden_ND: What goes into the head, at the positions that count.
        weight_VD: W, the head; it gets its gradient, summed with that of an embedding it is.
        gram_DD: W^T W in float32, computed once for as long as W stays.
        squared: Whether lengths are squared.

    Source:
        |W h|^2 = h^T (W^T W) h, whose gradients are 2 W^T W h and 2 W h h^T.
    """
    square_N = _SquaredLogits.apply(hidden_ND, weight_VD, gram_DD)
    return (square_N if squared else square_N.clamp(min=0).sqrt()).sum(), float(square_N.numel())
