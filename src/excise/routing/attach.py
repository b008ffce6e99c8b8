"""`route`: gradient routing on any model, in anybody's loop, for as long as a `with` block lasts.

Shape legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from excise.core.config import ConfigError
from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.models.hooks import eager
from excise.models.names import canonical, modules_by_name, parameters_by_name, unwrap
from excise.routing.groups import GroupMap, Groups
from excise.routing.layers import ActiveRoutes, RoutedModule, call, kind_of
from excise.routing.policy import Policy, Routes, check, compile
from excise.routing.resolve import find_map


class Routing:
    """What `route` yields: it takes the labels of a batch, and steps an optimizer.

    Attributes:
        model: The model.
        map: Who owns what.
        policy: The rules; None where only groups were given.
        active: The routes of the present batch, which the modules read.
        modules: The modules that take part.
        written: Groups written since the last `step`.
        zeroed: Whether what no token may write gets a gradient of zeros in place of none.
    """

    def __init__(self, model: nn.Module, map: GroupMap, policy: Policy | None) -> None:
        """Start with plain training."""
        self.model, self.map, self.policy = model, map, policy
        self.active = ActiveRoutes(map.names)
        self.modules = _routed_modules(model, map)
        self.written: set[str] = set()
        # DDP waits for a gradient of every parameter; `step` freezes those of zeros.
        self.zeroed = isinstance(model, nn.parallel.DistributedDataParallel)

    def labels(
        self,
        label_BT: Tensor,
        *,
        ids_BT: Tensor | None = None,
        attention_BT: Tensor | None = None,
        units: Sequence[str] = (),
        draw: Sequence[float] | int | None = None,
        soften_V: Tensor | None = None,
        confidence_BT: Tensor | None = None,
        sizes: Sequence[float] = (),
    ) -> Routes:
        """Say what the tokens of the next batch are, and put the policy's routes in force.

        Args:
            label_BT: Capability label per token (-1 unlabeled, 0 core, 1.. capabilities), or per
                image [B].
            ids_BT: Token ids; needed with `soften_V`.
            attention_BT: True where a token is real; None for everywhere.
            units: Unit id of each row, for `hashed`.
            draw: As `compile`.
            soften_V: As `compile`.
            confidence_BT: As `compile`.
            sizes: As `compile`.

        Returns:
            The routes; `loss_BT` weighs the loss of each token.

        Raises:
            UserError: If `route` was given groups alone, or a label has no rule.
        """
        if self.policy is None:
            raise UserError("labels need rules; give `route` a Policy, not groups alone")
        images = label_BT.dim() == 1
        label_BT = (label_BT[:, None] if images else label_BT).cpu().long()
        ids = torch.zeros_like(label_BT) if ids_BT is None else ids_BT.cpu()
        real = torch.ones_like(label_BT) if attention_BT is None else attention_BT.cpu()
        routes = compile(
            self.policy,
            self.map,
            Batch(ids, real.bool(), real.bool(), label_BT, tuple(units)),
            draw=draw,
            soften_V=None if soften_V is None else soften_V.cpu(),
            confidence_BT=None if confidence_BT is None else confidence_BT.cpu(),
            sizes=sizes,
        )
        self.set(routes)
        assert self.active.routes is not None
        return self.active.routes

    def set(self, routes: Routes | None) -> None:
        """Put routes in force until the next call.

        Keep them until the backward pass is done where activations are recomputed.

        Args:
            routes: The routes; None for plain training.

        Raises:
            UserError: If a matrix of weights has not one column for each group.
        """
        if routes is None:
            self.written.update(self.map.names)
        else:
            self.written |= routes.written
            routes = routes.to(next(self.model.parameters()).device)
        self.active.put(routes, zeros=self.zeroed)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step an optimizer so that what no token since the last step may write keeps its bits.

        A zero gradient is not enough: momentum and weight decay move it. Slices that are frozen
        in this step keep weights and optimizer state; a parameter frozen as a whole takes no
        step. Under DDP what any process may write is written by all.

        Args:
            optimizer: Any optimizer of the model's parameters.

        Raises:
            UserError: As `check`.
        """
        self.check()
        written = self._written_anywhere()
        name_of = {id(p): name for name, p in parameters_by_name(self.model).items()}
        frozen_slices: list[tuple[Tensor, Tensor]] = []
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            slices = self.map.owners.get(name_of.get(id(param), ""), ())
            frozen = [o for o in slices if o.group not in written]
            if not frozen or param.grad is None:
                continue
            if len(frozen) == len(slices):
                param.grad = None
                continue
            state = optimizer.state.get(param, {}).values()
            same = [t for t in state if isinstance(t, Tensor) and t.shape == param.shape]
            for tensor in (param, *same):
                parts = [o.of(tensor) for o in frozen]
                frozen_slices += [(part, part.clone()) for part in parts]
        optimizer.step()
        for part, before in frozen_slices:
            part.copy_(before)
        self.written = set()
        for module in self.modules:
            module.called = False

    def _written_anywhere(self) -> Set[str]:
        """Return the groups written since the last step, under DDP by any process."""
        if not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.written
        device = next(self.model.parameters()).device
        flags = torch.tensor([float(name in self.written) for name in self.map.names])
        flags = flags.to(device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return {n for n, flag in zip(self.map.names, flags.tolist(), strict=True) if flag}

    def check(self) -> None:
        """Refuse a model that used a routed weight behind its module's back; `step` calls it.

        Raises:
            UserError: If a module was not called and yet its weight has a gradient.
        """
        sharing: dict[int, list[RoutedModule]] = {}
        for routed in self.modules:
            for name in routed.owned:
                sharing.setdefault(id(routed.module.get_parameter(name)), []).append(routed)
        for modules in sharing.values():
            first, weight = modules[0], next(iter(modules[0].owned))
            has_gradient = first.module.get_parameter(weight).grad is not None
            if has_gradient and not any(routed.called for routed in modules):
                raise UserError(
                    f"{first.path} was never called and yet its {weight} has a gradient: the "
                    "model reads it directly, so it cannot be routed; freeze it"
                )


@contextmanager
def route(
    model: nn.Module, policy: Policy | Groups, *, labels: Iterable[int] = ()
) -> Iterator[Routing]:
    """Route gradients through `model` while the block runs.

    Values stay those of the plain model (but for groups a token does not read); what a token
    writes follows its label. Nothing of it is left behind.

    Source: Cloud et al. 2024, "Gradient Routing", arXiv:2410.04332, section 3.

    Example::

        policy = ex.Policy(
            groups=ex.Groups(parts={"module_1": (ex.Part(at="mlp", units=(0, 64)),)}),
            rules={"core": (ex.Rule(write=("core",)),), "forget": (ex.Rule(write=("self",)),)},
            capabilities=("virology",),
        )
        with ex.route(model, policy) as routing:
            for ids_BT, label_BT in batches:
                routes = routing.labels(label_BT)
                model(input_ids=ids_BT, labels=ids_BT).loss.backward()
                routing.step(optimizer)  # what no token may write keeps its bits
                optimizer.zero_grad()

    Args:
        model: A model, wrapped (PEFT, DDP) or not; a compiled one runs eagerly meanwhile.
        policy: Rules by label; or groups alone, for routes of one's own (`Routing.set`).
        labels: Labels that will occur; one without a rule is refused at once.

    Yields:
        The routing.

    Raises:
        ConfigError: With every problem of groups and policy.
        UserError: If the model is routed already.
    """
    groups = policy if isinstance(policy, Groups) else policy.groups
    map, problems_of_groups = find_map(model, groups)
    problems = [f"groups.{problem}" for problem in problems_of_groups]
    rules = policy if isinstance(policy, Policy) else None
    if rules is not None:
        problems += check(rules, groups.names, labels)
    if problems:
        raise ConfigError(problems, "policy")
    assert map is not None
    routing = Routing(model, map, rules)
    if any(getattr(routed.forward, "routes", False) for routed in routing.modules):
        raise UserError("gradients through this model are routed already; leave that block first")
    modules = [routed.module for routed in routing.modules]
    before = [module.__dict__.get("forward") for module in modules]
    with eager(model):
        try:
            for routed in routing.modules:
                routed.module.forward = _routed_forward(routed, routing.active)
            yield routing
        finally:
            for module, forward in zip(modules, before, strict=True):
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward


def _routed_modules(model: nn.Module, map: GroupMap) -> list[RoutedModule]:
    """Return the modules that take part, with what they own and where masks act."""
    named = modules_by_name(model)
    prefix, inner = unwrap(model)
    name_of = {id(p): name for name, p in parameters_by_name(model).items()}
    modules: dict[int, RoutedModule] = {}

    def taking_part(module: nn.Module, path: str) -> RoutedModule:
        return modules.setdefault(id(module), RoutedModule(path, module, module.forward))

    for name, module in inner.named_modules():
        params = module.named_parameters(recurse=False, remove_duplicate=False)
        owned = {n: map.owners[name_of[id(p)]] for n, p in params}
        if owned:
            routed = taking_part(module, canonical(name, prefix))
            routed.owned, routed.kind = owned, kind_of(module, owned)
    for place in map.places:
        routed = taking_part(named[place.path], place.path)
        if place.side == "input":
            routed.inputs += (place,)
        elif place.side == "output":
            routed.outputs += (place,)
        else:
            routed.experts += (place,)
    return list(modules.values())


def _routed_forward(routed: RoutedModule, active: ActiveRoutes) -> Callable[..., Any]:
    """Return the forward of a module while routes are in force."""

    @functools.wraps(routed.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if active.routes is None:
            return routed.forward(*args, **kwargs)
        return call(routed, active, args, kwargs)

    forward.routes = True  # type: ignore[attr-defined]
    return forward
