"""`excise inspect`: what one edit did inside, from two models and their data to the record."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from excise.auditor.buckets import bucket_stats
from excise.auditor.budget import budget_of
from excise.auditor.residuals import residuals_of
from excise.core.events import Emit
from excise.data.domain import Domain
from excise.diagnose.inspection import inspect_pair
from excise.fetch.model import open_model
from excise.models.checkpoint import Checkpoint
from excise.models.spec import ModelSpec
from excise.record import Inspection, MethodRun, Record, Sample
from excise.requests.inspection import InspectRun
from excise.requests.lengths import fit_lengths
from excise.run import output
from excise.run.environment import device_of, environment, now
from excise.run.results import Models, check_comparable, describe, model_ref, model_refs, timed

IDENTICAL = "The two models are identical: no tensor differs, so there is nothing to inspect."


def inspect(request: InspectRun, out: Path, *, emit: Emit, command: str = "") -> Record:
    """Measure what an edit did inside a model.

    Both models are held in memory at once; weights are compared from disk. The residual streams by
    kind of token come from the pass that a smoke audit makes, kept beside the output as its stages
    are: whichever of the two runs first makes it.

    Args:
        request: Edited model, original and data.
        out: Output folder.
        emit: Sink of progress events.
        command: The command that makes this again, for the record.

    Returns:
        The record, as written to `out/run.json`.

    Raises:
        UserError: If a model or the data cannot be read, or the two models do not compare.
    """
    began, started = time.monotonic(), now()
    request = fit_lengths(request, emit)
    with output.claim(out, request):
        original = open_model(request.original)
        edited = open_model(ModelSpec(path=request.model))
        check_comparable(original, {request.arm: edited})
        domain = request.domain.build(original)
        rows_as_audited = domain
        domain = replace(domain, sensitive=domain.sensitive or request.sensitive)
        output.write_split(out, request.domain, domain)
        runtime = output.runtime(out, request.dtype, request.device, emit)
        ctx = replace(runtime.context(out, seed=request.seed), emit=emit)
        found, samples = inspect_pair(
            original,
            edited,
            domain,
            ctx,
            name=request.arm,
            rows=request.rows,
            max_length=request.max_length,
            samples=request.samples,
        )
        budget = budget_of("smoke", original.num_parameters)
        held = [residuals_of(m, rows_as_audited, budget, ctx) for m in (original, edited)]
        found = found.model_copy(update={"buckets": bucket_stats(*held)})
        arm = MethodRun(
            name=request.arm,
            method={},
            model=model_ref(request.arm, edited, str(edited.path)),
            changed=tuple(tensor.name for tensor in found.tensors),
        )
        record = _record(request, original, domain, arm, found, samples, command, started)
        record = timed(record, began)
        output.write(out, record, ())
    emit("done", {"out": str(out)})
    return record


def _record(
    request: InspectRun,
    original: Checkpoint,
    domain: Domain,
    arm: MethodRun,
    found: Inspection,
    samples: tuple[Sample, ...],
    command: str,
    started: str,
) -> Record:
    """Put what was found into a record."""
    return Record(
        kind="inspect",
        title=request.title or request.name,
        command=command,
        config=request.model_dump(mode="json"),
        environment=environment(request.dtype, device_of(request.device), started),
        seeds=(request.seed,),
        data=describe(domain),
        models=model_refs(Models(original), request.original.path),
        method_runs=(arm,),
        inspection=found,
        samples=samples,
        sensitive=domain.sensitive,
        notes=(IDENTICAL,) if found.identical else (),
    )
