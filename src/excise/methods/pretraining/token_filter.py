"""Token filtering: of every text only the tokens that are to be learned have a loss.

Let z be 1 where labels say with more than a threshold that a token is to be forgotten. The loss is
next-token prediction where z of the *target* is 0. `mask` leaves it at that: what is to be
forgotten is read, and what stands behind it is predicted from it. `remove` puts one hidden symbol
in the place of every token whose z is 1, so that it is not read either. Document filtering drops
the whole text, with all in it that was to be learned.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, Domain, Row, Rows
from excise.data.labels import LabelNoise, forget_score
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.losses import token_nll
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    dropped,
    forget_probability,
    labelled_corpus,
    pretrain,
    schedule,
)
from excise.models.checkpoint import Checkpoint
from excise.train.fit import Term


class TokenFilter(Method):
    """Learn nothing from predicting tokens labelled as forget, and read them or do not."""

    name: Literal["token_filter"] = "token_filter"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    how: Literal["mask", "remove"] = "remove"
    """`mask`: what is filtered is read and has no loss. `remove`: a hidden symbol stands in its
    place besides."""
    filter_above: float = Field(default=0.5, ge=0, lt=1)
    """A token is filtered where labels say with more than this probability that it is forget.
    Lower it for recall."""
    hidden: str = ""
    """Token of the vocabulary that `remove` puts in the place of others; the mask, unknown or
    padding token when empty."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Shaping capabilities with token-level data filtering",
        "arXiv:2601.21571",
        "loss masking and removal. Masking is masked SLUNG too: Teaching models to understand "
        "(but not generate) high-risk data, arXiv:2505.03052",
        defaults={
            "hidden": "arXiv:2601.21571: a symbol of its own, <|hidden|>; here a token that the "
            "vocabulary has",
            "filter_above": "ours: the paper sweeps it towards recall",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` on all rows, with the loss of the tokens that are not filtered."""
        config = schedule(self.pretrain, self.name)
        tokenizer = start.tokenizer()
        rows = labelled_corpus(domain, self.labels, ctx)
        facts = self._facts(rows, tokenizer, config.max_length)
        hidden = hidden_symbol(tokenizer, self.hidden) if self.how == "remove" else None

        def loss(model: nn.Module, batch: Batch) -> dict[str, Term]:
            read = batch if hidden is None else self._hide(batch, hidden, tokenizer.bos_token_id)
            nll_BT = token_nll(model(**read.inputs, use_cache=False).logits, batch.ids_BT)
            keep_BT = batch.target_BT & ~self._filtered(batch)
            return {"nll": Term(nll_BT[keep_BT].sum(), float(keep_BT.sum()))}

        return pretrain(
            start,
            rows,
            config,
            ctx,
            stage=self.name,
            loss=loss,
            counts=lambda b: {"nll": float((b.target_BT & ~self._filtered(b)).sum())},
            extras=facts,
        )

    def _filtered(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return z: which tokens are filtered."""
        return forget_probability(batch) > self.filter_above

    def _hide(self, batch: Batch, hidden: int, bos_id: int | None) -> Batch:
        """Return what is read; the mark that begins a text belongs to no token's content."""
        z_BT = self._filtered(batch) & batch.attention_BT
        if bos_id is not None:
            z_BT &= batch.ids_BT != bos_id
        return replace(batch, ids_BT=torch.where(z_BT, hidden, batch.ids_BT))

    def _facts(self, rows: Rows, tokenizer: Tokenizer, max_length: int) -> dict[str, int]:
        """Return what is filtered of one reading of all rows, for the record.

        Raises:
            UserError: If nothing is left to learn from.
        """
        done = "masked" if self.how == "mask" else "removed"
        counts = scored_tokens(rows, tokenizer, max_length, self.filter_above)
        if not counts[False, False] + counts[True, False]:
            raise UserError(
                f"{self.name} leaves no token to learn from; raise '{self.name}.filter_above' or "
                "give rows to keep"
            )
        whole = [row for row in rows if not row.spans]
        of_rows = dropped(whole, [row for row in whole if forget_score(row) <= self.filter_above])
        return {
            f"tokens_{done}": counts[False, True] + counts[True, True],
            "forget_tokens_left": counts[True, False],
            "core_tokens_lost": counts[False, True],
            f"rows_{done}": of_rows.pop("rows_dropped"),
            **of_rows,
        }


def hidden_symbol(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of the symbol that stands in the place of removed tokens.

    Args:
        tokenizer: The model's tokenizer.
        token: A token of its vocabulary; empty for its mask, unknown or padding token, the first
            that it has and that does not begin or end texts.

    Raises:
        UserError: If there is none.
    """
    if token:
        if token not in tokenizer.get_vocab():
            raise UserError(
                f"'{token}' is no token of this model's vocabulary; name one that is in "
                "'token_filter.hidden'"
            )
        return int(tokenizer.convert_tokens_to_ids(token))
    marks = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    taken = (None, tokenizer.bos_token_id, tokenizer.eos_token_id)
    for mark in marks:
        if mark not in taken:
            return int(mark)
    raise UserError(
        "this model's vocabulary has no mask, unknown or padding token of its own to hide removed "
        "tokens behind; name a token of it in 'token_filter.hidden', or set 'token_filter.how' to "
        "'mask'"
    )


def scored_tokens(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length: int, above: float
) -> Counter[tuple[bool, bool]]:
    """Return how many scored tokens are to be forgotten and are filtered.

    Args:
        rows: Rows with the truth (`capability`) and the given labels, of spans where there are any.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept of a row.
        above: The threshold.

    Returns:
        Tokens by (whether they teach a capability, whether they are filtered).
    """
    counts: Counter[tuple[bool, bool]] = Counter()
    examples = encode(rows, tokenizer, max_length=max_length)
    for row, example in zip(rows, examples, strict=True):
        z_T = forget_probability(collate([example], pad_id=0))[0] > above
        truth = example
        if row.spans:
            (truth,) = encode([truly_labelled(row)], tokenizer, max_length=max_length)
        teaches_T = torch.tensor(truth.label) > CORE if row.spans else bool(row.capability)
        scored_T = torch.tensor(example.target)
        for teaches in (False, True):
            of_kind_T = scored_T & (teaches_T == teaches)
            for filtered in (False, True):
                counts[teaches, filtered] += int((of_kind_T & (z_T == filtered)).sum())
    return counts


def truly_labelled(row: Row) -> Row:
    """Return a row whose spans have label 1 where they teach some capability, else core."""
    spans = tuple(replace(span, label=int(bool(span.capability))) for span in row.spans)
    return replace(row, label=CORE, spans=spans)
