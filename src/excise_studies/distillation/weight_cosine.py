"""How near two models are in weights."""

from __future__ import annotations

import torch

from excise.models.checkpoint import Checkpoint


def cosine(one: Checkpoint, other: Checkpoint) -> float:
    """Return the cosine between the matrices of two models of one shape, as one long vector.

    Args:
        one: A model.
        other: Another; only tensors that both have under one name count.
    """
    a, b = (
        {n: p.detach().double() for n, p in model.load(dtype=torch.float32).named_parameters()}
        for model in (one, other)
    )
    names = [name for name in a if name in b and a[name].dim() > 1]
    dot = sum(float((a[n] * b[n]).sum()) for n in names)
    squares = (sum(float(m[n].square().sum()) for n in names) for m in (a, b))
    size = 1.0
    for square in squares:
        size *= max(square, 1e-24) ** 0.5
    return dot / size
