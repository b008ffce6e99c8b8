"""The audit: every attack on every subject, each pair a stage of its own.

A stage is keyed by the attack, the checkpoint's bytes, domain, budget and seed, so that rails are
shared between arms and studies, equal weights are attacked once, and a killed audit goes on where
it was. Trainings are cut further, one stage each, and two readings of one training share it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from excise.audit.attacks import ATTACKS
from excise.audit.base import ArmResult, Attack, AttackResult, Budget, Subject
from excise.audit.hide import PlantKind
from excise.audit.plant import PLANT_FOR, VERSION, Plant, make_plant
from excise.audit.results import from_json, renamed, to_json
from excise.audit.scoring import more_is_known
from excise.audit.tuning import Part, Trained
from excise.context import Context
from excise.domains.base import Domain
from excise.errors import UserError, nearest
from excise.models.checkpoint import Checkpoint
from excise.record import AttackArm, write_text
from excise.stages import Store, library_versions
from excise.train.grid import Pool

Results = dict[tuple[str, str], AttackResult]
"""Results by attack and subject."""

PLANTED = "planted"
"""Name of the positive control among the subjects."""


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
        """Put the readings together."""
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
        apart = {"name", "attacks", "margin"}
        if self.part is not None:
            apart |= {"rates", "lora_rates", "seeds", "shots", "random_directions"}
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


def _surroundings(seed: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return what else can change a number."""
    return {
        "seed": seed,
        "dtype": str(dtype),
        "device": torch.device(device).type,
        "libraries": library_versions(),
    }


def run_job(job: Job) -> str:
    """Run a job as a stage, or find it done; returns why it failed, or nothing.

    What a user can cause (a role without rows, a text without tokens) fails the arm and not the
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
        "budget": job.budget.model_dump(mode="json", exclude={"name", "attacks", "margin"}),
        **_surroundings(job.seed, job.dtype, job.device),
    }
    folder = Store(job.root).stage(f"plant-{kind}", key, make)
    data = json.loads((folder / "plant.json").read_text(encoding="utf-8"))
    model = folder / "model"
    return Plant(checkpoint=Checkpoint(model) if model.is_dir() else None, **data)


def chosen_attacks(budget: Budget, attacks: Sequence[Attack] = ()) -> tuple[Attack, ...]:
    """Return the attacks of an audit.

    Args:
        budget: Names what is required.
        attacks: Attacks with settings of their own; they replace those of the same name.

    Returns:
        Every required attack once, then what was given beyond.

    Raises:
        UserError: If the budget requires an attack nobody knows.
    """
    given = {str(attack.name): attack for attack in attacks}  # type: ignore[attr-defined]
    made: dict[str, Attack] = {}
    for name in budget.attacks:
        if name not in given and name not in ATTACKS:
            raise UserError(f"the budget requires the attack '{name}'; {nearest(name, ATTACKS)}")
        made[name] = given[name] if name in given else ATTACKS[name]()
    return tuple({**made, **given}.values())


def attack_all(
    subjects: Sequence[Subject],
    domain: Domain,
    budget: Budget,
    ctx: Context,
    pool: Pool,
    store: Store,
    *,
    attacks: Sequence[Attack] = (),
    plant: bool = True,
) -> Results:
    """Run every attack on every subject and on the planted controls.

    Args:
        subjects: Candidates, original, oracles; each has a name of its own.
        domain: Rows by role.
        budget: How hard to try, and which attacks are required.
        ctx: Seed, device, dtype, and the sink of progress.
        pool: Worker processes.
        store: Where stages lie.
        attacks: Attacks with settings of their own, beside or in place of the budget's.
        plant: Whether to build positive controls, which needs the original.

    Returns:
        Results by attack and subject; the controls' subject is `planted`. What could not run is
        there as an arm that says why.
    """
    wanted = chosen_attacks(budget, attacks)
    pairs = [(attack, subject) for attack in wanted for subject in subjects]
    original = next((s.checkpoint for s in subjects if s.name == "original"), None)
    original = original or next((s.original for s in subjects if s.original), None)
    plants: dict[str, Plant] = {}
    if plant and original is not None:
        plants = _plants(wanted, original, domain, budget, ctx, pool, store)
        for attack in wanted:
            found = plants.get(_name(attack))
            if found is not None and found.hides and found.checkpoint is not None:
                pairs.append((attack, Subject(PLANTED, found.checkpoint, original)))
    jobs = {pair: _jobs(*pair, domain, budget, ctx, store) for pair in pairs}
    reasons = _run(jobs, ctx, pool)
    results: Results = {}
    for attack, subject in pairs:
        result = _collect(jobs[attack, subject], attack, subject, budget, domain, reasons, store)
        if subject.name == PLANTED:
            result = _with_plant(result, plants[_name(attack)])
        results[_name(attack), subject.name] = result
    for attack in wanted:
        if plant and (_name(attack), PLANTED) not in results:
            why = plants[_name(attack)].reason if _name(attack) in plants else _no_plant(original)
            results[_name(attack), PLANTED] = _absent(attack, PLANTED, "missing", why)
    return results


def _no_plant(original: Checkpoint | None) -> str:
    """Say why an attack has no control."""
    if original is None:
        return "there is no original to plant a control in"
    return "no planted control is known for this attack"


def _name(attack: Attack) -> str:
    """Return an attack's name."""
    return str(getattr(attack, "name", type(attack).__name__))


def _plants(
    attacks: Sequence[Attack],
    original: Checkpoint,
    domain: Domain,
    budget: Budget,
    ctx: Context,
    pool: Pool,
    store: Store,
) -> dict[str, Plant]:
    """Build the controls that the attacks need, each once."""
    needed = {name: PLANT_FOR[name] for name in map(_name, attacks) if name in PLANT_FOR}
    kinds = list(dict.fromkeys(needed.values()))
    jobs = [
        PlantJob(store.root, k, original, domain, budget, ctx.seed, str(ctx.device), ctx.dtype)
        for k in kinds
    ]

    def told(i: int, plant: Plant) -> None:
        ctx.emit("plant", {"kind": plant.kind, "hides": plant.hides, "reason": plant.reason})

    made = dict(zip(kinds, pool.map(run_plant, jobs, told), strict=True))
    return {name: made[which] for name, which in needed.items()}


def _jobs(
    attack: Attack, subject: Subject, domain: Domain, budget: Budget, ctx: Context, store: Store
) -> tuple[Job, ...]:
    """Return the jobs of one attack on one subject."""
    whole = Job(store.root, attack, subject, domain, budget, ctx.seed, str(ctx.device), ctx.dtype)
    if not isinstance(attack, Divisible):
        return (whole,)
    return tuple(replace(whole, part=part) for part in attack.parts(budget))


def _run(
    jobs: Mapping[tuple[Attack, Subject], Sequence[Job]], ctx: Context, pool: Pool
) -> dict[Path, str]:
    """Run every stage once, trainings first because they take longest."""
    stages: dict[Path, Job] = {}
    for pair in jobs.values():
        for job in pair:
            stages.setdefault(_path(job), job)
    ordered = sorted(stages, key=lambda path: stages[path].part is None)
    done = 0

    def told(i: int, reason: str) -> None:
        nonlocal done
        done += 1
        job = stages[ordered[i]]
        facts = {"attack": _name(job.attack), "subject": job.subject.name}
        ctx.emit("attack", {**facts, "done": done, "of": len(ordered), "reason": reason})

    answers = pool.map(run_job, [stages[path] for path in ordered], told)
    return dict(zip(ordered, answers, strict=True))


def _path(job: Job) -> Path:
    """Return the folder of a job's stage."""
    return Store(job.root).path(job.name, job.key())


def _collect(
    jobs: Sequence[Job],
    attack: Attack,
    subject: Subject,
    budget: Budget,
    domain: Domain,
    reasons: Mapping[Path, str],
    store: Store,
) -> AttackResult:
    """Read one pair's stages back."""
    paths = [_path(job) for job in jobs]
    why = next((reasons[path] for path in paths if reasons[path]), "")
    if why:
        return _absent(attack, subject.name, "failed", why)
    if not isinstance(attack, Divisible):
        text = (paths[0] / "result.json").read_text(encoding="utf-8")
        return renamed(from_json(text, str(paths[0])), subject.name)
    texts = [(path / "trained.json").read_text(encoding="utf-8") for path in paths]
    trained = [Trained.from_json(json.loads(text)) for text in texts]
    return attack.read_parts(trained, subject, budget, more_is_known(domain))


def _absent(attack: Attack, subject: str, status: Any, reason: str) -> AttackResult:
    """Return a result without numbers that says why."""
    arm = AttackArm(
        name=_name(attack),
        subject=subject,
        access=attack.access,
        rung=attack.rung,
        needs_original=attack.needs_original,
        status=status,
        reason=reason,
    )
    return AttackResult(_name(attack), subject, (ArmResult(arm, ()),), ())


def _with_plant(result: AttackResult, plant: Plant) -> AttackResult:
    """Note in every arm which plant was attacked and how well it hides."""
    facts = {"plant": plant.kind, "known": plant.before, "hidden": plant.after}
    arms = tuple(
        replace(arm, arm=arm.arm.model_copy(update={"facts": {**arm.arm.facts, **facts}}))
        for arm in result.arms
    )
    return replace(result, arms=arms)
