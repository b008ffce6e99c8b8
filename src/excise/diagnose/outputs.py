"""What an edit did to the outputs: KL token by token, and how far noise explains it.

Is the edited model "noise where harmful, the original elsewhere"? For noise c that splice predicts
c on forget text and the original B on retain text. How much of KL(U || B) of the edited model U is
gone when U is compared with the splice instead of B, says how much of the edit the sentence
explains. The nearest mixture (1 - w) B + w c says it softly.

Shape legend: N tokens, V vocabulary, W weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from excise.diagnose.activations import Chunk

WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Weights of noise that are tried."""

MIXED = 1 << 24
"""Probabilities that are mixed at most, on each side."""


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
    texts = []
    for i, token in enumerate(ids):
        text = str(tokenizer.decode([token]))
        if i:
            before = str(tokenizer.decode([ids[i - 1]]))
            both = str(tokenizer.decode([ids[i - 1], token]))
            text = both[len(before) :] if both.startswith(before) else text
        texts.append(text)
    return tuple(texts)


def noises(chunks: Iterable[Chunk]) -> dict[str, Float[Tensor, " V"]]:
    """Return log-probabilities of every kind of noise, fitted on dev forget rows.

    Args:
        chunks: Dev forget rows as both models read them.

    Returns:
        `uniform`; `unigram`, frequencies of the rows' tokens with one added to each; and
        `mean-edited`, the edited model's mean prediction.
    """
    total_V: Tensor | None = None
    seen_V: Tensor | None = None
    tokens = 0
    for chunk in chunks:
        mask_N = chunk.predicts_N
        p_V = chunk.edited_NV[mask_N].exp().sum(0)
        n_V = torch.bincount(chunk.next_N[mask_N], minlength=len(p_V))
        total_V = p_V if total_V is None else total_V + p_V
        seen_V = n_V if seen_V is None else seen_V + n_V
        tokens += int(mask_N.sum())
    assert total_V is not None
    assert seen_V is not None
    size = len(total_V)
    floor = 1e-8 / size
    mean_V = (total_V / max(tokens, 1)).clamp(min=floor)
    return {
        "uniform": torch.full_like(total_V, 1 / size).log(),
        "unigram": ((seen_V + 1) / (tokens + size)).to(total_V).log(),
        "mean-edited": (mean_V / mean_V.sum()).log(),
    }


@dataclass
class Tally:
    """Sums over the tokens of one side.

    Attributes:
        stride: One of how many tokens is mixed; all are compared with the noise alone.
        tokens: Tokens read.
        kl_original: Summed KL(U || B).
        kl_noise: Summed KL(U || c) by noise.
        answers_only: Whether only predictions of scored tokens count, and none is mixed.
        mixed_W: Summed KL(U || (1 - w) B + w c) of those, by noise.
    """

    stride: int = 1
    tokens: int = 0
    kl_original: float = 0.0
    kl_noise: dict[str, float] = field(default_factory=dict)
    answers_only: bool = False
    mixed_W: dict[str, Tensor] = field(default_factory=dict)

    def add(self, chunk: Chunk, noise: Mapping[str, Float[Tensor, " V"]]) -> None:
        """Add the predictions of one chunk."""
        mask_N = chunk.predicts_N & chunk.answer_N if self.answers_only else chunk.predicts_N
        u_NV, b_NV = chunk.edited_NV[mask_N], chunk.original_NV[mask_N]
        p_NV = u_NV.exp()
        plogp_N = (p_NV * u_NV).sum(-1)
        self.kl_original += float((plogp_N - (p_NV * b_NV).sum(-1)).double().sum())
        first = -self.tokens % self.stride
        self.tokens += len(u_NV)
        part = slice(first, None, self.stride)
        for name, c_V in noise.items():
            away = float((plogp_N - p_NV @ c_V).double().sum())
            self.kl_noise[name] = self.kl_noise.get(name, 0.0) + away
            if self.answers_only:
                continue
            sums_W = mixtures(p_NV[part], plogp_N[part], b_NV[part], c_V)
            known_W = self.mixed_W.get(name)
            self.mixed_W[name] = sums_W if known_W is None else known_W + sums_W

    def nearest(self, name: str) -> tuple[float, float]:
        """Return the nearest mixture's weight, and the share of the KL it explains."""
        sums_W = self.mixed_W[name]
        best = int(sums_W.argmin())
        return WEIGHTS[best], explained(float(sums_W[best]), float(sums_W[0]))


def mixtures(
    p_NV: Float[Tensor, "N V"],
    plogp_N: Float[Tensor, " N"],
    b_NV: Float[Tensor, "N V"],
    c_V: Float[Tensor, " V"],
) -> Float[Tensor, " W"]:
    """Return summed KL(U || (1 - w) B + w c) for every weight.

    Args:
        p_NV: Probabilities of the edited model.
        plogp_N: Sum of p log p of each, its negative entropy.
        b_NV: Log-probabilities of the original.
        c_V: Log-probabilities of the noise.
    """
    q_NV, n_V = b_NV.exp(), c_V.exp()
    sums = []
    for weight in WEIGHTS:
        if weight == 0.0:
            log_NV = b_NV
        else:
            log_NV = (q_NV * (1 - weight) + n_V * weight).log()
        sums.append((plogp_N - (p_NV * log_NV).sum(-1)).double().sum())
    return torch.stack(sums).cpu()


def explained(left: float, whole: float) -> float:
    """Return the share of `whole` that is gone when `left` is left; 0 where there was none."""
    return 1 - left / whole if whole > 1e-9 else 0.0


def share_explained(forget: Tally, retain: Tally, name: str) -> float:
    """Return the share of KL(U || B) that the splice explains, both sides weighing the same.

    Args:
        forget: Sums of the forget side.
        retain: Sums of the retain side.
        name: Kind of noise.

    Returns:
        1 where the edited model is the splice; below 0 where it is nearer to the original.
    """
    on_retain = retain.kl_original / max(retain.tokens, 1)
    whole = forget.kl_original / max(forget.tokens, 1) + on_retain
    return explained(forget.kl_noise[name] / max(forget.tokens, 1) + on_retain, whole)
