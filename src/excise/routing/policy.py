"""From the label of each token to what it reads, what it writes, and how much its loss weighs.

Shape legend: B rows, T tokens, N = B * T positions, G groups, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from excise.core.errors import UserError, nearest
from excise.data.domain import CORE
from excise.routing.groups import JOINT, GroupMap
from excise.routing.rules import Names, Policy, Rule, capability_name, check, choose, prepare
from excise.routing.weights import Weight, weigh

__all__ = ["Labelled", "Names", "Policy", "Routes", "Rule", "check", "choose", "compile", "prepare"]


class Labelled(Protocol):
    """What `compile` needs of a batch; `excise.data.stream.Batch` is one."""

    @property
    def ids_BT(self) -> Tensor:
        """Token ids."""
        ...

    @property
    def attention_BT(self) -> Tensor:
        """True where a token is real."""
        ...

    @property
    def label_BT(self) -> Tensor:
        """Capability label per token."""
        ...

    @property
    def units(self) -> Sequence[str]:
        """Unit id of each row."""
        ...


@dataclass(frozen=True)
class Routes:
    """What the tokens of one batch read and write; None where everything weighs 1.

    Attributes:
        read_NG: Weight of each group's activations in the forward pass.
        write_NG: Weight of each token's gradient in each group's weights.
        edge_NG: Weight of the gradient that leaves each group's activations.
        loss_BT: Weight of each token's loss.
        written: Groups that some token may write.
        shape: Rows and tokens, where the positions are those of texts.
        columns: By `read`, `write` and `edge` one weight per group, told before a batch moves to
            an accelerator so that nobody has to wait for it; None where it was not told.
    """

    read_NG: Tensor | None = None
    write_NG: Tensor | None = None
    edge_NG: Tensor | None = None
    loss_BT: Tensor | None = None
    written: frozenset[str] = frozenset()
    shape: tuple[int, int] | None = None
    columns: Mapping[str, tuple[Weight | None, ...]] | None = None

    def to(self, device: torch.device) -> Routes:
        """Return the routes on `device`."""
        names = ("read_NG", "write_NG", "edge_NG", "loss_BT")
        moved: dict[str, Any] = {
            n: t.to(device) for n in names if (t := getattr(self, n)) is not None
        }
        columns = {
            which: tuple(None if w is None else w.to(device) for w in weights)
            for which, weights in self.told().items()
        }
        return replace(self, columns=columns, **moved)

    def told(self) -> Mapping[str, tuple[Weight | None, ...]]:
        """Return the weights by group of what is not all ones."""
        if self.columns is not None:
            return self.columns
        given = {which: getattr(self, f"{which}_NG") for which in ("read", "write", "edge")}
        return {
            which: tuple(weigh(w_N) for w_N in values_NG.t().contiguous())
            for which, values_NG in given.items()
            if values_NG is not None
        }


def ruling_labels(batch: Labelled, at: Literal["next", "token", "row"]) -> Tensor:
    """Return the label that rules each position, [B, T].

    Args:
        batch: The batch.
        at: `next`: of the token that the position predicts (its own where that is none);
            `token`: its own; `row`: the one most real tokens of the row have, the larger of two.
    """
    label_BT = batch.label_BT
    if at != "row":
        return _moved(label_BT, batch.attention_BT, at)
    rows = []
    for label_T, real_T in zip(label_BT, batch.attention_BT):
        values, counts = label_T[real_T].unique(return_counts=True)
        best = values[counts == counts.max()].max() if len(values) else label_T[0]
        rows.append(best.expand(len(label_T)))
    return torch.stack(rows)


def _hash(text: str) -> int:
    """Return 64 bits that depend on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class _Row:
    """What a rule's names stand for in one row."""

    policy: Policy
    names: tuple[str, ...]
    sizes: Sequence[float]
    draw: float
    unit: str

    def groups(self, chosen: Iterable[str], label: int) -> list[int]:
        """Return the columns of the groups that a rule names."""
        columns = []
        for name in chosen:
            for group in self._named(name, label):
                if group not in self.names:
                    raise UserError(
                        f"a rule names group '{group}', which the model's map lacks; "
                        f"{nearest(group, self.names)}"
                    )
                columns.append(self.names.index(group))
        return columns

    def _named(self, name: str, label: int) -> list[str]:
        kind, _, count = name.partition(":")
        if kind == "self":
            return [self.policy.module_of(label)]
        if kind == "drawn":
            return [self._drawn()]
        if kind == "hashed":
            groups = self.policy.groups
            pool = [g for g in groups.parts if g not in (JOINT, groups.leftovers)]
            ranked = sorted(pool, key=lambda g: _hash(f"{self.unit}:{g}"))
            return ranked[: int(count or 1)]
        return [name]

    def _drawn(self) -> str:
        """Return a capability's module, drawn in proportion to its rows."""
        count = max(1, len(self.policy.capabilities), len(self.sizes))
        sizes = self.sizes or [1.0] * count
        point = _hash(f"drawn:{self.draw!r}") / 2**64 * sum(sizes)
        for i, size in enumerate(sizes):
            point -= size
            if point < 0:
                return self.policy.module_of(i + 1)
        return self.policy.module_of(len(sizes))


def compile(
    policy: Policy,
    map: GroupMap,
    batch: Labelled,
    *,
    draw: Sequence[float] | int | None = None,
    soften_V: Tensor | None = None,
    confidence_BT: Tensor | None = None,
    sizes: Sequence[float] = (),
) -> Routes:
    """Return what every token of a batch reads and writes.

    Args:
        policy: The rules.
        map: Groups of the model.
        batch: A batch on the CPU.
        draw: One uniform number in [0, 1) per row, by which alternatives are chosen; or a seed.
            None takes 0: the first alternative.
        soften_V: Confidence in a capability's label by the token that rules the position (ERA's
            token weights).
        confidence_BT: Confidence in the label of each token; None takes the batch's own, if it
            has one. A confidence of c mixes the rule's write and edge weights with those of
            `unlabeled`; what is read switches at 0.5.
        sizes: Rows of each capability, for `drawn`.

    Returns:
        The routes, on the CPU.

    Raises:
        UserError: If a label has no rule, or a rule names a group that the map lacks.
    """
    ruling_BT = ruling_labels(batch, policy.at)
    rows, tokens = ruling_BT.shape
    draws = _draws(draw, rows)
    read, write, edge = (torch.ones(rows, tokens, len(map.names)) for _ in range(3))
    weight_BT = torch.ones(rows, tokens)
    sure_BT = _confidence(batch, policy.at, confidence_BT)
    soft_BT = _softened(batch, policy.at, soften_V)
    for b in range(rows):
        row = _Row(policy, map.names, sizes, draws[b], batch.units[b] if batch.units else "")
        own_T = batch.label_BT[b] if policy.at != "row" else ruling_BT[b]
        real_T = batch.attention_BT[b].bool()
        for label in sorted({*ruling_BT[b][real_T].tolist(), *own_T[real_T].tolist()}):
            rule = _rule(policy, label, draws[b])
            at_T = (ruling_BT[b] == label) & real_T
            sure_T = _sure(
                label,
                None if sure_BT is None else sure_BT[b],
                None if soft_BT is None else soft_BT[b],
            )
            _fill(row, rule, label, at_T, sure_T, (read[b], write[b], edge[b]))
            weight_BT[b, (own_T == label) & real_T] = rule.weight
    for g in _placed(map):
        write[..., g] *= read[..., g] != 0  # what is not read has no gradient
    real_BT = batch.attention_BT.bool()
    written = frozenset(n for g, n in enumerate(map.names) if (write[..., g][real_BT] != 0).any())
    partial_G = (write[real_BT] != 1).any(0)
    write[~real_BT] = (~partial_G).float()  # padding has no gradient: its rows are left out
    loss_BT = _some(weight_BT, flat=False)
    return Routes(_some(read), _some(write), _some(edge), loss_BT, written, (rows, tokens))


def _softened(batch: Labelled, at: str, soften_V: Tensor | None) -> Tensor | None:
    """Return ERA's token weight of the token that rules each position; None without weights."""
    if soften_V is None:
        return None
    return soften_V.float().cpu()[_moved(batch.ids_BT, batch.attention_BT, at)]


def _placed(map: GroupMap) -> list[int]:
    """Return the numbers of the groups that have places in the model."""
    placed = {p.group for p in map.places}
    return [g for g, name in enumerate(map.names) if name in placed]


def _sure(label: int, sure_T: Tensor | None, soft_T: Tensor | None) -> Tensor | None:
    """Return the confidence in a label by token: the label's own, times the token's weight."""
    known = sure_T if label >= CORE else None
    if soft_T is None or label <= CORE:
        return known
    return soft_T if known is None else known * soft_T


def _draws(draw: Sequence[float] | int | None, rows: int) -> Sequence[float]:
    """Return one uniform number per row."""
    if draw is None:
        return [0.0] * rows
    if isinstance(draw, int):
        return [_hash(f"{draw}:{row}") / 2**64 for row in range(rows)]
    return draw


def _rule(policy: Policy, label: int, draw: float) -> Rule:
    """Return the rule of a label in a row."""
    rules = policy.rules_of(label)
    if not rules:
        word = capability_name(policy, label)
        raise UserError(f"the policy has no rule for label '{word}', which a row carries; add one")
    return rules[choose(rules, draw)]


def _weights(row: _Row, rule: Rule, label: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return read, write and edge weights of one rule, each [G]."""
    count = len(row.names)

    def chosen(names: Names) -> Tensor:
        if names == "all":
            return torch.ones(count)
        out = torch.zeros(count)
        out[row.groups(names, label)] = 1.0
        return out

    edge = torch.ones(count)
    for name, value in rule.edges.items():
        edge[row.groups([name], label)] = value
    return chosen(rule.read), chosen(rule.write), edge


def _fill(
    row: _Row,
    rule: Rule,
    label: int,
    at_T: Tensor,
    sure_T: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write a rule's weights at its positions, mixed with those of `unlabeled` by confidence."""
    weights = _weights(row, rule, label)
    if sure_T is None:
        for target, values in zip(out, weights, strict=True):
            target[at_T] = values
        return
    others = row.policy.rules_of(-1)
    other = _weights(row, others[choose(others, row.draw)] if others else Rule(), -1)
    c = sure_T[at_T][:, None]
    out[0][at_T] = torch.where(c >= 0.5, weights[0], other[0])
    out[1][at_T] = c * weights[1] + (1 - c) * other[1]
    out[2][at_T] = c * weights[2] + (1 - c) * other[2]


def _moved(values_BT: Tensor, attention_BT: Tensor, at: str) -> Tensor:
    """Return values of tokens at the positions they rule; rows have one value anyway."""
    if at != "next":
        return values_BT
    real_BT = attention_BT[:, 1:].bool()
    ahead_BT = torch.where(real_BT, values_BT[:, 1:], values_BT[:, :-1])
    return torch.cat([ahead_BT, values_BT[:, -1:]], dim=1)


def _confidence(batch: Labelled, at: str, confidence_BT: Tensor | None) -> Tensor | None:
    """Return the confidence in the ruling labels, None where all are certain."""
    given = getattr(batch, "confidence_BT", None) if confidence_BT is None else confidence_BT
    return None if given is None else _moved(given.float(), batch.attention_BT, at)


def _some(values: Tensor, *, flat: bool = True) -> Tensor | None:
    """Return None for all ones, else one row per position."""
    if bool((values == 1).all()):
        return None
    return values.flatten(0, 1) if flat else values
