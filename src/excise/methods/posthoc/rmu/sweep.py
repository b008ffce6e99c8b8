"""Several settings of RMU in one run, of which one is chosen by the rule of `choosing`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from excise.core.config import Config
from excise.core.context import Context
from excise.methods.base import Cost
from excise.methods.choosing import RULE, better


class RMUSweep(Config):
    """Settings to try; an empty one stays as the method has it."""

    layer: tuple[int, ...] = ()
    """Blocks whose output is steered."""
    steering: tuple[float, ...] = ()
    """Norms of the control vector."""
    alpha: tuple[float, ...] = ()
    """Weights of the retain term."""
    retain_budget: float = Field(default=0.05, ge=0)
    """Nats per token by which the loss on `dev` retain text may rise."""
    rows: int = Field(default=64, ge=1)
    """Rows of `dev` scored per role and topic at most."""

    @field_validator("layer", "steering", "alpha", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Take `5,6,7` and a single number, as they come from a command line."""
        if isinstance(value, str):
            return tuple(part for part in value.replace(",", " ").split())
        return (value,) if isinstance(value, int | float) else value

    def grid(self, layer: int, steering: Any, alpha: Any) -> list[dict[str, Any]]:
        """Return every combination of settings, lower layers first.

        Args:
            layer: The method's own, for where nothing is swept.
            steering: The same.
            alpha: The same.
        """
        combinations = itertools.product(
            sorted(set(self.layer)) or [layer], self.steering or [steering], self.alpha or [alpha]
        )
        return [dict(zip(("layer", "steering", "alpha"), c, strict=True)) for c in combinations]


@dataclass(frozen=True)
class Tried:
    """What came of one setting.

    Attributes:
        forget: Loss on `dev` forget text, nats per token.
        retain: Loss on `dev` retain text.
        changed: Trained tensors by name.
        controls: Control vectors.
        facts: What the record says of the run.
        history: Its log.
        cost: What it took.
    """

    forget: float
    retain: float
    changed: Mapping[str, Tensor]
    controls: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    cost: Cost


def choose(
    sweep: RMUSweep,
    grid: Sequence[Mapping[str, Any]],
    attempt: Callable[[int], Tried],
    original: tuple[float, float],
    ctx: Context,
) -> tuple[Tried, Cost, dict[str, Any]]:
    """Try every setting and return the best.

    Args:
        sweep: The budget.
        grid: The settings.
        attempt: Trains and scores the setting of a number.
        original: `dev` losses of the original, forget and retain.
        ctx: Told of every setting.

    Returns:
        The best, the cost of all together, and what the record says of the choice.
    """
    limit = original[1] + sweep.retain_budget
    best: Tried | None = None
    chosen: Mapping[str, Any] = {}
    cost = Cost()
    table: list[dict[str, Any]] = []
    for number, settings in enumerate(grid):
        tried = attempt(number)
        cost += tried.cost
        row = {
            **settings,
            "dev_forget": tried.forget, "dev_retain": tried.retain,
            "within_budget": tried.retain <= limit, "share_moved": tried.facts["share_moved"],
            "flops": tried.cost.flops, "seconds": tried.cost.seconds,
        }  # fmt: skip
        table.append(row)
        ctx.emit("note", {"text": _sentence(row, number, len(grid))})
        if better(tried, best, limit):
            best, chosen = tried, settings
    assert best is not None, "a grid has a setting"
    report = {
        "rule": RULE,
        "retain_budget": sweep.retain_budget,
        "original": {"dev_forget": original[0], "dev_retain": original[1]},
        "chosen": dict(chosen),
        "within_budget": best.retain <= limit,
        "table": table,
    }
    return best, cost, report


def _sentence(row: Mapping[str, Any], number: int, count: int) -> str:
    """Return one row of the table for people."""
    return (
        f"rmu {number + 1}/{count}: layer {row['layer']}, steering {row['steering']}, alpha "
        f"{row['alpha']}: dev forget {row['dev_forget']:.3f}, retain {row['dev_retain']:.3f}"
        + ("" if row["within_budget"] else " (beyond the budget)")
    )
