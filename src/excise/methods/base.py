"""What a method is: a configuration with `apply`.

The hyper-parameter object *is* the method. A method file reads top to bottom like the paper's
algorithm box; nothing here is a template that runs it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from excise.core.config import Config
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
        title: Title of the paper.
        url: Where to read it (arXiv id or address).
        equation: Which equation or algorithm is implemented.
        repository: Reference code as `owner/name@commit (licence)`, or empty.
        defaults: For each default that has one, the sentence or file it comes from.
    """

    title: str
    url: str
    equation: str = ""
    repository: str = ""
    defaults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a removal took.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens read, forward passes of frozen models included.
        flops: Floating-point operations, estimated from parameters and tokens.
        seconds: Wall-clock time.
    """

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of two costs."""
        return Cost(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Removal:
    """What `apply` returns.

    Attributes:
        checkpoint: The edited model, on disk.
        changed: Canonical names of the tensors that differ from the start.
        cost: What it took.
        extras: JSON-able facts the record keeps (trained modules, share of entries moved ...);
            tensors a later stage needs (control vectors, masks) lie as safetensors under
            `extras["files"]`, a mapping of name to path relative to `ctx.work`, never in the
            model folder.
        history: One dictionary of named losses per logged step.
    """

    checkpoint: Checkpoint
    changed: tuple[str, ...]
    cost: Cost
    extras: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()


class Method(Config, ABC):
    """A way to remove a capability.

    Subclasses declare `name: Literal["..."] = "..."`, their hyper-parameters with published
    defaults, `paper`, `starts_from` and `version`, and implement `apply`.
    """

    kind: ClassVar[str] = "method"
    starts_from: ClassVar[Literal["original", "scratch"]] = "original"
    paper: ClassVar[Paper]
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")

    @abstractmethod
    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` from `start`.

        Args:
            start: The original model, or for `starts_from = "scratch"` the untrained one.
            domain: Rows by role; the method may read forget, retain, unlabeled and dev.
            ctx: Seed, device, dtype and the folder to work in.

        Returns:
            The edited checkpoint, written under `ctx.work`, and what it took.
        """
