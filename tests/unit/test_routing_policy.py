"""From labels to what tokens read, write and weigh."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.routing import GroupMap, Groups, Part, Policy, Rule, compile
from excise.routing.groups import Owned, Place
from excise.routing.policy import choose

NAMES = ("core", "module_1", "module_2", "joint")
MAP = GroupMap(
    NAMES,
    "core",
    {"w": (Owned("core", None, 0, 0),)},
    tuple(Place("p", "input", name, i, i + 1) for i, name in enumerate(NAMES[:3])),
)
GROUPS = Groups(parts={name: (Part(at="norms"),) for name in NAMES[1:]})


def policy(**more: Any) -> Policy:
    rules: Any = {
        "core": (Rule(write=("core", "joint")),),
        "forget": (Rule(write=("self",), edges={"core": -0.75}, weight=0.5),),
        "unlabeled": (Rule(),),
    }
    given: Any = {"groups": GROUPS, "rules": rules, "capabilities": ("a", "b"), **more}
    return Policy(**given)


def batch(*labels: list[int], real: int = 0) -> Batch:
    label_BT = torch.tensor(labels)
    ids_BT = torch.arange(label_BT.numel()).view(label_BT.shape)
    attention_BT = torch.ones_like(label_BT, dtype=torch.bool)
    if real:
        attention_BT[:, real:] = False
    units = tuple(f"u{i}" for i in range(len(labels)))
    return Batch(ids_BT, attention_BT, attention_BT.clone(), label_BT, units)


def columns(values_NG: Tensor | None, name: str) -> list[float]:
    assert values_NG is not None
    return values_NG[:, NAMES.index(name)].tolist()


def test_the_label_of_the_predicted_token_rules() -> None:
    routes = compile(policy(), MAP, batch([0, 0, 1, 2]))
    assert columns(routes.write_NG, "core") == [1, 0, 0, 0]
    assert columns(routes.write_NG, "module_1") == [0, 1, 0, 0]
    assert columns(routes.write_NG, "module_2") == [0, 0, 1, 1]
    assert columns(routes.write_NG, "joint") == [1, 0, 0, 0]
    assert columns(routes.edge_NG, "core") == [1, -0.75, -0.75, -0.75]
    assert routes.read_NG is None
    assert routes.written == {"core", "joint", "module_1", "module_2"}
    # The loss of a token weighs by its own label: position 1 predicts token 2.
    assert routes.loss_BT is not None
    assert routes.loss_BT.tolist() == [[1, 1, 0.5, 0.5]]


def test_tokens_and_rows_can_rule() -> None:
    mixed = batch([0, 0, 1, 2], [1, 1, 1, 0])
    token = compile(policy(at="token"), MAP, mixed)
    assert columns(token.write_NG, "module_1") == [0, 0, 1, 0, 1, 1, 1, 0]
    row = compile(policy(at="row"), MAP, mixed)
    assert columns(row.write_NG, "core") == [1, 1, 1, 1, 0, 0, 0, 0]
    assert columns(row.write_NG, "module_1") == [0, 0, 0, 0, 1, 1, 1, 1]


def test_plain_rows_cost_nothing() -> None:
    routes = compile(policy(), MAP, batch([-1, -1]))
    assert routes.read_NG is routes.write_NG is routes.edge_NG is routes.loss_BT is None
    assert routes.written == set(NAMES)


def test_what_is_not_read_is_not_written() -> None:
    rules: Any = {"core": (Rule(read=("core", "joint")),)}
    routes = compile(policy(rules=rules), MAP, batch([0, 0]))
    assert columns(routes.read_NG, "module_1") == [0, 0]
    assert columns(routes.write_NG, "module_1") == [0, 0]
    assert routes.written == {"core", "joint"}


def test_alternatives_are_drawn_by_share() -> None:
    rules: Any = {"core": (Rule(write=("core",), share=3), Rule(write=("joint",), share=1))}
    assert [choose(rules["core"], d) for d in (0.0, 0.74, 0.76, 0.999)] == [0, 0, 1, 1]
    routes = compile(policy(rules=rules), MAP, batch([0], [0]), draw=[0.1, 0.9])
    assert columns(routes.write_NG, "core") == [1, 0]
    rows = batch(*[[0]] * 400)
    drawn = columns(compile(policy(rules=rules), MAP, rows, draw=5).write_NG, "core")
    assert 0.65 < sum(drawn) / 400 < 0.85
    assert drawn == columns(compile(policy(rules=rules), MAP, rows, draw=5).write_NG, "core")
    assert drawn != columns(compile(policy(rules=rules), MAP, rows, draw=6).write_NG, "core")


def test_modules_are_drawn_by_their_rows() -> None:
    rules: Any = {"core": (Rule(write=("core", "drawn")),)}
    rows = batch(*[[0]] * 400)
    routes = compile(policy(rules=rules), MAP, rows, draw=1, sizes=(30, 10))
    first, second = columns(routes.write_NG, "module_1"), columns(routes.write_NG, "module_2")
    assert all(a + b == 1 for a, b in zip(first, second, strict=True))
    assert 0.65 < sum(first) / 400 < 0.85


def test_sinks_follow_the_unit_alone() -> None:
    groups = Groups(parts={f"sink_{i}": (Part(at="norms"),) for i in range(6)})
    names = groups.names
    map = GroupMap(names, "core", {}, ())
    rules: Any = {"core": (Rule(read=("core", "hashed:2"), write=("core", "hashed:2")),)}
    given = Policy(groups=groups, rules=rules)
    units = tuple(f"unit {i}" for i in range(200))
    rows = replace(batch(*[[0]] * 200), units=units)
    write_NG = compile(given, map, rows, draw=1).write_NG
    assert write_NG is not None
    assert torch.equal(write_NG, compile(given, map, rows, draw=2).write_NG)  # type: ignore[arg-type]
    assert (write_NG[:, 1:].sum(1) == 2).all()
    used = Counter(int(i) for i in write_NG[:, 1:].nonzero()[:, 1])
    assert min(used.values()) > 200 * 2 / 6 / 2


def test_confidence_mixes_with_what_nobody_looked_at() -> None:
    soften_V = torch.tensor([1.0, 0.5, 0.0, 1.0])
    routes = compile(policy(), MAP, batch([1, 1, 1, 1]), soften_V=soften_V)
    # Position 0 predicts token 1 (c = 0.5), position 1 token 2 (c = 0) and so on.
    assert columns(routes.write_NG, "core") == [0.5, 1, 0, 0]
    assert columns(routes.write_NG, "module_1") == [1, 1, 1, 1]
    assert columns(routes.edge_NG, "core") == [0.125, 1, -0.75, -0.75]
    rules: Any = {"core": (Rule(read=("core",), write=("core",)),), "unlabeled": (Rule(),)}
    sure_BT = torch.tensor([[1.0, 0.6, 0.4]])
    routes = compile(policy(rules=rules, at="token"), MAP, batch([0, 0, 0]), confidence_BT=sure_BT)
    assert columns(routes.read_NG, "module_1") == [0, 0, 1]
    assert columns(routes.write_NG, "joint") == pytest.approx([0, 0.4, 0.6])
    # What is not read takes no gradient, however unsure the label.
    assert columns(routes.write_NG, "module_1") == pytest.approx([0, 0, 0.6])


def test_padding_needs_no_rule_and_writes_nothing() -> None:
    rules: Any = {"a": (Rule(write=("self",)),)}
    rows = batch([1, 1, -1], real=2)
    routes = compile(policy(rules=rules), MAP, rows)
    assert routes.written == {"module_1"}
    with pytest.raises(UserError, match="no rule for label 'unlabeled'"):
        compile(policy(rules=rules), MAP, batch([1, -1, -1]))
    with pytest.raises(UserError, match="no rule for label 'b'"):
        compile(policy(rules=rules), MAP, batch([1, 2]))
