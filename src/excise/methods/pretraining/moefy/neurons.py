"""Which neurons do the work of which domain, and putting those of one domain side by side.

Attribution: the first-order estimate of what a unit's removal does to the loss, the absolute
product of activation and gradient (Molchanov et al. 2017, "Pruning convolutional neural networks
for resource efficient inference", arXiv:1611.06440, equation 8), averaged over the scored tokens
of a domain. An expert of a mixture has no single activation; there it is the product of weights
and gradients.

Shape legend: B rows, T tokens, M units of a block, D domains (core first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.losses import nll
from excise.methods.pretraining.routed.modules import mlp_kind
from excise.models.anatomy import anatomy
from excise.models.hooks import capture, trainable
from excise.models.names import parameters_by_name
from excise.routing import Part, count_units
from excise.routing.surgery import ranges_of

Attribution = dict[int, Tensor]
"""How much each unit matters to each domain, [D, M] by block."""


def attribution(
    model: nn.Module,
    domains: Sequence[Sequence[Batch]],
    blocks: Sequence[int],
    device: torch.device,
) -> Attribution:
    """Return how much each unit matters to the loss of each domain.

    Args:
        model: A causal model in evaluation mode; its gradients are dropped.
        domains: Batches of each domain, core first.
        blocks: Blocks to measure.
        device: Where the model is.

    Returns:
        By block [D, M] on the CPU, in nats per scored token.
    """
    units = {block: count_units(model, block, mlp_kind(model, block)) for block in blocks}
    total = {block: torch.zeros(len(domains), count) for block, count in units.items()}
    with trainable(model, ("*",)):
        for d, batches in enumerate(domains):
            scored = sum(batch.num_targets for batch in batches)
            for batch in batches:
                for block, value_M in _taylor(model, batch.to(device), blocks).items():
                    total[block][d] += value_M.cpu().float() / max(1, scored)
        model.zero_grad(set_to_none=True)
    return total


def _taylor(model: nn.Module, batch: Batch, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the summed |value x gradient| of every unit on one batch, by block."""
    layout = anatomy(model)
    dense = {b: layout.mlp_down[b] for b in blocks if layout.experts[b] is None}
    model.zero_grad(set_to_none=True)
    with capture(model, list(dense.values()), of="input", grad=True) as inputs:
        loss, _ = nll(model(**batch.inputs, use_cache=False).logits, batch)
        activations = {block: inputs[path][0] for block, path in dense.items()}
        for a_BTM in activations.values():
            a_BTM.retain_grad()
        loss.backward()
    taylor = {}
    for block, a_BTM in activations.items():
        assert a_BTM.grad is not None
        product_BTM = (a_BTM.detach() * a_BTM.grad).float().abs()
        taylor[block] = product_BTM.flatten(0, -2).sum(0)
    return taylor | {block: _experts(model, block) for block in blocks if block not in taylor}


def _experts(model: nn.Module, block: int) -> Tensor:
    """Return |weight x gradient| of every expert of a block, summed over its weights."""
    named = parameters_by_name(model)
    values = []
    for unit in range(count_units(model, block, "experts")):
        part = Part(at="experts", blocks=(block,), units=(unit, unit + 1))
        value = torch.zeros(())
        for name, spans in ranges_of(model, [part]).items():
            grad = named[name].grad
            for dim, start, stop in spans if grad is not None else ():
                assert grad is not None
                product = named[name].detach() * grad
                value = value + product.narrow(dim, start, stop - start).abs().sum().cpu()
        values.append(value)
    return torch.stack(values)


def contrast(scores_DM: Float[Tensor, "D M"], score: Literal["ratio", "difference"]) -> Tensor:
    """Return how much more each unit does for a capability than for all others, [D - 1, M].

    Args:
        scores_DM: Attribution, core first.
        score: `difference` of the shares of each domain's attribution, which prefers units that
            matter; or `ratio` of them, which prefers units that matter to nothing else.
    """
    share_DM = scores_DM / scores_DM.sum(dim=1, keepdim=True).clamp(min=1e-30)
    others = share_DM.sum(dim=0, keepdim=True) - share_DM
    others = others / max(1, len(share_DM) - 1)
    if score == "difference":
        return (share_DM - others)[1:]
    floor = 0.1 / scores_DM.shape[1]  # a tenth of the mean share: what matters to nobody is no gain
    return (share_DM / (others + floor))[1:]


def choose(
    score_CM: Float[Tensor, "C M"], count: int, owned: Sequence[Sequence[int]] = ()
) -> list[list[int]]:
    """Give every capability `count` units, the best pair of capability and unit first.

    Args:
        score_CM: Score of every unit for every capability.
        count: Units of each capability in the end.
        owned: Units that each has already and keeps.

    Returns:
        Units of each capability, the kept ones first.

    Raises:
        UserError: If the core would be left with nothing.
    """
    capabilities, units = score_CM.shape
    if capabilities * count >= units:
        raise UserError(
            f"moefy would give {capabilities} capabilities {count} of {units} units each and leave "
            "the core none; lower 'neurons'"
        )
    chosen = [*map(list, owned)] or [[] for _ in range(capabilities)]
    taken = {unit for of_capability in chosen for unit in of_capability}
    ranked = score_CM.flatten().sort(descending=True, stable=True).indices.tolist()
    for at in ranked:
        capability, unit = divmod(at, units)
        if unit not in taken and len(chosen[capability]) < count:
            chosen[capability].append(unit)
            taken.add(unit)
    return chosen


@torch.no_grad()
def gather_units(model: nn.Module, block: int, chosen: Sequence[Sequence[int]]) -> list[Part]:
    """Reorder a block's units so that each capability's lie side by side, behind the core's.

    The model computes the same: rows of the matrices into the MLP and columns of the one out of
    it move together (of experts, with the router's rows).

    Args:
        model: The model; changed in place.
        block: Number of the block.
        chosen: Units of each capability.

    Returns:
        The part that each capability now has.
    """
    kind = mlp_kind(model, block)
    count = count_units(model, block, kind)
    taken = [unit for units in chosen for unit in units]
    order = torch.tensor([u for u in range(count) if u not in set(taken)] + taken)
    named = parameters_by_name(model)
    first, second = (
        ranges_of(model, [Part(at=kind, blocks=(block,), units=(u, u + 1))]) for u in (0, 1)
    )
    for name, spans in first.items():
        tensor = named[name]
        for (dim, start, stop), (_, after, _) in zip(spans, second[name], strict=True):
            assert stop == start + 1, "a unit is one row or column of each of its matrices"
            index = (start + order * (after - start)).to(tensor.device)
            home = (start + torch.arange(count) * (after - start)).to(tensor.device)
            tensor.index_copy_(dim, home, tensor.index_select(dim, index))
    parts, at = [], count - len(taken)
    for units in chosen:
        parts.append(Part(at=kind, blocks=(block,), units=(at, at + len(units))))
        at += len(units)
    return parts


def captured(scores: Attribution, parts: Mapping[int, Sequence[Part]]) -> list[dict[str, float]]:
    """Return which share of the attribution lies in each capability's module.

    Args:
        scores: Attribution by block, of the model whose units are gathered.
        parts: Part of each capability by block.

    Returns:
        For each capability `own`: of its own attribution, `core`: of the core's.
    """
    shares = []
    for i in range(len(next(iter(parts.values())))):
        inside, total = torch.zeros(2), torch.zeros(2)
        for block, of_block in parts.items():
            start, stop = of_block[i].units or (0, 0)
            pair = scores[block][[i + 1, 0]]
            inside += pair[:, start:stop].sum(dim=1)
            total += pair.sum(dim=1)
        share = inside / total.clamp(min=1e-30)
        shares.append({"own": float(share[0]), "core": float(share[1])})
    return shares
