"""`fit` against ten-line loops written without it: the weights must be the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.train.fit import FitConfig, Term, fit

STEPS = 20


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def _data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 12, 6, generator=g).to(dtype)
    return x, torch.randn(STEPS, 12, 3, generator=g).to(dtype)


def _fitted(config: FitConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    model, (x, y) = _model(dtype), _data(dtype)

    def loss(m: nn.Module, step: int) -> dict[str, Term]:
        # A mean in the model's own dtype, as the reference loops take it.
        return {"mse": Term(((m(x[step]) - y[step]) ** 2).mean(), 1.0)}

    list(fit(model, lambda step: [step], loss, config, Context(work=Path("unused"))))
    return model


def _reference(optimizer: Any, model: nn.Module, clip: float = 0.0) -> nn.Module:
    x, y = _data(next(model.parameters()).dtype)
    for step in range(STEPS):
        loss = ((model(x[step]) - y[step]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


class HubAdamW:
    """AdamW as the hub's library published it until 4.50, written down from its formula."""

    def __init__(self, params: Iterable[Tensor], lr: float, eps: float, decay: float) -> None:
        self.params, self.lr, self.eps, self.decay = list(params), lr, eps, decay
        self.t = 0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            assert p.grad is not None
            m.mul_(0.9).add_(p.grad, alpha=1.0 - 0.9)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=1.0 - 0.999)
            size = self.lr * math.sqrt(1.0 - 0.999**self.t) / (1.0 - 0.9**self.t)
            p.addcdiv_(m, v.sqrt().add_(self.eps), value=-size)
            if self.decay > 0:
                p.add_(p, alpha=-self.lr * self.decay)


def _optimizer(name: str, model: nn.Module, lr: float, wd: float) -> Any:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=wd, foreach=False)
    if name == "hf_adamw":
        return HubAdamW(model.parameters(), lr=lr, eps=1e-6, decay=wd)
    return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=wd, foreach=False)


def _distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "hf_adamw", "sgd"])
def test_the_weights_are_those_of_a_plain_loop(name: Any, wd: float, dtype: torch.dtype) -> None:
    config = FitConfig(steps=STEPS, lr=1e-2, optimizer=name, weight_decay=wd, master="model")
    reference = _model(dtype)
    _reference(_optimizer(name, reference, 1e-2, wd), reference)
    assert _distance(_fitted(config, dtype), reference) == 0


def test_clipping_is_torchs() -> None:
    config = FitConfig(steps=STEPS, lr=1e-2, optimizer="sgd", clip=0.1)
    reference = _model()
    _reference(_optimizer("sgd", reference, 1e-2, 0.0), reference, clip=0.1)
    fitted = _fitted(config)
    assert _distance(fitted, reference) < 1e-7
    assert _distance(fitted, _fitted(config.model_copy(update={"clip": 0.0}))) > 1e-3


def test_the_two_adamws_differ() -> None:
    """Negative control: parity with one is not parity with the other."""
    config = FitConfig(steps=STEPS, lr=1e-2, optimizer="hf_adamw", eps=1e-3)
    reference = _model()
    _reference(
        torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=1e-3, weight_decay=0), reference
    )
    fitted = _fitted(config)
    moved = _distance(reference, _model())
    assert _distance(fitted, reference) > 0.01 * moved


def test_float32_masters_equal_training_a_float32_copy() -> None:
    """The step is taken in float32 on gradients of the rounded weights."""
    config = FitConfig(steps=STEPS, lr=1e-3)
    x, y = _data(torch.bfloat16)
    low = _model(torch.bfloat16)
    master = copy.deepcopy(low).float()
    optimizer = torch.optim.AdamW(master.parameters(), lr=1e-3, weight_decay=0, foreach=False)
    for step in range(STEPS):
        with torch.no_grad():
            for p, q in zip(low.parameters(), master.parameters(), strict=True):
                p.copy_(q)
        low.zero_grad()
        ((low(x[step]) - y[step]) ** 2).mean().backward()
        for p, q in zip(low.parameters(), master.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
    fitted = _fitted(config, torch.bfloat16)
    assert _distance(fitted, master.bfloat16()) == 0
