"""Python first: `remove`, `audit` and `load`; the command only wraps what these use."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from excise import record as schema
from excise.core.context import Context
from excise.core.errors import UserError
from excise.core.stages import disk_full
from excise.data.domain import Domain
from excise.data.spec import DomainSpec
from excise.fetch.original import open_model
from excise.methods.base import Method, Removal
from excise.models.checkpoint import Checkpoint, open_checkpoint
from excise.models.spec import ModelSpec
from excise.record import MethodRun, Record
from excise.requests.recipe import AuditSpec, EvalSpec
from excise.run.environment import device_of
from excise.run.jobs import Setting
from excise.run.results import Models, check_comparable, describe, judged, model_ref, model_refs

Model = str | Path | nn.Module | Checkpoint
"""A folder, hub id, GGUF file, fetched name, model in memory, or a checkpoint."""


def remove(
    model: Model,
    method: Method,
    domain: Domain | DomainSpec,
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
) -> Removal:
    """Remove a capability with one method.

    Args:
        model: What to start from; for a method that trains from scratch, the untrained model.
        method: The method with its hyper-parameters.
        domain: What to remove and what to keep.
        tokenizer: Needed with a model in memory.
        out: Folder to work in; the model lies in `out/model`. A new temporary folder when
            missing. Called again on the folder of an interrupted removal, it goes on.
        seed: Seed of every draw.
        dtype: Compute dtype.
        device: `auto` takes an accelerator where there is one.

    Returns:
        The edited checkpoint, what changed and what it took.

    Raises:
        UserError: If the model or the data cannot be used.
    """
    import torch

    start = _open(model, tokenizer)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="excise-"))
    with disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ctx = Context(folder, seed, torch.device(device_of(device)), getattr(torch, dtype))
    return method.apply(start, _build(domain, start), ctx)


def audit(
    model: Model | Mapping[str, Model],
    *,
    original: Model,
    domain: Domain | DomainSpec,
    oracles: Sequence[Model] = (),
    budget: Literal["smoke", "standard", "strong"] = "smoke",
    change: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    workers: int = 1,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
) -> Record:
    """Attack one edited model or several, and judge how much comes back.

    Args:
        model: The edited model, or several by name.
        original: The model before removal.
        domain: What was removed and what was to stay.
        oracles: Models never taught what was removed.
        budget: How hard to try.
        change: Fields of the budget that differ from the named one.
        tokenizer: Needed with models in memory.
        out: Folder for stages, record and report; a new temporary folder when missing.
        workers: Worker processes, one thread each.
        seed: Seed of every draw.
        dtype: Compute dtype.
        device: `auto` takes an accelerator where there is one.

    Returns:
        The record; with `out` it is also written there, beside a report.

    Raises:
        UserError: If models cannot be read against each other, or the data cannot be used.
    """
    from excise.run import output
    from excise.run.run import attack_models, score_models
    from excise.train.pool import Pool

    named = model if isinstance(model, Mapping) else {"candidate": model}
    arms = {name: _open(one, tokenizer) for name, one in named.items()}
    rails = Models(_open(original, tokenizer), tuple(_open(o, tokenizer) for o in oracles))
    check_comparable(rails.original, {**arms, **{str(i): o for i, o in enumerate(rails.oracles)}})
    built = _build(domain, rails.original)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="excise-"))
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(folder / "stages", dtype, device_of(device))
    spec = AuditSpec(budget=budget, change=dict(change or {}))
    with Pool(workers) as pool:
        scored = score_models(built, rails, arms, EvalSpec(), setting, pool)
        results = attack_models(built, rails, arms, spec, setting, pool, seed)
    record = judged(_unjudged(built, rails, arms, seed), built, rails, arms, scored, results, spec)
    if out is not None:
        output.write(folder, record, [item for one in scored.values() for item in one.items])
    return record


def _unjudged(domain: Domain, rails: Models, arms: Mapping[str, Checkpoint], seed: int) -> Record:
    """Return the record of an audit before its numbers."""
    return Record(
        kind="audit",
        title=f"audit of {', '.join(arms)}",
        data=describe(domain),
        models=model_refs(rails, ""),
        method_runs=tuple(
            MethodRun(name=name, method={}, model=model_ref(name, one))
            for name, one in arms.items()
        ),
        sensitive=domain.sensitive,
        seeds=(seed,),
    )


def load(folder: str | Path) -> Record:
    """Read the record of an output folder.

    Raises:
        UserError: If there is none.
    """
    return schema.load(Path(folder))


def _open(model: Model, tokenizer: Any) -> Checkpoint:
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, nn.Module):
        return open_checkpoint(model, tokenizer=tokenizer)
    return open_model(ModelSpec(path=str(model)))


def _build(domain: Domain | DomainSpec, model: Checkpoint) -> Domain:
    if isinstance(domain, Domain):
        return domain
    if isinstance(domain, DomainSpec):
        return domain.build(model)
    raise UserError(f"domain must be a Domain or a DomainSpec such as ex.Files, not {domain!r}")
