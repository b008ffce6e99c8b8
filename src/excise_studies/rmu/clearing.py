"""Clearing the residual stream: directions and subspaces, how they are fitted and taken out.

A clearing is a linear map h <- h - W R^T (h - c) at the output of blocks. With W = R orthonormal
and c = 0 it is the projection of Arditi and Chughtai (2024); with c the mean of retain text what
retain needs of the direction stays; with R = S^-1 d / (d^T S^-1 d) for S the covariance of retain
text and W = d it is the best linear unbiased estimate of how much of d was added (generalised
least squares), which removes d exactly and moves retain text least. A projection that is the same
at every block can also be written into the weights: no matrix writes into the residual stream
along its directions any more.

Everything is fitted on `dev` rows, each row's first token left out (its norm is orders larger).
Estimators and their sources: Lucki et al. (arXiv 2409.18025), four directions per layer.

Shape legend: B rows, T tokens, N kept tokens, L blocks, D width, K dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from excise.auditor.attacks.direction import unit
from excise.auditor.batching import batches
from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import encode
from excise.models.anatomy import Anatomy, anatomy
from excise.models.hooks import Edit, capture, find_module

SHRINK = 0.1
"""Share of the mean variance in the covariance of retain text, so that it can be inverted."""


@dataclass(frozen=True)
class Clearing:
    """One linear map per block.

    Attributes:
        name: Name of the condition.
        write_LDK: What is subtracted.
        read_LDK: How much of it: R^T (h - c).
        centre_LD: c.
        first: First block whose output is cleared.
        estimator: How it was fitted.
        spare: Whether the first position is left alone: models park large activations there, on
            which all others lean.
        control: Whether it knows nothing about the forget set.
        needs_original: Whether the original was needed to fit it.
    """

    name: str
    write_LDK: Tensor
    read_LDK: Tensor
    centre_LD: Tensor
    first: int
    estimator: str
    spare: bool = False
    control: bool = False
    needs_original: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What is cleared, by its numbers; how it was fitted does not count."""
        parts = (self.write_LDK, self.read_LDK, self.centre_LD)
        data = b"".join(part.float().contiguous().numpy().tobytes() for part in parts)
        return {
            "maps": hashlib.sha256(data).hexdigest(),
            "shapes": [list(part.shape) for part in parts],
            "first": self.first,
            "spare": self.spare,
        }

    @property
    def dims(self) -> int:
        """Dimensions that are cleared."""
        return int(self.write_LDK.shape[-1])

    def edits(self, model: Any) -> dict[str, Edit]:
        """Return the edits of the blocks, as `excise.models.hooks.edit` takes them."""
        paths = anatomy(model).blocks[self.first :]
        parts = zip(paths, self.write_LDK, self.read_LDK, self.centre_LD, strict=True)
        return {path: remove(w, r, c, spare=self.spare) for path, w, r, c in parts}


def remove(
    write_DK: Float[Tensor, "D K"],
    read_DK: Float[Tensor, "D K"],
    centre_D: Float[Tensor, " D"],
    *,
    spare: bool = False,
) -> Edit:
    """Return the edit h <- h - W R^T (h - c).

    Args:
        write_DK: W.
        read_DK: R.
        centre_D: c.
        spare: Whether to leave the first position alone; texts must be padded on the right.
    """

    def change(hidden_BTD: Tensor) -> Tensor:
        float_BTD = hidden_BTD.float()
        amount_BTK = (float_BTD - centre_D.to(float_BTD)) @ read_DK.to(float_BTD)
        if spare:
            amount_BTK[:, 0] = 0
        return (float_BTD - amount_BTK @ write_DK.to(float_BTD).T).to(hidden_BTD.dtype)

    return change


@torch.no_grad()
def states(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, max_length: int, limit: int = 0
) -> Float[Tensor, "L N D"]:
    """Return every block's output at real tokens but the first, in float32.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        rows: What it reads; equal rows give equal positions for every model.
        max_length: Tokens per row.
        limit: Tokens kept at most, evenly spaced; 0 for all.
    """
    paths = anatomy(model).blocks
    states: list[Tensor] = []
    for batch in batches(encode(rows, tokenizer, max_length=max_length), model, tokenizer):
        with capture(model, paths) as got:
            model(**batch.inputs, use_cache=False)
        mask_BT = batch.attention_BT.clone()
        mask_BT[:, 0] = False
        states.append(torch.stack([got[path][0].float()[mask_BT] for path in paths]))
    all_LND = torch.cat(states, dim=1)
    if not limit or all_LND.shape[1] <= limit:
        return all_LND
    return all_LND[:, torch.linspace(0, all_LND.shape[1] - 1, limit).long()]


@dataclass(frozen=True)
class FittingActivations:
    """What estimators are fitted on: activations on `dev` rows.

    Attributes:
        forget_LND: Edited model on forget text.
        before_LND: Original on the same tokens.
        retain_LND: Edited model on retain text.
        calm_LND: Original on the same retain text.
        generic_LND: Edited model on other text that shares nothing with the forget set.
        first: First edited block, for estimators that hold the original.
    """

    forget_LND: Tensor
    before_LND: Tensor
    retain_LND: Tensor
    calm_LND: Tensor
    generic_LND: Tensor
    first: int


def fit_all(
    activations: FittingActivations, dims: Sequence[int], randoms: int, generator: torch.Generator
) -> list[Clearing]:
    """Fit every clearing.

    Args:
        activations: On `dev` rows.
        dims: Sizes of the subspaces.
        randoms: Number of random directions.
        generator: Draws of the controls.

    Returns:
        Four estimators, each for one direction and one per block; three of them more gently, and
        with the first token spared; subspaces; controls.
    """
    difference = {
        "edited - original": activations.forget_LND.mean(1) - activations.before_LND.mean(1),
        "forget - retain": activations.forget_LND.mean(1) - activations.retain_LND.mean(1),
        "forget - generic": activations.forget_LND.mean(1) - activations.generic_LND.mean(1),
    }
    clearings: list[Clearing] = []
    for name, delta_LD in difference.items():
        holds = name == "edited - original"
        first = activations.first if holds else onset(delta_LD, activations.retain_LND)
        parts = (delta_LD[first:], activations.retain_LND[first:], first, name, holds)
        fitted = [_plain(*parts), _centred(*parts), _least_squares(*parts)]
        best = largest(delta_LD, activations.retain_LND) - first
        fitted += [_spared(clearing) for clearing in fitted]
        clearings += [*fitted, *(_shared(clearing, best) for clearing in fitted)]
    clearings += _subspaces(activations, (1, *[k for k in dims if k > 1]))
    return clearings + controls(activations, dims, randoms, generator)


def onset(delta_LD: Float[Tensor, "L D"], retain_LND: Float[Tensor, "L N D"]) -> int:
    """Return the first block where the difference is half as large as anywhere, by retain norm.

    Args:
        delta_LD: Difference of means by block.
        retain_LND: Activations on retain text, whose mean norm is the unit.
    """
    size_L = delta_LD.norm(dim=-1) / retain_LND.norm(dim=-1).mean(1)
    return int((size_L >= size_L.max() / 2).nonzero()[0])


def largest(delta_LD: Float[Tensor, "L D"], retain_LND: Float[Tensor, "L N D"]) -> int:
    """Return the block where the difference is largest, by retain norm.

    Args:
        delta_LD: Difference of means by block.
        retain_LND: Activations on retain text, whose mean norm is the unit.
    """
    return int((delta_LD.norm(dim=-1) / retain_LND.norm(dim=-1).mean(1)).argmax())


def _plain(
    delta_LD: Tensor, retain_LND: Tensor, first: int, estimator: str, holds: bool
) -> Clearing:
    """Project the direction out."""
    line_LDK = unit(delta_LD)[..., None]
    zero_LD = torch.zeros_like(delta_LD)
    name = f"{estimator}, per block"
    return Clearing(name, line_LDK, line_LDK, zero_LD, first, estimator, needs_original=holds)


def _centred(
    delta_LD: Tensor, retain_LND: Tensor, first: int, estimator: str, holds: bool
) -> Clearing:
    """Set the direction to what it is on retain text on average."""
    plain = _plain(delta_LD, retain_LND, first, estimator, holds)
    name = f"{estimator}, to the retain mean, per block"
    return replace(plain, name=name, centre_LD=retain_LND.mean(1))


def _least_squares(
    delta_LD: Tensor, retain_LND: Tensor, first: int, estimator: str, holds: bool
) -> Clearing:
    """Remove the direction by the least-squares estimate of its amount."""
    centre_LD = retain_LND.mean(1)
    rest_LND = retain_LND - centre_LD[:, None]
    cov_LDD = rest_LND.transpose(1, 2) @ rest_LND / rest_LND.shape[1]
    mean_L = cov_LDD.diagonal(dim1=1, dim2=2).mean(1)
    eye_DD = torch.eye(cov_LDD.shape[-1]).to(cov_LDD)
    cov_LDD = (1 - SHRINK) * cov_LDD + SHRINK * mean_L[:, None, None] * eye_DD
    solved_LD = torch.linalg.solve(cov_LDD, delta_LD)
    scale_L1 = (solved_LD * delta_LD).sum(-1, keepdim=True).clamp(min=1e-12)
    name = f"{estimator}, least squares, per block"
    return Clearing(
        name,
        delta_LD[..., None],
        (solved_LD / scale_L1)[..., None],
        centre_LD,
        first,
        estimator,
        needs_original=holds,
    )


def _spared(clearing: Clearing) -> Clearing:
    """Return the clearing without the first position."""
    name = clearing.name.replace("per block", "first token spared, per block")
    return replace(clearing, name=name, spare=True)


def _shared(clearing: Clearing, at: int) -> Clearing:
    """Return the clearing with the direction of one of its blocks at all of them.

    The centre stays that of each block: what is usual differs from block to block.
    """
    count = len(clearing.write_LDK)
    return replace(
        clearing,
        name=clearing.name.replace("per block", "one"),
        write_LDK=clearing.write_LDK[at].expand(count, -1, -1),
        read_LDK=clearing.read_LDK[at].expand(count, -1, -1),
    )


def components(
    change_LND: Float[Tensor, "L N D"], scale_LD: Float[Tensor, "L D"], dims: int
) -> Float[Tensor, "L D K"]:
    """Return an orthonormal basis of the first principal components of standardised changes.

    The changes are not centred: their mean is what is looked for.

    Args:
        change_LND: Change of every token, for example edited minus original.
        scale_LD: Standard deviation of every coordinate.
        dims: K; at most D.
    """
    scaled_LND = change_LND / scale_LD[:, None].clamp(min=1e-6)
    gram_LDD = scaled_LND.transpose(1, 2) @ scaled_LND
    top_LDK = torch.linalg.eigh(gram_LDD).eigenvectors.flip(-1)[..., :dims]
    basis_LDK: Tensor = torch.linalg.qr(top_LDK * scale_LD[..., None].clamp(min=1e-6)).Q
    return basis_LDK


def _subspaces(activations: FittingActivations, dims: Sequence[int]) -> list[Clearing]:
    """Return principal subspaces of the paired changes, and of forget text against retain."""
    centre_LD = activations.retain_LND.mean(1)
    sources = {
        "components of edited - original": (
            activations.forget_LND - activations.before_LND,
            activations.before_LND.std(1),
            True,
        ),
        "components of forget - retain": (
            activations.forget_LND - centre_LD[:, None],
            activations.retain_LND.std(1),
            False,
        ),
    }
    clearings = []
    for name, (change_LND, scale_LD, holds) in sources.items():
        mean_LD = change_LND.mean(1)
        first = activations.first if holds else onset(mean_LD, activations.retain_LND)
        best = max(first, largest(mean_LD, activations.retain_LND))
        most = min(max(dims), change_LND.shape[-1])
        basis_LDK = components(change_LND, scale_LD, most)
        for k in (k for k in dims if k <= most):
            own_LDK = basis_LDK[first:, :, :k]
            one_LDK = basis_LDK[best, :, :k].expand(len(own_LDK), -1, -1)
            for kind, base_LDK in (("per block", own_LDK), ("one", one_LDK)):
                clearings.append(
                    Clearing(
                        f"{name}, k={k}, {kind}",
                        base_LDK,
                        base_LDK,
                        torch.zeros_like(centre_LD[first:]),
                        first,
                        name,
                        needs_original=holds,
                    )
                )
    return clearings


def controls(
    activations: FittingActivations, dims: Sequence[int], randoms: int, generator: torch.Generator
) -> list[Clearing]:
    """Return clearings that know nothing of the forget set.

    `split halves` is built as forget - retain is, from two halves of the retain text.

    Args:
        activations: On `dev` rows.
        dims: Sizes of the subspaces; the largest gets a random one as well.
        randoms: Number of random directions.
        generator: Where they are drawn from.
    """
    retain_LND, first = activations.retain_LND, activations.first
    half = retain_LND.shape[1] // 2
    delta_LD = retain_LND[first:, :half].mean(1) - retain_LND[first:, half:].mean(1)
    halves = _plain(delta_LD, retain_LND[first:], first, "split halves", False)
    clearings = [halves, _shared(halves, 0)]
    width = retain_LND.shape[-1]
    zero_LD = torch.zeros_like(delta_LD)
    bases = [(f"random {i}", 1) for i in range(randoms)]
    if dims and 1 < max(dims) < width:
        bases.append((f"random, k={max(dims)}", max(dims)))
    for name, k in bases:
        noise_DK = torch.randn(width, k, generator=generator)
        basis_DK = torch.linalg.qr(noise_DK).Q.to(retain_LND)
        base_LDK = basis_DK.expand(len(delta_LD), -1, -1)
        clearings.append(Clearing(name, base_LDK, base_LDK, zero_LD, first, "random"))
    return [replace(clearing, control=True) for clearing in clearings]


def writers(model: Any) -> tuple[str, ...]:
    """Return the matrices that write into the residual stream.

    The embedding is one of them, unless it is the output head as well: clearing it would change
    what is read, too.

    Raises:
        UserError: If a norm stands between a matrix and the stream, or experts are fused.
    """
    layout = anatomy(model)
    if any(layout.experts):
        raise UserError(f"{layout.family} mixes experts; clear a dense model's weights instead")
    if layout.family in ("gemma2", "gemma3_text", "gemma3", "olmo2"):
        raise UserError(
            f"{layout.family} has a norm between its matrices and the residual stream; clear its "
            "activations instead of its weights"
        )
    head = () if layout.tied else (layout.embed,)
    return (*head, *layout.attention_out, *layout.mlp_down)


@torch.no_grad()
def clear_weights(model: Any, basis_DK: Float[Tensor, "D K"]) -> tuple[str, ...]:
    """Project an orthonormal basis out of every matrix that writes to the residual, in place.

    Args:
        model: A dense causal model.
        basis_DK: Orthonormal columns.

    Returns:
        The names of the parameters that changed.
    """
    layout = anatomy(model)
    changed = []
    for path in writers(model):
        module = find_module(model, path)
        across = path == layout.embed or _stored_in_out(layout, path)
        for name, parameter in module.named_parameters(recurse=False):
            basis = basis_DK.to(parameter)
            if parameter.dim() == 1 or across:
                parameter.sub_((parameter @ basis) @ basis.T)
            else:
                parameter.sub_(basis @ (basis.T @ parameter))
            changed.append(f"{path}.{name}")
    return tuple(changed)


def _stored_in_out(layout: Anatomy, path: str) -> bool:
    """Return whether the matrix of a path is stored as (in, out)."""
    return layout.transposed and path in (*layout.attention_out, *layout.mlp_down)


def writer_edits(model: Any, basis_DK: Float[Tensor, "D K"]) -> dict[str, Edit]:
    """Return edits of what every writer puts out that do the same as `clear_weights`."""
    zero_D = torch.zeros(basis_DK.shape[0])
    return {path: remove(basis_DK, basis_DK, zero_D) for path in writers(model)}
