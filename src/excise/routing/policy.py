"""Policy: from the label of each token to the groups it reads and writes.

`Policy` is what a user writes: for every label one rule or several alternatives, of which one is
drawn per text. `compile` makes of it the `Routes` of one batch: a weight per token and group.

Shape legend: B rows, T tokens, N = B * T positions, G groups, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from excise.core.config import SIGNED, Config
from excise.core.errors import UserError, nearest
from excise.data.domain import CORE, UNLABELED
from excise.data.stream import Batch
from excise.routing.groups import JOINT, GroupMap, Groups
from excise.routing.weights import Weight, weigh

Names = tuple[str, ...] | Literal["all"]
"""Names of groups."""
SPECIAL = ("self", "drawn", "hashed")
"""Names that stand for a module by row: its capability's, a drawn one, a hashed one."""


class Rule(Config):
    """What tokens of one label read and write."""

    read: Names = "all"
    """Groups that take part in the forward pass; the activations of others are 0."""
    write: Names = "all"
    """Groups whose weights receive the gradient of the token."""
    edges: Annotated[dict[str, float], SIGNED] = Field(default_factory=dict)
    """Weight of the gradient that passes back through a group's activations; 1 where missing."""
    weight: Annotated[float, SIGNED] = 1.0
    """Weight of the token's loss; negative to ascend, up to the loss of a uniform guess."""
    share: float = Field(default=1.0, gt=0)
    """Probability of this rule among the alternatives of a label, up to a common factor."""


class Policy(Config):
    """The groups of a model and the rules of each label.

    In rules, `self` is the module of the token's own capability, `drawn` a module drawn in
    proportion to its rows, `hashed` (or `hashed:3`) one (three) chosen by the hash of the unit.
    """

    groups: Groups = Groups()
    """What belongs together."""
    rules: dict[str, tuple[Rule, ...]]
    """Alternatives by label: `core`, `unlabeled`, a capability, or `forget` for any of them."""
    capabilities: tuple[str, ...] = ()
    """Names of the capabilities; number i has label i + 1."""
    modules: dict[str, str] = Field(default_factory=dict)
    """Group of each capability where it is not `module_1`, `module_2` ..."""
    at: Literal["next", "token", "row"] = "next"
    """Whose label rules a position: of the token it predicts, of the token, or of the row."""

    def label_name(self, label: int) -> str:
        """Return the word for a label: a capability's name, or its number where it has none."""
        if label <= CORE:
            return "core" if label == CORE else "unlabeled"
        return self.capabilities[label - 1] if label <= len(self.capabilities) else str(label)

    def module_of(self, capability: int) -> str:
        """Return the group of capability number `capability`, from 1."""
        return self.modules.get(self.label_name(capability), f"module_{capability}")

    def rules_of(self, label: int) -> tuple[Rule, ...]:
        """Return the alternatives of a label; empty when there is no rule."""
        if label <= CORE:
            return self.rules.get(self.label_name(label), ())
        named = label <= len(self.capabilities) and self.capabilities[label - 1] in self.rules
        return self.rules.get(self.label_name(label) if named else "forget", ())


def check(policy: Policy, names: Sequence[str], labels: Iterable[int] = ()) -> list[str]:
    """Return everything that is wrong with a policy.

    Args:
        policy: The policy.
        names: Groups of the model.
        labels: Labels that occur in the data.
    """
    problems: list[str] = []
    known = {"core", "unlabeled", "forget", *policy.capabilities}
    for label, rules in policy.rules.items():
        if label not in known:
            problems.append(f"rules.{label}: is no label; {nearest(label, known)}")
        if not rules:
            problems.append(f"rules.{label}: has no rule")
        for i, rule in enumerate(rules):
            for field, chosen in _names_of(rule).items():
                at = f"rules.{label}[{i}].{field}"
                for name in chosen:
                    special = name.partition(":")[0]
                    if special == "self" and label in ("core", "unlabeled"):
                        problems.append(
                            f"{at}: tokens labelled {label} have no module of their own"
                        )
                    elif special not in SPECIAL and name not in names:
                        problems.append(f"{at}: there is no group '{name}'; {nearest(name, names)}")
    for number in sorted(set(labels)):
        word, module = policy.label_name(number), policy.module_of(number)
        rules = policy.rules_of(number)
        if not rules:
            problems.append(f"rules: label '{word}' occurs in the data and has no rule")
        uses = {name for rule in rules for chosen in _names_of(rule).values() for name in chosen}
        if number > CORE and "self" in uses and module not in names:
            problems.append(
                f"rules: capability '{word}' has no group '{module}'; name it in `modules`"
            )
    for capability, group in policy.modules.items():
        if capability not in policy.capabilities:
            problems.append(
                f"modules.{capability}: is no capability; "
                f"{nearest(capability, policy.capabilities)}"
            )
        if group not in names:
            problems.append(f"modules.{capability}: there is no group '{group}'")
    return list(dict.fromkeys(problems))


def _names_of(rule: Rule) -> dict[str, tuple[str, ...]]:
    """Return the groups that a rule names, by field; none where it takes all."""
    read, write = (() if names == "all" else names for names in (rule.read, rule.write))
    return {"read": read, "write": write, "edges": tuple(rule.edges)}


def choose(rules: Sequence[Rule], draw: float) -> int:
    """Return which alternative a uniform draw in [0, 1) falls on."""
    total = sum(rule.share for rule in rules)
    at = 0.0
    for i, rule in enumerate(rules):
        at += rule.share / total
        if draw < at:
            return i
    return len(rules) - 1


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
        columns: By `read`, `write` and `edge` one weight per group, computed before a batch moves
            to an accelerator so that nobody has to wait for it; None where they were not.
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
            for which, weights in self.by_group().items()
        }
        return replace(self, columns=columns, **moved)

    def by_group(self) -> Mapping[str, tuple[Weight | None, ...]]:
        """Return by `read`, `write` and `edge`, where not all are 1, one weight per group."""
        if self.columns is not None:
            return self.columns
        matrices = {which: getattr(self, f"{which}_NG") for which in ("read", "write", "edge")}
        return {
            which: tuple(weigh(w_N) for w_N in values_NG.t().contiguous())
            for which, values_NG in matrices.items()
            if values_NG is not None
        }


def compile(
    policy: Policy,
    map: GroupMap,
    batch: Batch,
    *,
    draw: Sequence[float] | int | None = None,
    soften_V: Float[Tensor, "V"] | None = None,
    confidence_BT: Float[Tensor, "B T"] | None = None,
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
    ruling_BT = _ruling_labels(batch, policy.at)
    rows, tokens = ruling_BT.shape
    draws = _draws(draw, rows)
    read, write, edge = (torch.ones(rows, tokens, len(map.names)) for _ in range(3))
    weight_BT = torch.ones(rows, tokens)
    if confidence_BT is None:
        confidence_BT = batch.confidence_BT
    if confidence_BT is not None:
        confidence_BT = _moved(confidence_BT.float(), batch.attention_BT, policy.at)
    soft_BT = None
    if soften_V is not None:
        soft_BT = soften_V.float().cpu()[_moved(batch.ids_BT, batch.attention_BT, policy.at)]
    for b in range(rows):
        row = _Row(policy, map.names, sizes, draws[b], batch.units[b] if batch.units else "")
        label_T = batch.label_BT[b] if policy.at != "row" else ruling_BT[b]
        real_T = batch.attention_BT[b].bool()
        for label in sorted({*ruling_BT[b][real_T].tolist(), *label_T[real_T].tolist()}):
            rule = _rule(policy, label, draws[b])
            at_T = (ruling_BT[b] == label) & real_T
            confidence_T = _confidence(
                label,
                None if confidence_BT is None else confidence_BT[b],
                None if soft_BT is None else soft_BT[b],
            )
            _fill(row, rule, label, at_T, confidence_T, (read[b], write[b], edge[b]))
            weight_BT[b, (label_T == label) & real_T] = rule.weight
    masked = {place.group for place in map.places}
    for g, name in enumerate(map.names):
        if name in masked:
            write[..., g] *= read[..., g] != 0  # what is not read has no gradient
    real_BT = batch.attention_BT.bool()
    written = frozenset(n for g, n in enumerate(map.names) if (write[..., g][real_BT] != 0).any())
    partial_G = (write[real_BT] != 1).any(0)
    write[~real_BT] = (~partial_G).float()  # padding has no gradient: its rows are left out
    read_NG, write_NG, edge_NG = (_unless_ones(m.flatten(0, 1)) for m in (read, write, edge))
    loss_BT = _unless_ones(weight_BT)
    return Routes(read_NG, write_NG, edge_NG, loss_BT, written, (rows, tokens))


def _ruling_labels(batch: Batch, at: Literal["next", "token", "row"]) -> Int[Tensor, "B T"]:
    """Return the label that rules each position.

    Args:
        batch: The batch.
        at: `next`: of the token that the position predicts (its own where that is none);
            `token`: its own; `row`: the one most real tokens of the row have, the larger of two.
    """
    label_BT = batch.label_BT
    if at != "row":
        return _moved(label_BT, batch.attention_BT, at)
    rows = []
    for label_T, real_T in zip(label_BT, batch.attention_BT, strict=True):
        values, counts = label_T[real_T].unique(return_counts=True)
        most = values[counts == counts.max()].max() if len(values) else label_T[0]
        rows.append(most.expand(len(label_T)))
    return torch.stack(rows)


def _moved(values_BT: Tensor, attention_BT: Tensor, at: str) -> Tensor:
    """Return values of tokens at the positions they rule; rows have one value anyway."""
    if at != "next":
        return values_BT
    real_BT = attention_BT[:, 1:].bool()
    ahead_BT = torch.where(real_BT, values_BT[:, 1:], values_BT[:, :-1])
    return torch.cat([ahead_BT, values_BT[:, -1:]], dim=1)


def _draws(draw: Sequence[float] | int | None, rows: int) -> Sequence[float]:
    """Return one uniform number per row."""
    if draw is None:
        return [0.0] * rows
    if isinstance(draw, int):
        return [_hash(f"{draw}:{row}") / 2**64 for row in range(rows)]
    return draw


def _hash(text: str) -> int:
    """Return 64 bits that depend on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _rule(policy: Policy, label: int, draw: float) -> Rule:
    """Return the rule of a label in a row."""
    rules = policy.rules_of(label)
    if not rules:
        word = policy.label_name(label)
        raise UserError(f"the policy has no rule for label '{word}', which a row carries; add one")
    return rules[choose(rules, draw)]


def _confidence(label: int, confidence_T: Tensor | None, soft_T: Tensor | None) -> Tensor | None:
    """Return the confidence in a label by token: the label's own, times the token's weight."""
    known_T = confidence_T if label >= CORE else None
    if soft_T is None or label <= CORE:
        return known_T
    return soft_T if known_T is None else known_T * soft_T


@dataclass(frozen=True)
class _Row:
    """One row of a batch, in which the names of rules stand for groups of the model."""

    policy: Policy
    names: tuple[str, ...]
    sizes: Sequence[float]
    draw: float
    unit: str

    def columns(self, chosen: Iterable[str], label: int) -> list[int]:
        """Return the columns of the groups that a rule names."""
        groups = [group for name in chosen for group in self._groups(name, label)]
        for group in groups:
            if group not in self.names:
                raise UserError(
                    f"a rule names group '{group}', which the model's map lacks; "
                    f"{nearest(group, self.names)}"
                )
        return [self.names.index(group) for group in groups]

    def _groups(self, name: str, label: int) -> list[str]:
        kind, _, count = name.partition(":")
        if kind == "self":
            return [self.policy.module_of(label)]
        if kind == "drawn":
            return [self._drawn()]
        if kind == "hashed":
            groups = self.policy.groups
            pool = [g for g in groups.parts if g not in (JOINT, groups.leftovers)]
            return sorted(pool, key=lambda g: _hash(f"{self.unit}:{g}"))[: int(count or 1)]
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

    def weights(self, rule: Rule, label: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return read, write and edge weights of one rule, each [G]."""

        def chosen(names: Names) -> Tensor:
            if names == "all":
                return torch.ones(len(self.names))
            weight_G = torch.zeros(len(self.names))
            weight_G[self.columns(names, label)] = 1.0
            return weight_G

        edge_G = torch.ones(len(self.names))
        for name, value in rule.edges.items():
            edge_G[self.columns([name], label)] = value
        return chosen(rule.read), chosen(rule.write), edge_G


def _fill(
    row: _Row,
    rule: Rule,
    label: int,
    at_T: Tensor,
    confidence_T: Tensor | None,
    matrices: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Put a rule's weights at its positions, mixed with those of `unlabeled` by confidence.

    Args:
        row: The row.
        rule: Its rule for the label.
        label: The label.
        at_T: Positions that the label rules.
        confidence_T: Confidence in the label; None for certain.
        matrices: Read, write and edge weights of the row, each [T, G]; changed in place.
    """
    weights = row.weights(rule, label)
    if confidence_T is None:
        for matrix_TG, weight_G in zip(matrices, weights, strict=True):
            matrix_TG[at_T] = weight_G
        return
    others = row.policy.rules_of(UNLABELED)
    other = row.weights(others[choose(others, row.draw)] if others else Rule(), UNLABELED)
    c = confidence_T[at_T][:, None]
    matrices[0][at_T] = torch.where(c >= 0.5, weights[0], other[0])
    matrices[1][at_T] = c * weights[1] + (1 - c) * other[1]
    matrices[2][at_T] = c * weights[2] + (1 - c) * other[2]


def _unless_ones(values: Tensor) -> Tensor | None:
    """Return None for all ones."""
    return None if bool((values == 1).all()) else values
