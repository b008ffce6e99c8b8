"""What an attack is, what it is run on and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from excise.auditor.budget import Budget
from excise.auditor.controls.control import PositiveControl
from excise.core.config import Config
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.record import AttackVariant, Level

Access = Literal["prompt", "logits", "activations", "weights"]
ORIGINAL = "original"
"""Name of the model before removal among the subjects."""
POSITIVE_CONTROL = "positive-control"
"""Name of the positive control among the subjects: a model that only hides what it knows."""

RESERVED = (ORIGINAL, POSITIVE_CONTROL)
"""Names that no edited model may have; nor may one begin with `oracle`."""


@dataclass(frozen=True)
class Subject:
    """A model under attack: the candidate or a reference model; all get the same procedure.

    Attributes:
        name: `candidate`, `original`, `oracle-0` ..., or `positive-control`.
        checkpoint: Its weights.
        original: The model before removal, for attacks that hold it; None when unknown.
    """

    name: str
    checkpoint: Checkpoint
    original: Checkpoint | None = None


@dataclass(frozen=True)
class VariantResult:
    """One variant of an attack: the record's entry plus what the statistics need.

    Attributes:
        entry: What goes into the record.
        unit_scores: For every checkpoint of the curve, score by unit on V, same order as
            `entry.curve`; units are the keys.
        dev_score: Score on `dev_forget` at the end, by which rates are chosen.
    """

    entry: AttackVariant
    unit_scores: tuple[Mapping[str, float], ...]
    dev_score: float = float("nan")
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackResult:
    """What one attack did to one subject.

    Attributes:
        attack: Name of the attack.
        subject: Name of the subject.
        variants: Every variant that was run.
        chosen: Indices into `variants` of those that decide (one per seed, at the chosen rate).
        seconds: Wall-clock time.
        fail_only: Indices of those that hold the original and bring nothing of it along: they can
            fail a level and never let it pass.
    """

    attack: str
    subject: str
    variants: tuple[VariantResult, ...]
    chosen: tuple[int, ...]
    seconds: float = 0.0
    fail_only: tuple[int, ...] = ()


class Attack(Config, ABC):
    """A way to bring a removed capability back.

    Subclasses declare `name: Literal["..."] = "..."` and their settings, and implement `run`,
    which does the same to any subject: candidate, original, oracle or positive control.

    Attributes:
        access: What the attacker holds.
        level: The level it decides.
        controls: Models that hide what they know, which it must undo to count: the first that
            hides is used. An attack without controls is shown and decides nothing.
        needs_original: Whether it holds the original, and so names that threat model.
        light: Whether it holds neither gradients nor optimizer states, and may run beside one
            that does.
        source: Where it comes from.
        version: Raised when it gives other results.
    """

    kind: ClassVar[str] = "attack"
    access: ClassVar[Access]
    level: ClassVar[Level]
    controls: ClassVar[tuple[PositiveControl, ...]] = ()
    needs_original: ClassVar[bool] = False
    light: ClassVar[bool] = False
    source: ClassVar[str] = ""
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return about how often an attack that trains nothing reads what is scored.

        Only the estimate of a run asks.

        Args:
            budget: How hard to try; its numbers of rows and its length are those that are there.
        """
        del budget
        return 4.0

    @abstractmethod
    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Attack `subject` and score `domain.test`.

        Args:
            subject: The model.
            domain: Rows by role; the attacker trains on `relearn` and `benign` only and chooses
                on `dev_*` only.
            budget: How hard to try.
            ctx: Seed, device, dtype and the folder to work in.

        Returns:
            Every variant with its curve and scores by unit.
        """


def name_of(attack: Attack) -> str:
    """Return an attack's name."""
    return str(getattr(attack, "name", type(attack).__name__))


Results = Mapping[tuple[str, str], AttackResult]
"""Results by attack and subject."""
