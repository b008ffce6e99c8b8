"""Which tensors RMU trains, found by name; slices where experts are fused into one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.anatomy import Anatomy, Experts, anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.names import select

Where = tuple[int | slice, ...]
"""An index into a tensor."""


@dataclass(frozen=True)
class Places:
    """Where a run of RMU acts.

    Attributes:
        parts: Anatomy of the whole model.
        layer: Block whose output is steered.
        names: Trained tensors by canonical name, in the model's order.
        slices: For a tensor of which only a part is trained, which part.
        first: First block that holds a trained tensor.
        mlp_only: Whether all that is trained in block `first` lies in its MLP.
        entries: Trained entries.
        whole: Entries of the trained tensors with those that are not trained.
    """

    parts: Anatomy
    layer: int
    names: tuple[str, ...]
    slices: Mapping[str, Where]
    first: int
    mlp_only: bool
    entries: int
    whole: int

    @property
    def at(self) -> str:
        """Path of the steered block."""
        return self.parts.blocks[self.layer]

    @property
    def printed(self) -> tuple[str, ...]:
        """Names with their slices, for people."""
        return tuple(n + written(self.slices[n]) if n in self.slices else n for n in self.names)


def written(where: Where) -> str:
    """Return an index as one would type it, such as `[0, 64:128]`."""
    parts = [
        str(i)
        if isinstance(i, int)
        else f"{'' if i.start is None else i.start}:{'' if i.stop is None else i.stop}"
        for i in where
    ]
    return f"[{', '.join(parts)}]"


def find_places(
    start: Checkpoint,
    layer: int,
    *,
    blocks: Sequence[int] = (),
    modules: Sequence[str] = (),
    matrix: Literal["down", "up"] = "down",
    experts: Literal["first", "all"] = "first",
) -> Places:
    """Find what is trained; nothing but headers is read.

    Args:
        start: The model.
        layer: Block whose output is steered.
        blocks: Blocks whose MLP matrix is trained; empty for `layer` and the two below it.
        modules: Modules or parameters by name, instead of `blocks`.
        matrix: Which matrix of the MLP.
        experts: Of a mixture of experts, which.

    Raises:
        UserError: If a block is beyond the model, a name matches nothing, or something trained
            lies above the steered block.
    """
    model = start.layout.model
    parts = anatomy(model)
    chosen = tuple(blocks) or tuple(range(max(0, layer - 2), layer + 1))
    for block in (layer, *chosen):
        if not 0 <= block < parts.num_blocks:
            raise UserError(
                f"rmu: block {block} is beyond this model, which has blocks 0 to "
                f"{parts.num_blocks - 1}; set 'layer' (and 'blocks') lower"
            )
    if modules:
        names, slices = select(model, modules), dict[str, Where]()
    else:
        found: dict[str, Where | None] = {}
        for block in sorted(set(chosen)):
            found |= _matrices(model, parts, block, matrix, experts)
        names = [n for n in dict(model.named_parameters()) if n in found]
        slices = {n: w for n, w in found.items() if w is not None}
    return _places(model, parts, layer, names, slices)


def _places(
    model: nn.Module,
    parts: Anatomy,
    layer: int,
    names: Sequence[str],
    slices: Mapping[str, Where],
) -> Places:
    """Put together what was found, after checking that gradients reach it."""
    block_of: dict[str, int] = {}
    for name in names:
        inside = [i for i, b in enumerate(parts.blocks) if name.startswith(b + ".")]
        block_of[name] = inside[0] if inside else -1
        if block_of[name] > layer or (not inside and not name.startswith(parts.embed + ".")):
            raise UserError(
                f"rmu: '{name}' lies above block {layer}, whose output is steered, so no gradient "
                f"reaches it; name modules of blocks 0 to {layer}"
            )
    first = max(0, min(block_of.values()))
    if min(block_of.values()) < 0:
        raise UserError(f"rmu: '{names[0]}' is the embedding; name modules inside the blocks")
    mlp = parts.mlp[first] + "."
    sizes = {n: torch.empty(model.get_parameter(n).shape, device="meta") for n in names}
    return Places(
        parts=parts,
        layer=layer,
        names=tuple(names),
        slices=slices,
        first=first,
        mlp_only=all(n.startswith(mlp) for n in names if block_of[n] == first),
        entries=sum(t[slices[n]].numel() if n in slices else t.numel() for n, t in sizes.items()),
        whole=sum(t.numel() for t in sizes.values()),
    )


def _matrices(
    model: nn.Module, parts: Anatomy, block: int, matrix: str, experts: str
) -> dict[str, Where | None]:
    """Return the matrices of one block's MLP by name, with the slice that is trained."""
    found = parts.experts[block]
    if found is not None:
        return _expert_matrices(found, matrix, experts)
    path = parts.mlp_down[block] if matrix == "down" else parts.mlp_up[block]
    named = {n: p for n, p in model.named_parameters() if n.startswith(path + ".")}
    (name,) = (n for n, p in named.items() if p.dim() == 2)
    if matrix == "down" or not parts.slices:
        return {name: None}
    return {name: _rows(parts.slices, parts.transposed)}


def _rows(slices: Mapping[str, tuple[int, int]], transposed: bool) -> Where:
    """Return the part of a fused matrix that is the up-projection."""
    up = slice(*slices["mlp_up"])
    return (slice(None), up) if transposed else (up,)


def _expert_matrices(found: Experts, matrix: str, experts: str) -> dict[str, Where | None]:
    """Return the matrices of a mixture's experts, or of the first alone."""
    weights = found.down if matrix == "down" else found.up
    rows = _rows(found.slices, found.transposed) if matrix == "up" and found.slices else ()
    if experts == "all":
        if weights[0].index is not None and rows:
            return {weights[0].parameter: (slice(None), *rows)}
        return {w.parameter: None for w in weights}
    one = weights[0]
    if one.index is None:
        return {one.parameter: rows or None}
    return {one.parameter: (one.index, *rows)}


@contextmanager
def sliced(parameters: Mapping[str, nn.Parameter], slices: Mapping[str, Where]) -> Iterator[None]:
    """Let gradients reach only the given parts of tensors while the block runs.

    Args:
        parameters: Trained parameters by name.
        slices: Parts by name.
    """

    def keep(where: Where) -> object:
        def hook(grad: Tensor) -> Tensor:
            out = torch.zeros_like(grad)
            out[where] = grad[where]
            return out

        return hook

    handles = [parameters[n].register_hook(keep(where)) for n, where in slices.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
