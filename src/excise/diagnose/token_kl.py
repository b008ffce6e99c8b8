"""How far the edited model's predictions lie from the original's, token by token.

Shape legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from excise.data.domain import Row
from excise.data.stream import encode


def token_kl(
    edited_NV: Float[Tensor, "N V"], original_NV: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """Return KL(edited || original) of every token's prediction, in nats.

    Args:
        edited_NV: Log-probabilities of the edited model.
        original_NV: Those of the original.
    """
    kl_N: Tensor = (edited_NV.exp() * (edited_NV - original_NV)).sum(-1)
    return kl_N.clamp(min=0)


def pieces(ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    """Return the text of each token, spaces included.

    A token is read behind the one before it, because some tokenizers drop the space of a first
    token.

    Args:
        ids: Token ids of a row.
        tokenizer: Its tokenizer.
    """
    found = []
    for i, token in enumerate(ids):
        alone = str(tokenizer.decode([token]))
        if i:
            before = str(tokenizer.decode([ids[i - 1]]))
            both = str(tokenizer.decode([ids[i - 1], token]))
            alone = both[len(before) :] if both.startswith(before) else alone
        found.append(alone)
    return tuple(found)


def strip_of(
    row: Row, tokenizer: Any, kl_at: Mapping[int, float], *, max_length: int
) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    """Return the tokens of a row and, for each, the KL of the prediction that should name it.

    Args:
        row: The row.
        tokenizer: Its tokenizer.
        kl_at: KL by the position that predicts; the first position is not in it.
        max_length: Tokens per row.

    Returns:
        Tokens as text, and KL in nats or None.
    """
    (example,) = encode([row], tokenizer, max_length=max_length)
    values = tuple(kl_at.get(t - 1) for t in range(len(example.ids)))
    return pieces(example.ids, tokenizer), values
