"""Clearing written into the weights: no matrix writes the directions into the residual any more.

Shape legend: B rows, T tokens, D width, K dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from excise.core.errors import UserError
from excise.models.anatomy import Anatomy, anatomy
from excise.models.hooks import Edit, find_module
from excise_studies.rmu.clearing import remove


def writers(model: Any) -> tuple[str, ...]:
    """Return the matrices that write into the residual stream.

    The embedding is one of them, unless it is the output head as well: clearing it would change
    what is read, too.

    Raises:
        UserError: If a norm stands between a matrix and the stream, or experts are fused.
    """
    found = anatomy(model)
    if any(found.experts):
        raise UserError(f"{found.family} mixes experts; clear a dense model's weights instead")
    if found.family in ("gemma2", "gemma3_text", "gemma3", "olmo2"):
        raise UserError(
            f"{found.family} has a norm between its matrices and the residual stream; clear its "
            "activations instead of its weights"
        )
    head = () if found.tied else (found.embed,)
    return (*head, *found.attention_out, *found.mlp_down)


@torch.no_grad()
def clear_weights(model: Any, basis_DK: Float[Tensor, "D K"]) -> tuple[str, ...]:
    """Project an orthonormal basis out of every matrix that writes to the residual, in place.

    Args:
        model: A dense causal model.
        basis_DK: Orthonormal columns.

    Returns:
        The names of the parameters that changed.
    """
    found = anatomy(model)
    changed = []
    for path in writers(model):
        module = find_module(model, path)
        across = path == found.embed or _stored_in_out(found, path)
        for name, parameter in module.named_parameters(recurse=False):
            basis = basis_DK.to(parameter)
            if parameter.dim() == 1 or across:
                parameter.sub_((parameter @ basis) @ basis.T)
            else:
                parameter.sub_(basis @ (basis.T @ parameter))
            changed.append(f"{path}.{name}")
    return tuple(changed)


def _stored_in_out(found: Anatomy, path: str) -> bool:
    """Return whether the matrix of a path is stored as (in, out)."""
    return found.transposed and path in (*found.attention_out, *found.mlp_down)


def writer_edits(model: Any, basis_DK: Float[Tensor, "D K"]) -> dict[str, Edit]:
    """Return edits of what every writer puts out that do the same as `clear_weights`."""
    zero_D = torch.zeros(basis_DK.shape[0])
    return {path: remove(basis_DK, basis_DK, zero_D) for path in writers(model)}
