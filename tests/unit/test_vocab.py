"""Losses formed in chunks are the plain ones, in value and gradient, and never hold the logits.

Shape legend: B rows, T tokens, N tokens, D hidden size, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from excise import losses
from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.models.head import Head
from excise.train import vocab
from excise.train.vocab import (
    SKIP,
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
)

N, D, V = 13, 6, 29
ROWS = 4 * vocab.BUFFERS * V * 8
"""Bytes of a chunk of four rows in float64: 13 rows do not divide by it."""
NEAR = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def student(dtype: torch.dtype, cap: float | None, bias: bool) -> tuple[Tensor, Head]:
    hidden_ND = draw(N, D, seed=1).to(dtype).requires_grad_()
    weight_VD = draw(V, D, seed=2).to(dtype).requires_grad_()
    bias_V = draw(V, seed=3).to(dtype).requires_grad_() if bias else None
    return hidden_ND, Head(weight_VD, bias_V, cap, scale=0.7 if bias else 1.0)


def teacher(dtype: torch.dtype, cap: float | None) -> HiddenTarget:
    return HiddenTarget(
        draw(N, 4, seed=4, dtype=dtype), Head(draw(V, 4, seed=5).to(dtype), None, cap)
    )


def same(
    ours: losses.Summed, plain: losses.Summed, hidden_ND: Tensor, head: Head, near: float
) -> None:
    leaves = [t for t in (hidden_ND, head.weight_VD, head.bias_V) if t is not None]
    assert ours[1] == plain[1]
    got, wanted = ours[0], plain[0]
    size = max(1.0, abs(wanted.item()))
    assert abs(got.item() - wanted.item()) <= near * size
    # A factor, as a training loop's division by the count.
    pairs = zip(
        torch.autograd.grad(got * 0.3, leaves), torch.autograd.grad(wanted * 0.3, leaves),
        strict=True,
    )  # fmt: skip
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= near * max(1.0, float(b.abs().max()))


MASK_N = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
CASES = [(None, False), (None, True), (3.0, False), (3.0, True)]


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(("cap", "bias"), CASES)
def test_cross_entropy_is_the_plain_one(dtype: torch.dtype, cap: float | None, bias: bool) -> None:
    hidden_ND, head = student(dtype, cap, bias)
    ids_BT = torch.randint(V, (1, N + 1), generator=torch.Generator().manual_seed(6))
    target_BT = torch.cat([torch.zeros(1, dtype=torch.bool), MASK_N])[None]
    batch = Batch(ids_BT, torch.ones_like(target_BT), target_BT, ids_BT * 0, ("u",))
    # The plain loss reads logits of all T positions, the last of which predicts nothing.
    last_1D = torch.zeros(1, D, dtype=dtype)
    padded_ND = torch.cat([hidden_ND, last_1D])
    plain = losses.nll(head.logits(padded_ND)[None], batch)
    ours = vocab.chunked_nll(padded_ND, head, vocab.next_tokens(batch), chunk_bytes=ROWS)
    same(ours, plain, hidden_ND, head, NEAR[dtype])


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(("cap", "bias"), CASES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergences_are_the_plain_ones(
    dtype: torch.dtype, cap: float | None, bias: bool, direction: KLDirection
) -> None:
    hidden_ND, head = student(dtype, cap, bias)
    goal = teacher(dtype, 2.0 if cap else None)
    function = losses.forward_kl if direction == "forward" else losses.reverse_kl
    for temperature in (1.0, 2.5):
        logits_1NV = head.logits(hidden_ND)[None] / temperature
        goal_1NV = goal.head.logits(goal.hidden_ND)[None] / temperature
        plain = function(goal_1NV, logits_1NV, MASK_N[None])
        ours = vocab.chunked_kl(
            hidden_ND, head, goal, direction=direction, temperature=temperature, mask_N=MASK_N,
            chunk_bytes=ROWS,
        )  # fmt: skip
        same(ours, plain, hidden_ND, head, NEAR[dtype])


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("cap", [None, 3.0])
def test_uniform_targets_are_the_plain_ones(dtype: torch.dtype, cap: float | None) -> None:
    hidden_ND, head = student(dtype, cap, bias=False)
    both: dict[KLDirection, Any] = {
        "forward": losses.kl_to_uniform,
        "reverse": losses.negative_entropy,
    }
    for direction, function in both.items():
        plain = function(head.logits(hidden_ND)[None], MASK_N[None])
        ours = vocab.chunked_uniform(
            hidden_ND,
            head,
            direction=direction,
            mask_N=MASK_N,
            chunk_bytes=ROWS,
        )
        same(ours, plain, hidden_ND, head, NEAR[dtype])


@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("chunk", [1, 5, 12, 13, 99])
def test_any_cut_into_chunks_gives_the_same(rows: int, chunk: int) -> None:
    hidden_ND, head = student(torch.float64, 3.0, bias=True)
    goal = teacher(torch.float64, None)
    goal = HiddenTarget(goal.hidden_ND[:rows], goal.head)
    logits_1NV = head.logits(hidden_ND[:rows])[None]
    goal_1NV = goal.head.logits(goal.hidden_ND)[None]
    plain = losses.forward_kl(goal_1NV, logits_1NV, torch.ones(1, rows, dtype=torch.bool))
    one = vocab.BUFFERS * V * 8
    ours = vocab.chunked_kl(hidden_ND[:rows], head, goal, chunk_bytes=one * chunk)
    same(ours, plain, hidden_ND, head, 1e-10)


def every_target() -> dict[str, tuple[Target, Tensor]]:
    """Return each target with its distribution, or for draws the share of each token."""
    logits_NV = draw(N, V, seed=7)
    p_NV = logits_NV.softmax(-1)
    top = p_NV.topk(5)
    tail_N1 = (1 - top.values.sum(-1, keepdim=True)) / (V - 5)
    spread_NV = tail_N1.expand(N, V).scatter(1, top.indices, top.values)
    ids_NK = torch.stack(
        [torch.randperm(V, generator=torch.Generator().manual_seed(i))[:3] for i in range(N)]
    )
    count_NK = torch.tensor([[3, 1, 0]]).expand(N, 3)
    drawn_NV = torch.zeros(N, V, dtype=torch.float64).scatter(1, ids_NK, count_NK.double() / 4)
    given_V = draw(V, seed=8).softmax(-1)
    share_NM = draw(N, 2, seed=9).softmax(-1)
    mixed_NV = share_NM[:, :1] * p_NV + share_NM[:, 1:] / V
    label_N = torch.arange(N) % V
    return {
        "label": (Label(label_N), torch.nn.functional.one_hot(label_N, V).double()),
        "uniform": (Uniform(), torch.full((N, V), 1 / V, dtype=torch.float64)),
        "given": (Fixed(given_V * 7), given_V.expand(N, V)),
        "dense": (Dense(logits_NV), p_NV),
        "topk": (TopK(top.indices, top.values.log(), V), spread_NV),
        "sampled": (Sampled(ids_NK, count_NK, V), drawn_NV),
        "mixture": (MixtureTarget((Dense(logits_NV), Uniform()), share_NM), mixed_NV),
    }


@pytest.mark.parametrize("name", list(every_target()))
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_every_target_is_its_distribution(name: str, direction: KLDirection) -> None:
    target, p_NV = every_target()[name]
    hidden_ND, head = student(torch.float64, 3.0, bias=True)
    if direction == "reverse" and name in ("label", "sampled"):
        with pytest.raises(UserError, match="no reverse KL"):
            vocab.chunked_kl(hidden_ND, head, target, direction=direction)
        return
    logq_NV = head.logits(hidden_ND).log_softmax(-1)
    if direction == "reverse":
        each_N = (logq_NV.exp() * (logq_NV - p_NV.log())).sum(-1)
    else:
        each_N = torch.nn.functional.kl_div(logq_NV, p_NV, reduction="none").sum(-1)
        if name == "sampled":  # the value is the cross-entropy
            each_N = each_N - torch.xlogy(p_NV, p_NV).sum(-1)
    ours = vocab.chunked_kl(
        hidden_ND, head, target, direction=direction, mask_N=MASK_N, chunk_bytes=ROWS
    )
    plain = (each_N * MASK_N).sum(), float(MASK_N.sum())
    same(ours, plain, hidden_ND, head, 1e-10)


def test_a_splice_is_the_sum_of_its_rows() -> None:
    made = every_target()
    names = ["label", "uniform", "given", "dense", "topk", "sampled"]
    targets = [made[name][0] for name in names]
    kinds_N = torch.tensor([0, 1, 2, 3, SKIP, 4, 5, 1, SKIP, 3, 3, 0, 1])
    hidden_ND, head = student(torch.float64, None, bias=True)
    parts = [
        vocab.chunked_kl(hidden_ND, head, target, mask_N=kinds_N == i)
        for i, target in enumerate(targets)
    ]
    apart = sum((p[0] for p in parts), torch.zeros(())), sum(p[1] for p in parts)
    ours = vocab.chunked_splice(hidden_ND, head, kinds_N, targets, chunk_bytes=ROWS)
    assert ours[1] == 11
    same(ours, apart, hidden_ND, head, 1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    made = every_target()
    targets = [made[name][0] for name in ("label", "dense", "topk", "given")]
    hidden_ND, head = student(torch.float64, 3.0, bias=True)
    kinds_N = torch.arange(N) % 5 - 1

    def splice(
        direction: KLDirection, only: list[Target], kinds_N: Tensor
    ) -> Callable[..., Tensor]:
        def value(h_ND: Tensor, w_VD: Tensor, b_V: Tensor) -> Tensor:
            own = Head(w_VD, b_V, head.softcap, head.scale)
            return vocab.chunked_splice(
                h_ND, own, kinds_N, only, direction=direction, temperature=1.0, chunk_bytes=ROWS
            )[0]

        return value

    leaves = (hidden_ND, head.weight_VD, head.bias_V)
    for direction, only, kinds in (
        ("forward", targets, kinds_N),
        ("reverse", [targets[1], Uniform()], kinds_N.clamp(max=1)),
    ):
        assert torch.autograd.gradcheck(splice(direction, only, kinds), leaves)  # type: ignore[arg-type]


def test_both_uses_of_a_tied_head_add_up() -> None:
    ids_N = torch.arange(N) % V
    label_N = (ids_N * 5 + 1) % V
    weight_VD = draw(V, D, seed=2).requires_grad_()
    hidden_ND = torch.tanh(weight_VD[ids_N])
    ours, _ = vocab.chunked_nll(hidden_ND, Head(weight_VD, softcap=2.0), label_N, chunk_bytes=ROWS)
    logits_NV = Head(weight_VD, softcap=2.0).logits(torch.tanh(weight_VD[ids_N]))
    plain = torch.nn.functional.cross_entropy(logits_NV, label_N, reduction="sum")
    (got,) = torch.autograd.grad(ours, weight_VD)
    (wanted,) = torch.autograd.grad(plain, weight_VD)
    assert float((got - wanted).abs().max()) < 1e-10


def test_half_precision_adds_weights_up_in_float32() -> None:
    hidden_ND = draw(4096, D, seed=1).bfloat16().requires_grad_()
    weight_VD = draw(V, D, seed=2).bfloat16().requires_grad_()
    label_N = torch.arange(4096) % V
    ours, _ = vocab.chunked_nll(hidden_ND, Head(weight_VD), label_N, chunk_bytes=1 << 14)
    assert ours.dtype == torch.float32
    wide = [t.detach().float().requires_grad_() for t in (hidden_ND, weight_VD)]
    plain = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, label_N, reduction="sum")
    got = torch.autograd.grad(ours, [hidden_ND, weight_VD])
    wanted = torch.autograd.grad(plain, wide)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        # Beyond the logits' own rounding nothing is lost, whatever the number of chunks.
        assert float((a.float() - b).abs().max()) < 1e-2 * float(b.abs().max())


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_no_tensor_holds_tokens_times_vocabulary() -> None:
    rows, words = 200, 700
    hidden_ND = draw(rows, D, seed=1).requires_grad_()
    weight_VD = draw(words, D, seed=2).requires_grad_()
    goal = HiddenTarget(draw(rows, D, seed=3), Head(draw(words, D, seed=4), softcap=5.0))
    with Largest() as seen:
        total, _ = vocab.chunked_kl(
            hidden_ND, Head(weight_VD, softcap=5.0), goal, chunk_bytes=vocab.BUFFERS * words * 8 * 9
        )
        total.backward()
    assert seen.numel == 9 * words
    assert rows * words > 10 * seen.numel


def test_skipped_rows_are_dropped_before_the_head() -> None:
    hidden_ND, head = student(torch.float64, None, bias=False)
    with torch.no_grad():
        hidden_ND[~MASK_N] = math.nan
    for total, count in (
        vocab.chunked_uniform(hidden_ND, head, mask_N=MASK_N),
        vocab.chunked_nll(hidden_ND, head, torch.where(MASK_N, 3, -100)),
    ):
        assert count == MASK_N.sum()
        dh_ND, dw_VD = torch.autograd.grad(total, [hidden_ND, head.weight_VD])
        assert dw_VD.isfinite().all()
        assert (dh_ND[~MASK_N] == 0).all()
        assert (dh_ND[MASK_N] != 0).any()


def test_nothing_to_teach_is_zero_with_a_graph() -> None:
    hidden_ND, head = student(torch.float32, None, bias=False)
    total, count = vocab.chunked_nll(hidden_ND, head, torch.full((N,), -100))
    total.backward()
    assert (total.item(), count) == (0.0, 0.0)
    assert hidden_ND.grad is not None
    assert not hidden_ND.grad.any()


def test_without_gradients_none_are_formed() -> None:
    hidden_ND, head = student(torch.float64, None, bias=False)
    with torch.no_grad():
        total, _ = vocab.chunked_uniform(hidden_ND, head)
    assert not total.requires_grad
    only, _ = vocab.chunked_uniform(hidden_ND.detach(), head)
    (dw_VD,) = torch.autograd.grad(only, [head.weight_VD])
    assert dw_VD.any()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (HiddenTarget(torch.zeros(N, 2), Head(torch.zeros(V + 1, 2))), "vocabulary of 30 tokens"),
        (HiddenTarget(torch.zeros(N - 1, 2), Head(torch.zeros(V, 2))), "has 12 rows"),
        (TopK(torch.zeros(N, 1).long(), torch.zeros(N, 1), V - 1), "vocabulary of 28 tokens"),
        (TopK(torch.zeros(N, 1).long(), torch.zeros(N, 1), V, 2.0), "temperature 2"),
        (MixtureTarget((Uniform(),), torch.ones(N, 2) / 2), "2 columns of shares"),
        (MixtureTarget((Uniform(), Fixed(torch.ones(5))), torch.ones(N, 2) / 2), "vocabulary of 5"),
    ],
)
def test_targets_that_do_not_fit_are_refused(target: Target, says: str) -> None:
    hidden_ND, head = student(torch.float32, None, bias=False)
    with pytest.raises(UserError, match=says):
        vocab.chunked_kl(hidden_ND, head, target)


def test_other_mistakes_are_refused() -> None:
    hidden_ND, head = student(torch.float32, None, bias=False)
    prob_V = torch.ones(V).index_fill(0, torch.tensor([3]), 0.0)
    with pytest.raises(UserError, match="infinite; smooth it"):
        vocab.chunked_kl(hidden_ND, head, Fixed(prob_V), direction="reverse")
    with pytest.raises(UserError, match="picks target 1 and there are 1"):
        vocab.chunked_splice(hidden_ND, head, torch.ones(N).long(), [Uniform()])
    with pytest.raises(UserError, match="one per token"):
        vocab.chunked_nll(hidden_ND, head, torch.zeros(N + 1).long())
    with pytest.raises(UserError, match="must be more than 0"):
        vocab.chunked_kl(hidden_ND, head, Uniform(), temperature=0.0)
    with pytest.raises(UserError, match="soft cap"):
        Head(torch.zeros(V, D), softcap=0.0)


def test_a_token_that_cannot_be_costs_nothing() -> None:
    hidden_ND, head = student(torch.float64, None, bias=False)
    logits_NV = draw(N, V, seed=7)
    logits_NV[:, 4] = -math.inf
    total, _ = vocab.chunked_kl(hidden_ND, head, Dense(logits_NV))
    p_NV = logits_NV.softmax(-1)
    plain = torch.nn.functional.kl_div(
        head.logits(hidden_ND).log_softmax(-1), p_NV, reduction="sum"
    )
    assert total.item() == pytest.approx(plain.item(), abs=1e-10)


def test_kinds_of_masks() -> None:
    first_N, second_N = torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([1, 1, 0, 0]).bool()
    assert vocab.as_kinds([first_N, second_N]).tolist() == [0, 1, 0, SKIP]
