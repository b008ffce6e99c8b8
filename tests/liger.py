"""The real liger kernel beside our chunked cross-entropy, without a GPU.

Triton's interpreter runs the kernel's program on the CPU, so that what is checked is the released
kernel with our arguments: values and gradients, not speed. Run by `make liger-test`, which puts
liger and Triton into a folder of their own; `make test` does not need them.

Shape legend: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import os
import sys
from importlib.metadata import version

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from excise.models.head import Head
from excise.train.vocab import chunked_nll, liger

SHAPES = ((1, 4, 7), (13, 24, 129), (64, 16, 4099))
"""Rows, hidden size, vocabulary: odd ones, and a vocabulary beyond one block of the kernel's."""


def case(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Head, Tensor]:
    """Return hidden states, a head and targets of which every fifth is ignored."""
    n, d, v = shape
    draw = torch.Generator().manual_seed(n)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(dtype).requires_grad_()

    target_N = torch.randint(v, (n,), generator=draw)
    target_N = target_N.masked_fill(torch.arange(n) % 5 == 3, -100)
    return tensor(n, d), Head(tensor(v, d), tensor(v) if bias else None), target_N


def farthest(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> float:
    """Return the largest relative difference between liger and the chunks, gradients included."""
    hidden_ND, head, target_N = case(shape, dtype, bias)
    leaves = [t for t in (hidden_ND, head.weight_VD, head.bias_V) if t is not None]
    found = []
    for engine in ("auto", "torch"):
        total, count = chunked_nll(hidden_ND, head, target_N, engine=engine)
        assert count == float((target_N >= 0).sum()), f"{engine} counted {count} rows"
        grads = torch.autograd.grad(total, leaves)
        found.append([total.detach().float(), *(g.float() for g in grads)])
    pairs = zip(*found, strict=True)
    return max(float((a - b).abs().max() / (b.abs().max() + 1e-6)) for a, b in pairs)


def main() -> int:
    """Compare all cases; 0 where all agree and a spoiled one does not."""
    liger.on_gpu = lambda tensors: True
    calls = 0
    true_call = liger._call

    def counted(*given: object) -> Tensor:
        nonlocal calls
        calls += 1
        return true_call(*given)  # type: ignore[arg-type]

    liger._call = counted  # type: ignore[assignment]
    bad = 0
    dtypes = (torch.float32, torch.bfloat16)
    for shape, dtype, bias in itertools.product(SHAPES, dtypes, (False, True)):
        before, off = calls, farthest(shape, dtype, bias)
        near = 1e-5 if dtype == torch.float32 else 2e-2
        asked = calls > before
        bad += not (asked and off <= near)
        said = "" if asked else ", but liger was not asked"
        print(f"{shape}, {dtype}, bias {bias}: {off:.1e} of {near:.0e}{said}")
    liger._call = lambda *given: true_call(*given) * 1.01
    spoiled = farthest(SHAPES[1], torch.float32, bias=False)
    bad += spoiled < 1e-3
    print(f"a kernel that is off by a hundredth: {spoiled:.1e}")
    print(f"liger {version('liger_kernel')}, Triton {version('triton')}, torch {torch.__version__}")
    print("liger agrees" if not bad else f"{bad} case(s) are wrong")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
