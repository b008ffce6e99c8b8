"""The rules of a policy: what tokens of a label read, write and weigh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field

from excise.core.config import Config, ConfigError
from excise.core.errors import nearest
from excise.data.domain import CORE
from excise.routing.groups import Groups

Names = tuple[str, ...] | Literal["all"]
SPECIAL = ("self", "drawn", "hashed")
"""Names that stand for a module told by the row: its capability's, a drawn one, a hashed one."""


class Rule(Config):
    """What tokens of one label read and write."""

    read: Names = "all"
    """Groups that take part in the forward pass; the activations of others are 0."""
    write: Names = "all"
    """Groups whose weights receive the gradient of the token."""
    edges: dict[str, float] = Field(default_factory=dict)
    """Weight of the gradient that passes back through a group's activations; 1 where missing."""
    weight: float = 1.0
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

    def module_of(self, capability: int) -> str:
        """Return the group of capability number `capability`, from 1."""
        named = capability <= len(self.capabilities)
        name = self.capabilities[capability - 1] if named else ""
        return self.modules.get(name, f"module_{capability}")

    def rules_of(self, label: int) -> tuple[Rule, ...]:
        """Return the alternatives of a label; empty when there is no rule."""
        if label < CORE:
            return self.rules.get("unlabeled", ())
        if label == CORE:
            return self.rules.get("core", ())
        name = self.capabilities[label - 1] if label <= len(self.capabilities) else ""
        return (
            self.rules.get(name, self.rules.get("forget", ()))
            if name
            else self.rules.get("forget", ())
        )


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
            sets = {f: getattr(rule, f) for f in ("read", "write")} | {"edges": tuple(rule.edges)}
            for field, chosen in sets.items():
                for name in () if chosen == "all" else chosen:
                    at = f"rules.{label}[{i}].{field}"
                    special = name.partition(":")[0]
                    if special == "self" and label in ("core", "unlabeled"):
                        problems.append(
                            f"{at}: tokens labelled {label} have no module of their own"
                        )
                    elif special not in SPECIAL and name not in names:
                        problems.append(f"{at}: there is no group '{name}'; {nearest(name, names)}")
    for number in sorted(set(labels)):
        rules = policy.rules_of(number)
        if not rules:
            word = capability_name(policy, number)
            problems.append(f"rules: label '{word}' occurs in the data and has no rule")
        uses = {
            n for r in rules for s in (r.read, r.write, tuple(r.edges)) if s != "all" for n in s
        }
        if number > CORE and "self" in uses and policy.module_of(number) not in names:
            problems.append(
                f"rules: capability '{capability_name(policy, number)}' has no group "
                f"'{policy.module_of(number)}'; name it in `modules`"
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


def capability_name(policy: Policy, label: int) -> str:
    """Return the word for a label: a capability's name, or its number where it has none."""
    if label <= CORE:
        return "core" if label == CORE else "unlabeled"
    return policy.capabilities[label - 1] if label <= len(policy.capabilities) else str(label)


def choose(rules: Sequence[Rule], draw: float) -> int:
    """Return which alternative a uniform draw in [0, 1) falls on."""
    total = sum(rule.share for rule in rules)
    at = 0.0
    for i, rule in enumerate(rules):
        at += rule.share / total
        if draw < at:
            return i
    return len(rules) - 1


def prepare(map_problems: Sequence[str], policy_problems: Sequence[str]) -> None:
    """Raise one error with all problems of groups and policy.

    Raises:
        ConfigError: If there is any.
    """
    problems = [f"groups.{p}" for p in map_problems] + list(policy_problems)
    if problems:
        raise ConfigError(problems, "policy")
