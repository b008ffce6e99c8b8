"""Which tensors an edit moved, how far, and in how many directions; read from disk one by one.

Shape legend: O rows and I columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from excise.core.errors import UserError
from excise.core.random_state import seeded
from excise.models.checkpoint import Checkpoint
from excise.record import TensorChange

EXACT = 2048
"""Matrices whose smaller side is longer are taken apart by their largest singular values alone."""

SKETCH = 256
"""Singular values that are looked for in those."""


@dataclass(frozen=True)
class Moved:
    """One tensor of both models.

    Attributes:
        entry: How it moved, for the record.
        change: Squared Frobenius norm of the change.
        size: Squared Frobenius norm of the original.
    """

    entry: TensorChange
    change: float
    size: float


def check_same_tensors(original: Checkpoint, edited: Checkpoint) -> None:
    """Refuse models whose parameters differ in name or shape.

    Raises:
        UserError: Naming the first difference.
    """
    for model, other in ((original, edited), (edited, original)):
        theirs = {n: p for n, p in other.layout.model.named_parameters(remove_duplicate=False)}
        ours = dict(model.layout.model.named_parameters())
        for name in model.parameter_names():
            if name not in theirs or theirs[name].shape != ours[name].shape:
                raise UserError(
                    f"{edited.path} and {original.path} are not of one architecture and shape "
                    f"('{name}' differs); give the model it was made from as --original"
                )


def moved_tensors(
    original: Checkpoint, edited: Checkpoint, emit: Callable[[int, int], None] | None = None
) -> Iterator[Moved]:
    """Compare every tensor of two folders; no model is loaded.

    Args:
        original: The model before the edit.
        edited: The model after it.
        emit: Called with the number of tensors done and the number of all.

    Yields:
        One entry per parameter, those that did not move too.
    """
    names = edited.parameter_names()
    for done, name in enumerate(names):
        before = original.weights_of([name])[name]
        after = edited.weights_of([name])[name]
        yield compare(name, before, after)
        if emit is not None:
            emit(done + 1, len(names))


def compare(name: str, before: Tensor, after: Tensor) -> Moved:
    """Compare one tensor.

    Args:
        name: Its name.
        before: The original's.
        after: The edited one.
    """
    change = after.float() - before.float()
    entries = float((change != 0).double().mean()) if change.numel() else 0.0
    far = float(change.double().square().sum())
    size = float(before.double().square().sum())
    rank, count = (None, None)
    if far > 0 and change.ndim >= 2 and min(change.shape[-2:]) > 1:
        rank, count = spectrum(change.flatten(0, -2))
    entry = TensorChange(
        name=name,
        shape=tuple(before.shape),
        relative=math.sqrt(far / size) if size > 0 else (1.0 if far > 0 else 0.0),
        moved=entries,
        rank=rank,
        count90=count,
    )
    return Moved(entry, far, size)


def spectrum(change_OI: Float[Tensor, "O I"]) -> tuple[float | None, int | None]:
    """Return the effective rank of a change and how many singular values hold 90 % of it.

    Args:
        change_OI: A matrix that is not zero; the matrices of experts stand below each other.

    Returns:
        exp of the entropy of the singular values (Roy & Vetterli 2007), None for a matrix too
        large to take apart; and the count, None where it is more than were looked for.
    """
    if min(change_OI.shape) > EXACT:
        with seeded(0, change_OI.device):
            _, value_X, _ = torch.svd_lowrank(change_OI, q=SKETCH)
        return None, count90(value_X.double(), float(change_OI.double().square().sum()))
    value_X = torch.linalg.svdvals(change_OI.double())
    share_X = value_X / value_X.sum()
    rank = float(torch.special.entr(share_X).sum().exp())
    return rank, count90(value_X, float(value_X.square().sum()))


def count90(value_X: Float[Tensor, " X"], whole: float) -> int | None:
    """Return how many of the largest singular values hold 90 % of `whole`, their squared sum."""
    held_X = value_X.square().cumsum(0)
    enough = (held_X >= 0.9 * whole * (1 - 1e-9)).nonzero()
    return int(enough[0]) + 1 if len(enough) else None
