"""Hidden states of the model that is labelled for, by word.

A word has the mean state of its tokens behind a block, which knows what stands before it, beside
the mean over the text, which knows what comes after it too.

Shape legend: N words, D width, T tokens, B texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import labelled_text
from excise.data.encoding import with_specials
from excise.data.stream import Tokenizer
from excise.labelling.words import Document
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import active_stream, capture


@dataclass(frozen=True)
class Reader:
    """A model up to a block, and its tokenizer.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        path: The block whose output is read.
        width: Size of its residual stream.
        max_length: Tokens that are read at once.
        flops_per_token: Floating-point operations of reading a token.
    """

    model: Any
    tokenizer: Tokenizer
    path: str
    width: int
    max_length: int
    flops_per_token: float


def block_of(blocks: int, asked: int | None) -> int:
    """Return the block that is read: by default a sixth of the way, which costs a sixth of a pass.

    Args:
        blocks: How many the model has.
        asked: Number of a block, from 0, or None.

    Raises:
        UserError: If there is no such block.
    """
    at = max(0, blocks // 6 - 1) if asked is None else asked
    if not 0 <= at < blocks:
        raise UserError(f"labeller.block is {at}; the model has {blocks} blocks, from 0")
    return at


def reader(checkpoint: Checkpoint, block: int | None, max_length: int, ctx: Context) -> Reader:
    """Load a model up to a block, and no further.

    Args:
        checkpoint: The model.
        block: Number of the block, from 0; None for a sixth of the way.
        max_length: Tokens that are read at once.
        ctx: Device and dtype.

    Raises:
        UserError: If there is no such block, or the tokenizer does not say which characters a token
            stands for.
    """
    tokenizer = checkpoint.tokenizer()
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "labeller 'states' needs a tokenizer that says which characters a token stands for; "
            "use the model's fast tokenizer (tokenizer.json), or another labeller"
        )
    frame = backbone(checkpoint.shapes)
    at = block_of(frame.num_blocks, block)
    model = checkpoint.load_prefix(at + 1, dtype=ctx.dtype, device=ctx.device)
    path = frame.blocks[at]
    inner = model.get_submodule(path.rpartition(".")[0])
    weights = sum(p.numel() for child in [*inner.children()][: at + 1] for p in child.parameters())
    return Reader(model, tokenizer, path, frame.d_model, max_length, 2.0 * weights)


@torch.no_grad()
def states(
    documents: Sequence[Document], reader: Reader, *, batch: int = 16
) -> tuple[list[Float[Tensor, "N D2"]], int]:
    """Return the states of every word of some documents, on the CPU, and the tokens read.

    Args:
        documents: The documents.
        reader: What reads them.
        batch: Texts that are read at once.
    """
    pieces: list[tuple[int, list[int], Tensor]] = []  # document, ids, first character of each
    marks: list[int] = []
    for i, document in enumerate(documents):
        said = reader.tokenizer(
            labelled_text(document.row), add_special_tokens=False, return_offsets_mapping=True
        )
        ids = list(said["input_ids"])
        offsets = torch.tensor(said["offset_mapping"], dtype=torch.long).view(-1, 2)
        room = max(1, reader.max_length - len(with_specials([], reader.tokenizer)))
        for start in range(0, len(ids), room):
            part = with_specials(ids[start : start + room], reader.tokenizer)
            pieces.append((i, part, _words_at(document, offsets[start : start + room])))
            marks.append(len(part) - len(ids[start : start + room]))
    tokens = sum(len(ids) for _, ids, _ in pieces)
    totals = [torch.zeros(len(document.words), 2 * reader.width) for document in documents]
    counts = [torch.zeros(len(document.words), 1) for document in documents]
    order = sorted(range(len(pieces)), key=lambda at: len(pieces[at][1]))
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        x_BTD = _read(reader, [pieces[at][1] for at in chosen])
        for row, at in enumerate(chosen):
            i, ids, word_T = pieces[at]
            x_TD = x_BTD[row, marks[at] : len(ids)]
            inside_T = word_T >= 0
            both_TD = torch.cat([x_TD, x_TD.mean(dim=0, keepdim=True).expand_as(x_TD)], dim=1)
            totals[i].index_add_(0, word_T[inside_T], both_TD[inside_T])
            counts[i].index_add_(0, word_T[inside_T], torch.ones(int(inside_T.sum()), 1))
    means = [total / count.clamp(min=1) for total, count in zip(totals, counts, strict=True)]
    return means, tokens


def _words_at(document: Document, offsets_T2: Int[Tensor, "T 2"]) -> Int[Tensor, " T"]:
    """Return the word in which each token's last character lies, -1 for none."""
    if not document.words:
        return torch.full((len(offsets_T2),), -1)
    starts = torch.tensor([start for start, _ in document.offsets])
    ends = torch.tensor([end for _, end in document.offsets])
    last_T = (offsets_T2[:, 1] - 1).clamp(min=0)
    at_T = torch.searchsorted(starts, last_T, right=True) - 1
    inside_T = (at_T >= 0) & (last_T < ends[at_T.clamp(min=0)])
    return torch.where(inside_T, at_T, -1)


def _read(reader: Reader, texts: Sequence[Sequence[int]]) -> Float[Tensor, "B T D"]:
    """Return a block's output, float32 on the CPU; padding on the right is read by nobody."""
    width = max(map(len, texts))
    pad = reader.tokenizer.pad_token_id or 0
    ids_BT = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in texts])
    real_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
    device = reader.model.device
    inner = getattr(reader.model, reader.model.base_model_prefix, reader.model)  # no head
    with capture(reader.model, [reader.path]) as outputs:
        inner(input_ids=ids_BT.to(device), attention_mask=real_BT.to(device), use_cache=False)
    return active_stream(outputs[reader.path][0]).float().cpu()
