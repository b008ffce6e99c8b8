"""The straight line: recipe -> domain -> stages -> checkpoint -> attacks -> record -> report.

A reader needs nothing else to see the whole; every step is one function below or a job.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from excise import output
from excise.audit.audit import Results, attack_all
from excise.audit.base import Subject
from excise.audit.depth.verdict import judge_all
from excise.domains.base import Domain
from excise.environment import device_of, environment, peak_memory
from excise.events import Emit
from excise.jobs import (
    InitJob,
    RemovalJob,
    Scored,
    ScoreJob,
    Setting,
    make_init,
    make_removal,
    make_scores,
)
from excise.methods.base import Method, Removal
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.models.checkpoint import Checkpoint
from excise.models.original import open_model, tokenizer_for
from excise.record import ArmRecord, Item, ModelRef, Record, Sample
from excise.recipes.base import AuditSpec, EvalSpec, Recipe, budget_for, starts_from
from excise.stages import Store
from excise.train.grid import Pool


ARMS = 500
"""Scratch arms use the recipe's seed plus this: another draw than the original and the oracles."""


@dataclass(frozen=True)
class Models:
    """The models that arms are read against.

    Attributes:
        original: The model before removal.
        oracles: Models trained without the forget units, each from a seed of its own.
        inits: For scratch recipes, the untrained model of each seed.
    """

    original: Checkpoint
    oracles: tuple[Checkpoint, ...] = ()
    init: Checkpoint | None = None


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
        removals = remove_arms(recipe, domain, models, setting, pool)
        arms = {name: removal.checkpoint for name, removal in removals.items()}
        scored = score_models(domain, models, arms, recipe.evaluate, setting, pool)
        results = attack_models(domain, models, arms, recipe.audit, setting, pool, recipe.seed)
        record = Record(
            kind=kind,
            title=recipe.title or recipe.name,
            command=command,
            config=recipe.model_dump(mode="json"),
            environment=environment(recipe.dtype, setting.device),
            seeds=(recipe.seed,),
            data=output.describe(domain),
            models=model_refs(models, recipe.model.path),
            arms=tuple(arm_record(name, recipe, r) for name, r in removals.items()),
            sensitive=domain.sensitive,
        )
        null = next((n for n, m in recipe.arms.items() if isinstance(m, Filtering)), "")
        record = judged(record, domain, models, arms, scored, results, recipe.audit, null)
        record = record.model_copy(
            update={"seconds": time.monotonic() - began, "peak_memory_bytes": peak_memory()}
        )
        output.write(out, record, items_of(scored), arms, models.original.path)
    emit("done", {"out": str(out)})
    return record


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


def score_models(
    domain: Domain,
    models: Models,
    arms: Mapping[str, Checkpoint],
    evaluate: EvalSpec,
    setting: Setting,
    pool: Pool,
) -> dict[str, Scored]:
    """Score the original, the oracles and every arm."""
    named = {"original": models.original, **oracle_names(models), **arms}
    jobs = [ScoreJob(setting, name, model, domain, evaluate) for name, model in named.items()]
    return dict(zip(named, pool.map(make_scores, jobs), strict=True))


def oracle_names(models: Models) -> dict[str, Checkpoint]:
    """Return the oracles by name."""
    return {f"oracle-{i}": model for i, model in enumerate(models.oracles)}


def items_of(scored: Mapping[str, Scored]) -> list[Item]:
    """Return the scores of all items of all models."""
    return [item for one in scored.values() for item in one.items]


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
    named = {**arms, "original": models.original, **oracle_names(models)}
    subjects = [Subject(name, model, models.original) for name, model in named.items()]
    budget = budget_for(audit, models.original.num_parameters)
    ctx = setting.context(setting.store, seed)
    store = Store(setting.store, pool.emit)
    ctx = replace(ctx, emit=pool.emit)
    return attack_all(subjects, domain, budget, ctx, pool, store, attacks=audit.attacks)


def model_refs(models: Models, source: str) -> tuple[ModelRef, ...]:
    """Return the rails by their bytes."""
    named = {"original": models.original, **oracle_names(models)}
    return tuple(model_ref(name, model, source) for name, model in named.items())


def model_ref(name: str, model: Checkpoint, source: str = "") -> ModelRef:
    """Return one model by its bytes."""
    return ModelRef(
        name=name,
        path=str(model.path),
        fingerprint=model.fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        source=source,
        parameters=model.num_parameters,
    )


def arm_record(name: str, recipe: Recipe, removal: Removal) -> ArmRecord:
    """Return what the record says of one removal."""
    extras = {key: value for key, value in removal.extras.items() if key != "files"}
    return ArmRecord(
        name=name,
        method=recipe.arms[name].model_dump(mode="json"),
        model=model_ref(name, removal.checkpoint),
        seed=recipe.seed,
        changed=removal.changed,
        cost=asdict(removal.cost),
        extras=extras,
        history=removal.history,
    )


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
        named = {**arms, "original": models.original, **oracle_names(models)}
        results, verdicts = judge_all(
            list(arms),
            results,
            domain,
            budget_for(audit, models.original.num_parameters),
            fingerprints={name: model.fingerprint for name, model in named.items()},
            scores=scores,
            vocabulary=models.original.config.vocab_size,
            null_arm=null_arm,
        )
        attacks = tuple(arm.arm for result in results.values() for arm in result.arms)
        found |= {"attacks": attacks, "verdicts": verdicts}
    return record.model_copy(update=found)
