"""Python first: `remove`, `audit` and `load`; the command goes through the same stages."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import SerializeAsAny
from torch import nn

from excise.core.config import Config
from excise.core.disk import disk_full, expand
from excise.core.errors import UserError
from excise.core.events import silent
from excise.data.domain import Domain
from excise.data.spec import DomainSpec
from excise.fetch.model import open_model
from excise.methods.base import ApplyMethod, Method, Removal
from excise.models.checkpoint import Checkpoint, open_checkpoint
from excise.models.endpoint import Endpoint
from excise.models.spec import ModelSpec
from excise.record import Record
from excise.record import load as load_record
from excise.requests.lengths import check_lengths
from excise.requests.recipe import (
    NO_MODEL,
    AuditSpec,
    EvalSpec,
    Keep,
    check_names,
    starts_from,
)
from excise.run import output
from excise.run.devices import pool_on
from excise.run.environment import environment, now
from excise.run.hosted import HostedAudit, examine_hosted, references_of
from excise.run.results import (
    Models,
    describe,
    method_run,
    model_refs,
    reference_names,
    timed,
)
from excise.run.steps import audit_models
from excise.train.pool import Processes

ModelSource = str | Path | nn.Module | Checkpoint
"""A folder, hub id, GGUF file, fetched name, model in memory, or a checkpoint."""


def remove(
    model: ModelSource,
    method: Method,
    domain: Domain | DomainSpec,
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    keep: Keep = "best",
) -> Removal:
    """Remove a capability with one method.

    Args:
        model: What to start from; for a method that trains from scratch, the untrained model.
        method: The method with its hyper-parameters.
        domain: What to remove and what to keep.
        tokenizer: Needed with a model in memory.
        out: Folder to write to; the model lies in `out/model`, with its card, beside the record
            and the split that `excise audit out` reads; a LoRA adapter that the method keeps in
            `out/adapter`. A new temporary folder when missing. The removal itself is a stage
            beside `out`: called again with the same arguments it is found or resumes.
        seed: Seed of everything random.
        dtype: Compute dtype.
        device: `auto` takes an accelerator where there is one.
        keep: What is left in `out`: the model; its changed tensors alone, in `out/delta`, from
            which `excise export` rebuilds it; `all` of both and of the steps that a stop rule
            kept; or none, and the checkpoint is that of the stage.

    Returns:
        The edited checkpoint, what changed and what it took.

    Raises:
        UserError: If the model or the data cannot be used, or `out` holds another removal.
    """
    began, started = time.monotonic(), now()
    start = _open(model, tokenizer)
    method = check_lengths(method, start.config)
    built = _build(domain, start)
    folder = _folder(out)
    name = str(getattr(method, "name", type(method).__name__))
    if keep == "delta" and starts_from(method) == "scratch":
        raise UserError(f"keep: '{name}' trains from scratch and changes no original; use 'best'")
    request = _Removal(
        keep=keep,
        method=method,
        original=start.fingerprint,
        tokenizer=start.tokenizer_fingerprint,
        domain=built.fingerprint,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    with disk_full(folder), output.claim(folder, request), Processes(1) as pool:
        runtime = output.runtime(folder, dtype, device)
        removal = pool.map(runtime.run, [ApplyMethod(method, start, built, seed)])[0]
        bases = {} if starts_from(method) == "scratch" else {name: start}
        edits = output.copy_edits(folder, {name: removal}, bases, keep)
        record = Record(
            kind="remove",
            title=f"{name} on {start.path.name}",
            config=_told(name, request, domain, start),
            environment=environment(dtype, runtime.device, started),
            seeds=(seed,),
            data=describe(built),
            models=model_refs(Models(start), ""),
            method_runs=(method_run(name, method, removal, seed, edits.get(name, {})),),
            sensitive=built.sensitive,
        )
        edited = {name: removal.checkpoint}
        record = output.write_models(folder, timed(record, began), edited, {}, start.path, keep)
        if isinstance(domain, DomainSpec):
            output.write_split(folder, domain, built)
        output.write(folder, record, ())
    if keep in NO_MODEL:
        return removal
    checkpoint = dataclasses.replace(removal.checkpoint, path=folder / "model")
    return dataclasses.replace(removal, checkpoint=checkpoint)


class _Removal(Config):
    """What `remove` was asked for; an output folder is held by one."""

    keep: Keep
    method: SerializeAsAny[Method]
    original: str
    tokenizer: str
    domain: str
    seed: int
    dtype: str
    device: str


def _told(
    name: str, request: _Removal, domain: Domain | DomainSpec, start: Checkpoint
) -> dict[str, Any]:
    """Return what the record says was asked for, in the words of a recipe.

    A domain in memory, which nothing can read again, is None.
    """
    return {
        "domain": domain.model_dump(mode="json") if isinstance(domain, DomainSpec) else None,
        "original": {"path": str(start.path), "tokenizer": str(start.tokenizer_path or "")},
        "arms": {name: request.method.model_dump(mode="json")},
        **request.model_dump(include={"seed", "dtype", "device", "keep"}),
    }


def audit(
    model: ModelSource | Mapping[str, ModelSource],
    *,
    original: ModelSource,
    domain: Domain | DomainSpec,
    oracles: Sequence[ModelSource] = (),
    proxies: Sequence[ModelSource] = (),
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
        domain: The forget set and the retain set.
        oracles: Models never taught what was removed.
        proxies: Models that stand in for oracles: an early checkpoint, a filtered sibling.
        budget: How hard to try.
        change: Fields of the budget that differ from the named one.
        tokenizer: Needed with models in memory.
        out: Folder for record and report, with the stages beside it; a new temporary one when
            missing. Called again with the same arguments, it finds or resumes what was attacked.
        workers: Worker processes, one thread each; each has an accelerator of its own where
            there are several.
        seed: Seed of everything random.
        dtype: Compute dtype.
        device: `auto` takes an accelerator where there is one.

    Returns:
        The record; with `out` it is also written there, beside a report.

    Raises:
        UserError: If models cannot be read against each other, the data cannot be used, or `out`
            holds another audit or a removal.
    """
    named = model if isinstance(model, Mapping) else {"candidate": model}
    check_names(named)
    candidates = {name: _open(one, tokenizer) for name, one in named.items()}
    models = Models(
        _open(original, tokenizer),
        tuple(_open(one, tokenizer) for one in oracles),
        tuple(_open(one, tokenizer) for one in proxies),
    )
    built = _build(domain, models.original)
    folder = _folder(out)
    asked = _Audit(
        audit=AuditSpec(budget=budget, change=dict(change or {})),
        seed=seed,
        models={
            name: (each.fingerprint, each.tokenizer_fingerprint)
            for name, each in {**candidates, **reference_names(models)}.items()
        },
        domain=built.fingerprint,
        dtype=dtype,
        device=device,
    )
    asked = check_lengths(asked, models.original.config)
    started = now()
    with disk_full(folder), output.claim(folder, asked), pool_on(device, workers, silent) as pool:
        runtime = output.runtime(folder, dtype, device)
        record = Record(
            kind="audit",
            title=f"audit of {', '.join(candidates)}",
            config=asked.model_dump(mode="json", include=ASKED),
            environment=environment(dtype, runtime.device, started),
            data=describe(built),
            models=model_refs(models, ""),
            sensitive=built.sensitive,
            seeds=(seed,),
        )
        record, items = audit_models(record, asked, built, models, candidates, runtime, pool)
        if out is not None:
            output.write(folder, record, items)
    return record


def audit_endpoint(
    model: str | Mapping[str, str],
    *,
    endpoint: Endpoint,
    original: str,
    domain: Domain | DomainSpec,
    oracles: Sequence[str] = (),
    proxies: Sequence[str] = (),
    budget: Literal["smoke", "standard", "strong"] = "smoke",
    change: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Record:
    """Ask models that only prompts reach, and judge how much comes back: levels D0 and D1.

    Args:
        model: Name of the edited model at the endpoint, or several by their names in the record.
        endpoint: Where all models are served. The key is read from `EXCISE_ENDPOINT_KEY`.
        original: Name of the model before removal.
        domain: The forget set and the retain set; test and dev rows have a prompt and an answer.
        oracles: Names of models never taught what was removed.
        proxies: Names of models that stand in for oracles.
        budget: How hard to try.
        change: Fields of the budget that differ from the named one.
        out: Folder for record and report, with the answers beside it; a new temporary one when
            missing. Called again with the same arguments, it asks only what was not answered.
        seed: Seed of everything random.

    Returns:
        The record; with `out` it is also written there, beside a report.

    Raises:
        UserError: If the endpoint does not answer, the data has no questions, or `out` holds
            another audit or a removal.
    """
    named = model if isinstance(model, Mapping) else {"candidate": model}
    check_names(named)
    references = references_of(original, tuple(oracles), tuple(proxies))
    if not isinstance(domain, Domain | DomainSpec):
        raise _no_domain(domain)
    built = domain.build(None) if isinstance(domain, DomainSpec) else domain
    spec = AuditSpec(budget=budget, change=dict(change or {}))
    about = HostedAudit(named, references, built, spec, EvalSpec(), seed)
    folder, began, started = _folder(out), time.monotonic(), now()
    asked = _HostedAudit(
        audit=spec,
        seed=seed,
        models={**named, **references},
        domain=built.fingerprint,
        endpoint=endpoint,
    )
    with disk_full(folder), output.claim(folder, asked):
        record, items = examine_hosted(about, endpoint, folder, silent)
        told = {
            "title": f"audit of {', '.join(named)}",
            "config": asked.model_dump(mode="json", include=ASKED),
            "environment": environment("", "endpoint", started),
        }
        record = timed(record.model_copy(update=told), began)
        if out is not None:
            output.write(folder, record, items)
    return record


ASKED = {"audit", "evaluate", "endpoint", "seed", "dtype", "device"}
"""What the record of an audit says was asked for; models and data it names in its own words."""


class _HostedAudit(Config):
    """What `audit_endpoint` was asked for; an output folder is held by one."""

    audit: AuditSpec
    seed: int
    models: dict[str, str]
    domain: str
    endpoint: Endpoint


class _Audit(Config):
    """What `audit` was asked for; an output folder is held by one."""

    audit: AuditSpec
    evaluate: EvalSpec = EvalSpec()
    seed: int
    models: dict[str, tuple[str, str]]
    domain: str
    dtype: str
    device: str


def load(folder: str | Path) -> Record | Checkpoint:
    """Read the record of an output folder, or open the model in a model's folder.

    Raises:
        UserError: If the folder holds neither.
    """
    path = expand(folder)
    if (path / "config.json").is_file() and not (path / "run.json").is_file():
        return open_checkpoint(path)
    return load_record(path)


def _folder(out: str | Path | None) -> Path:
    """Return the folder to write to; a new temporary one, with its own store, when missing."""
    if out is None:
        return Path(tempfile.mkdtemp(prefix="excise-")) / "out"
    return Path(out)


def _open(model: ModelSource, tokenizer: Any) -> Checkpoint:
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
    raise _no_domain(domain)


def _no_domain(domain: object) -> UserError:
    return UserError(f"domain must be a Domain or a DomainSpec such as ex.Files, not {domain!r}")
