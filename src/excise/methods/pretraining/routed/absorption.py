"""Where knowledge went: losses with and without the modules, and which group rows write into.

Rows of a capability that carry no label are the ones that matter: what they teach should have
been drawn into the module by the rows that carry one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from excise.data.domain import CORE, Row, Rows
from excise.data.split import hashed_order
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.losses import nll
from excise.models.hooks import trainable
from excise.models.names import parameters_by_name
from excise.routing import GroupMap

LIMIT = 128
"""Rows of each kind that are read."""

CHUNK = 32
"""Rows per forward pass."""

Samples = Mapping[str, tuple[Batch, ...]]
"""Batches of `retain`, `labelled` (forget rows with a label) and `missed` (without) rows; a kind
without rows is left out."""


def hash_ordered(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return rows in an order that depends on the seed and their content alone."""
    return hashed_order(rows, [f"{row.unit}:{row.wording}:{row.text}" for row in rows], seed)


def batches_of(rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int) -> tuple[Batch, ...]:
    """Return rows in batches of `CHUNK`, on the CPU.

    Args:
        rows: The rows.
        tokenizer: The model's tokenizer.
        max_length: Tokens per row.
    """
    examples, pad_id = encode(rows, tokenizer, max_length=max_length), tokenizer.pad_token_id
    return tuple(
        collate(examples[i : i + CHUNK], pad_id=pad_id) for i in range(0, len(examples), CHUNK)
    )


def sample(rows: Rows, tokenizer: Tokenizer, *, max_length: int) -> Samples:
    """Draw up to `LIMIT` rows of each kind, by their content alone.

    Args:
        rows: What is read in training, with true `capability` and given `label`.
        tokenizer: The model's tokenizer.
        max_length: Tokens per row.
    """
    kinds: dict[str, list[Row]] = {"retain": [], "labelled": [], "missed": []}
    for row in dict.fromkeys(rows):
        forget = "labelled" if row.label > CORE else "missed"
        kinds[forget if row.capability else "retain"].append(row)
    return {
        kind: batches_of(hash_ordered(of_kind, 0)[:LIMIT], tokenizer, max_length=max_length)
        for kind, of_kind in kinds.items()
        if of_kind
    }


def losses(model: nn.Module, samples: Samples, device: torch.device) -> dict[str, float]:
    """Return the mean loss per scored token of every kind of row, in nats.

    Args:
        model: A causal model, in evaluation mode.
        samples: What to read, by kind.
        device: Where the model is.
    """
    return {kind: mean_loss(model, batches, device) for kind, batches in samples.items()}


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Return the mean loss per scored token, in nats.

    Args:
        model: A causal model, in evaluation mode.
        batches: At least one.
        device: Where the model is.
    """
    total = count = 0.0
    for batch in batches:
        here = batch.to(device)
        value, scored = nll(model(**here.inputs, use_cache=False).logits, here)
        total, count = total + float(value), count + scored
    return total / max(1.0, count)


def gradient_shares(
    model: nn.Module, map: GroupMap, samples: Samples, device: torch.device
) -> dict[str, Any]:
    """Return which groups each kind's ordinary gradient would write into.

    Args:
        model: The trained model, modules on; its gradients are dropped.
        map: Who owns what.
        samples: What to read; the first chunk of each kind is enough.
        device: Where the model is.

    Returns:
        By kind: `share` of the squared gradient norm by group, `norm` by group, and `blocks`, the
        same shares by group and block ("" for what lies in none).
    """
    shares = {}
    with trainable(model, ("*",)):
        for kind, batches in samples.items():
            model.zero_grad(set_to_none=True)
            here = batches[0].to(device)
            value, count = nll(model(**here.inputs, use_cache=False).logits, here)
            (value / count).backward()
            shares[kind] = _shares(model, map)
        model.zero_grad(set_to_none=True)
    return shares


def _shares(model: nn.Module, map: GroupMap) -> dict[str, Any]:
    """Return squared gradient norms by group and by block, as shares."""
    groups = dict.fromkeys(map.names, 0.0)
    blocks: dict[str, dict[str, float]] = {name: {} for name in map.names}
    for name, param in parameters_by_name(model).items():
        if param.grad is None:
            continue
        block = next((part for part in name.split(".") if part.isdigit()), "")
        for owned in map.owners[name]:
            square = float(owned.of(param.grad).double().square().sum())
            groups[owned.group] += square
            blocks[owned.group][block] = blocks[owned.group].get(block, 0.0) + square
    total = sum(groups.values()) or 1.0
    return {
        "share": {name: value / total for name, value in groups.items()},
        "norm": {name: value**0.5 for name, value in groups.items()},
        "blocks": {
            name: {block: value / total for block, value in of_group.items()}
            for name, of_group in blocks.items()
        },
    }
