"""The straight line: recipe -> domain -> stages -> checkpoint -> attacks -> record -> report.

A reader needs nothing else to see the whole; every step is one function below or a job.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from excise.auditor.base import Subject
from excise.auditor.engine import Results, attack_all
from excise.core.events import Emit
from excise.core.stages import Store
from excise.data.domain import Domain
from excise.fetch.original import open_model, tokenizer_for
from excise.methods.base import Method, Removal
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import ModelSpec
from excise.record import Item, MethodRun, Record
from excise.requests.audit import AuditRun
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe, budget_for, starts_from
from excise.run import output
from excise.run.environment import device_of
from excise.run.jobs import (
    InitJob,
    RemovalJob,
    Scored,
    ScoreJob,
    Setting,
    make_init,
    make_removal,
    make_scores,
)
from excise.run.results import (
    Models,
    check_comparable,
    items_of,
    judged,
    method_run,
    model_ref,
    new_record,
    oracle_names,
    timed,
)
from excise.train.pool import Pool

ARMS = 500
"""Scratch arms use the recipe's seed plus this: another draw than the original and the oracles."""


def run(
    recipe: Recipe,
    out: Path,
    *,
    workers: int,
    emit: Emit,
    command: str = "",
    kind: Literal["run", "remove"] = "run",
) -> Record:
    """Run a recipe: make the models, remove, attack, judge, write.

    Args:
        recipe: Everything there is to choose.
        out: Output folder; an interrupted run of the same recipe goes on there.
        workers: Worker processes, one thread each.
        emit: Sink of progress events.
        command: The command that makes this again, for the record.
        kind: Which verb this is.

    Returns:
        The record, as written to `out/run.json`.
    """
    began = time.monotonic()
    setting = Setting(output.store_of(out), recipe.dtype, device_of(recipe.device))
    with output.claim(out, recipe), Pool(workers or None, emit=emit) as pool:
        domain, models = prepare(recipe, setting, pool)
        output.write_split(out, recipe.domain, domain)
        removals = remove_arms(recipe, domain, models, setting, pool)
        if recipe.refit:
            removals = refit(recipe, models, removals, setting, pool, out)
        record = new_record(recipe, kind, command, domain, models, setting).model_copy(
            update={
                "method_runs": tuple(
                    method_run(name, recipe.arms[name], removal, recipe.seed)
                    for name, removal in removals.items()
                )
            }
        )
        arms = {name: removal.checkpoint for name, removal in removals.items()}
        null = next((n for n, m in recipe.arms.items() if isinstance(m, Filtering)), "")
        record, items = examine(record, recipe, domain, models, arms, setting, pool, null)
        record = timed(record, began, pool.peak_bytes)
        output.write_models(out, record, arms, models.original.path)
        output.write(out, record, items)
    emit("done", {"out": str(out)})
    return record


def audit(request: AuditRun, out: Path, *, workers: int, emit: Emit, command: str = "") -> Record:
    """Attack models that exist, whoever made them.

    Args:
        request: Candidates, rails, data and budget.
        out: Output folder; the only place that is written to.
        workers: Worker processes, one thread each.
        emit: Sink of progress events.
        command: The command that makes this again, for the record.

    Returns:
        The record, as written to `out/run.json`.
    """
    began = time.monotonic()
    setting = Setting(output.store_of(out), request.dtype, device_of(request.device))
    with output.claim(out, request), Pool(workers or None, emit=emit) as pool:
        original = open_model(request.original)
        arms = {name: open_model(ModelSpec(path=path)) for name, path in request.candidates.items()}
        oracles = tuple(open_model(ModelSpec(path=path)) for path in request.oracles)
        check_comparable(original, {**arms, **oracle_names(oracles)})
        models = Models(original, oracles)
        domain = request.domain.build(original)
        output.write_split(out, request.domain, domain)
        record = new_record(request, "audit", command, domain, models, setting)
        record = record.model_copy(
            update={
                "method_runs": tuple(
                    MethodRun(name=name, method={}, model=model_ref(name, model, str(model.path)))
                    for name, model in arms.items()
                )
            }
        )
        record, items = examine(record, request, domain, models, arms, setting, pool, "")
        record = timed(record, began, pool.peak_bytes)
        output.write(out, record, items)
    emit("done", {"out": str(out)})
    return record


def examine(
    record: Record,
    asked: Recipe | AuditRun,
    domain: Domain,
    models: Models,
    arms: Mapping[str, Checkpoint],
    setting: Setting,
    pool: Pool,
    null: str,
) -> tuple[Record, list[Item]]:
    """Score every model, attack it, judge it, and put all of it into the record."""
    scored = score_models(domain, models, arms, asked.evaluate, setting, pool)
    results = attack_models(domain, models, arms, asked.audit, setting, pool, asked.seed)
    record = judged(record, domain, models, arms, scored, results, asked.audit, null)
    return record, items_of(scored)


def prepare(recipe: Recipe, setting: Setting, pool: Pool) -> tuple[Domain, Models]:
    """Build the domain and make or open the original and the oracles."""
    if recipe.model.scratch is None:
        original = open_model(recipe.model)
        return recipe.domain.build(original), Models(original)
    domain = recipe.domain.build(None)
    tokenizer = tokenizer_for(recipe.domain)
    seeds = [recipe.seed, *(recipe.seed + 1000 + i for i in range(recipe.oracles))]
    inits = pool.map(
        make_init,
        [
            InitJob(setting, recipe.model.scratch, tokenizer, seed)
            for seed in (*seeds, recipe.seed + ARMS)
        ],
    )
    methods: list[Method] = [Plain(pretrain=recipe.pretrain)]
    methods += [Filtering(pretrain=recipe.pretrain)] * recipe.oracles
    made = pool.map(
        make_removal,
        [
            RemovalJob(setting, method, init, domain, seed)
            for method, init, seed in zip(methods, inits[:-1], seeds, strict=True)
        ],
    )
    original, *oracles = [removal.checkpoint for removal in made]
    return domain, Models(original, tuple(oracles), inits[-1])


def remove_arms(
    recipe: Recipe, domain: Domain, models: Models, setting: Setting, pool: Pool
) -> dict[str, Removal]:
    """Apply every arm's method: scratch methods to the untrained model, others to the original."""
    jobs = []
    for method in recipe.arms.values():
        scratch = starts_from(method) == "scratch"
        if scratch and getattr(method, "pretrain", recipe.pretrain) is None:
            method = method.model_copy(update={"pretrain": recipe.pretrain})
        start = models.init if scratch else models.original
        assert start is not None
        seed = recipe.seed + (ARMS if scratch else 0)
        jobs.append(RemovalJob(setting, method, start, domain, seed))
    return dict(zip(recipe.arms, pool.map(make_removal, jobs), strict=True))


def refit(
    recipe: Recipe,
    models: Models,
    removals: Mapping[str, Removal],
    setting: Setting,
    pool: Pool,
    out: Path,
) -> dict[str, Removal]:
    """Repeat every removal on all forget rows; the audited models stay those of the split.

    The refitted models lie under `refit/`; each arm's extras say which bytes they are.
    """
    spec = recipe.domain.model_copy(update={"refit": True})
    again = remove_arms(recipe, spec.build(models.original), models, setting, pool)
    output.copy_models(out / "refit", {n: r.checkpoint for n, r in again.items()})
    return {
        name: replace(
            removal,
            extras={**removal.extras, "refit": {"fingerprint": again[name].checkpoint.fingerprint}},
        )
        for name, removal in removals.items()
    }


def score_models(
    domain: Domain,
    models: Models,
    arms: Mapping[str, Checkpoint],
    evaluate: EvalSpec,
    setting: Setting,
    pool: Pool,
) -> dict[str, Scored]:
    """Score the original, the oracles and every arm."""
    named = {"original": models.original, **oracle_names(models.oracles), **arms}
    jobs = [ScoreJob(setting, name, model, domain, evaluate) for name, model in named.items()]
    return dict(zip(named, pool.map(make_scores, jobs), strict=True))


def attack_models(
    domain: Domain,
    models: Models,
    arms: Mapping[str, Checkpoint],
    audit: AuditSpec,
    setting: Setting,
    pool: Pool,
    seed: int,
) -> Results:
    """Run every attack on every arm and on the rails; nothing when the budget is `none`."""
    if audit.budget == "none":
        return {}
    named = {**arms, "original": models.original, **oracle_names(models.oracles)}
    subjects = [Subject(name, model, models.original) for name, model in named.items()]
    budget = budget_for(audit, models.original.num_parameters)
    ctx = setting.context(setting.store, seed)
    store = Store(setting.store, pool.emit)
    ctx = replace(ctx, emit=pool.emit)
    return attack_all(subjects, domain, budget, ctx, pool, store, attacks=audit.attacks)
