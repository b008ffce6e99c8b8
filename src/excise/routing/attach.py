"""`route`: gradient routing on any model, in anybody's loop, for as long as a `with` block lasts.

Shape legend: B rows, T tokens, N positions, G groups, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.models.hooks import eager
from excise.models.names import canonical, modules_by_name, unwrap
from excise.routing.groups import GroupMap, Groups, find_map
from excise.routing.layers import run
from excise.routing.plan import Plan, Span, kind_of
from excise.routing.policy import Policy, Routes, check, compile, prepare
from excise.routing.weights import Piece, Weight


class Routing:
    """The routes in force on one model.

    Attributes:
        model: The model.
        map: Who owns what.
        policy: The rules; None where only groups were given.
        routes: What the tokens of the present batch read and write; None for plain training.
        written: Groups written since the last `step`.
        muted: Whether all routed parameters are constants at the moment.
        zeroed: Whether what no token may write gets a gradient of zeros in place of none.
    """

    def __init__(self, model: nn.Module, map: GroupMap, policy: Policy | None) -> None:
        """Start with plain training."""
        self.model, self.map, self.policy = model, map, policy
        self.routes: Routes | None = None
        self.written: set[str] = set()
        self.muted = False
        self.zeroed = False
        self.plans: list[Plan] = []
        self._numbers = {name: i for i, name in enumerate(map.names)}
        self._weights: dict[str, list[Weight | None]] = {}
        self._repeated: dict[tuple[int, int], Weight] = {}
        self._made: dict[tuple[str, str, tuple[Span, ...], int], list[Piece]] = {}

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and tokens of the present batch."""
        return None if self.routes is None else self.routes.shape

    def set(self, routes: Routes | None) -> None:
        """Put routes in force until the next call; None for plain training.

        Keep them until the backward pass is done where activations are recomputed.
        """
        self.routes = routes
        self._repeated.clear()
        self._made.clear()
        if routes is None:
            self.written.update(self.map.names)
            return
        self.written |= routes.written
        self.routes = routes = routes.to(next(self.model.parameters()).device)
        count = len(self.map.names)
        told = routes.told()
        for which in ("read", "write", "edge"):
            weights = list(told.get(which, (None,) * count))
            if len(weights) != count:
                raise UserError(
                    f"{which}_NG has {len(weights)} columns but the model has {count} groups: "
                    f"{', '.join(self.map.names)}"
                )
            if self.zeroed:
                weights = [None if w is None else replace(w, zero=False) for w in weights]
            self._weights[which] = weights

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
        """
        if self.policy is None:
            raise UserError("labels need rules; give `route` a Policy, not groups alone")
        images = label_BT.dim() == 1
        label_BT = (label_BT[:, None] if images else label_BT).cpu().long()
        ids = torch.zeros_like(label_BT) if ids_BT is None else ids_BT.cpu()
        real = torch.ones_like(label_BT) if attention_BT is None else attention_BT.cpu()
        batch = Batch(ids, real.bool(), real.bool(), label_BT, tuple(units))
        routes = compile(
            self.policy,
            self.map,
            batch,
            draw=draw,
            soften_V=None if soften_V is None else soften_V.cpu(),
            confidence_BT=None if confidence_BT is None else confidence_BT.cpu(),
            sizes=sizes,
        )
        self.set(routes)
        assert self.routes is not None
        return self.routes

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step an optimizer so that what no token since the last step may write keeps its bits.

        A zero gradient is not enough: momentum and weight decay move it. Slices that are frozen
        in this step keep weights and optimizer state; a parameter frozen as a whole takes no
        step. Under DDP what any process may write is written by all.

        Args:
            optimizer: Any optimizer of the model's parameters.
        """
        self.check()
        written = self._written_anywhere()
        named = {id(p): name for name, p in _parameters(self.model).items()}
        kept: list[tuple[Tensor, Tensor]] = []
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            owned = self.map.owners.get(named.get(id(param), ""), ())
            frozen = [o for o in owned if o.group not in written]
            if not frozen or param.grad is None:
                continue
            if len(frozen) == len(owned):
                param.grad = None
                continue
            state = optimizer.state.get(param, {}).values()
            same = [t for t in state if isinstance(t, Tensor) and t.shape == param.shape]
            for tensor in (param, *same):
                for o in frozen:
                    part = tensor.narrow(o.dim or 0, o.start, o.stop - o.start)
                    kept.append((part, part.clone()))
        optimizer.step()
        for part, before in kept:
            part.copy_(before)
        self.written = set()
        for plan in self.plans:
            plan.called = False

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
        calls: dict[int, list[Plan]] = {}
        for plan in self.plans:
            for name in plan.own:
                calls.setdefault(id(plan.module.get_parameter(name)), []).append(plan)
        for plans in calls.values():
            weight = next(iter(plans[0].own))
            param = plans[0].module.get_parameter(weight)
            if param.grad is not None and not any(p.called for p in plans):
                raise UserError(
                    f"{plans[0].path} was never called and yet its {weight} has a gradient: the "
                    "model reads it directly, so it cannot be routed; freeze it"
                )

    def pieces(self, which: str, spans: Sequence[Span], lead: int, who: str) -> list[Piece]:
        """Return token weights by slice; see `plan.State`."""
        key = (which, who, tuple(spans), lead)
        if key not in self._made:
            weights = self._weights[which]
            self._made[key] = [
                (start, stop, self._fit(weights[self._numbers[group]], lead, who))
                for start, stop, group in spans
            ]
        return self._made[key]

    def _fit(self, weight: Weight | None, lead: int, who: str) -> Weight | None:
        """Repeat a token's weight over the positions it has in an activation."""
        if weight is None or lead in (0, len(weight.values_N)):
            return weight
        count = len(weight.values_N)
        if lead % count:
            raise UserError(
                f"{who} sees {lead} positions but labels were given for {count}; give labels for "
                "what the model really reads"
            )
        key = (id(weight), lead)
        if key not in self._repeated:
            values = weight.values_N.repeat_interleave(lead // count)
            self._repeated[key] = Weight(values, weight.zero, None, weight.binary)
        return self._repeated[key]

    def matrix(self, which: str) -> Tensor | None:
        """Return all weights [N, G]; see `plan.State`."""
        values: Tensor | None = getattr(self.routes, f"{which}_NG")
        return values

    def number(self, group: str) -> int:
        """Return the column of a group."""
        return self._numbers[group]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let all routed parameters be constants while the block runs."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters by canonical name, tied ones once."""
    prefix, inner = unwrap(model)
    return {canonical(n, prefix): p for n, p in inner.named_parameters()}


def _plans(model: nn.Module, map: GroupMap) -> list[Plan]:
    """Return the modules that take part, with what they own and where masks act."""
    named = modules_by_name(model)
    prefix, inner = unwrap(model)
    first = {id(p): name for name, p in _parameters(model).items()}
    plans: dict[int, Plan] = {}

    def plan(module: nn.Module, path: str) -> Plan:
        return plans.setdefault(id(module), Plan(path, module, module.forward))

    for name, module in inner.named_modules():
        params = module.named_parameters(recurse=False, remove_duplicate=False)
        own = {n: map.owners[first[id(p)]] for n, p in params}
        if own:
            one = plan(module, canonical(name, prefix))
            one.own, one.kind = own, kind_of(module, own)
    for place in map.places:
        one = plan(named[place.path], place.path)
        if place.side == "input":
            one.inputs += (place,)
        elif place.side == "output":
            one.outputs += (place,)
        else:
            one.experts += (place,)
    return list(plans.values())


def _patched(plan: Plan, routing: Routing) -> Callable[..., Any]:
    """Return the forward of a module while routes are in force."""

    @functools.wraps(plan.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if routing.routes is None:
            return plan.forward(*args, **kwargs)
        return run(plan, routing, args, kwargs)

    forward.routes = True  # type: ignore[attr-defined]
    return forward


@contextmanager
def route(
    model: nn.Module, policy: Policy | Groups, *, labels: Iterable[int] = ()
) -> Iterator[Routing]:
    """Route gradients through `model` while the block runs.

    Values stay those of the plain model (but for groups a token does not read); what a token
    writes follows its label. Nothing of it is left behind.

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
    map, problems = find_map(model, groups)
    rules = policy if isinstance(policy, Policy) else None
    prepare(problems, [] if rules is None else check(rules, groups.names, labels))
    assert map is not None
    routing = Routing(model, map, rules)
    # DDP waits for a gradient of every parameter; `step` freezes those of zeros.
    routing.zeroed = isinstance(model, nn.parallel.DistributedDataParallel)
    routing.plans = _plans(model, map)
    if any(getattr(plan.forward, "routes", False) for plan in routing.plans):
        raise UserError("gradients through this model are routed already; leave that block first")
    before = [(plan.module, plan.module.__dict__.get("forward")) for plan in routing.plans]
    with eager(model):
        try:
            for plan in routing.plans:
                plan.module.forward = _patched(plan, routing)
            yield routing
        finally:
            for module, own in before:
                if own is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = own
