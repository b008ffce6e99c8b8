"""What the architecture of a model allows: how many positions it has, and how rows may be padded.

Rotary, relative and ALiBi positions are computed for any length; a table of learned positions, or
one that is made once, ends somewhere, and a token beyond its end is an IndexError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from excise.core.errors import UserError

POSITIONS: Final[Mapping[str, str]] = {
    "biogpt": "max_position_embeddings",
    "codegen": "n_positions",
    "ctrl": "n_positions",
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "gpt_neo": "max_position_embeddings",
    "gptj": "n_positions",
    "mpt": "max_seq_len",
    "openai-gpt": "n_positions",
    "opt": "max_position_embeddings",
}
"""Field of the configuration that ends the table of positions, by `model_type`."""

RECURRENT: Final = (
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
)
"""Values of `model_type` whose blocks, all or some, carry a state from token to token."""


SIZES: Final[Mapping[str, tuple[int, int]]] = {
    "num_hidden_layers": (1, 10_000),
    "hidden_size": (1, 10_000_000),
    "intermediate_size": (1, 100_000_000),
    "vocab_size": (1, 100_000_000),
    "num_attention_heads": (1, 100_000),
    "num_key_value_heads": (1, 100_000),
    "head_dim": (1, 1_000_000),
    "sliding_window": (0, 2**63 - 1),
    "max_position_embeddings": (1, 2**63 - 1),
}
"""Fields of a configuration, the least and the most that they can be."""


def check_sizes(config: Any, where: str) -> None:
    """Refuse sizes that no model has, before anything of that size is made.

    Args:
        config: A `transformers` configuration; sizes that it does not name, or names block by
            block, are not looked at.
        where: What names them, for the sentence.

    Raises:
        UserError: Naming the first.
    """
    text = config.get_text_config()
    for name, (least, most) in SIZES.items():
        size = getattr(text, name, None)
        other = isinstance(size, bool | float | str)
        if other or (isinstance(size, int) and not least <= size <= most):
            raise UserError(
                f"{where}: {name} must be a whole number from {least} to {most:,}, not {size!r}"
            )


def position_limit(config: Any) -> int | None:
    """Return how many tokens a model can read, None where positions have no end.

    Args:
        config: The model's `transformers` configuration.
    """
    text = config.get_text_config()
    field = POSITIONS.get(text.model_type)
    return None if field is None else int(getattr(text, field))


def carries_state(model: Any) -> bool:
    """Return whether padding before a row would change what the model says of it."""
    config = getattr(model, "config", None)
    return config is not None and config.get_text_config().model_type in RECURRENT


def readable(model: Any, max_length: int) -> int:
    """Return how many tokens of a row a model reads: `max_length`, or its positions where fewer."""
    limit = position_limit(model.config) if hasattr(model, "config") else None
    return max_length if limit is None else min(max_length, limit)
