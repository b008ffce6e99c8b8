"""Liger is asked only where it computes the same thing, and believed only after it agreed.

There is no GPU here: liger is a stand-in, and the question of the device is answered yes. The
released kernel is compared by `make liger-test`.

Shape legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from excise.models.head import Head
from excise.train.vocab import HiddenTarget, chunked_kl, chunked_nll, chunked_uniform, liger

N, D, V = 11, 5, 17
MODULE = "liger_kernel.ops.fused_linear_cross_entropy"


@dataclass
class Fake:
    """A stand-in for liger's function, with the arguments of its releases.

    Attributes:
        factor: By which its sum is off.
        calls: Arguments of every call but those of the check.
    """

    factor: float = 1.0
    calls: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def forward(
        ctx: Any, _input: Tensor, weight: Tensor, target: Tensor, ce_weight: Any = None,
        bias: Any = None, ignore_index: int = -100, lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0, reduction: str = "mean", softcap: Any = None,
        return_z_loss: bool = False, accum_dtype: Any = None,
    ) -> Any:  # fmt: skip
        """Show the names of the arguments."""

    def apply(
        self, _input: Tensor, weight: Tensor, target: Tensor, ce_weight: Any, bias: Any,
        ignore_index: int, lse: float, smoothing: float, reduction: str, softcap: Any, z: bool,
        accum_dtype: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert (ce_weight, lse, smoothing, softcap, z) == (None, 0.0, 0.0, None, False)
        if _input.shape[0] != 9:  # of the check
            self.calls.append({"rows": len(_input), "accum": accum_dtype, "reduction": reduction})
        logits_NV = F.linear(_input, weight, bias)
        total = F.cross_entropy(logits_NV, target, reduction=reduction, ignore_index=ignore_index)
        return total * self.factor, None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    made = Fake()
    for name in ("liger_kernel", "liger_kernel.ops", MODULE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(
        sys.modules[MODULE], "LigerFusedLinearCrossEntropyFunction", made, raising=False
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(liger, "on_gpu", lambda tensors: True)
    clear()
    yield made
    clear()


def clear() -> None:
    liger._function.cache_clear()
    liger._agrees.cache_clear()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=draw).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=draw).to(dtype).requires_grad_()
    target_N = torch.arange(N).masked_fill(torch.arange(N) % 4 == 1, -100)
    return hidden_ND, weight_VD, target_N


def test_liger_takes_cross_entropy_and_drops_rows_first(fake: Fake) -> None:
    hidden_ND, weight_VD, target_N = inputs()
    head = Head(weight_VD, torch.zeros(V))
    total, count = chunked_nll(hidden_ND, head, target_N)
    assert fake.calls == [{"rows": 8, "accum": torch.float32, "reduction": "sum"}]
    ours, own_count = chunked_nll(hidden_ND, head, target_N, engine="torch")
    assert count == own_count == 8
    leaves = [hidden_ND, weight_VD]
    pairs = zip(torch.autograd.grad(total, leaves), torch.autograd.grad(ours, leaves), strict=True)
    for a, b in [(total, ours), *pairs]:
        assert torch.allclose(a, b, atol=1e-5)
    assert len(fake.calls) == 1


def test_liger_is_not_asked_where_it_computes_another_thing(fake: Fake) -> None:
    hidden_ND, weight_VD, target_N = inputs()
    plain = Head(weight_VD)
    chunked_nll(hidden_ND, Head(weight_VD, softcap=30.0), target_N)
    chunked_nll(hidden_ND, Head(weight_VD, scale=0.5), target_N)
    chunked_nll(hidden_ND, Head(weight_VD, torch.zeros(V).double()), target_N)
    chunked_nll(hidden_ND.detach(), plain, target_N)
    chunked_nll(hidden_ND, plain, torch.full((N,), -100))
    chunked_kl(hidden_ND, plain, vocab_target(hidden_ND))
    chunked_uniform(hidden_ND, plain)
    with torch.no_grad():
        chunked_nll(hidden_ND, plain, target_N)
    double_ND, double_VD, _ = inputs(torch.float64)
    chunked_nll(double_ND, Head(double_VD), target_N)
    assert fake.calls == []
    chunked_nll(hidden_ND, plain, target_N)
    assert len(fake.calls) == 1


def vocab_target(hidden_ND: Tensor) -> Any:
    return HiddenTarget(hidden_ND.detach(), Head(torch.ones(V, D)))


def test_a_release_that_gives_other_numbers_is_not_believed(fake: Fake) -> None:
    fake.factor = 1.01
    hidden_ND, weight_VD, target_N = inputs()
    total, _ = chunked_nll(hidden_ND, Head(weight_VD), target_N)
    ours, _ = chunked_nll(hidden_ND, Head(weight_VD), target_N, engine="torch")
    assert fake.calls == []
    assert torch.equal(total, ours)


def test_a_release_that_adds_weights_up_in_half_precision_is_not_used(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "forward", lambda ctx, _input, weight, target: None, raising=False)
    hidden_ND, weight_VD, target_N = inputs()
    chunked_nll(hidden_ND, Head(weight_VD), target_N)
    assert fake.calls == []


def test_without_liger_or_a_gpu_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, weight_VD, target_N = inputs()
    clear()
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: pytest.fail("looked for it on the CPU")
    )
    chunked_nll(hidden_ND, Head(weight_VD), target_N)
    monkeypatch.setattr(liger, "on_gpu", lambda tensors: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    total, count = chunked_nll(hidden_ND, Head(weight_VD), target_N)
    assert count == 8
    assert float(total.detach()) > 0
    clear()
