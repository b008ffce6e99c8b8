"""The same function in other coordinates: neurons of every MLP in another order.

Shape legend: M neurons of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.models.anatomy import anatomy
from excise.models.hooks import find_module


@torch.no_grad()
def permute_neurons(model: Any, generator: torch.Generator) -> int:
    """Reorder the neurons of every MLP in place; predictions stay what they are.

    Args:
        model: A dense causal model.
        generator: What the orders are drawn from, on the CPU.

    Returns:
        How many neurons have another place.

    Raises:
        UserError: If the model mixes experts.
    """
    layout = anatomy(model)
    if any(layout.experts):
        raise UserError(f"{layout.family} mixes experts; neurons of a dense model can be permuted")
    moved = 0
    for i in range(layout.num_blocks):
        order_M = torch.randperm(layout.d_mlp, generator=generator)
        moved += int((order_M != torch.arange(layout.d_mlp)).sum())
        spans = sorted(layout.slices.values()) or [(0, layout.d_mlp)]
        for path in dict.fromkeys((layout.mlp_up[i], layout.mlp_gate[i])):
            if path:
                _reorder(find_module(model, path), order_M, spans, outputs=not layout.transposed)
        down = find_module(model, layout.mlp_down[i]).get_parameter("weight")
        into = 0 if layout.transposed else 1
        down.copy_(down.index_select(into, order_M.to(down.device)))
    return moved


def _reorder(
    module: nn.Module, order_M: Tensor, spans: list[tuple[int, int]], *, outputs: bool
) -> None:
    """Reorder what a matrix puts out, span by span; `outputs`: those are its first dimension."""
    for parameter in module.parameters(recurse=False):
        dim = 0 if outputs or parameter.dim() == 1 else 1
        for start, stop in spans:
            part = parameter.narrow(dim, start, stop - start)
            part.copy_(part.index_select(dim, order_M.to(part.device)))
