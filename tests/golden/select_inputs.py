"""What the recorded runs of RepSelect's and ELM's released code and their replay start from.

This file imports torch alone, beside the model's weights, which are those of `rmu_inputs`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

CONFIG: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""A Llama of two blocks."""

BATCHES, ROWS, LENGTH = 3, 4, 16
COMPONENTS, LORA_LR, LR, SUBTRACTIONS = 8, 0.5, 0.05, 3
ETA, TOP, TEMPERATURE = 30, 7, 1.2
EXPERT, NOVICE = [1, 5, 6, 7], [1, 9]
"""What stands before a text, its first id the one that begins texts."""


def seed_for(purpose: str) -> int:
    """Return the seed that a run of seed 0 gives to a purpose."""
    return int.from_bytes(hashlib.sha256(f"0:{purpose}".encode()).digest()[:8], "big") >> 1


def ids(batch: int) -> torch.Tensor:
    """Return the token ids of a batch; rows are of one length."""
    generator = torch.Generator().manual_seed(900 + batch)
    return torch.randint(3, 61, (ROWS, LENGTH), generator=generator)


def text() -> list[int]:
    """Return the row whose target is recorded."""
    return [1, *ids(7)[0].tolist()]
