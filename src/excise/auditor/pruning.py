"""Which weights of a matrix pruning sets to zero, by magnitude, activations or gradients.

Shape legend: R rows (outputs, and all leading dimensions), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from excise.auditor.quantization import matrices
from excise.data.domain import Row
from excise.data.stream import collate, encode
from excise.models.hooks import capture
from excise.models.names import modules_by_name
from excise.models.structure import sizes


def lowest_of_matrix(score_RC: Float[Tensor, "*R C"], share: float) -> Bool[Tensor, "*R C"]:
    """Return the `floor(share * entries)` lowest scores of a whole matrix.

    Args:
        score_RC: Score of every weight.
        share: Share that is pruned.
    """
    flat = score_RC.flatten()
    return lowest_of_rows(flat[None], share)[0].view_as(score_RC)


def lowest_of_rows(score_RC: Float[Tensor, "*R C"], share: float) -> Bool[Tensor, "*R C"]:
    """Return the `floor(share * columns)` lowest scores of every output row.

    Args:
        score_RC: Score of every weight, inputs last.
        share: Share that is pruned.

    Source:
        Wanda, arXiv 2306.11695, section 3: weights are compared within an output.
    """
    count = int(score_RC.shape[-1] * share)
    order = score_RC.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(score_RC, dtype=torch.bool).scatter_(-1, order, True)


def set_difference(
    forget_RC: Float[Tensor, "*R C"], utility_RC: Float[Tensor, "*R C"], q: float, p: float
) -> Bool[Tensor, "*R C"]:
    """Return the top q of one score that are not in the top p of the other, within a matrix.

    Args:
        forget_RC: How much each weight matters on text of the capability.
        utility_RC: How much it matters on benign text.
        q: Share of the first that is taken.
        p: Share of the second that is spared.

    Source:
        Wei et al., arXiv 2402.05162, section 3.2 (set difference of SNIP scores, layer by layer).
    """
    return lowest_of_matrix(-forget_RC, q) & ~lowest_of_matrix(-utility_RC, p)


@torch.no_grad()
def prune_(model: Any, masks: Mapping[str, Tensor]) -> int:
    """Set weights to zero in place.

    Args:
        model: The model.
        masks: Which weights, by parameter name, in the parameter's own layout.

    Returns:
        How many.
    """
    for name, mask in masks.items():
        model.get_parameter(name).masked_fill_(mask, 0)
    return sum(int(mask.sum()) for mask in masks.values())


@torch.no_grad()
def input_norms(
    model: Any, rows: Sequence[Row], tokenizer: Any, *, max_length: int
) -> dict[str, Float[Tensor, " C"]]:
    """Return the norm of every input of a linear layer over all tokens, by the weight's name.

    A weight that no linear layer of its own reads has none: packed experts, convolutions, and
    what a fused kernel reads past its layer.

    Args:
        model: The model.
        rows: Calibration rows, read one at a time, so that no padding is counted.
        tokenizer: Its tokenizer.
        max_length: Tokens per row.

    Source:
        Wanda, arXiv 2306.11695, equation 1: ||X_j||_2 over all tokens of the calibration rows.
    """
    columns = {
        f"{path}.weight": size[0]
        for path, module in modules_by_name(model).items()
        if (size := sizes(module)) is not None
    }
    names = [name for name in matrices(model) if name in columns]
    square_C: dict[str, Tensor] = {}
    for example in encode(rows, tokenizer, max_length=max_length):
        batch = collate([example], pad_id=tokenizer.pad_token_id).to(model.device)
        with capture(model, [name.removesuffix(".weight") for name in names], of="input") as got:
            model(**batch.inputs, use_cache=False)
        for name in names:
            for value in got[name.removesuffix(".weight")]:
                if value.shape[-1] == columns[name]:
                    read_C = value.float().reshape(-1, columns[name]).square().sum(0)
                    square_C[name] = square_C[name] + read_C if name in square_C else read_C
    return {name: value_C.sqrt() for name, value_C in square_C.items()}
