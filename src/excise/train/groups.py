"""What is trained: groups of parameters, their masters and optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from excise.errors import UserError
from excise.train.optim import Optimizer
from excise.train.state import Group
from excise.train.terms import FitConfig


def make_groups(
    model: nn.Module,
    groups: Mapping[str, Sequence[nn.Parameter]] | None,
    config: FitConfig,
    rates: Mapping[str, float],
) -> list[Group]:
    """Give every group its leaves and optimizer; refuse empty and overlapping ones."""
    if groups is None:
        groups = {"all": [p for p in model.parameters() if p.requires_grad]}
    if unknown := set(rates) - set(groups):
        raise UserError(f"rates name the group '{min(unknown)}', known: {', '.join(groups)}")
    seen: dict[int, str] = {}
    made = []
    for name, given in groups.items():
        params = list({id(p): p for p in given}.values())  # tied weights are listed twice
        if not params:
            raise UserError(f"group '{name}' has no parameter to train; check its names")
        for p in params:
            if id(p) in seen:
                raise UserError(f"groups '{seen[id(p)]}' and '{name}' share a parameter")
            seen[id(p)] = name
        leaves = [_leaf(p, config.master) for p in params]
        optimizer = Optimizer(
            config.optimizer, leaves, config.betas, config.epsilon, config.weight_decay
        )
        made.append(Group(name, params, leaves, optimizer, rates.get(name, config.lr)))
    return made


def _leaf(param: nn.Parameter, master: str) -> Tensor:
    """Return what the optimizer steps in place of `param`."""
    half = param.dtype in (torch.float16, torch.bfloat16)
    return param.detach().float() if half and master == "float32" else param


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
