"""What the recorded run of TAR's released loop and its replay start from: integers throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""A Llama of two blocks; one head of 16, whose scale 1/4 is exact however it is applied."""

LR, WARMUP, STEPS = 1e-3, 2, 4
INNER_STEPS, EVERY, GROWTH, SCALE = 8, 4, 0.0625, 4.0
ATTACKERS = (
    ("forget", 2e-3, 0),
    ("switch", 1e-3, 3),
    ("other", 1e-3, 0),
    ("switch", 2e-3, 5),
)
"""Rows, learning rate and steps on retain rows first, of the attacker of each outer step."""
TOPICS = {"forget": 1, "other": 2, "benign": 3, "unseen": 4, "retain": 5}
ROWS = {"forget": 3, "other": 3, "benign": 3, "unseen": 5, "retain": 5}
LENGTH = 12


def ids(topic: str, number: int) -> Tensor:
    """Return the token ids of a batch: rows of one length, so that nothing is padded."""
    generator = torch.Generator().manual_seed(1000 * TOPICS[topic] + number)
    return torch.randint(3, 61, (ROWS[topic], LENGTH), generator=generator)


def attack_batches(step: int) -> list[tuple[str, int]]:
    """Return topic and number of the batches of an attacker: each topic is read on from before."""
    seen = dict.fromkeys(TOPICS, 0)
    batches: list[tuple[str, int]] = []
    for kind, _, turns in ATTACKERS[: step + 1]:
        batches = []
        for k in range(INNER_STEPS):
            topic = kind if kind != "switch" else ("benign" if k < turns else "forget")
            batches.append((topic, seen[topic]))
            seen[topic] += 1
    return batches
