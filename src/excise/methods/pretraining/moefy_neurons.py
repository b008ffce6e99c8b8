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
from excise.models.anatomy import anatomy
from excise.models.hooks import capture
from excise.models.names import parameters_by_name
from excise.routing.change import ranges_of
from excise.routing.groups import Part
from excise.routing.measures import What, count_units

Scores = dict[int, Tensor]
"""Attribution [D, M] by block."""


def kind_of(model: nn.Module, block: int) -> What:
    """Return what a block's MLP is made of: neurons, or experts."""
    return "mlp" if anatomy(model).experts[block] is None else "experts"


def attribution(
    model: nn.Module,
    domains: Sequence[Sequence[Batch]],
    blocks: Sequence[int],
    device: torch.device,
) -> Scores:
    """Return how much each unit matters to the loss of each domain.

    Args:
        model: A causal model in evaluation mode; its gradients are dropped and its flags kept.
        domains: Batches of each domain, core first.
        blocks: Blocks to measure.
        device: Where the model is.

    Returns:
        By block [D, M] on the CPU, in nats per scored token.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    total = {b: torch.zeros(len(domains), count_units(model, b, kind_of(model, b))) for b in blocks}
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        for d, batches in enumerate(domains):
            scored = sum(batch.num_targets for batch in batches)
            for batch in batches:
                for block, value_M in _taylor(model, batch.to(device), blocks).items():
                    total[block][d] += value_M.cpu().float() / max(1, scored)
    finally:
        model.zero_grad(set_to_none=True)
        for p, needed in flags:
            p.requires_grad_(needed)
    return total


def _taylor(model: nn.Module, batch: Batch, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the summed |value x gradient| of every unit on one batch, by block."""
    found = anatomy(model)
    dense = {b: found.mlp_down[b] for b in blocks if found.experts[b] is None}
    model.zero_grad(set_to_none=True)
    with capture(model, list(dense.values()), of="input", grad=True) as got:
        loss, _ = nll(model(**batch.inputs).logits, batch)
        inside = {block: got[path][0] for block, path in dense.items()}
        for tensor in inside.values():
            tensor.retain_grad()
        loss.backward()
    out = {}
    for block, a_BTM in inside.items():
        assert a_BTM.grad is not None
        product_BTM = (a_BTM.detach() * a_BTM.grad).float().abs()
        out[block] = product_BTM.flatten(0, -2).sum(0)
    for block in blocks:
        if block not in out:
            out[block] = _experts(model, block)
    return out


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
    got = [list(mine) for mine in owned] or [[] for _ in range(capabilities)]
    taken = {unit for mine in got for unit in mine}
    ranked = score_CM.flatten().sort(descending=True, stable=True).indices.tolist()
    for at in ranked:
        capability, unit = divmod(at, units)
        if unit not in taken and len(got[capability]) < count:
            got[capability].append(unit)
            taken.add(unit)
    return got


@torch.no_grad()
def gather_units(model: nn.Module, block: int, got: Sequence[Sequence[int]]) -> list[Part]:
    """Reorder a block's units so that each capability's lie side by side, behind the core's.

    The model computes the same: rows of the matrices into the MLP and columns of the one out of
    it move together (of experts, with the router's rows).

    Args:
        model: The model; changed in place.
        block: Number of the block.
        got: Units of each capability.

    Returns:
        The part that each capability now has.
    """
    kind = kind_of(model, block)
    count = count_units(model, block, kind)
    taken = [unit for mine in got for unit in mine]
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
    for mine in got:
        parts.append(Part(at=kind, blocks=(block,), units=(at, at + len(mine))))
        at += len(mine)
    return parts


def captured(scores: Scores, parts: Mapping[int, Sequence[Part]]) -> list[dict[str, float]]:
    """Return which share of the attribution lies in each capability's module.

    Args:
        scores: Attribution by block, of the model whose units are gathered.
        parts: Part of each capability by block.

    Returns:
        For each capability `own`: of its own attribution, `core`: of the core's.
    """
    out = []
    for i in range(len(next(iter(parts.values())))):
        inside, total = torch.zeros(2), torch.zeros(2)
        for block, mine in parts.items():
            start, stop = mine[i].units or (0, 0)
            pair = scores[block][[i + 1, 0]]
            inside += pair[:, start:stop].sum(dim=1)
            total += pair.sum(dim=1)
        share = inside / total.clamp(min=1e-30)
        out.append({"own": float(share[0]), "core": float(share[1])})
    return out
