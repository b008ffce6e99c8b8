"""Shrink and perturb: which weights, how far towards their initial value, with what noise.

A matrix becomes `(1 - alpha) W + alpha beta X` with X Xavier-uniform of its shape; a vector (the
scale of a norm, a bias) only shrinks, towards the value the family initialises it with: 1 for the
scale of a LayerNorm or RMSNorm, 0 for biases and for Gemma's scale, which is stored minus 1.

Which weights of a group are moved can be a choice: those with the largest |w * dL/dw| on rows to
forget, averaged over rows, all matrices ranked together; or as many at random.

Sources: UNDO, arXiv 2506.06278, section 3; shrink and perturb: Ash & Adams, arXiv 1910.08475; the
score: SNIP, arXiv 1810.02340, equation 5, on single texts Wei et al. 2024, arXiv 2402.05162,
section 3.1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Row
from excise.data.stream import Tokenizer, collate, encode
from excise.data.subsample import subsample
from excise.losses import nll
from excise.models.anatomy import anatomy

LayerGroup = Literal["all", "mlp", "attention", "embed", "norms"]
"""Groups of layers. `embed` holds every embedding and the head, `norms` the vectors outside of
attention, MLPs and embeddings."""

SALIENCY_ROWS = 128
"""Rows that are scored at most, chosen by hash."""


def xavier_uniform(
    shape: Sequence[int], generator: torch.Generator
) -> Float[Tensor, "..."]:  # any shape of two dimensions or more
    """Return Xavier-uniform noise in float32: uniform within sqrt(6 / (fan in + fan out)).

    Args:
        shape: Of two dimensions, or of three with one matrix per expert, or of a convolution's
            four with the kernel last.
        generator: Random numbers, on the CPU.

    Source:
        Glorot and Bengio 2010, equation 16 (normalized initialization).
    """
    if len(shape) > 3:
        field = math.prod(shape[2:])
        fans = (shape[0] + shape[1]) * field
    else:
        fans = shape[-1] + shape[-2]
    bound = math.sqrt(6.0 / fans)
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def shrunk(
    value: Tensor, *, alpha: float, beta: float, initial: Tensor | None, noise: Tensor | None
) -> Tensor:
    """Return `(1 - alpha) W + alpha (W0 + beta X)`, in float32 at least, in the dtype of W.

    Args:
        value: The tensor W.
        alpha: How far it is moved: 0 keeps it, 1 leaves nothing of it.
        beta: Scale of the noise.
        initial: W0 of its shape, what it shrinks towards; None for 0.
        noise: X of its shape; None to shrink alone.

    Source:
        UNDO, arXiv 2506.06278, section 3 (there W0 is 0 for every tensor).
    """
    wide = value if value.dtype == torch.float64 else value.float()
    moved = (1.0 - alpha) * wide
    if initial is not None:
        moved = moved + alpha * initial.to(moved)
    if noise is not None and beta:
        moved = moved + alpha * beta * noise.to(moved)
    return moved.to(value.dtype)


def initial_vectors(model: nn.Module) -> dict[str, Tensor]:
    """Return what every vector of a model is initialised with, by parameter name.

    A norm is asked: a copy of it is initialised by the family's own rule. Biases are 0.

    Args:
        model: A `transformers` model; of any other, norms reset themselves.
    """
    initialise: Any = getattr(model, "_init_weights", None)
    initial: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        named = dict(module.named_parameters(recurse=False))
        vectors = {name: p for name, p in named.items() if p.dim() <= 1}
        values = {name: torch.zeros_like(p) for name, p in vectors.items()}
        if vectors and len(vectors) == len(named) and not list(module.children()):
            values = _reset(module, named, initialise)
        initial |= {f"{path}.{name}" if path else name: v for name, v in values.items()}
    return initial


def _reset(
    module: nn.Module, named: Mapping[str, nn.Parameter], initialise: Any
) -> dict[str, Tensor]:
    """Return the vectors of a norm as its family initialises them."""
    twin = copy.copy(module)  # shares buffers, which no rule for norms writes
    twin._parameters = {n: nn.Parameter(torch.full_like(p, math.nan)) for n, p in named.items()}
    reset: Any = getattr(twin, "reset_parameters", None)
    if initialise is not None:
        initialise(twin)
    elif reset is not None:
        reset()
    guess = {name: 0.0 if "bias" in name else 1.0 for name in named}
    values = {}
    for name, value in twin.named_parameters():
        known = bool(value.isfinite().all())
        values[name] = value.detach() if known else torch.full_like(value.detach(), guess[name])
    return values


def members(model: nn.Module, groups: Sequence[LayerGroup]) -> tuple[str, ...]:
    """Return the names of the parameters in groups of layers, each tied tensor once.

    Args:
        model: The model.
        groups: Groups; `all` takes everything.

    Raises:
        UserError: If the model has no parameter in them.
    """
    named = dict(model.named_parameters())
    if "all" in groups:
        return tuple(named)
    layout = anatomy(model)
    inside = {"mlp": layout.mlp, "attention": layout.attention}
    embeddings = [path for path, m in model.named_modules() if isinstance(m, nn.Embedding)]
    embeddings.append(layout.head)

    def group_of(name: str, vector: bool) -> str:
        for group, paths in (*inside.items(), ("embed", embeddings)):
            if any(name.startswith(f"{path}.") for path in paths):
                return group
        return "norms" if vector else "other"

    chosen = tuple(n for n, p in named.items() if group_of(n, p.dim() <= 1) in groups)
    if not chosen:
        raise UserError(
            f"groups {', '.join(groups)} hold no parameter of this model; use 'all' or another "
            "group"
        )
    return chosen


@torch.no_grad()
def perturb(
    model: nn.Module,
    *,
    alpha: float,
    beta: float,
    ctx: Context,
    groups: Sequence[LayerGroup] = ("all",),
    purpose: str = "perturb",
    masks: Mapping[str, Tensor] | None = None,
) -> tuple[str, ...]:
    """Shrink and perturb a model in place.

    The noise of a tensor depends on the seed, the purpose and the tensor's name alone, so that it
    is the same whichever other groups are perturbed.

    Args:
        model: The model.
        alpha: How far weights are moved: 0 keeps them, 1 leaves nothing of them.
        beta: Scale of the noise.
        ctx: Gives the seed.
        groups: Groups of layers.
        purpose: Names the noise.
        masks: Which weights are moved, by parameter name; what has no mask keeps its value. None
            for all.

    Returns:
        Names of the perturbed parameters.

    Raises:
        UserError: If alpha lies outside [0, 1] or beta is negative.
    """
    if not 0.0 <= alpha <= 1.0:
        raise UserError(f"alpha is {alpha:g}; a share of the weights to replace lies in [0, 1]")
    if not 0.0 <= beta < math.inf:
        raise UserError(f"beta is {beta:g}; a scale of noise is 0 or more")
    names = tuple(n for n in members(model, groups) if masks is None or n in masks)
    initial = initial_vectors(model)
    named = dict(model.named_parameters())
    for name in names:
        value = named[name]
        noise = None
        if value.dim() > 1 and beta:
            noise = xavier_uniform(value.shape, ctx.generator(f"{purpose}/{name}"))
        moved = shrunk(value, alpha=alpha, beta=beta, initial=initial.get(name), noise=noise)
        value.copy_(moved if masks is None else torch.where(masks[name], moved, value))
    return names


def forget_saliency(
    model: nn.Module,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    names: Sequence[str],
    *,
    max_length: int,
    ctx: Context,
) -> dict[str, Tensor]:
    """Return |w * dL/dw| of every matrix among `names`, averaged over rows, in float32.

    L is the loss per scored token of one row.

    Args:
        model: The model that knows; it keeps its gradients and flags.
        rows: Forget rows.
        tokenizer: Its tokenizer.
        names: Parameters; vectors are left out.
        max_length: Tokens per row.
        ctx: Seed of the chosen rows, device.

    Source:
        SNIP, arXiv 1810.02340, equation 5; on single texts arXiv 2402.05162, section 3.1.
    """
    named = dict(model.named_parameters())
    chosen = {name: named[name] for name in names if named[name].dim() > 1}
    read = subsample(rows, SALIENCY_ROWS, by="content", seed=ctx.seed_for("saliency"))
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
    flags = [(p, p.requires_grad) for p in chosen.values()]
    try:
        for p in chosen.values():
            p.requires_grad_(True)
        for example in encode(read, tokenizer, max_length=max_length):
            batch = collate([example], pad_id=tokenizer.pad_token_id).to(ctx.device)
            value, count = nll(model(**batch.inputs, use_cache=False).logits, batch)
            grads = torch.autograd.grad(value / count, list(chosen.values()), allow_unused=True)
            for (name, p), grad in zip(chosen.items(), grads, strict=True):
                if grad is not None:
                    total[name] += (p.detach() * grad).abs().float() / len(read)
    finally:
        for p, needed in flags:
            p.requires_grad_(needed)
    return total


def largest(scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return masks of the weights with the largest scores, all tensors ranked together.

    Args:
        scores: Score of every weight, by parameter name.
        share: How many, as a share of all of them.

    Raises:
        UserError: If there is no weight to choose from.
    """
    if not scores:
        raise UserError("the groups hold no matrix to choose weights from; name other groups")
    flat = torch.cat([value.flatten() for value in scores.values()])
    count = max(1, round(share * flat.numel()))
    picked = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    picked[flat.topk(count).indices] = True
    sizes = [value.numel() for value in scores.values()]
    parts = picked.split(sizes)
    return {n: m.view_as(v) for (n, v), m in zip(scores.items(), parts, strict=True)}


def at_random(
    model: nn.Module, names: Sequence[str], share: float, ctx: Context
) -> dict[str, Tensor]:
    """Return masks of as many weights chosen at random: the control of `forget_saliency`.

    Args:
        model: The model.
        names: Parameters; vectors are left out.
        share: How many, as a share of all entries of the matrices.
        ctx: Seed of the choice.
    """
    named = dict(model.named_parameters())
    scores = {
        name: torch.rand(named[name].shape, generator=ctx.generator(f"saliency/{name}"))
        for name in names
        if named[name].dim() > 1
    }
    masks = largest(scores, share)
    return {name: mask.to(named[name].device) for name, mask in masks.items()}
