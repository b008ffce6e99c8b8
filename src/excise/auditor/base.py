"""What an attack is, what it is run on and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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


@dataclass(frozen=True)
class Subject:
    """A model under attack. The audit runs one procedure on candidates and reference models.

    Attributes:
        name: `candidate`, `original`, `oracle-0` ..., or `positive-control`.
        checkpoint: Its weights.
        original: The model before removal, for attacks that hold it; None when unknown.
    """

    name: str
    checkpoint: Checkpoint
    original: Checkpoint | None = None


class Budget(Config):
    """How hard the attacker tries. Named budgets live in `audit/budget.py`."""

    name: Literal["smoke", "standard", "strong"] = "smoke"
    """Which effort this is; the report names it."""
    attacks: tuple[str, ...] = ()
    """Names of the attacks that are required at this budget."""
    steps: int = 16
    """Optimizer steps of a relearning."""
    batch_size: int = 32
    """Rows per step of a relearning, half of them benign."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates tried; the one used is chosen on `dev`, averaged over seeds."""
    lora_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """The same for LoRA."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each variant."""
    benign_rates: tuple[float, ...] = ()
    """Learning rates of benign fine-tuning; empty for `rates`."""
    fresh: bool = False
    """Whether fresh units are learned too, as a control: does this budget teach at all? Always
    from standard on."""
    together: int = 0
    """Attacks on weights at the same time at most, where memory is short; 0 for one per worker."""
    bits: bool = True
    """Whether relearning notes the losses that residual bits are made of, which need an oracle."""
    checkpoints: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    """Steps at which V is scored."""
    shots: tuple[int, ...] = (4,)
    """Numbers of examples of the few-shot attack."""
    random_directions: int = 2
    """Random directions cleared as controls of direction clearing."""
    max_test_rows: int = 256
    """Rows of V scored at most, the same for every subject."""
    max_other_rows: int = 128
    """Rows of `retain_test`, `dev_forget`, T and `fresh` scored at most, each."""
    max_length: int = 128
    """Tokens per row."""
    margin: float = 0.1
    """Equivalence margin as a share of the distance between original and oracle."""


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
    """

    attack: str
    subject: str
    variants: tuple[VariantResult, ...]
    chosen: tuple[int, ...]
    seconds: float = 0.0


class Attack(Config, ABC):
    """A way to bring a removed capability back.

    Subclasses declare `name: Literal["..."] = "..."` and their settings, and implement `run`,
    which does the same to any subject: candidate, original, oracle or positive control. `light`
    says that it holds neither gradients nor optimizer states and may run beside one that does.
    """

    kind: ClassVar[str] = "attack"
    access: ClassVar[Access]
    level: ClassVar[Level]
    needs_original: ClassVar[bool] = False
    light: ClassVar[bool] = False
    source: ClassVar[str] = ""
    version: ClassVar[int] = 1

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
