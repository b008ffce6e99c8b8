"""What the recorded runs of released weight-space code and their replay start from.

Weights are integers over a power of two, so that any version of torch makes the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYER = 1
"""Block whose output is read; to code that counts inputs of blocks it is the next one."""
POSITION = -2
"""Token of every row that a mean is taken over: the one that predicts the last."""
RIDGE = 0.01
SCALE = 2.0
COMPARED = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")
"""Parameters of which a task vector is compared."""


def model(number: int) -> Any:
    """Return one of two models of three blocks of width 32."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            if parameter.dim() > 1:
                whole = torch.arange(parameter.numel()) * (7919 + 2 * i) + 31 * number
                parameter.copy_(((whole % 1009 - 504) / 2048).reshape(parameter.shape))
    return made


def rows(role: int) -> list[list[int]]:
    """Return twelve rows of nine token ids of one of two roles."""
    return [[(5 + 7 * i + 11 * t * (role + 1) + i * t) % 61 for t in range(9)] for i in range(12)]
