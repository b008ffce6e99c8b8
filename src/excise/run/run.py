"""The straight line: recipe -> domain -> stages -> checkpoint -> attacks -> record -> report.

A reader needs nothing else to see the whole; its steps are functions of `steps`,
`results` and `output`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from excise.fetch.model import open_model
from excise.methods.pretraining.filtering import makes_oracle
from excise.models.spec import ModelSpec
from excise.record import MethodRun, Record
from excise.requests.audit import AuditRun
from excise.requests.lengths import fit_lengths
from excise.requests.processes import check_batches, check_fsdp, check_packages
from excise.requests.recipe import Recipe, starts_from
from excise.run import output
from excise.run.canary import remove_canaries
from excise.run.environment import now
from excise.run.hosted import audit_hosted
from excise.run.results import Models, method_run, new_record, timed
from excise.run.steps import audit_models, examine, open_edited, prepare, refit, remove_all
from excise.train.pool import Pool


def run(
    recipe: Recipe,
    out: Path,
    pool: Pool,
    *,
    command: str = "",
    kind: Literal["run", "remove"] = "run",
) -> Record:
    """Run a recipe: make the models, remove, attack, judge, write.

    Args:
        recipe: Everything there is to choose.
        out: Output folder; an interrupted run of the same recipe resumes there.
        pool: Who does the jobs, and where events go; opened here.
        command: The command that makes this again, for the record.
        kind: Which verb this is.

    Returns:
        The record, as written to `out/run.json`.
    """
    began, started, emit = time.monotonic(), now(), pool.emit
    recipe = fit_lengths(recipe, emit)
    check_batches(recipe, pool.world)
    check_packages(recipe)
    check_fsdp(recipe, pool.world)
    with output.claim(out, recipe), pool:
        runtime = output.runtime(out, recipe.dtype, recipe.device, emit)
        runtime = replace(runtime, world=pool.world, fsdp=recipe.fsdp)
        emit("phase", {"text": "reading the model and the data"})
        domain, models = prepare(recipe, runtime, pool)
        output.note_changes(out, recipe.domain, models.original, emit)
        output.write_split(out, recipe.domain, domain)
        emit("phase", {"text": "looking for work that is done already"})
        removals = remove_all(recipe, domain, models, runtime, pool)
        edited = {name: removal.checkpoint for name, removal in removals.items()}
        bases = {n: models.original for n, m in recipe.arms.items() if starts_from(m) != "scratch"}
        edits = output.copy_edits(out, removals, bases, recipe.keep)
        refitted = refit(recipe, models, runtime, pool) if recipe.refit else {}
        output.copy_edits(out / "refit", refitted, bases, recipe.keep)
        again = {name: removal.checkpoint for name, removal in refitted.items()}
        record = new_record(recipe, kind, command, domain, models, runtime, started)
        arms = tuple(
            method_run(n, recipe.arms[n], r, recipe.seed, edits.get(n, {}), again.get(n))
            for n, r in removals.items()
        )
        record = record.model_copy(update={"method_runs": arms})
        # The gap of the model made by data filtering is the audit's measured null.
        null = next((n for n, m in recipe.arms.items() if makes_oracle(m, domain)), "")
        record, items = examine(record, recipe, domain, models, edited, runtime, pool, null)
        emit("phase", {"text": "writing models and report"})
        record = output.write_models(
            out, timed(record, began, pool.peak_bytes), edited, again, models.original.path,
            recipe.keep,
        )  # fmt: skip
        output.write(out, record, items)
    emit("done", {"out": str(out)})
    return record


def audit(
    request: AuditRun,
    out: Path,
    pool: Pool,
    *,
    command: str = "",
) -> Record:
    """Attack models that exist, whoever made them.

    Args:
        request: Candidates, reference models, data and budget.
        out: Output folder; the only place that is written to.
        pool: Who does the jobs, and where events go; opened here.
        command: The command that makes this again, for the record.

    Returns:
        The record, as written to `out/run.json`.
    """
    if request.endpoint is not None:
        return audit_hosted(request, out, emit=pool.emit, command=command)
    began, started, emit = time.monotonic(), now(), pool.emit
    request = fit_lengths(request, emit)
    check_batches(request, pool.world)
    check_packages(request)
    with output.claim(out, request), pool:
        runtime = output.runtime(out, request.dtype, request.device, emit)
        runtime = replace(runtime, world=pool.world)
        emit("phase", {"text": "reading the models and the data"})
        original = open_model(request.original)
        oracles, proxies = (
            tuple(open_model(ModelSpec(path=path)) for path in paths)
            for paths in (request.oracles, request.proxies)
        )
        models = Models(original, oracles, proxies)
        named = {n: open_edited(p, original, runtime) for n, p in request.candidates.items()}
        domain = request.build(models.original)
        if request.canary is None:  # whose recorded original is another: the one that was taught
            output.note_changes(out, request.domain, models.original, emit)
        output.write_split(out, request.domain, domain)
        emit("phase", {"text": "looking for work that is done already"})
        arms: tuple[MethodRun, ...] = ()
        if request.canary is not None:
            start = models.original
            models, named, arms = remove_canaries(request, domain, start, runtime, pool)
        record = new_record(request, "audit", command, domain, models, runtime, started)
        record, items = audit_models(record, request, domain, models, named, runtime, pool, arms)
        record = timed(record, began, pool.peak_bytes)
        output.write(out, record, items)
    emit("done", {"out": str(out)})
    return record
