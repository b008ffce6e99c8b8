"""UNDO: unlearn, perturb, distil.

1. Unlearn: suppress what is to be removed. The result is the teacher.
2. Perturb: take a copy of it, shrink its weights and add noise.
3. Distil: train the copy to say what the teacher says, until the retain set is back.

What the teacher does not say, the student has to find by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Example, Stream, Tokenizer, collate, encode
from excise.data.subsample import subsample
from excise.methods.base import ApplyMethod, Cost, Method, Paper, Removal
from excise.methods.chain import Chain
from excise.methods.distillation.cache_kinds import CacheKind
from excise.methods.distillation.corpora import (
    AnyCorpus,
    FullMix,
    OnPolicy,
    TeacherSamples,
    Texts,
    read_corpus,
)
from excise.methods.distillation.distil import (
    BatchReader,
    Distillation,
    DistillationLog,
    StopRule,
    retain_per_million,
    stop_facts,
    stop_rule,
    train_student,
)
from excise.methods.distillation.harmful import Classifier, TrueLabels, classify, quality
from excise.methods.distillation.perturb import (
    LayerGroup,
    at_random,
    forget_saliency,
    largest,
    members,
    perturb,
)
from excise.methods.distillation.targets import (
    ORIGINAL,
    UNLEARNED,
    FromMixture,
    FromTeacher,
    Splice,
    Targets,
    asked_alone,
    judge_of,
    model_of,
    sources_of,
)
from excise.methods.distillation.teacher_cache import build_cache, same_vocabulary
from excise.methods.distillation.teachers import Frozen, frozen, mean_prediction, unigram
from excise.methods.posthoc.maxent import MaxEnt
from excise.methods.tuning import Progress, finish, forget_rows
from excise.models.checkpoint import Checkpoint, ModelPath, open_checkpoint
from excise.models.head import head_of
from excise.train.fit import FitConfig

STATISTICS = 512
"""Forget rows from which unigram and mean prediction are made, at most."""


class Undo(Method):
    """Unlearn, shrink and perturb a copy, distil it from the unlearned model."""

    name: Literal["undo"] = "undo"
    unlearn: SerializeAsAny[Method] = MaxEnt()
    """How the teacher is made: any method that starts from the original."""
    also: dict[str, SerializeAsAny[Method]] = {}
    """Further teachers by name, for mixtures."""
    alpha: float = Field(default=0.6, ge=0, le=1)
    """How far the student's weights are moved before it learns: 0 keeps the teacher's, 1 leaves
    nothing of them (unlearn and distil)."""
    beta: float = Field(default=0.1, ge=0)
    """Scale of the noise, of Xavier-uniform shape; 0 shrinks alone."""
    groups: tuple[LayerGroup, ...] = ("all",)
    """Groups of layers that are perturbed."""
    weights: Literal["all", "forget_snip", "random"] = "all"
    """Which weights of `groups` are perturbed: all; the `share` of the matrices' weights with the
    largest |weight x gradient| on forget rows of the original; or as many at random."""
    share: float = Field(default=0.2, gt=0, le=1)
    """How many weights, where not all."""
    repeats: int = Field(default=1, ge=1)
    """Rounds of perturbing and distilling, each with the steps of `fit`."""
    student: ModelPath = "unlearned"
    """Whose weights the student begins with: `unlearned`, `original` or a folder."""
    targets: Targets = FromTeacher()
    """What each token is distilled towards."""
    corpus: AnyCorpus = FullMix()
    """What is read."""
    divergence: Literal["auto", "forward", "reverse"] = "auto"
    """KL(target || student) or KL(student || target); `auto` is reverse on the student's own
    texts."""
    tokens: Literal["scored", "all"] = "scored"
    """Which tokens are distilled: those that are scored, or prompts as well."""
    cache: CacheKind | None = None
    """Keep what teachers say about the corpus, for this student and others: `hidden` is exact,
    `topk` and `sampled` are smaller; empty to ask the teachers in every step."""
    fit: FitConfig = FitConfig(
        steps=1000, lr=7e-4, batch_size=32, warmup=50, schedule="cosine", min_lr=0.1, clip=1.0
    )
    """Steps at most, rows per step, learning rate."""
    stop_tolerance: float | None = Field(default=None, ge=0)
    """Stop when the retain score on dev rows is this near to the teacher's: absolute for scores
    out of 1, a share for losses; empty to take all steps."""
    stop_every: int = Field(default=20, ge=1)
    """Steps between checks."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row."""
    pack: tuple[int, ...] = (1,)
    """Rows per text, in turn."""
    pretrain_tokens: int = Field(default=0, ge=0)
    """Tokens the original was trained on, for the cost as a share of it; 0 where the run knows them
    or nobody does."""

    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain", "unlabeled")
    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning (UNDO)",
        "arXiv:2506.06278",
        "section 3: theta <- (1 - alpha) theta + alpha beta X, then KL(teacher || student)",
        "AddieFoote/distillation-robustify-unlearning",
        {
            "alpha": "ours: run_serum_arithmetic_sweep_alpha.py tries 0.1 to 0.8 and recommends "
            "none",
            "beta": "run_serum_arithmetic_sweep_alpha.py: 0.1",
            "groups": "code/tools/serum.py: all; the scale of a norm shrinks towards its initial "
            "value here, there to 0",
            "fit": "run_serum_arithmetic_sweep_alpha.py: lr 7e-4 to 7e-5 cosine, 50 steps of "
            "warm-up (the first at lr 0, here at a fiftieth of the rate), 1000 at most, clip 1, "
            "360 texts of 256 tokens a step (language: 240 of 2048); here 32 texts",
            "max_length": "run_serum_arithmetic_sweep_alpha.py: 256 (language: 2048); here 512",
            "stop_tolerance": "run_serum_arithmetic_sweep_alpha.py: within 0.05 of the teacher "
            "(language: within 5 %); here off, so that all steps are taken unless it is set",
        },
    )

    @model_validator(mode="after")
    def _check(self) -> Undo:
        """Refuse what cannot be distilled, before anything runs."""
        for name, method in self.makers().items():
            first = method.methods[0] if isinstance(method, Chain) else method
            if first.starts_from == "scratch":
                raise ValueError(
                    f"{'unlearn' if name == 'unlearned' else f'also.{name}'}: "
                    f"'{method.name}' trains from scratch; name its model in targets.path"  # type: ignore[attr-defined]
                )
        if self.alpha == 1.0 and self.beta == 0.0:
            raise ValueError("beta: with alpha 1 it leaves weights of 0, which learn nothing")
        if self.cache is not None and (self.tokens == "all" or self.corpus.name == "on_policy"):
            raise ValueError(
                "cache: holds the scored tokens of texts that stay the same; leave it out with "
                "tokens 'all' and with corpus 'on_policy'"
            )
        if {"unlearned", "original"} & set(self.also):
            raise ValueError("also: 'unlearned' and 'original' are taken; use other names")
        return self

    @property
    def whole_batch(self) -> str:
        """Why cutting a batch gives another model, where targets are drawn in a step."""
        draws = (
            isinstance(self.targets, Splice) and self.targets.harmful == "shuffled",
            isinstance(self.targets, FromMixture) and self.targets.how == "draw",
        )
        return "targets are drawn among what a process reads in a step" if any(draws) else ""

    def makers(self) -> dict[str, Method]:
        """Return the methods that make teachers, by name."""
        return {"unlearned": self.unlearn, **self.also}

    def needed_sources(self) -> set[str]:
        """Return the models that a run needs: names of `makers`, `original`, folders."""
        sources = {*sources_of(self.targets), model_of(self.targets), self.student}
        if isinstance(self.corpus, TeacherSamples):
            sources.add(UNLEARNED)
        return sources

    def needed_makers(self) -> dict[str, Method]:
        """Return those of `makers` that this run asks for anything."""
        sources = self.needed_sources()
        return {name: method for name, method in self.makers().items() if name in sources}

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Make the teachers, each a stage that other students share; then distil a student."""
        removals = {
            name: ctx.run(ApplyMethod(method, start, domain, ctx.seed))
            for name, method in self.needed_makers().items()
        }
        return self.distil(start, domain, ctx, removals)

    def distil(
        self,
        start: Checkpoint,
        domain: Domain,
        ctx: Context,
        removals: Mapping[str, Removal],
    ) -> Removal:
        """Distil a student from teachers that exist.

        Args:
            start: The original.
            domain: Rows by role.
            ctx: Seed, device, dtype, folder.
            removals: What the methods of `needed_makers` returned.

        Returns:
            The student and what all of it took, teachers included.

        Raises:
            UserError: If a teacher emits NaN or has another vocabulary, or the corpus is shorter
                than a sequence.
        """
        began = time.monotonic()
        models = _models(self, start, removals)
        tokenizer = start.tokenizer()

        # What is read, and which of it is harmful.
        judge = judge_of(self.targets)
        texts = read_corpus(
            self.corpus, domain, start, models.get(UNLEARNED), ctx,
            noise=judge.noise if isinstance(judge, TrueLabels) else None,
            max_length=self.max_length,
        )  # fmt: skip
        model = _student(self, start, models, ctx)
        vocab = head_of(model).vocab
        teachers = {
            source: frozen(source, models[source].load(dtype=ctx.dtype, device=ctx.device), vocab)
            for source in sources_of(self.targets)
        }
        if isinstance(judge, Classifier):
            texts = _judged(judge, start, domain, texts, tokenizer, ctx, self.max_length)
        if judge is not None and judge.name != "implicit":
            texts.facts["labels"] = quality(texts.examples, texts.truth)
        _refuse_nan(teachers, texts.examples, tokenizer, ctx)

        # What each token is taught, and when that is enough.
        task = _task(self, domain, teachers, tokenizer, vocab, ctx)
        rule = stop_rule(
            domain, tokenizer, tolerance=self.stop_tolerance, every=self.stop_every,
            max_length=self.max_length,
        )  # fmt: skip
        rule.goal = _goal(self, models, teachers, rule, ctx)
        if self.cache is not None:
            task, texts = _cached(self.cache, task, models, texts, tokenizer, ctx)

        # Perturb and distil, round by round.
        log = DistillationLog(Progress(ctx, self.name, self.fit.steps))
        masks = _masks(self, start, domain, ctx)
        reader = _reader(self, texts, tokenizer, ctx)
        perturbed: tuple[str, ...] = ()
        before = math.nan
        for i in range(self.repeats):
            perturbed = perturb(
                model, alpha=self.alpha, beta=self.beta, ctx=ctx, groups=self.groups,
                purpose=f"perturb/{i}", masks=masks,
            )  # fmt: skip
            if i == 0:
                before = rule.score(model)
            train_student(model, task, reader, rule, self.fit, ctx, log, state=f"round-{i}")
        model.eval()

        scores = (before, rule.score(model))
        facts = {
            "alpha": self.alpha,
            "beta": self.beta,
            "perturbed_tensors": len(perturbed),
            # The files of the teachers' folders are not this method's.
            "teachers": {
                name: {key: fact for key, fact in removal.extras.items() if key != "files"}
                for name, removal in removals.items()
            },
            "corpus": texts.facts,
            "stop": stop_facts(rule, log, scores),
            "retain_per_million_tokens": retain_per_million(rule, scores, log.progress.tokens),
        }
        parameters = dict(model.named_parameters())
        removal = finish(start, model, parameters, log.progress, ctx, extras=facts)
        cost, costs = _cost(self, start, texts, log, rule, removals, began)
        return replace(removal, cost=cost, extras={**removal.extras, "cost": costs})


def _models(
    method: Undo, start: Checkpoint, removals: Mapping[str, Removal]
) -> dict[str, Checkpoint]:
    """Return the models that a run needs, by source.

    Raises:
        UserError: If a source is neither a name nor a model, or has another tokenizer.
    """
    models: dict[str, Checkpoint] = {}
    for source in sorted(method.needed_sources()):
        if source in removals:
            models[source] = removals[source].checkpoint
        elif source == ORIGINAL:
            models[source] = start
        elif Path(source).is_dir():
            models[source] = open_checkpoint(source)
            same_vocabulary(models[source], start)
        else:
            names = ", ".join((ORIGINAL, *method.makers()))
            raise UserError(f"'{source}' is neither a teacher ({names}) nor a model's folder")
    return models


def _student(
    method: Undo, start: Checkpoint, models: Mapping[str, Checkpoint], ctx: Context
) -> Any:
    """Load the model whose weights the student begins with.

    Raises:
        UserError: If its parameters have other names or shapes than the original's.
    """
    model = models[method.student].load(dtype=ctx.dtype, device=ctx.device)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wanted = {name: tuple(p.shape) for name, p in start.layout.model.named_parameters()}
    if shapes != wanted:
        odd = min(n for n in shapes.keys() | wanted.keys() if shapes.get(n) != wanted.get(n))
        raise UserError(
            f"the student in {models[method.student].path} is no model of the original's shape: "
            f"'{odd}' is {shapes.get(odd)} and not {wanted.get(odd)}"
        )
    model.requires_grad_(True)
    model.train()
    return model


def _judged(
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


def _refuse_nan(
    teachers: Mapping[str, Frozen], examples: list[Example], tokenizer: Tokenizer, ctx: Context
) -> None:
    """Let every teacher read a few rows before anything is trained.

    Raises:
        UserError: If one emits NaN.
    """
    batch = collate(examples[:8], pad_id=tokenizer.pad_token_id).to(ctx.device)
    for teacher in teachers.values():
        teacher.check(batch)


def _task(
    method: Undo,
    domain: Domain,
    teachers: Mapping[str, Frozen],
    tokenizer: Tokenizer,
    vocab: int,
    ctx: Context,
) -> Distillation:
    """Return targets and teachers, with the fixed distributions that the targets need."""
    fixed: dict[str, Tensor] = {}
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
    on_policy = isinstance(method.corpus, OnPolicy)
    reverse = method.divergence == "reverse" or (method.divergence == "auto" and on_policy)
    hard = method.targets.name == "hard_labels"
    return Distillation(
        method.targets,
        teachers,
        fixed,
        "reverse" if reverse and not hard else "forward",
        method.tokens,
        own_reads=1 if on_policy else 0,
    )


def _cached(
    kind: CacheKind,
    task: Distillation,
    models: Mapping[str, Checkpoint],
    texts: Texts,
    tokenizer: Tokenizer,
    ctx: Context,
) -> tuple[Distillation, Texts]:
    """Return the task with what its teachers say read beforehand; idle teachers are let go.

    The tokens that a cache is made of count as read by every student that uses it.
    """
    asked, live = asked_alone(task.targets)
    caches = {source: build_cache(models[source], texts.examples, kind, ctx) for source in asked}
    teachers = {source: t for source, t in task.teachers.items() if source in live}
    read = len(caches) * sum(len(e.ids) for e in {e.ids: e for e in texts.examples}.values())
    facts = {**texts.facts, "caches": {name: c.summary() for name, c in caches.items()}}
    return (
        replace(task, teachers=teachers, caches=caches, bos_id=tokenizer.bos_token_id),
        replace(texts, read=texts.read + read, facts=facts),
    )


def _goal(
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


def _reader(method: Undo, texts: Texts, tokenizer: Tokenizer, ctx: Context) -> BatchReader:
    """Return the batches by step."""
    fit = method.fit
    policy = method.corpus if isinstance(method.corpus, OnPolicy) else None
    rows = Stream(
        texts.examples,
        fit.batch_size,
        ctx.seed_for("order.distil"),
        pad_id=tokenizer.pad_token_id,
        rank=ctx.rank,
        world=ctx.world,
        micro_size=fit.micro_size,
        padding_side=tokenizer.padding_side,
        pack=(1,) if policy else method.pack,
        bos_id=tokenizer.bos_token_id,
    )
    return BatchReader(rows, tokenizer, policy, ctx, method.max_length)


def _masks(
    method: Undo, start: Checkpoint, domain: Domain, ctx: Context
) -> dict[str, Tensor] | None:
    """Return which weights are perturbed, None for all."""
    if method.weights == "all":
        return None
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    names = members(model, method.groups)
    if method.weights == "random":
        return at_random(model, names, method.share, ctx)
    rows, tokenizer = forget_rows(domain), start.tokenizer()
    scores = forget_saliency(model, rows, tokenizer, names, max_length=method.max_length, ctx=ctx)
    return largest(scores, method.share)


def _cost(
    method: Undo,
    start: Checkpoint,
    texts: Texts,
    log: DistillationLog,
    rule: StopRule,
    removals: Mapping[str, Removal],
    began: float,
) -> tuple[Cost, dict[str, Any]]:
    """Return what student, teachers, corpus and checks took, and the same for the record.

    A token costs the student 6 FLOPs per parameter, and 2 where a model only reads it.
    """
    parameters = start.num_parameters
    read = log.read + texts.read + len(rule.checks) * rule.tokens
    student = log.progress.tokens
    flops = parameters * (6.0 * student + 2.0 * read)
    seconds = log.progress.earlier + time.monotonic() - began
    total = Cost(log.steps, round(student + read), flops, seconds) + texts.cost
    for removal in removals.values():
        total = total + removal.cost
    tokens = method.pretrain_tokens
    share = total.flops / (6.0 * parameters * tokens) if tokens else None
    return total, {
        "student_tokens": student,
        "teacher_tokens": round(log.read),
        "corpus_tokens": texts.read,
        "distil_flops": 6.0 * parameters * student,
        "teacher_flops": 2.0 * parameters * log.read,
        "unlearn_flops": sum(removal.cost.flops for removal in removals.values()),
        "flops": total.flops,
        "share_of_pretraining": share,
    }
