"""What a method is: a configuration with `apply`.

The hyper-parameter object *is* the method. A method file reads top to bottom like the paper's
algorithm box; nothing here is a template that runs it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from excise.core.config import Config, configs_in
from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.labels import LabelNoise, relabelled
from excise.methods.search import Space
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
    defaults, `paper`, `starts_from` and `version`, and implement `apply`. `search` says where a
    leaderboard looks for their settings; empty for the learning rate and the weights of losses.
    """

    kind: ClassVar[str] = "method"
    starts_from: ClassVar[Literal["original", "scratch"]] = "original"
    paper: ClassVar[Paper]
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    search: ClassVar[Space] = {}

    @property
    def whole_batch(self) -> str:
        """Why cutting a batch, into micro-batches or over processes, gives another model.

        Empty where it does not; else training starts over when the number of processes changes.
        """
        return ""

    @property
    def step_cost(self) -> float:
        """What a step of its own `fit` costs, in passes forward and back over its rows."""
        return 1.0

    @property
    def readings(self) -> float:
        """How often it reads all its rows, forward and back, beside the steps of its `fit`."""
        return 0.0

    @property
    def extra_copies(self) -> int:
        """Copies of what it trains that a step holds beside weights, gradient and moments."""
        return 0

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


class PostHoc(Method):
    """The settings that every method on a trained model has."""

    labels: LabelNoise | None = None
    """How the labels it is given differ from the truth; missing for not at all. Missed forget rows
    are read as retain text, or by nobody."""

    refuses: ClassVar[Mapping[str, str]] = {}
    """Options that others have and it does not take, and why not."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        """Say why an option is not taken where it is asked for."""
        for option, why in cls.refuses.items() if isinstance(data, Mapping) else ():
            if data.get(option) not in (None, 0):
                raise ValueError(f"{option}: {why}; leave it out")
        return data

    @model_validator(mode="after")
    def _labels_are_certain(self) -> PostHoc:
        """Refuse what only methods that train from scratch read."""
        if self.labels is not None and self.labels.confidence is not None:
            raise ValueError(
                "labels.confidence: only methods that train from scratch weigh a label by it; "
                "leave it out"
            )
        return self

    def given(self, domain: Domain, ctx: Context) -> tuple[Domain, dict[str, Any]]:
        """Return the domain as the labeller gives it, and what the record says of that."""
        return relabelled(domain, self.labels, seed=ctx.seed_for("labels"))


@dataclass(frozen=True)
class ApplyMethod(Stage[Removal]):
    """A method applied to a model. A method made of methods runs them as stages of their own.

    Attributes:
        method: The method.
        start: What it starts from.
        domain: Rows by role.
        seed: Seed of everything random.
    """

    version: ClassVar[int] = 2
    data_parallel: ClassVar[bool] = True

    method: Method
    start: Checkpoint
    domain: Domain
    seed: int

    @property
    def counts_processes(self) -> bool:
        """Whether the method, or one that it is made of, works on whole batches."""
        return any(method.whole_batch for method in methods_in(self.method))

    @property
    def name(self) -> str:
        """Name of the method."""
        return str(getattr(self.method, "name", "method"))

    def make(self, ctx: Context) -> None:
        """Apply the method and write down what it returned."""
        removal = self.method.apply(self.start, self.domain, ctx)
        if removal.checkpoint.path != ctx.work / "model":
            raise UserError(f"method '{self.name}' must write its model to ctx.work / 'model'")
        if ctx.rank == 0:
            facts = {
                "changed": removal.changed,
                "cost": asdict(removal.cost),
                "extras": removal.extras,
                "history": removal.history,
            }
            write_text(ctx.work / "removal.json", json.dumps(facts))

    def read(self, folder: Path) -> Removal:
        """Return the removal; files of its extras as paths."""
        facts = json.loads((folder / "removal.json").read_text(encoding="utf-8"))
        extras = facts["extras"]
        if "files" in extras:
            extras["files"] = {k: str(folder / v) for k, v in extras["files"].items()}
        return Removal(
            Checkpoint(folder / "model", self.start.trust_remote_code),
            tuple(facts["changed"]),
            Cost(**facts["cost"]),
            extras,
            tuple(facts["history"]),
        )


def methods_in(config: Config) -> Iterator[Method]:
    """Yield a method and those it is made of."""
    if isinstance(config, Method):
        yield config
    for name in type(config).model_fields:
        for _, inner in configs_in(getattr(config, name)):
            yield from methods_in(inner)


def completed(config: Config, known: Mapping[str, Any]) -> Any:
    """Return a configuration whose methods know what the run knows and they do not say.

    Args:
        config: A method; methods inside it are completed too.
        known: Values by field; a field takes one where it is missing, None or 0.

    Returns:
        The configuration, a new one where something was filled in.
    """
    change: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(config, Method) and not value and known.get(name):
            change[name] = known[name]
        elif isinstance(value, Config):
            change[name] = completed(value, known)
        elif isinstance(value, tuple):
            change[name] = tuple(completed(v, known) if isinstance(v, Config) else v for v in value)
        elif isinstance(value, dict):
            change[name] = {
                k: completed(v, known) if isinstance(v, Config) else v for k, v in value.items()
            }
    change = {name: value for name, value in change.items() if value != getattr(config, name)}
    return config.model_copy(update=change) if change else config
