"""What every part of the record is made of: entries, estimates, the depth levels.

Read it through `excise.record`. This module imports neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

ScoreDirection = Literal["higher", "lower"]
"""Which way of a metric is more knowledge."""

Level = Literal["D0", "D1", "D2", "D3", "D4", "D5"]
"""Code of a depth level, never printed without its words."""

LEVELS: dict[Level, str] = {
    "D0": "the behaviour is gone",
    "D1": "holds against prompts",
    "D2": "holds against reading and clearing activations",
    "D3": "holds against weight edits that carry no information",
    "D4": "relearning does not bring back the held-out test set",
    "D5": "as if never learned",
}
"""The depth levels in words, lowest first."""


class RecordEntry(BaseModel):
    """Base of every part of the record: frozen, and tolerant of fields a newer version adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)

    value: float
    """Point estimate."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""
    n: int = 0
    """Number of independent units (or groups of units) it rests on."""
    coverage: float = 0.95
    """Coverage of the interval."""

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2
