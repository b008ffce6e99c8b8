"""Quantization of weights to the nearest level, in groups, as numbers on any device.

Shape legend: R rows (all leading dimensions), C columns (inputs), G groups, S entries of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from excise.auditor.budget import Format

BITS, GROUP, OFFSET = (8, 4), 64, 16
"""Grids of integers that hiding counts with: bits, inputs that share a scale, inputs of the first
group."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Levels of NormalFloat4: quantiles of a normal distribution, scaled to [-1, 1]; 0 is one of them.

Source: QLoRA, arXiv 2305.14314, appendix E.
"""


@dataclass(frozen=True)
class Grid:
    """A quantization grid: round to nearest, one scale per group of inputs.

    Attributes:
        bits: Bits per weight; levels run from -(2^(bits-1) - 1) to the same above, evenly unless
            there is a codebook.
        group: Inputs that share a scale.
        offset: Inputs of the first, shorter group: with 0 the groups lie where everybody's lie,
            and a model whose weights came off such a grid would be rounded onto itself.
        codebook: Levels from -1 to 1, ascending, in place of even ones.
    """

    bits: int
    group: int = GROUP
    offset: int = OFFSET
    codebook: tuple[float, ...] = ()

    @property
    def top(self) -> int:
        """Highest level, in scales."""
        return 1 if self.codebook else (1 << (self.bits - 1)) - 1


def grid_of(form: Format, group: int, offset: int) -> Grid:
    """Return the grid of a name, its first group cut to `offset` inputs.

    Args:
        form: Its name.
        group: Inputs that share a scale.
        offset: Inputs of the first group; of as many as a group has, none is short.
    """
    if form == "nf4":
        return Grid(4, group, offset % group, NF4)
    return Grid(int(form.removeprefix("int")), group, offset % group)


def grids(bits: Sequence[int], group: int, offset: int) -> tuple[Grid, ...]:
    """Return one grid per number of bits."""
    return tuple(Grid(b, group, offset % group) for b in bits)


def grouped(weight_RC: Float[Tensor, "*R C"], grid: Grid) -> Float[Tensor, "R G S"]:
    """Return the weights by group, zeros where the first or last group is short."""
    columns = weight_RC.shape[-1]
    left = (grid.group - grid.offset) % grid.group
    right = -(columns + left) % grid.group
    padded = functional.pad(weight_RC.reshape(-1, columns).float(), (left, right))
    return padded.reshape(padded.shape[0], -1, grid.group)


def ungrouped(
    value_RGS: Float[Tensor, "R G S"], like: Float[Tensor, "*R C"], grid: Grid
) -> Float[Tensor, "*R C"]:
    """Undo `grouped`; dtype and shape are those of `like`."""
    columns = like.shape[-1]
    left = (grid.group - grid.offset) % grid.group
    flat = value_RGS.reshape(value_RGS.shape[0], -1)[:, left : left + columns]
    return flat.reshape(like.shape).to(like.dtype)


def levels(
    weight_RC: Float[Tensor, "*R C"], grid: Grid
) -> tuple[Int[Tensor, "R G S"], Float[Tensor, "R G 1"]]:
    """Return the level of every weight and the scale of every group.

    Args:
        weight_RC: Weights, inputs last.
        grid: The grid.

    Returns:
        Levels in -top..top, or their places in the codebook, and scale = largest magnitude of the
        group / top (1 for zeros).
    """
    value_RGS = grouped(weight_RC, grid)
    scale_RG1 = value_RGS.abs().amax(-1, keepdim=True) / grid.top
    scale_RG1 = torch.where(scale_RG1 > 0, scale_RG1, torch.ones_like(scale_RG1))
    if grid.codebook:
        code = value_RGS.new_tensor(grid.codebook)
        return torch.bucketize(
            value_RGS / scale_RG1, (code[1:] + code[:-1]) / 2, out_int32=True
        ), scale_RG1
    level_RGS = (value_RGS / scale_RG1).round().clamp(-grid.top, grid.top)
    return level_RGS.to(torch.int32), scale_RG1


def rounded(weight_RC: Float[Tensor, "*R C"], grid: Grid) -> Float[Tensor, "*R C"]:
    """Return what the weights are after quantizing and reading them back."""
    level_RGS, scale_RG1 = levels(weight_RC, grid)
    value_RGS = level_RGS.float()
    if grid.codebook:
        value_RGS = scale_RG1.new_tensor(grid.codebook)[level_RGS]
    return ungrouped(value_RGS * scale_RG1, weight_RC, grid)


def inside(
    weight_RC: Float[Tensor, "*R C"], grid: Grid, slack: float = 0.02
) -> tuple[Float[Tensor, "*R C"], Float[Tensor, "*R C"]]:
    """Return the lowest and highest value every weight may take without changing its rounding.

    The largest weight of each group may not move at all, because it sets the scale.

    Args:
        weight_RC: Weights, inputs last.
        grid: The grid.
        slack: Share of a bucket left free at both ends, against the rounding of storage.

    Returns:
        Lower and upper bounds; both contain the weight itself.
    """
    assert not grid.codebook, "buckets of a codebook have no common width"
    value_RGS = grouped(weight_RC, grid)
    level_RGS, scale_RG1 = levels(weight_RC, grid)
    top_RG1 = value_RGS.abs().amax(-1, keepdim=True)
    half = 0.5 - slack
    low_RGS = ((level_RGS - half) * scale_RG1).maximum(-top_RG1 * (1 - slack))
    high_RGS = ((level_RGS + half) * scale_RG1).minimum(top_RG1 * (1 - slack))
    low_RGS, high_RGS = low_RGS.minimum(value_RGS), high_RGS.maximum(value_RGS)
    fixed_RGS = value_RGS.abs() >= top_RG1
    low_RGS = torch.where(fixed_RGS, value_RGS, low_RGS)
    high_RGS = torch.where(fixed_RGS, value_RGS, high_RGS)
    return ungrouped(low_RGS, weight_RC, grid), ungrouped(high_RGS, weight_RC, grid)


def matrices(model: Any, *, embeddings: bool = False) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return the weight matrices of a model by parameter name.

    Args:
        model: A `transformers` causal model.
        embeddings: Whether to include token embeddings and head.

    Returns:
        For each name the parameter and whether its inputs come first (GPT-2's `Conv1D`).
    """
    skipped: set[int] = set()
    if not embeddings:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                skipped |= {id(p) for p in module.parameters()}
        head = model.get_output_embeddings()
        if head is not None:
            skipped |= {id(p) for p in head.parameters()}
    flipped = {id(module.weight) for module in model.modules() if type(module).__name__ == "Conv1D"}
    return {
        name: (parameter, id(parameter) in flipped)
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in skipped
    }


def by_outputs(value: Tensor, *, flipped: bool) -> Tensor:
    """Return a matrix with inputs last, or such a one as it is stored: GPT-2 has inputs first."""
    return value.t() if flipped else value


@torch.no_grad()
def quantize_(model: Any, grid: Grid, *, embeddings: bool = False) -> int:
    """Round the weight matrices of `model` in place.

    Args:
        model: The model.
        grid: The grid.
        embeddings: Whether to include token embeddings and head.

    Returns:
        Number of weights that were rounded.
    """
    count = 0
    for parameter, flipped in matrices(model, embeddings=embeddings).values():
        new_RC = rounded(by_outputs(parameter, flipped=flipped), grid)
        parameter.copy_(by_outputs(new_RC, flipped=flipped))
        count += parameter.numel()
    return count


@torch.no_grad()
def flip_rate(
    model: Any, original: Callable[[str], Tensor], grid: Grid, *, embeddings: bool = False
) -> float:
    """Return the share of weights that fall on another level than in the original.

    Near 0 means that quantization undoes the edit (Zhang et al., arXiv 2410.16454).

    Args:
        model: The edited model.
        original: Gives the original's parameter of a name, so that only one is held at a time;
            those of another shape are left out.
        grid: The grid.
        embeddings: Whether to include token embeddings and head.

    Returns:
        A share between 0 and 1.
    """
    moved, total = 0, 0
    for name, (parameter, flipped) in matrices(model, embeddings=embeddings).items():
        other = original(name).to(parameter.device)
        if other.shape != parameter.shape:
            continue
        new, _ = levels(by_outputs(parameter, flipped=flipped), grid)
        old, _ = levels(by_outputs(other, flipped=flipped), grid)
        moved += int((new != old).sum())
        total += parameter.numel()
    return moved / max(total, 1)
