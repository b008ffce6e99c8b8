"""From what jobs returned to the record: models by their bytes, arms, samples, verdicts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from excise.auditor.base import Results
from excise.auditor.engine import lengths
from excise.auditor.verdict import judge_all
from excise.core.errors import UserError
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.methods.base import Method, Removal
from excise.models.checkpoint import Checkpoint
from excise.record import Item, MethodRun, ModelRef, Record, Sample
from excise.record.measured import PROXY
from excise.requests.audit import AuditRun
from excise.requests.recipe import AuditSpec, Recipe, budget_for
from excise.run.environment import environment, peak_memory
from excise.run.stages import Scored


@dataclass(frozen=True)
class Models:
    """The models that arms are read against.

    Attributes:
        original: The model before removal.
        oracles: Models trained without the forget units, each from a seed of its own.
        proxies: Models that stand in for those: an early checkpoint, a filtered sibling.
        init: For recipes that train from scratch, the untrained model that methods start from.
        tokens: Tokens the original was trained on, 0 where it was not trained here.
    """

    original: Checkpoint
    oracles: tuple[Checkpoint, ...] = ()
    proxies: tuple[Checkpoint, ...] = ()
    init: Checkpoint | None = None
    tokens: int = 0


def oracle_names(models: Models) -> dict[str, Checkpoint]:
    """Return the oracles and their proxies by name."""
    oracles = {f"oracle-{i}": model for i, model in enumerate(models.oracles)}
    return oracles | {f"{PROXY}-{i}": model for i, model in enumerate(models.proxies)}


def reference_names(models: Models) -> dict[str, Checkpoint]:
    """Return the reference models by name: the original first, then the oracles."""
    return {"original": models.original, **oracle_names(models)}


def new_record(
    asked: Recipe | AuditRun,
    kind: Literal["run", "remove", "audit"],
    command: str,
    domain: Domain,
    models: Models,
    runtime: Runtime,
    started: str,
) -> Record:
    """Return a record that says what was asked, where, and about what."""
    source = asked.original.path if isinstance(asked, AuditRun) else asked.model.path
    canary = isinstance(asked, AuditRun) and asked.canary is not None
    return Record(
        kind=kind,
        title=asked.title or asked.name,
        command=command,
        config=asked.model_dump(mode="json"),
        environment=environment(asked.dtype, runtime.device, started, runtime.world),
        seeds=(asked.seed,),
        data=describe(domain),
        models=model_refs(models, source),
        sensitive=domain.sensitive,
        notes=(ABOUT_CANARIES,) if canary else (),
    )


ABOUT_CANARIES = (
    "A canary audit: made-up facts were taught to the model and removed again. It says how deep "
    "this method, at these settings, cuts on this model, and nothing about your own forget set."
)
"""What the record of a canary audit says of itself."""


def timed(record: Record, began: float, workers: int = 0) -> Record:
    """Add how long it took and how much memory one process had, `workers` bytes or this one."""
    taken = {"seconds": time.monotonic() - began, "peak_memory_bytes": peak_memory(workers)}
    return record.model_copy(update=taken)


def describe(domain: Domain) -> dict[str, Any]:
    """Return what the record says of the data: counts by role, claim, exposure, notes."""
    return {
        "name": domain.name,
        "fingerprint": domain.fingerprint,
        "claim": domain.claim,
        "exposure": domain.exposure,
        "verbatim": domain.verbatim,
        "metrics": list(domain.metrics),
        "retain_metrics": list(domain.retain_metrics),
        "rows": {role: len(rows) for role, rows in domain.roles()},
        "units": {role: len({row.unit for row in rows}) for role, rows in domain.roles()},
        "notes": list(domain.notes),
    }


def check_comparable(original: Checkpoint, others: Mapping[str, Checkpoint]) -> None:
    """Refuse models that cannot be read against each other.

    Raises:
        UserError: If an architecture, a shape or a tokenizer differs from the original's.
    """
    shapes = {name: tuple(e.shape) for name, e in original.entries.items()}
    for name, model in others.items():
        theirs = {key: tuple(e.shape) for key, e in model.entries.items()}
        common = set(shapes) & set(theirs)
        if model.config.model_type != original.config.model_type or any(
            shapes[key] != theirs[key] for key in common
        ):
            raise UserError(
                f"{name} ({model.path}) is not of the original's architecture and shape; give the "
                "model it was made from as --original"
            )
        if model.tokenizer().get_vocab() != original.tokenizer().get_vocab():
            raise UserError(
                f"{name} ({model.path}) has another vocabulary than the original; scores would "
                "not compare"
            )


def refuse_equal(models: Models, candidates: Mapping[str, Checkpoint]) -> None:
    """Refuse a candidate that is one of its own reference models.

    Raises:
        UserError: If weights and configuration of two are equal.
    """
    for name, model in candidates.items():
        for reference, other in reference_names(models).items():
            if model.fingerprint == other.fingerprint:
                raise UserError(
                    f"'{name}' and the reference model '{reference}' are the same model, byte for "
                    "byte; give the audit a candidate that differs from what it is compared with"
                )


def items_of(scored: Mapping[str, Scored]) -> list[Item]:
    """Return the scores of all items of all models."""
    return [item for one in scored.values() for item in one.items]


def model_refs(models: Models, source: str) -> tuple[ModelRef, ...]:
    """Return the reference models by their bytes."""
    named = reference_names(models).items()
    return tuple(model_ref(name, model, source) for name, model in named)


def model_ref(name: str, model: Checkpoint, source: str = "") -> ModelRef:
    """Return one model by its bytes."""
    return ModelRef(
        name=name,
        path=str(model.path),
        fingerprint=model.fingerprint,
        files=model.file_sums,
        tokenizer=model.tokenizer_fingerprint,
        source=source,
        parameters=model.num_parameters,
    )


def method_run(
    name: str,
    method: Method,
    removal: Removal,
    seed: int,
    edits: Mapping[str, Any],
    refit: Checkpoint | None = None,
) -> MethodRun:
    """Return what the record says of one removal.

    Args:
        name: Its name.
        method: What was applied.
        removal: What it returned.
        seed: Its seed.
        edits: What `output.copy_edits` says of the adapter or delta that it keeps.
        refit: Its repetition on all forget rows.
    """
    extras = {key: value for key, value in removal.extras.items() if key != "files"}
    extras |= edits
    return MethodRun(
        name=name,
        method=method.model_dump(mode="json"),
        model=model_ref(name, removal.checkpoint),
        seed=seed,
        changed=removal.changed,
        cost=asdict(removal.cost),
        extras=extras,
        history=tuple(dict(row) for row in removal.history),
        refit=None if refit is None else model_ref(name, refit),
    )


def audited_arm(name: str, model: Checkpoint) -> MethodRun:
    """Return what the record says of a model that somebody made."""
    return MethodRun(name=name, method={}, model=model_ref(name, model, str(model.path)))


def samples_of(scored: Mapping[str, Scored]) -> tuple[Sample, ...]:
    """Put the continuations of all models side by side."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, one in scored.items():
        for where, prompt, expected, output_text in one.samples:
            rows.setdefault((where, prompt, expected), {})[name] = output_text
    return tuple(
        Sample(set=where, prompt=prompt, expected=expected, outputs=outputs)
        for (where, prompt, expected), outputs in rows.items()
    )


def judged(
    record: Record,
    domain: Domain,
    models: Models,
    arms: Mapping[str, Checkpoint],
    scored: Mapping[str, Scored],
    results: Results,
    audit: AuditSpec,
    null_arm: str = "",
) -> Record:
    """Add scores, attacks, verdicts and samples to a record."""
    scores = tuple(score for one in scored.values() for score in one.scores)
    found: dict[str, object] = {"scores": scores, "samples": samples_of(scored)}
    if results:
        budget = budget_for(audit, models.original.num_parameters)
        results, verdicts = judge_all(
            list(arms),
            results,
            domain,
            budget,
            scores=scores,
            items=items_of(scored),
            vocabulary=models.original.config.vocab_size,
            null_run=null_arm,
        )
        attacks = tuple(variant.entry for result in results.values() for variant in result.variants)
        found |= {"attacks": attacks, "verdicts": verdicts}
        notes = [*record.data.get("notes", ()), *lengths(results, budget)]
        found["data"] = {**record.data, "notes": notes}
    return record.model_copy(update=found)
