"""What a worker does: one attack on one subject, one training of it, or one planted control.

Every job is a stage; jobs are plain values and their functions lie at module level, so that both
can travel to a worker.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from excise.auditor.base import Attack, AttackResult, Budget, Subject
from excise.auditor.controls.control import VERSION, Plant, make_plant
from excise.auditor.controls.hide import PlantKind
from excise.auditor.results import to_json
from excise.auditor.tuning import Part, Trained
from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.stages import Store, library_versions
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.record import write_text


def name_of(attack: Attack) -> str:
    """Return an attack's name."""
    return str(getattr(attack, "name", type(attack).__name__))


@runtime_checkable
class Divisible(Protocol):
    """An attack made of trainings that can run apart, and be shared."""

    def parts(self, budget: Budget) -> tuple[Part, ...]:
        """Return the trainings."""
        ...

    def train_part(
        self, part: Part, subject: Subject, domain: Domain, budget: Budget, ctx: Context
    ) -> Trained:
        """Run one."""
        ...

    def read_parts(
        self, trained: Sequence[Trained], subject: Subject, budget: Budget, higher: bool
    ) -> AttackResult:
        """Put the measurements together."""
        ...


@dataclass(frozen=True)
class Job:
    """One attack, or one training of it, on one subject; travels to a worker.

    Attributes:
        root: Folder of the store.
        attack: The attack.
        subject: The model.
        domain: Rows by role.
        budget: How hard to try.
        seed: Seed of the audit.
        device: Where models run.
        dtype: Compute dtype.
        part: The training, for attacks made of those.
    """

    root: Path
    attack: Attack
    subject: Subject
    domain: Domain
    budget: Budget
    seed: int
    device: str
    dtype: torch.dtype
    part: Part | None = None

    @property
    def name(self) -> str:
        """Name of the stage."""
        return f"attack-{_training(self.attack).name}"  # type: ignore[attr-defined]

    def key(self) -> dict[str, Any]:
        """Return everything that decides the result."""
        attack = _training(self.attack)
        apart = {"name", "attacks", "margin", "fresh", "together"}
        if self.part is not None:
            apart |= {"rates", "lora_rates", "benign_rates", "seeds", "shots"}
            apart |= {"random_directions"}
        original = self.subject.original
        return {
            "attack": attack.model_dump(mode="json"),
            "class": type(attack).__qualname__,
            "version": attack.version,
            "part": asdict(self.part) if self.part else None,
            "checkpoint": self.subject.checkpoint.fingerprint,
            "tokenizer": self.subject.checkpoint.tokenizer_fingerprint,
            "original": original.fingerprint if original and self.part is None else "",
            "domain": self.domain.fingerprint,
            "budget": self.budget.model_dump(mode="json", exclude=apart),
            **_surroundings(self.seed, self.dtype, self.device),
        }


@dataclass(frozen=True)
class PlantJob:
    """The control of one or more attacks; the first kind that hides is kept."""

    root: Path
    kinds: tuple[PlantKind, ...]
    original: Checkpoint
    domain: Domain
    budget: Budget
    seed: int
    device: str
    dtype: torch.dtype


def _training(attack: Attack) -> Attack:
    """Return the attack whose work is done: for a second reading, the one it reads."""
    return getattr(attack, "training", attack)


@functools.cache
def _versions() -> dict[str, str]:
    """Return the libraries' versions, asked once a process: every key holds them."""
    return library_versions()


def _surroundings(seed: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return what else can change a number."""
    return {
        "seed": seed,
        "dtype": str(dtype),
        "device": torch.device(device).type,
        "libraries": _versions(),
    }


def run_job(job: Job) -> str:
    """Run a job as a stage, or find it done; returns why it failed, or nothing.

    What a user can cause (a role without rows, a text without tokens) fails the variant and not the
    audit; it is not stored, so that the next run tries again.
    """

    def make(folder: Path) -> None:
        ctx = Context(folder, job.seed, torch.device(job.device), job.dtype)
        if job.part is None:
            result = job.attack.run(job.subject, job.domain, job.budget, ctx)
            write_text(folder / "result.json", to_json(result))
            return
        assert isinstance(job.attack, Divisible)
        trained = job.attack.train_part(job.part, job.subject, job.domain, job.budget, ctx)
        write_text(folder / "trained.json", json.dumps(trained.to_json()) + "\n")

    try:
        Store(job.root).stage(job.name, job.key(), make)
    except UserError as error:
        return str(error)
    return ""


def run_plant(job: PlantJob) -> Plant:
    """Build the first plant that hides, each a stage."""
    plant: Plant | None = None
    for kind in job.kinds:
        plant = _one_plant(job, kind)
        if plant.hides:
            break
    assert plant is not None
    return plant


def _one_plant(job: PlantJob, kind: PlantKind) -> Plant:
    """Build one kind of plant as a stage."""

    def make(folder: Path) -> None:
        ctx = Context(folder, job.seed, torch.device(job.device), job.dtype)
        try:
            plant = make_plant(kind, job.original, job.domain, job.budget, ctx, folder / "model")
        except UserError as error:
            plant = Plant(kind, None, math.nan, reason=str(error))
        data = {k: v for k, v in vars(plant).items() if k != "checkpoint"}
        write_text(folder / "plant.json", json.dumps(data) + "\n")

    key = {
        "kind": kind,
        "version": VERSION,
        "original": job.original.fingerprint,
        "domain": job.domain.fingerprint,
        "budget": job.budget.model_dump(
            mode="json", exclude={"name", "attacks", "margin", "fresh", "together"}
        ),
        **_surroundings(job.seed, job.dtype, job.device),
    }
    folder = Store(job.root).stage(f"plant-{kind}", key, make)
    data = json.loads((folder / "plant.json").read_text(encoding="utf-8"))
    model = folder / "model"
    return Plant(checkpoint=Checkpoint(model) if model.is_dir() else None, **data)
