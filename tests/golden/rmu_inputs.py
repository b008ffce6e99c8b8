"""What the recorded run of RMU's released loop and its replay start from.

Every number is made of integers, so that any version of torch makes the same bits. This file
imports torch alone: the recorder runs it beside a transformers of 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""A Mistral of ten blocks; heads of 16, whose scale 1/4 is exact however it is applied."""

LAYER = 7
TRAINED = (5, 6, 7)
STEERING = (5.0, 8.0)
ALPHA = (10.0, 20.0)
LR = 5e-4
STEPS = 20
ROWS = 4
TOPICS = 2
EOS = 2


def weight(name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Return the weights called `name`: multiples of 2^-17, ones for norms."""
    if "norm" in name:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(1000 + number)
    whole = torch.randint(-16384, 16384, shape, generator=generator)
    return whole.float() * 2.0**-17


def fill(model: Any) -> None:
    """Give a model its weights, in the order of their sorted names."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for number, name in enumerate(sorted(named)):
            named[name].copy_(weight(name, tuple(named[name].shape), number))


def texts(topic: int, step: int) -> list[list[int]]:
    """Return the token ids of a batch; topic -1 is the text to retain."""
    generator = torch.Generator().manual_seed(50 * (topic + 2) + step)
    rows = []
    for _ in range(ROWS):
        length = int(torch.randint(3, 17, (1,), generator=generator))
        rows.append(torch.randint(3, 61, (length,), generator=generator).tolist())
    return rows


def padded(rows: list[list[int]], max_length: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask, cut on the right and padded on the left with the end token."""
    rows = [row[:max_length] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([[EOS] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
