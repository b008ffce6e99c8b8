"""What a stage is given beside its inputs: seeds by purpose, device, dtype, processes, a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

Emit = Callable[[str, Mapping[str, Any]], None]


def _silent(kind: str, data: Mapping[str, Any]) -> None:
    """Drop an event: the default when nobody listens."""


@dataclass(frozen=True)
class Context:
    """Everything a stage may use that is not one of its inputs.

    Attributes:
        work: Folder of the stage: state of interrupted training, files it makes.
        seed: Seed of the arm; every random draw derives from it and the name of its purpose.
        device: Where models run.
        dtype: Compute dtype of models.
        rank: Number of this process.
        world: Number of processes.
        emit: Sink of progress events, `emit(kind, data)`.
    """

    work: Path
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1
    emit: Emit = _silent

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
