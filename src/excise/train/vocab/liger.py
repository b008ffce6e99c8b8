"""Cross-entropy by `liger-kernel` on a GPU, where it computes what `excise.train.vocab` does.

Only the fused linear cross-entropy is used. Its divergences between two models know no soft cap
and in some releases hold a float32 [tokens, vocabulary] buffer, which is what the chunks are for.

Shape legend: N rows (tokens), n rows that are scored, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from excise.losses import Summed
from excise.models.head import Head


def on_gpu(tensors: Iterable[Tensor]) -> bool:
    """Return whether all tensors lie on an NVIDIA or AMD GPU."""
    return all(t.device.type == "cuda" for t in tensors)


def fits_liger(hidden_ND: Tensor, head: Head) -> bool:
    """Return whether liger's fused cross-entropy computes the same thing on these tensors.

    It does on a GPU, in one floating dtype up to float32, where gradients reach the hidden
    states, and without a soft cap or a factor of the logits.
    """
    tensors = [hidden_ND, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]
    return (
        head.softcap is None
        and head.scale == 1
        and on_gpu(tensors)
        and len({t.dtype for t in tensors}) == 1
        and hidden_ND.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and hidden_ND.requires_grad
        and torch.is_grad_enabled()
    )


@functools.cache
def _function() -> Any:
    """Return liger's autograd function, None where it or Triton is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction,
        )
    except (ImportError, RuntimeError):  # no Triton, or one that does not know this GPU
        return None
    arguments = inspect.signature(LigerFusedLinearCrossEntropyFunction.forward).parameters
    # Releases without it add weight gradients up in half precision.
    return LigerFusedLinearCrossEntropyFunction if "accum_dtype" in arguments else None


def _call(function: Any, hidden_ND: Tensor, head: Head, target_N: Tensor) -> Tensor:
    """Return liger's sum, by the names its arguments have; weights add up in float32."""
    ours: dict[str, Any] = {
        "_input": hidden_ND,
        "weight": head.weight_VD,
        "target": target_N.masked_fill(target_N < 0, -100),
        "bias": head.bias_V,
        "ignore_index": -100,
        "reduction": "sum",
        "accum_dtype": torch.float32,
    }
    arguments = list(inspect.signature(function.forward).parameters.values())[1:]  # without ctx
    values = [ours.get(p.name, None if p.default is p.empty else p.default) for p in arguments]
    out = function.apply(*values)
    total: Tensor = out[0] if isinstance(out, tuple) else out
    return total


@functools.cache
def _agrees(dtype: torch.dtype, device: torch.device, bias: bool) -> bool:
    """Return whether this release of liger gives the plain value and gradients on a small case."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    hidden_ND, weight_VD = tensor(9, 16), tensor(37, 16)
    head = Head(weight_VD, tensor(37) if bias else None)
    target_N = torch.tensor([3, -100, 0, 36, 5, 5, -1, 9, 12], device=device)
    plain = F.cross_entropy(
        head.logits(hidden_ND).float(), target_N.masked_fill(target_N < 0, -100), reduction="sum"
    )
    leaves = [t for t in (hidden_ND, weight_VD, head.bias_V) if t is not None]
    plain_grads = torch.autograd.grad(plain, leaves)
    fused = _call(_function(), hidden_ND, head, target_N)
    fused_grads = torch.autograd.grad(fused, leaves)
    near = 1e-4 if dtype == torch.float32 else 3e-2

    def same(a: Tensor, b: Tensor) -> bool:
        a, b = a.detach().float(), b.detach().float()
        return bool((a - b).abs().max() <= near * (b.abs().max() + 1e-6))

    pairs = zip(fused_grads, plain_grads, strict=True)
    return same(fused, plain) and all(same(a, b) for a, b in pairs)


def liger_nll(
    hidden_ND: Float[Tensor, "N D"], head: Head, target_N: Int[Tensor, " N"]
) -> Summed | None:
    """Return the summed negative log-likelihood by liger, None where it is not to be used.

    Args:
        hidden_ND: Hidden states that go into the head.
        head: The head.
        target_N: The right token of each row; a negative id drops the row.

    Returns:
        Sum and count as `chunked_nll`; None where liger is not installed, computes another
        thing, or gave other numbers than ours on a small case.
    """
    if not fits_liger(hidden_ND, head) or _function() is None:
        return None
    if not _agrees(hidden_ND.dtype, hidden_ND.device, head.bias_V is not None):
        return None
    scored_n = (target_N >= 0).nonzero()[:, 0]
    if not len(scored_n):
        return None
    total = _call(_function(), hidden_ND[scored_n], head, target_N[scored_n])
    return total.float(), float(len(scored_n))
