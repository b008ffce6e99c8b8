"""Forward passes over rows: cached tokenization, batches that fit into memory, nats by unit.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from excise.core.errors import NotFinite
from excise.data.domain import Row
from excise.data.stream import Batch, Example, collate, encode
from excise.losses import token_nll
from excise.models.limits import readable


class Memo:
    """A tokenizer that remembers texts it has seen: the same rows are scored many times."""

    def __init__(self, tokenizer: Any) -> None:
        """Wrap `tokenizer`; everything but plain calls on one text goes straight to it."""
        self._inner = tokenizer
        self._seen: dict[tuple[Any, ...], Any] = {}

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        """Tokenize, or remember."""
        if args or not isinstance(text, str) or "return_tensors" in options:
            return self._inner(text, *args, **options)
        key = (text, *sorted(options.items()))
        if key not in self._seen:
            self._seen[key] = self._inner(text, **options)
        return self._seen[key]

    def __getattr__(self, name: str) -> Any:
        """Return what the tokenizer has."""
        return getattr(self._inner, name)

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self._inner)


HEDGE = 0.9
"""Weight of a uniform guess in a hedged loss; see `nats`."""


@dataclass(frozen=True)
class Nats:
    """Negative log-likelihood by unit, in nats summed over target tokens.

    Attributes:
        plain: As the model says.
        hedged: Of a reader who mixes the model's prediction p with a uniform guess over the V
            tokens of the vocabulary, (1 - HEDGE) p + HEDGE / V. Confidence is no knowledge: however
            sure of wrong tokens a model is, such a reader never pays more than -log(HEDGE) = 0.11
            nats above a uniform guess, while a token that the model knows still saves him
            log(V) - log(1 / (1 - HEDGE)).
    """

    plain: dict[str, float]
    hedged: dict[str, float]


@torch.no_grad()
def nats(model: Any, rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> Nats:
    """Return by unit the negative log-likelihood, in nats summed over target tokens.

    A unit with several rows (wordings) gets the mean of its rows.

    Args:
        model: A causal model.
        rows: Rows of any shape.
        tokenizer: Its tokenizer.
        max_length: Tokens per row.

    Returns:
        Nats by unit.

    Raises:
        NotFinite: If the loss of a row is NaN or infinite.

    Source:
        A Bayesian mixture code: Grunwald, The Minimum Description Length Principle, 2007, ch. 6.
    """
    if not rows:
        return Nats({}, {})
    examples = encode(rows, tokenizer, max_length=readable(model, max_length), only_spans=True)
    sums: dict[str, list[tuple[float, float]]] = {}
    for batch in batches(examples, model, tokenizer):
        logits_BTV = model(**batch.inputs, use_cache=False).logits
        target_BT = batch.target_BT.clone()
        target_BT[:, 0] = False
        nll_BT = token_nll(logits_BTV, batch.ids_BT).double().masked_fill(~target_BT, 0)
        guess = HEDGE / logits_BTV.shape[-1]
        hedged_BT = -((1 - HEDGE) * (-nll_BT).exp() + guess).log().masked_fill(~target_BT, 0)
        both = zip(nll_BT.sum(1).tolist(), hedged_BT.sum(1).tolist(), strict=True)
        for unit, values in zip(batch.units, both, strict=True):
            sums.setdefault(unit, []).append(values)
    broken = sum(not math.isfinite(value) for values in sums.values() for value, _ in values)
    if broken:
        raise NotFinite("the model", "loss", broken, len(rows))
    plain, hedged = (
        {unit: sum(value[i] for value in values) / len(values) for unit, values in sums.items()}
        for i in range(2)
    )
    return Nats(plain, hedged)


def rows_per_pass(model: Any, length: int) -> int:
    """Return how many rows of `length` tokens keep the logits under about 128 MB."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    return max(1, (1 << 25) // max(1, length * vocabulary))


GRADIENT = 4
"""How many times fewer rows a pass with gradients takes: activations of all blocks are kept."""


def batches(
    examples: Sequence[Example], model: Any, tokenizer: Any, *, share: int = 1
) -> list[Batch]:
    """Return examples in batches of like length that fit into memory, on the model's device.

    Args:
        examples: Tokenized rows.
        model: Its vocabulary and device.
        tokenizer: Its padding.
        share: How many times fewer rows than a pass without gradients takes; see `GRADIENT`.
    """
    ordered = sorted(examples, key=lambda e: len(e.ids))
    collated: list[Batch] = []
    at = 0
    while at < len(ordered):
        size = rows_per_pass(model, len(ordered[min(at + 63, len(ordered) - 1)].ids))
        part = ordered[at : at + min(max(1, size // share), 128)]
        collated.append(collate(part, pad_id=tokenizer.pad_token_id).to(model.device))
        at += len(part)
    return collated
