"""The steps of a run: make the models, remove, score, attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from excise.auditor.base import Results, Subject
from excise.auditor.engine import attack_all
from excise.auditor.evaluation_set import check_scored
from excise.core.context import Stage
from excise.core.disk import expand
from excise.core.errors import NotFinite
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.data.spec import DomainSpec
from excise.evals.set_scores import set_scores
from excise.fetch.model import open_model
from excise.methods.base import ApplyMethod, Method, Removal, completed
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.models.checkpoint import Checkpoint, open_tokenizer
from excise.models.lora import holds_adapter
from excise.models.spec import ModelSpec
from excise.record import Item, MethodRun, Record
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe, budget_for, starts_from
from excise.requests.rows import check_rows
from excise.run.results import (
    Models,
    audited_arm,
    check_comparable,
    items_of,
    judged,
    oracle_names,
    reference_names,
    refuse_equal,
)
from excise.run.stages import MakeModel, MergeAdapter, Scored, ScoreModel
from excise.train.pool import Pool

ARMS = 500
"""Methods that train from scratch use the recipe's seed plus this, as no reference model does."""


class Examination(Protocol):
    """What recipes and audits ask of every model."""

    @property
    def evaluate(self) -> EvalSpec:
        """How models are scored."""
        ...

    @property
    def audit(self) -> AuditSpec:
        """How they are attacked."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the attacks."""
        ...


def label(jobs: Sequence[Stage[Any]], names: Sequence[str], runtime: Runtime, pool: Pool) -> None:
    """Tell whoever watches what a reader calls some stages.

    Args:
        jobs: The stages.
        names: A name for each.
        runtime: Where they lie.
        pool: Its `emit` gets the names.
    """
    for job, name in zip(jobs, names, strict=True):
        pool.emit("label", {"stage": runtime.path(job).name, "label": name})


def audit_models(
    record: Record,
    asked: Examination,
    domain: Domain,
    models: Models,
    candidates: Mapping[str, Checkpoint],
    runtime: Runtime,
    pool: Pool,
    arms: Sequence[MethodRun] = (),
) -> tuple[Record, list[Item]]:
    """Examine models that somebody made, once it is sure that they compare.

    Args:
        record: What is known so far.
        asked: How models are scored and attacked.
        domain: Rows by role.
        models: The reference models.
        candidates: The edited models by name.
        runtime: Where stages are kept.
        pool: Worker processes.
        arms: How they were made, where that is known.

    Raises:
        UserError: If a candidate or an oracle cannot be read against the original.
    """
    check_comparable(models.original, {**candidates, **oracle_names(models)})
    arms = arms or tuple(audited_arm(name, model) for name, model in candidates.items())
    record = record.model_copy(update={"method_runs": tuple(arms)})
    return examine(record, asked, domain, models, candidates, runtime, pool)


def examine(
    record: Record,
    asked: Examination,
    domain: Domain,
    models: Models,
    candidates: Mapping[str, Checkpoint],
    runtime: Runtime,
    pool: Pool,
    null: str = "",
) -> tuple[Record, list[Item]]:
    """Score every model, attack it, judge it, and put all of it into the record.

    Args:
        record: What is known so far.
        asked: How models are scored and attacked.
        domain: Rows by role.
        models: The reference models.
        candidates: The edited models by name.
        runtime: Where stages are kept.
        pool: Worker processes.
        null: Name of a candidate that filtering made: one more seed of the oracle.

    Returns:
        The record with scores, attacks and verdicts, and the score of every item.

    Raises:
        UserError: If attacks would have nothing to score or to choose by.
    """
    if asked.audit.budget != "none":
        check_scored(domain)
    named = {**reference_names(models), **candidates}
    jobs = [ScoreModel(model, domain, asked.evaluate) for model in named.values()]
    label(jobs, [f"scores of {name}" for name in named], runtime, pool)
    found = pool.map(score_named, [(runtime, *pair) for pair in zip(named, jobs, strict=True)])
    scored = {name: one.named(name) for name, one in zip(named, found, strict=True)}
    results = attack_models(asked, domain, models, candidates, runtime, pool)
    record = judged(record, domain, models, candidates, scored, results, asked.audit, null)
    oracle = next(iter(oracle_names(models)), "")
    items = {name: one.items for name, one in scored.items()}
    more, unknown = set_scores(items, oracle)
    notes = [*record.data.get("notes", ()), *unknown]
    change = {"scores": (*record.scores, *more), "data": {**record.data, "notes": notes}}
    return record.model_copy(update=change), items_of(scored)


def open_edited(path: str, original: Checkpoint, runtime: Runtime) -> Checkpoint:
    """Open an edited model; an adapter's folder is merged into the original, which it edits.

    Args:
        path: As `ModelSpec.path`, or the folder of an adapter.
        original: The model before the edit.
        runtime: Where a merged model is kept.

    Raises:
        UserError: If there is no such model, or the adapter is of another.
    """
    folder = expand(path)
    if holds_adapter(folder):
        return runtime.run(MergeAdapter(folder, original))
    return open_model(ModelSpec(path=path))


def score_named(job: tuple[Runtime, str, ScoreModel]) -> Scored:
    """Score a model; one that gives no numbers is named, and ends the run."""
    runtime, name, stage = job
    try:
        return runtime.run(stage)
    except NotFinite as error:
        raise error.of(f"the model '{name}'") from None


def prepare(recipe: Recipe, runtime: Runtime, pool: Pool) -> tuple[Domain, Models]:
    """Build the domain and make or open the original and the oracles."""
    if recipe.model.scratch is None:
        original = open_model(recipe.model)
        domain = recipe.domain.build(original)
        _check(recipe, domain, original.tokenizer() if original.tokenizer_files else None, pool)
        return domain, Models(original)
    domain = recipe.domain.build(None)
    tokenizer = scratch_tokenizer(recipe.model, recipe.domain)
    _check(recipe, domain, tokenizer, pool)
    seeds = [recipe.seed, *(recipe.seed + 1000 + i for i in range(recipe.oracles))]
    stages = [MakeModel(recipe.model.scratch, tokenizer, s) for s in (*seeds, recipe.seed + ARMS)]
    inits = pool.map(runtime.run, stages)
    methods: list[Method] = [Plain(pretrain=recipe.pretrain)]
    methods += [Filtering(pretrain=recipe.pretrain, drop="spans")] * recipe.oracles
    jobs = [
        ApplyMethod(method, init, domain, seed)
        for method, init, seed in zip(methods, inits[:-1], seeds, strict=True)
    ]
    label(jobs, ["original", *(f"oracle-{i}" for i in range(recipe.oracles))], runtime, pool)
    trained = pool.make(jobs, runtime)
    original, *oracles = [removal.checkpoint for removal in trained]
    tokens = trained[0].cost.tokens
    return domain, Models(original, tuple(oracles), init=inits[-1], tokens=tokens)


def _check(recipe: Recipe, domain: Domain, tokenizer: Any, pool: Pool) -> None:
    """Refuse rows that do not fit the recipe, and say what files of labels have of them."""
    for note in check_rows(recipe, domain, tokenizer):
        pool.emit("note", {"text": note})


def scratch_tokenizer(model: ModelSpec, domain: DomainSpec) -> Any:
    """Return the tokenizer of models trained here: the one that is named, else the domain's."""
    return open_tokenizer(model.tokenizer) if model.tokenizer else domain.tokenizer()


def remove_all(
    recipe: Recipe, domain: Domain, models: Models, runtime: Runtime, pool: Pool
) -> dict[str, Removal]:
    """Apply every method: those from scratch to the untrained model, others to the original."""
    known = {"pretrain": recipe.pretrain, "pretrain_tokens": models.tokens}
    jobs = []
    for method in recipe.arms.values():
        scratch = starts_from(method) == "scratch"
        start = models.init if scratch else models.original
        assert start is not None
        seed = recipe.seed + (ARMS if scratch else 0)
        jobs.append(ApplyMethod(completed(method, known), start, domain, seed))
    label(jobs, list(recipe.arms), runtime, pool)
    return dict(zip(recipe.arms, pool.make(jobs, runtime), strict=True))


def refit(recipe: Recipe, models: Models, runtime: Runtime, pool: Pool) -> dict[str, Removal]:
    """Repeat every removal on all forget rows; the audited models stay those of the split."""
    spec = recipe.domain.model_copy(update={"refit": True})
    return remove_all(recipe, spec.build(models.original), models, runtime, pool)


def attack_models(
    asked: Examination,
    domain: Domain,
    models: Models,
    candidates: Mapping[str, Checkpoint],
    runtime: Runtime,
    pool: Pool,
) -> Results:
    """Run every attack on every candidate and reference model; nothing for the budget `none`.

    Raises:
        UserError: If a candidate is one of its own reference models.
    """
    if asked.audit.budget == "none":
        return {}
    refuse_equal(models, candidates)
    named = {**candidates, **reference_names(models)}
    subjects = [Subject(name, model, models.original) for name, model in named.items()]
    budget = budget_for(asked.audit, models.original.num_parameters)
    return attack_all(
        subjects, domain, budget, asked.seed, runtime, pool, attacks=asked.audit.attacks
    )
