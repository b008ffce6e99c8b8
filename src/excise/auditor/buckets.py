"""Where an edit shows in the residual stream: by kind of text, position and block.

A bucket is the tokens of forget or of retain text that belong to the prompt, or at which a scored
token is due. Both models are read from the one pass that `ReadResiduals` keeps, so that where an
audit has read them nothing is read again. An edit that adds one vector to some tokens (the junk
direction of RMU) turns the stream of exactly those buckets, and gathers its variance in few
directions.

Shape legend: N positions, K positions of a bucket, L blocks, D width,
R rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from excise.auditor.residuals import Positions, Residuals
from excise.record import Bucket

TEXTS = {"dev": "forget", "retain": "retain"}
"""Which side each role of the pass is text of."""

TOP = 4
"""Principal directions whose share of the variance is told."""

SAMPLED = 512
"""Positions of a bucket, evenly spaced, that its directions are computed from at most."""


def bucket_stats(original: Residuals, edited: Residuals) -> tuple[Bucket, ...]:
    """Return norms, cosines and variances of two models on the same positions.

    Args:
        original: What the model before the edit held.
        edited: The same of the model after it.

    Returns:
        One entry per bucket that has positions and block. Plain text has no prompt.
    """
    found: list[Bucket] = []
    for role, text in TEXTS.items():
        if role not in original.texts:
            continue
        before, after = original.texts[role], edited.texts[role]
        assert torch.equal(before.row_N, after.row_N), "the two passes read different positions"
        places = {"prompt": _in_prompt(before), "answer": before.answering_N}
        for position, here_N in places.items():
            if bool(here_N.any()):
                found += _by_block(text, position, before, after, here_N)
    return tuple(found)


def _in_prompt(positions: Positions) -> Bool[Tensor, " N"]:
    """Return the positions before a row's last answering one; what follows is of neither kind."""
    at_N = torch.arange(len(positions.row_N))
    answer_N = torch.where(positions.answering_N, at_N, -1)
    rows = int(positions.row_N.max()) + 1 if len(at_N) else 0
    last_R = torch.full((rows,), -1).scatter_reduce(0, positions.row_N, answer_N, "amax")
    return ~positions.answering_N & (at_N < last_R[positions.row_N])


def _by_block(
    text: str, position: str, before: Positions, after: Positions, here_N: Bool[Tensor, " N"]
) -> list[Bucket]:
    """Return the entries of one bucket."""
    found = []
    for block in range(before.hidden_NLD.shape[1]):
        original_KD = before.hidden_NLD[here_N, block]
        edited_KD = after.hidden_NLD[here_N, block]
        norm = float(original_KD.norm(dim=-1).mean())
        entry = {
            "text": text,
            "position": position,
            "block": block,
            "tokens": len(original_KD),
            "norm_original": norm,
            "norm_edited": float(edited_KD.norm(dim=-1).mean()),
            "change": float((edited_KD - original_KD).norm(dim=-1).mean()) / max(norm, 1e-12),
            "cosine": float(torch.cosine_similarity(original_KD, edited_KD, dim=-1).mean()),
            "top_original": top_share(original_KD),
            "top_edited": top_share(edited_KD),
        }
        found.append(Bucket.model_validate(entry))
    return found


def top_share(hidden_KD: Float[Tensor, "K D"]) -> float:
    """Return the share of the variance along the `TOP` principal directions; 0 without variance.

    Args:
        hidden_KD: Positions of a bucket; their mean is taken out.
    """
    sampled_KD = hidden_KD[:: -(-len(hidden_KD) // SAMPLED)].double()
    centred_KD = sampled_KD - sampled_KD.mean(0)
    energy = torch.linalg.svdvals(centred_KD).square()
    return float(energy[:TOP].sum() / energy.sum()) if float(energy.sum()) > 1e-12 else 0.0
