"""Where knowledge went: losses with and without the modules, and which group rows write into.

Rows of a capability that carry no label are the ones that matter: what they teach should have
been drawn into the module by the rows that carry one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from excise.data.domain import CORE, Row, Rows
from excise.data.split import hashed_order
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.losses import nll
from excise.models.names import parameters_by_name
from excise.routing.groups import GroupMap

LIMIT = 128
"""Rows of each set that are read."""

CHUNK = 32
"""Rows per forward pass."""


@dataclass(frozen=True)
class Sets:
    """Batches of what a model was trained on, by what was told of them.

    Attributes:
        batches: `retain`, `labelled` (forget rows with a label) and `missed` (without), those
            that have rows.
    """

    batches: Mapping[str, tuple[Batch, ...]]


def sample(rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, seed: int = 0) -> Sets:
    """Draw some rows of each kind.

    Args:
        rows: What is read in training, with true `capability` and told `label`.
        tokenizer: The model's tokenizer.
        max_length: Tokens per row.
        seed: Seed of the draw, which depends on content alone.

    Returns:
        Up to `LIMIT` rows of each kind, in batches on the CPU.
    """
    kinds: dict[str, list[Row]] = {"retain": [], "labelled": [], "missed": []}
    for row in dict.fromkeys(rows):
        told = "labelled" if row.label > CORE else "missed"
        kinds[told if row.capability else "retain"].append(row)
    made = {}
    for kind, found in kinds.items():
        keys = [f"{row.unit}:{row.wording}:{row.text}" for row in found]
        chosen = encode(hashed_order(found, keys, seed)[:LIMIT], tokenizer, max_length=max_length)
        if chosen:
            made[kind] = tuple(
                collate(chosen[i : i + CHUNK], pad_id=tokenizer.pad_token_id)
                for i in range(0, len(chosen), CHUNK)
            )
    return Sets(made)


@torch.no_grad()
def losses(model: nn.Module, sets: Sets, device: torch.device) -> dict[str, float]:
    """Return the mean loss per scored token of every set, in nats."""
    return {kind: mean_loss(model, batches, device) for kind, batches in sets.batches.items()}


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
        value, scored = nll(model(**here.inputs).logits, here)
        total, count = total + float(value), count + scored
    return total / max(1.0, count)


def writes(model: nn.Module, map: GroupMap, sets: Sets, device: torch.device) -> dict[str, Any]:
    """Return which groups each set's ordinary gradient would write into.

    Args:
        model: The trained model, modules on; its gradients are dropped and its flags kept.
        map: Who owns what.
        sets: What to read; the first chunk of each is enough.
        device: Where the model is.

    Returns:
        By set: `share` of the squared gradient norm by group, `norm` by group, and `blocks`, the
        same shares by group and block ("" for what lies in none).
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    out = {}
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        for kind, batches in sets.batches.items():
            model.zero_grad(set_to_none=True)
            here = batches[0].to(device)
            value, count = nll(model(**here.inputs).logits, here)
            (value / count).backward()
            out[kind] = _squares(model, map)
    finally:
        model.zero_grad(set_to_none=True)
        for p, needed in flags:
            p.requires_grad_(needed)
    return out


def _squares(model: nn.Module, map: GroupMap) -> dict[str, Any]:
    """Return squared gradient norms by group and by block, as shares."""
    groups = dict.fromkeys(map.names, 0.0)
    blocks: dict[str, dict[str, float]] = {name: {} for name in map.names}
    for name, param in parameters_by_name(model).items():
        if param.grad is None:
            continue
        at = next((part for part in name.split(".") if part.isdigit()), "")
        for one in map.owners[name]:
            grad: Tensor = param.grad
            if one.dim is not None:
                grad = grad.narrow(one.dim, one.start, one.stop - one.start)
            square = float(grad.double().square().sum())
            groups[one.group] += square
            blocks[one.group][at] = blocks[one.group].get(at, 0.0) + square
    total = sum(groups.values()) or 1.0
    return {
        "share": {name: value / total for name, value in groups.items()},
        "norm": {name: value**0.5 for name, value in groups.items()},
        "blocks": {
            name: {at: value / total for at, value in found.items()}
            for name, found in blocks.items()
        },
    }


def rows_of(rows: Rows, kind: str) -> int:
    """Return how many rows are `retain`, `labelled` or `missed`."""
    if kind == "retain":
        return sum(not row.capability for row in rows)
    told = kind == "labelled"
    return sum(bool(row.capability) and (row.label > CORE) == told for row in rows)
