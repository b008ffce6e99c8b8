"""How deep an edit goes, by activation patching: the Unlearning Depth Score. By name only.

Blocks of the edited model are put into the original, one after the other, where it answers. What
the answer loses by that, as a share of what it loses with the oracle's blocks, is the block's
share: 0 where the edited model holds all that the original needs, 1 where no more than the oracle.
It needs original and oracle, and white-box scores disagree by layer: it is a diagnostic and never
decides a level.

    UDS_i = sum_l S1_l clip(S2_l / S1_l, 0, 1) / sum_l S1_l over blocks with S1_l > 0.05 nats

Shape legend: B rows, T tokens, N answering positions, R rows, L blocks, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import Batch, collate, encode
from excise.evals.tokens import logits_at, pad_id
from excise.losses import predicting
from excise.models.anatomy import backbone
from excise.models.hooks import Edit, active_stream, capture, edit

THRESHOLD = 0.05
"""Nats that a block of the oracle must cost the answer to count; the source's."""

ROWS = 16
"""Rows read at once."""


@dataclass(frozen=True)
class PatchingDepth:
    """How much of the oracle's ignorance an edited model has inside.

    Attributes:
        by_unit: Score by unit, 0 intact to 1 as the oracle; units without a block that counts are
            left out.
        oracle_L: Mean loss of log-probability per answer token, in nats, by block of the oracle.
        edited_L: The same by block of the edited model.
    """

    by_unit: dict[str, float]
    oracle_L: tuple[float, ...]
    edited_L: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over units, NaN for none."""
        return sum(self.by_unit.values()) / len(self.by_unit) if self.by_unit else float("nan")


def patching_depth(
    original: Any,
    oracle: Any,
    edited: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_length: int,
    threshold: float = THRESHOLD,
) -> PatchingDepth:
    """Patch the blocks of two models into the original.

    Args:
        original: The model before the edit.
        oracle: The same architecture, never taught.
        edited: The model after the edit.
        tokenizer: Of all three.
        rows: Questions or texts of the held-out test set.
        max_length: Tokens per row.
        threshold: Nats from which on a block counts.

    Source:
        UDS, arXiv 2605.24614, and gnueaj/unlearning-depth-score (README); the positions patched
        are those that predict the answer's tokens.

    Raises:
        UserError: If the models have different blocks, or there are no rows.
    """
    shapes = {(backbone(m).blocks, backbone(m).d_model) for m in (original, oracle, edited)}
    if len(shapes) > 1 or not rows:
        raise UserError(
            "patching needs rows and three models of one architecture; give the original, and an "
            "oracle and an edited model of its shape"
        )
    examples = sorted(
        encode(rows, tokenizer, max_length=max_length), key=lambda example: len(example.ids)
    )
    units: list[str] = []
    lost: tuple[list[Tensor], list[Tensor]] = ([], [])
    for at in range(0, len(examples), ROWS):
        batch = collate(examples[at : at + ROWS], pad_id=pad_id(tokenizer)).to(original.device)
        units += batch.units
        known_B = answer_logprobs(original, batch)
        for source, parts in zip((oracle, edited), lost, strict=True):
            parts.append((known_B[:, None] - patched_logprobs(original, source, batch)).cpu())
    oracle_RL, edited_RL = torch.cat(lost[0]), torch.cat(lost[1])
    by_unit: dict[str, list[float]] = {}
    for unit, s1_L, s2_L in zip(units, oracle_RL, edited_RL, strict=True):
        counts_L = s1_L > threshold
        if bool(counts_L.any()):
            s1_L, s2_L = s1_L[counts_L], s2_L[counts_L]
            value = float((s1_L * (s2_L / s1_L).clamp(0, 1)).sum() / s1_L.sum())
            by_unit.setdefault(unit, []).append(value)
    return PatchingDepth(
        {unit: sum(values) / len(values) for unit, values in by_unit.items()},
        tuple(oracle_RL.mean(0).tolist()),
        tuple(edited_RL.mean(0).tolist()),
    )


@torch.no_grad()
def answer_logprobs(model: Any, batch: Batch) -> Float[Tensor, " B"]:
    """Return the mean log-probability of each row's scored tokens, in nats."""
    mask_BT = predicting(batch.target_BT)
    logits_NV, _ = logits_at(model, {**batch.inputs, "use_cache": False}, mask_BT)
    next_N = batch.ids_BT.roll(-1, 1)[mask_BT]
    said_N = logits_NV.log_softmax(-1).gather(1, next_N[:, None])[:, 0]
    sums_B = torch.zeros(len(mask_BT), device=said_N.device)
    sums_B.index_add_(0, mask_BT.nonzero()[:, 0], said_N)
    return sums_B / mask_BT.sum(1)


@torch.no_grad()
def patched_logprobs(original: Any, source: Any, batch: Batch) -> Float[Tensor, "B L"]:
    """Return what the original says of the answers with one block's output out of another model.

    Args:
        original: The model that answers.
        source: The model whose outputs are put in.
        batch: Rows.

    Returns:
        Mean log-probabilities of the scored tokens, one column a block.
    """
    paths = backbone(original).blocks
    with capture(source, paths) as got:
        source(**batch.inputs, use_cache=False)
    mask_BT = predicting(batch.target_BT)
    columns = []
    for path in paths:
        with edit(original, {path: _exchanged(active_stream(got[path][0]), mask_BT)}):
            columns.append(answer_logprobs(original, batch))
    return torch.stack(columns, 1)


def _exchanged(other_BTD: Float[Tensor, "B T D"], mask_BT: Bool[Tensor, "B T"]) -> Edit:
    """Return an edit that puts another model's stream in at some positions."""

    def change(hidden: Tensor) -> Tensor:
        new_BTD = torch.where(mask_BT[..., None], other_BTD.to(hidden), active_stream(hidden))
        return new_BTD if hidden.dim() == 3 else torch.cat([new_BTD[None], hidden[1:]])

    return change
