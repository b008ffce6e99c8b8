"""Reading two models on the same rows: residual streams and predictions, token by token.

One forward of each model per batch feeds every measurement. The first token of a row is left out
throughout: its norm is orders larger than that of any other. Padding never enters.

Shape legend: B rows, T tokens of a row, N tokens kept, L blocks, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import Example, collate, encode
from excise.evals.tokens import logits_at, pad_id
from excise.losses import predicting
from excise.models.anatomy import backbone
from excise.models.hooks import active_stream, capture

MAX_RESIDUAL = 1 << 26
"""Residual entries of one model held at once at most (256 MB in float32)."""

MAX_LOGITS = 1 << 25
"""Logits of one model held at once at most (128 MB in float32)."""


@dataclass(frozen=True)
class ModelPair:
    """Two loaded models of one architecture, and their tokenizer.

    Attributes:
        original: The model before the edit.
        edited: The model after it.
        tokenizer: Of both.
        max_length: Tokens per row.
    """

    original: Any
    edited: Any
    tokenizer: Any
    max_length: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(backbone(self.original).blocks)


@dataclass(frozen=True)
class Chunk:
    """What both models hold at the kept tokens of a few rows.

    Attributes:
        original_LND: Residual stream of the original after every block, float32.
        edited_LND: The same of the edited model.
        original_NV: Log-probabilities of the original's next token.
        edited_NV: The same of the edited model.
        row_N: Which row each token belongs to, an index into the rows that were read.
        position_N: Where in its row it stands, from 1.
        next_N: The token that follows in the row, -1 at its end.
        answer_N: Whether the next token is a scored one.
    """

    original_LND: Float[Tensor, "L N D"]
    edited_LND: Float[Tensor, "L N D"]
    original_NV: Float[Tensor, "N V"]
    edited_NV: Float[Tensor, "N V"]
    row_N: Int[Tensor, " N"]
    position_N: Int[Tensor, " N"]
    next_N: Int[Tensor, " N"]
    answer_N: Bool[Tensor, " N"]

    @property
    def change_LND(self) -> Float[Tensor, "L N D"]:
        """What the edit added."""
        return self.edited_LND - self.original_LND

    @property
    def predicts_N(self) -> Bool[Tensor, " N"]:
        """Whether a token is not its row's last, so that its prediction is about the text."""
        return self.next_N >= 0


@torch.no_grad()
def read_pair(pair: ModelPair, rows: Sequence[Row], *, where: str) -> Iterator[Chunk]:
    """Read rows with both models.

    Args:
        pair: The models.
        rows: At least one.
        where: Which text this is, for an error.

    Yields:
        Chunks of rows of like length, small enough for memory.

    Raises:
        UserError: If no row has a third token, or a model's activations are not finite.
    """
    examples = encode(rows, pair.tokenizer, max_length=pair.max_length)
    long = [i for i, example in enumerate(examples) if len(example.ids) > 2]
    if not long:
        raise UserError(
            f"no {where} row has more than two tokens, so that nothing is predicted after the "
            "first; give longer rows"
        )
    for part in _parts(pair, examples, long):
        yield _read(pair, [examples[i] for i in part], part, where)


def _parts(
    pair: ModelPair, examples: Sequence[Example], index: Sequence[int]
) -> Iterator[list[int]]:
    """Yield indices of examples of like length whose activations fit into memory together."""
    head = pair.original.get_output_embeddings()
    vocabulary = int(head.weight.shape[0]) if head is not None else 1 << 16
    residual = pair.blocks * int(backbone(pair.original).d_model)
    most = max(1, min(MAX_RESIDUAL // residual, MAX_LOGITS // vocabulary))
    part: list[int] = []
    for i in sorted(index, key=lambda i: len(examples[i].ids)):
        if part and (len(part) + 1) * len(examples[i].ids) > most:
            yield part
            part = []
        part.append(i)
    yield part


def _read(pair: ModelPair, examples: Sequence[Example], index: Sequence[int], where: str) -> Chunk:
    """Run both models on one batch."""
    batch = collate(examples, pad_id=pad_id(pair.tokenizer)).to(pair.original.device)
    keep_BT = batch.attention_BT.clone()
    keep_BT[:, 0] = False
    by_model: list[tuple[Tensor, Tensor]] = []
    for name, model in (("original", pair.original), ("edited model", pair.edited)):
        paths = backbone(model).blocks
        with capture(model, paths) as outputs:
            logits_NV, _ = logits_at(model, {**batch.inputs, "use_cache": False}, keep_BT)
        streams = [active_stream(outputs[path][0]) for path in paths]
        residual_LND = torch.stack([stream_BTD.float()[keep_BT] for stream_BTD in streams])
        _check_finite(residual_LND, logits_NV, f"the {name}", where)
        by_model.append((residual_LND, logits_NV.log_softmax(-1)))
    after_BT = torch.full_like(batch.ids_BT, -1)
    after_BT[:, :-1] = batch.ids_BT[:, 1:].masked_fill(~batch.attention_BT[:, 1:], -1)
    row_B1 = torch.tensor(index, device=batch.ids_BT.device)[:, None]
    position_BT = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)[None]
    return Chunk(
        original_LND=by_model[0][0],
        edited_LND=by_model[1][0],
        original_NV=by_model[0][1],
        edited_NV=by_model[1][1],
        row_N=row_B1.expand_as(batch.ids_BT)[keep_BT],
        position_N=position_BT.expand_as(batch.ids_BT)[keep_BT],
        next_N=after_BT[keep_BT],
        answer_N=predicting(batch.target_BT)[keep_BT],
    )


def _check_finite(residual_LND: Tensor, logits_NV: Tensor, name: str, where: str) -> None:
    """Refuse a model that computes NaN or infinity."""
    broken_L = ~norms(residual_LND).isfinite().all(1)
    if bool(broken_L.any()):
        block = int(broken_L.int().argmax())
        raise UserError(
            f"{name} is not finite after block {block} on {where} text; its weights are broken, "
            "or try --dtype float32"
        )
    if not bool(logits_NV.isfinite().all()):
        raise UserError(
            f"the outputs of {name} are not finite on {where} text; its weights are broken, "
            "or try --dtype float32"
        )


def norms(residual_LND: Float[Tensor, "L N D"]) -> Float[Tensor, "L N"]:
    """Return the norm of every token's residual stream after every block.

    Args:
        residual_LND: Residual streams without the first tokens.
    """
    norm_LN: Tensor = residual_LND.norm(dim=-1)
    return norm_LN
