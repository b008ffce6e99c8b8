"""Losses: closed forms, gradients against finite differences, masks and precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from excise import losses


@dataclass(frozen=True)
class _Batch:
    ids_BT: Tensor
    target_BT: Tensor


def _random(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


MASK = torch.tensor([[True, True, False, True], [False, True, True, False]])


def test_nll_is_shifted_and_masked() -> None:
    z = _random(2, 4, 5)
    ids = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    nll_BT = losses.token_nll(z, ids)
    assert nll_BT[:, 0].tolist() == [0, 0]
    for b in range(2):
        for t in range(1, 4):
            expected = -z[b, t - 1].log_softmax(-1)[ids[b, t]]
            torch.testing.assert_close(nll_BT[b, t], expected)
    total, count = losses.nll(z, _Batch(ids, MASK))
    chosen = MASK.clone()
    chosen[:, 0] = False  # nothing predicts the first token, whatever the mask says
    assert count == 4
    torch.testing.assert_close(total, nll_BT[chosen].sum())


def test_predicting_names_the_logits_behind_the_targets() -> None:
    assert losses.predicting(MASK).tolist() == [
        [True, False, True, False],
        [True, True, False, False],
    ]


def test_closed_forms() -> None:
    v = 7
    flat = torch.full((2, 4, v), 3.0, dtype=torch.float64)
    for f in (losses.kl_to_uniform, losses.negative_entropy):
        total, count = f(flat, MASK)
        assert count == 5
        assert abs(float(total)) < 1e-12
    # A coin with p = 0.9: both divergences by hand.
    z = torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand(1, 1, 2)
    one = torch.ones(1, 1, dtype=torch.bool)
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(losses.kl_to_uniform(z, one)[0]) == pytest.approx(kl)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert float(losses.negative_entropy(z, one)[0]) == pytest.approx(math.log(2) - entropy)
    u = torch.zeros(1, 1, 2, dtype=torch.float64)
    assert float(losses.forward_kl(u, z, one)[0]) == pytest.approx(kl)
    assert float(losses.reverse_kl(z, u, one)[0]) == pytest.approx(kl)
    assert float(losses.forward_kl(z, u, one)[0]) == pytest.approx(math.log(2) - entropy)
    assert float(losses.reverse_kl(u, z, one)[0]) == pytest.approx(math.log(2) - entropy)


def test_rmu_means_over_tokens_and_hidden_axis() -> None:
    h, control = _random(2, 4, 3), _random(3, seed=1)
    total, count = losses.rmu_forget(h, control, MASK)
    assert count == 5 * 3
    expected = torch.nn.functional.mse_loss(h[MASK], control.expand(5, 3))
    torch.testing.assert_close(total / count, expected)
    frozen = _random(2, 4, 3, seed=2)
    total, count = losses.rmu_retain(h, frozen, MASK)
    torch.testing.assert_close(total / count, torch.nn.functional.mse_loss(h[MASK], frozen[MASK]))


def _sum_of(f: Any, *rest: Any) -> Any:
    return lambda x: f(x, *rest)[0]


IDS = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
TEACHER = _random(2, 4, 5, seed=3)


@pytest.mark.parametrize(
    "f",
    [
        _sum_of(losses.nll, _Batch(IDS, MASK)),
        _sum_of(losses.kl_to_uniform, MASK),
        _sum_of(losses.negative_entropy, MASK),
        lambda x: losses.forward_kl(TEACHER, x, MASK)[0],
        lambda x: losses.reverse_kl(TEACHER, x, MASK)[0],
        _sum_of(losses.rmu_forget, _random(5, seed=4), MASK),
        _sum_of(losses.rmu_retain, TEACHER, MASK),
    ],
)
def test_gradients_match_finite_differences(f: Any) -> None:
    assert torch.autograd.gradcheck(f, (_random(2, 4, 5).requires_grad_(),))


def test_teachers_get_no_gradient() -> None:
    teacher, student = _random(2, 4, 5).requires_grad_(), _random(2, 4, 5, seed=1).requires_grad_()
    for f in (losses.forward_kl, losses.reverse_kl):
        f(teacher, student, MASK)[0].backward()
    losses.rmu_retain(student, teacher, MASK)[0].backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_what_the_mask_hides_may_be_broken() -> None:
    z = _random(2, 4, 5)
    z[~MASK] = float("nan")
    z.requires_grad_()
    total, _ = losses.kl_to_uniform(z, MASK)
    total.backward()
    assert bool(total.isfinite())
    assert z.grad is not None
    assert bool(z.grad[MASK].isfinite().all())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_unless_told_otherwise(half: torch.dtype) -> None:
    z = _random(2, 4, 5).to(half)
    wide, _ = losses.kl_to_uniform(z, MASK)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, losses.kl_to_uniform(z.float(), MASK)[0])
    assert losses.kl_to_uniform(z, MASK, upcast=False)[0].dtype == half
    assert losses.nll(z, _Batch(IDS, MASK), upcast=False)[0].dtype == half
    assert losses.rmu_forget(z, z[0, 0], MASK, upcast=False)[0].dtype == half
    assert losses.kl_to_uniform(_random(2, 4, 5), MASK)[0].dtype == torch.float64
