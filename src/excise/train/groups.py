"""What is trained: groups of parameters and slices, their masters and optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.train.optim import Optimizer
from excise.train.slices import Slice, as_slice, check_slice, overlaps
from excise.train.state import Group
from excise.train.terms import FitConfig


def make_groups(
    model: nn.Module,
    groups: Mapping[str, Sequence[nn.Parameter | Slice]] | None,
    config: FitConfig,
    rates: Mapping[str, float],
) -> list[Group]:
    """Give every group its leaves and optimizer; refuse empty and overlapping ones."""
    if groups is None:
        groups = {"all": [p for p in model.parameters() if p.requires_grad]}
    if unknown := set(rates) - set(groups):
        raise UserError(f"rates name the group '{min(unknown)}', known: {', '.join(groups)}")
    seen: dict[int, list[tuple[str, Slice]]] = {}
    made = []
    for name, given in groups.items():
        # Tied weights are listed twice.
        slices = list({s.key: s for s in map(as_slice, given)}.values())
        if not slices:
            raise UserError(f"group '{name}' has no parameter to train; check its names")
        for one in slices:
            check_slice(one, name)
            for other, before in seen.get(id(one.param), []):
                if overlaps(one, before):
                    raise UserError(f"groups '{other}' and '{name}' share a parameter")
            seen.setdefault(id(one.param), []).append((name, one))
        leaves = [_leaf(one, config.master) for one in slices]
        optimizer = Optimizer(
            config.optimizer, leaves, config.betas, config.epsilon, config.weight_decay
        )
        made.append(Group(name, slices, leaves, optimizer, rates.get(name, config.lr)))
    return made


def _leaf(one: Slice, master: str) -> Tensor:
    """Return what the optimizer steps in place of a parameter or a slice of it."""
    param = one.param
    half = param.dtype in (torch.float16, torch.bfloat16)
    if half and master == "float32":
        return one.of(param.detach()).float()
    return param if one.whole else one.of(param.detach())


@contextmanager
def only(model: nn.Module, parts: Sequence[Group]) -> Iterator[None]:
    """Let gradients reach the groups' parameters alone, and leave none behind."""
    trained = {id(p): p for g in parts for p in g.params}
    others = {id(p): p for p in model.parameters()}
    before = {i: p.requires_grad for i, p in (others | trained).items()}
    try:
        for i, p in (others | trained).items():
            p.requires_grad_(i in trained)
            if i in trained:
                p.grad = None
        yield
    finally:
        for i, p in (others | trained).items():
            p.requires_grad_(before[i])
            if i in trained:
                p.grad = None
