"""What a computation declares and what it is given: stages and contexts.

This module holds the two nouns that methods, attacks and studies speak of; how stages are kept is
in `stages`.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from excise.core.events import Emit, silent
from excise.core.keys import fields_identity

T = TypeVar("T")

OWN_DEVICE = "EXCISE_DEVICE"
"""Environment variable of a worker: which of several devices is its own, such as `cuda:1`."""


def own_device(name: str) -> str:
    """Return the device of this process where `name` is a kind of device, and else `name`."""
    own = os.environ.get(OWN_DEVICE, "")
    return own if own.partition(":")[0] == name else name


class Stage(ABC, Generic[T]):
    """What is computed once. Subclasses are frozen dataclasses; every field is an input.

    The key of a stage follows from its fields (`excise.core.keys`). A field whose type is not
    known there says itself what makes two of its values equal:
    `tokenizer: Any = field(metadata={"identity": tokenizer_identity})`.

    Attributes:
        version: Raised when the same inputs give another result.
        data_parallel: Whether several processes make it together, each its share, so that it
            talks to them through `ctx`; any other stage is made by one process alone.
    """

    version: ClassVar[int] = 1
    data_parallel: ClassVar[bool] = False

    @property
    def counts_processes(self) -> bool:
        """Whether the number of processes that make it together decides more than its rounding."""
        return False

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is to a reader; its folder is called after it."""

    @abstractmethod
    def make(self, ctx: Context) -> None:
        """Fill `ctx.work`; after a kill it is called again on what it left.

        Args:
            ctx: The folder, device, dtype, processes, and the seed of the field `seed` (else 0).
        """

    @abstractmethod
    def read(self, folder: Path) -> T:
        """Return what the finished stage in `folder` holds."""


class RunStage(Protocol):
    """Returns what a stage gives, making it if it is not there."""

    def __call__(self, stage: Stage[T], /) -> T:
        """Run a stage, or find it done."""
        ...


@dataclass(frozen=True)
class Context:
    """What a stage is given beside its inputs: a folder, and how it is computed.

    Attributes:
        work: Folder of the stage: state of interrupted training, files it makes.
        seed: Seed of the run; every random draw derives from it and the name of its purpose.
        device: Where models run.
        dtype: Compute dtype of models.
        rank: Number of this process.
        world: Number of processes.
        fsdp: Whether a model's blocks are cut over the processes while it trains.
        emit: Sink of progress events, `emit(kind, data)`.
        stages: Runs a stage that this one is made of, and keeps it; None makes it in `work`.
    """

    work: Path
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1
    fsdp: bool = False
    emit: Emit = silent
    stages: RunStage | None = None

    def seed_for(self, purpose: str) -> int:
        """Return a 63-bit seed of its own for `purpose`: a new draw never shifts the others."""
        text = f"{self.seed}:{purpose}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def generator(self, purpose: str) -> torch.Generator:
        """Return a CPU generator seeded for `purpose`."""
        return torch.Generator().manual_seed(self.seed_for(purpose))

    def child(self, name: str, *, seed: int | None = None) -> Context:
        """Return a context whose folder is `work/name`, made if missing."""
        work = self.work / name
        work.mkdir(parents=True, exist_ok=True)
        return replace(self, work=work, seed=self.seed if seed is None else seed)

    def run(self, stage: Stage[T]) -> T:
        """Return what another stage gives; in a run it is kept beside this one, and shared.

        Without a store it is made again in a folder of `work`, which it may resume.
        """
        if self.stages is not None:
            return self.stages(stage)
        world = self.world if stage.counts_processes else 1
        how = [str(self.dtype), self.device.type, world]
        inputs = json.dumps([fields_identity(stage), how], sort_keys=True)
        digest = hashlib.sha256(inputs.encode()).hexdigest()[:16]
        seed: Any = getattr(stage, "seed", 0)
        inner = self.child(f"{stage.name}-{digest}", seed=int(seed))
        stage.make(inner)
        return stage.read(inner.work)
