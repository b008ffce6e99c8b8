"""The audit: every attack on every subject, each pair a stage of its own.

A stage is keyed by the attack, the checkpoint's bytes, domain, budget and seed, so that reference
models are shared between variants and studies, equal weights are attacked once, and a killed audit
goes on where it was. Trainings are cut further, one stage each, and two measurements of one
training share it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from excise.auditor.attacks import ATTACKS
from excise.auditor.base import (
    POSITIVE_CONTROL,
    Attack,
    AttackResult,
    Budget,
    Subject,
    VariantResult,
)
from excise.auditor.budget import LARGE
from excise.auditor.controls.control import Plant, plants_for
from excise.auditor.controls.hide import PlantKind
from excise.auditor.jobs import Divisible, Job, PlantJob, name_of, run_job, run_plant
from excise.auditor.results import from_json, renamed
from excise.auditor.scoring import more_is_known
from excise.auditor.tuning import Trained
from excise.core.context import Context
from excise.core.errors import UserError, nearest
from excise.core.stages import Store
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint
from excise.record import AttackVariant
from excise.train.pool import Pool

Results = dict[tuple[str, str], AttackResult]
"""Results by attack and subject."""


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
        Results by attack and subject; the controls' subject is `positive-control`. What could not
        run is there as a variant that says why.
    """
    wanted = chosen_attacks(budget, attacks)
    pairs = [(attack, subject) for attack in wanted for subject in subjects]
    original = next((s.checkpoint for s in subjects if s.name == "original"), None)
    original = original or next((s.original for s in subjects if s.original), None)
    plants: dict[str, Plant] = {}
    if plant and original is not None:
        plants = _plants(wanted, original, domain, budget, ctx, pool, store)
        for attack in wanted:
            found = plants.get(name_of(attack))
            if found is not None and found.hides and found.checkpoint is not None:
                pairs.append((attack, Subject(POSITIVE_CONTROL, found.checkpoint, original)))
    jobs = {pair: _jobs(*pair, domain, budget, ctx, store) for pair in pairs}
    reasons = _run(jobs, ctx, pool)
    results: Results = {}
    for attack, subject in pairs:
        result = _collect(jobs[attack, subject], attack, subject, budget, domain, reasons, store)
        if subject.name == POSITIVE_CONTROL:
            result = _with_plant(result, plants[name_of(attack)])
        results[name_of(attack), subject.name] = result
    for attack in wanted:
        if plant and (name_of(attack), POSITIVE_CONTROL) not in results:
            why = (
                plants[name_of(attack)].reason if name_of(attack) in plants else _no_plant(original)
            )
            results[name_of(attack), POSITIVE_CONTROL] = _absent(
                attack, POSITIVE_CONTROL, "missing", why
            )
    return results


def _no_plant(original: Checkpoint | None) -> str:
    """Say why an attack has no control."""
    if original is None:
        return "there is no original to plant a control in"
    return "no planted control is known for this attack"


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
    higher = more_is_known(domain)
    large = original.num_parameters >= LARGE
    names = map(name_of, attacks)
    needed = {name: plants_for(name, higher=higher, large=large) for name in names}
    needed = {name: kinds for name, kinds in needed.items() if kinds}
    kinds = list(dict.fromkeys(needed.values()))
    jobs = [
        PlantJob(store.root, k, original, domain, budget, ctx.seed, str(ctx.device), ctx.dtype)
        for k in kinds
    ]

    # Where memory is short, they take turns: all but a gate hold gradients.
    turns = [i % budget.together if budget.together else None for i in range(len(jobs))]
    made: dict[tuple[PlantKind, ...], Plant] = {}
    for job, plant in zip(jobs, pool.map(run_plant, jobs, turns=turns), strict=True):
        made[job.kinds] = plant
        told = {"kind": plant.kind, "hides": plant.hides, "reason": plant.reason}
        ctx.emit("plant", told)
    return {name: made[which] for name, which in needed.items()}


def _jobs(
    attack: Attack, subject: Subject, domain: Domain, budget: Budget, ctx: Context, store: Store
) -> tuple[Job, ...]:
    """Return the jobs of one attack on one subject."""
    whole = Job(store.root, attack, subject, domain, budget, ctx.seed, str(ctx.device), ctx.dtype)
    if not isinstance(attack, Divisible):
        return (whole,)
    # Fresh units ask whether the budget teaches; models that people use answer that.
    parts = [p for p in attack.parts(budget) if p.on != "fresh" or subject.name != POSITIVE_CONTROL]
    return tuple(replace(whole, part=part) for part in parts)


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
        facts = {"attack": name_of(job.attack), "subject": job.subject.name}
        ctx.emit("attack", {**facts, "done": done, "of": len(ordered), "reason": reason})

    found = [stages[path] for path in ordered]
    reasons = pool.map(run_job, found, told, turns=turns_of(found))
    return dict(zip(ordered, reasons, strict=True))


def turns_of(jobs: Sequence[Job]) -> list[int | None]:
    """Return whose turn each job waits for: heavy ones take as many as may run at once.

    What holds optimizer states is heavy: attacks on weights, unless they say they are light.
    """
    turns: list[int | None] = []
    count = 0
    for job in jobs:
        most = job.budget.together
        if not most or job.attack.light or job.attack.access != "weights":
            turns.append(None)
            continue
        turns.append(count % most)
        count += 1
    return turns


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
    entry = AttackVariant(
        name=name_of(attack),
        subject=subject,
        access=attack.access,
        level=attack.level,
        needs_original=attack.needs_original,
        status=status,
        reason=reason,
    )
    return AttackResult(name_of(attack), subject, (VariantResult(entry, ()),), ())


def _with_plant(result: AttackResult, plant: Plant) -> AttackResult:
    """Note in every variant which plant was attacked and how well it hides."""
    facts = {"positive_control": plant.kind, "known": plant.before, "hidden": plant.after}
    variants = tuple(
        replace(
            variant,
            entry=variant.entry.model_copy(update={"facts": {**variant.entry.facts, **facts}}),
        )
        for variant in result.variants
    )
    return replace(result, variants=variants)
