"""What the recorded runs of the released SSD and Potion and their replay start from.

Every number is made of integers, so that any version of torch makes the same bits. This file
imports torch alone.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ROWS = 4
"""Rows of a batch."""
LENGTH = 12
BATCHES = {"forget": 2, "retain": 6}
SSD = {"alpha": 2.0, "lam": 1.0}
RHO = 0.51
"""The search ends where at most so many of the first guesses on forget rows are left."""


def fill(model: Any) -> None:
    """Give a model its weights, in the order of their sorted names: multiples of 2^-15."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for number, name in enumerate(sorted(named)):
            if "norm" in name:
                named[name].fill_(1.0)
                continue
            generator = torch.Generator().manual_seed(2000 + number)
            whole = torch.randint(-8192, 8192, named[name].shape, generator=generator)
            named[name].copy_(whole.float() * 2.0**-15)


def ids(role: str, batch: int) -> Tensor:
    """Return the tokens [B, T] of a batch; forget rows use a part of the vocabulary alone."""
    generator = torch.Generator().manual_seed(100 * ("forget", "retain").index(role) + batch)
    low, high = (3, 20) if role == "forget" else (3, 55)
    return torch.randint(low, high, (ROWS, LENGTH), generator=generator)
