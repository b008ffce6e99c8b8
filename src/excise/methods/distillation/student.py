"""One run of UNDO: open teachers, read the corpus, perturb the student, distil, write it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Example, Stream, Tokenizer, collate, encode
from excise.data.subsample import subsample
from excise.methods.base import Removal
from excise.methods.distillation.accounts import costed, gain, stopping, without_files
from excise.methods.distillation.cache import build_cache
from excise.methods.distillation.cache_keys import same_vocabulary
from excise.methods.distillation.corpora import OnPolicy, TeacherSamples, Texts, read_corpus
from excise.methods.distillation.distil import (
    Distillation,
    Reader,
    StopRule,
    Told,
    distil,
    stop_rule,
)
from excise.methods.distillation.harmful import Classifier, TrueLabels, classify, quality
from excise.methods.distillation.perturb import members, perturb
from excise.methods.distillation.saliency import at_random, forget_saliency, largest
from excise.methods.distillation.targets import (
    ORIGINAL,
    UNLEARNED,
    Splice,
    asked_alone,
    judge_of,
    model_of,
    sources_of,
)
from excise.methods.distillation.teachers import Frozen, frozen, mean_prediction, unigram
from excise.methods.tuning import Progress, finish, forget_rows
from excise.models.checkpoint import Checkpoint, open_checkpoint
from excise.models.head import head_of

if TYPE_CHECKING:
    from excise.methods.distillation.undo import Undo

STATISTICS = 512
"""Forget rows from which unigram and mean prediction are made, at most."""


def needed(method: Undo) -> set[str]:
    """Return the sources that a run needs: those of `makers`, `original`, folders."""
    wanted = {*sources_of(method.targets), model_of(method.targets), method.student}
    if isinstance(method.corpus, TeacherSamples):
        wanted.add(UNLEARNED)
    return wanted


def checkpoints(
    method: Undo, start: Checkpoint, made: Mapping[str, Removal]
) -> dict[str, Checkpoint]:
    """Return the models that a run needs, by source.

    Raises:
        UserError: If a source is neither a name nor a model, or has another tokenizer.
    """
    found: dict[str, Checkpoint] = {}
    for source in sorted(needed(method)):
        if source in made:
            found[source] = made[source].checkpoint
        elif source == ORIGINAL:
            found[source] = start
        elif Path(source).is_dir():
            found[source] = open_checkpoint(source)
            same_vocabulary(found[source], start)
        else:
            names = ", ".join((ORIGINAL, *method.makers()))
            raise UserError(f"'{source}' is neither a teacher ({names}) nor a model's folder")
    return found


def make_student(
    method: Undo,
    start: Checkpoint,
    domain: Domain,
    ctx: Context,
    made: Mapping[str, Removal],
    caches: Path | None = None,
) -> Removal:
    """Distil a student from teachers that exist; see `Undo.distil`."""
    began = time.monotonic()
    models = checkpoints(method, start, made)
    tokenizer = start.tokenizer()
    judge = judge_of(method.targets)
    texts = read_corpus(
        method.corpus, domain, start, models.get(UNLEARNED), ctx,
        noise=judge.noise if isinstance(judge, TrueLabels) else None,
        max_length=method.max_length,
    )  # fmt: skip
    model = open_student(method, start, models, ctx)
    vocab = head_of(model).vocab
    teachers = {
        source: frozen(source, models[source].load(dtype=ctx.dtype, device=ctx.device), vocab)
        for source in sources_of(method.targets)
    }
    if isinstance(judge, Classifier):
        texts = judged(judge, start, domain, texts, tokenizer, ctx, method.max_length)
    if judge is not None and judge.name != "implicit":
        texts.facts["labels"] = quality(texts.examples, texts.truth)
    refuse_nan(teachers, texts.examples, tokenizer, ctx)
    task = task_of(method, domain, teachers, tokenizer, vocab, ctx)
    rule = stop_rule(
        domain, tokenizer, tolerance=method.stop_tolerance, every=method.stop_every,
        max_length=method.max_length,
    )  # fmt: skip
    rule.goal = goal_of(method, models, teachers, rule, ctx)
    if method.cache is not None:
        task, texts = cached(method, task, models, texts, tokenizer, ctx, caches)
    told = Told(Progress(ctx, method.name, method.fit.steps))
    masks = masks_of(method, start, domain, ctx)
    reader = reader_of(method, texts, tokenizer, ctx)
    scores, perturbed = train(method, model, task, reader, rule, told, ctx, masks)
    facts = {
        "alpha": method.alpha,
        "beta": method.beta,
        "perturbed_tensors": len(perturbed),
        "teachers": {name: dict(removal.extras) for name, removal in made.items()},
        "corpus": texts.facts,
        "stop": stopping(rule, told, scores),
        "retain_per_million_tokens": gain(rule, scores, told.progress.tokens),
    }
    parameters = dict(model.named_parameters())
    removal = finish(start, model, parameters, told.progress, ctx, extras=without_files(facts))
    return costed(method, removal, texts, told, rule, made, start.num_parameters, began)


def open_student(
    method: Undo, start: Checkpoint, models: Mapping[str, Checkpoint], ctx: Context
) -> Any:
    """Load the model whose weights the student begins with.

    Raises:
        UserError: If its parameters have other names or shapes than the original's.
    """
    model = models[method.student].load(dtype=ctx.dtype, device=ctx.device)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    own = {name: tuple(p.shape) for name, p in start.layout.model.named_parameters()}
    if shapes != own:
        odd = min(n for n in shapes.keys() | own.keys() if shapes.get(n) != own.get(n))
        raise UserError(
            f"the student in {models[method.student].path} is no model of the original's shape: "
            f"'{odd}' is {shapes.get(odd)} and not {own.get(odd)}"
        )
    model.requires_grad_(True)
    model.train()
    return model


def judged(
    judge: Classifier,
    start: Checkpoint,
    domain: Domain,
    texts: Texts,
    tokenizer: Tokenizer,
    ctx: Context,
    max_length: int,
) -> Texts:
    """Return the texts with the labels of a classifier."""
    original = start.load(dtype=ctx.dtype, device=ctx.device)
    examples, read = classify(
        judge, original, tokenizer, domain, texts.examples, ctx, max_length=max_length
    )
    return replace(texts, examples=examples, read=texts.read + read)


def refuse_nan(
    teachers: Mapping[str, Frozen], examples: list[Example], tokenizer: Tokenizer, ctx: Context
) -> None:
    """Let every teacher read a few rows before anything is trained.

    Raises:
        UserError: If one emits NaN.
    """
    batch = collate(examples[:8], pad_id=tokenizer.pad_token_id).to(ctx.device)
    for teacher in teachers.values():
        teacher.check(batch)


def task_of(
    method: Undo,
    domain: Domain,
    teachers: Mapping[str, Frozen],
    tokenizer: Tokenizer,
    vocab: int,
    ctx: Context,
) -> Distillation:
    """Return targets and teachers, with the fixed distributions that the targets need."""
    fixed: dict[str, torch.Tensor] = {}
    if isinstance(method.targets, Splice) and method.targets.harmful in ("unigram", "mean"):
        rows = subsample(
            forget_rows(domain), STATISTICS, by="content", seed=ctx.seed_for("statistics")
        )
        examples = encode(rows, tokenizer, max_length=method.max_length)
        if method.targets.harmful == "unigram":
            fixed["unigram"] = unigram(examples, vocab).to(ctx.device)
        else:
            teacher, pad_id = teachers[UNLEARNED], tokenizer.pad_token_id
            fixed["mean"] = mean_prediction(teacher, examples, pad_id, ctx.device)
    own = isinstance(method.corpus, OnPolicy)
    reverse = method.divergence == "reverse" or (method.divergence == "auto" and own)
    hard = method.targets.name == "hard_labels"
    return Distillation(
        method.targets,
        teachers,
        fixed,
        "reverse" if reverse and not hard else "forward",
        method.tokens,
        drawn=1 if own else 0,
    )


def cached(
    method: Undo,
    task: Distillation,
    models: Mapping[str, Checkpoint],
    texts: Texts,
    tokenizer: Tokenizer,
    ctx: Context,
    folder: Path | None,
) -> tuple[Distillation, Texts]:
    """Return the task with what its teachers say read beforehand; idle teachers are let go.

    The tokens that a cache is made of count as read by every student that uses it.
    """
    assert method.cache is not None
    asked, live = asked_alone(task.targets)
    caches = {
        source: build_cache(models[source], texts.examples, method.cache, ctx, folder=folder)
        for source in asked
    }
    teachers = {source: t for source, t in task.teachers.items() if source in live}
    read = len(caches) * sum(len(e.ids) for e in {e.ids: e for e in texts.examples}.values())
    facts = {**texts.facts, "caches": {name: c.summary() for name, c in caches.items()}}
    return (
        replace(task, teachers=teachers, caches=caches, bos_id=tokenizer.bos_token_id),
        replace(texts, read=texts.read + read, facts=facts),
    )


def goal_of(
    method: Undo,
    models: Mapping[str, Checkpoint],
    teachers: Mapping[str, Frozen],
    rule: StopRule,
    ctx: Context,
) -> float:
    """Return the retain score that the student is to come near to."""
    source = model_of(method.targets)
    if source in teachers:
        return rule.score(teachers[source].model)
    return rule.score(models[source].load(dtype=ctx.dtype, device=ctx.device))


def reader_of(method: Undo, texts: Texts, tokenizer: Tokenizer, ctx: Context) -> Reader:
    """Return the batches by step."""
    fit = method.fit
    own = method.corpus if isinstance(method.corpus, OnPolicy) else None
    rows = Stream(
        texts.examples,
        fit.batch_size,
        ctx.seed_for("order.distil"),
        pad_id=tokenizer.pad_token_id,
        rank=ctx.rank,
        world=ctx.world,
        micro_size=fit.micro_size,
        padding_side=tokenizer.padding_side,
        pack=(1,) if own else method.pack,
        bos_id=tokenizer.bos_token_id,
    )
    return Reader(rows, tokenizer, own, ctx, method.max_length)


def masks_of(
    method: Undo, start: Checkpoint, domain: Domain, ctx: Context
) -> dict[str, Tensor] | None:
    """Return which weights are perturbed, None for all: what the original leans on, or a draw."""
    if method.weights == "all":
        return None
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    names = members(model, method.groups)
    if method.weights == "random":
        return at_random(model, names, method.share, ctx)
    rows, tokenizer = forget_rows(domain), start.tokenizer()
    scores = forget_saliency(model, rows, tokenizer, names, max_length=method.max_length, ctx=ctx)
    return largest(scores, method.share)


def train(
    method: Undo,
    model: nn.Module,
    task: Distillation,
    reader: Reader,
    rule: StopRule,
    told: Told,
    ctx: Context,
    masks: Mapping[str, Tensor] | None,
) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Perturb and distil, round by round.

    Returns:
        Retain scores before the first step and after the last, and the perturbed parameters.
    """
    perturbed: tuple[str, ...] = ()
    before = math.nan
    for i in range(method.repeats):
        perturbed = perturb(
            model, alpha=method.alpha, beta=method.beta, ctx=ctx, parts=method.groups,
            purpose=f"perturb/{i}", masks=masks,
        )  # fmt: skip
        if i == 0:
            before = rule.score(model)
        distil(model, task, reader, rule, method.fit, ctx, told, state=f"round-{i}")
    model.eval()
    return (before, rule.score(model)), perturbed
