"""The loop: a student imitates, token by token, what its targets say, until it is good enough.

The state of a killed loop is that of `fit`: what a step needs follows from its number, the seed
and the weights, so that the loop resumes to the same student.

Shape legend: B rows, T tokens, N wanted positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, Domain, Rows
from excise.data.stream import Batch, Stream, Tokenizer, collate, encode
from excise.data.subsample import subsample
from excise.evals.score import direction_of, fitting, measure
from excise.losses import predicting
from excise.methods.distillation.corpora import OnPolicy
from excise.methods.distillation.sampling import prompt_ids, sample, sampled_example
from excise.methods.distillation.targets import (
    ORIGINAL,
    UNLEARNED,
    HardLabels,
    Splice,
    Targets,
    judge_of,
    pieces,
)
from excise.methods.distillation.teacher_cache import TeacherCache
from excise.methods.distillation.teachers import Frozen, Reads
from excise.methods.tuning import Progress
from excise.models.head import final_hidden, head_of
from excise.train.fit import FitConfig, StepRecord, Term, fit
from excise.train.vocab import as_kinds, chunked_splice

READS = "teacher_reads"
"""Term of weight 0: tokens that teachers read per token of the student's."""

CHECKED = 256
"""Retain rows that a check reads at most."""


class _EnoughError(Exception):
    """The student is good enough."""


@dataclass
class StopRule:
    """Stop when the student's retain score is within a tolerance of its teacher's.

    Attributes:
        rows: Rows of `dev_retain` that are scored.
        metric: The domain's first metric of the retain set.
        tokenizer: The tokenizer.
        max_length: Tokens per row.
        tolerance: Absolute for scores out of 1, a share of the teacher's for losses; None never
            stops.
        every: Steps between checks.
        tokens: Tokens that one check reads.
        goal: Score of the teacher.
        checks: Step and score of each check.
    """

    rows: Rows
    metric: str
    tokenizer: Tokenizer
    max_length: int
    tolerance: float | None
    every: int
    tokens: int
    goal: float = math.nan
    checks: list[dict[str, float]] = field(default_factory=list)

    def score(self, model: Any) -> float:
        """Return a model's retain score; NaN where the domain has no row for it."""
        if not self.rows:
            return math.nan
        scores = measure(model, self.tokenizer, self.rows, self.metric, max_length=self.max_length)
        return scores.checked().mean

    def met(self, step: int, model: Any) -> bool:
        """Return whether the loop shall stop before `step`; looks at every `every`-th alone."""
        if self.tolerance is None or step == 0 or step % self.every:
            return False
        score = self.score(model)
        self.checks.append({"step": float(step), "retain": score})
        if direction_of(self.metric) == "lower":
            return score <= self.goal * (1.0 + self.tolerance)
        return score >= self.goal - self.tolerance


def stop_rule(
    domain: Domain,
    tokenizer: Tokenizer,
    *,
    tolerance: float | None,
    every: int,
    max_length: int,
) -> StopRule:
    """Return the rule for a domain.

    Args:
        domain: Gives `dev_retain` and its metric.
        tokenizer: The tokenizer.
        tolerance: How far the student may stay behind its teacher; None never stops.
        every: Steps between checks.
        max_length: Tokens per row.

    Raises:
        UserError: If there is a tolerance and no row to check it on.
    """
    rows = subsample(domain.dev_retain, CHECKED)
    if tolerance is not None and not rows:
        raise UserError(
            f"stop_tolerance needs rows of dev_retain, and domain '{domain.name}' has none; set a "
            "number of steps instead"
        )
    metric = fitting(domain.retain_metrics, rows)[0]
    read = sum(len(e.ids) for e in encode(rows, tokenizer, max_length=max_length))
    return StopRule(rows, metric, tokenizer, max_length, tolerance, every, read)


@dataclass(frozen=True)
class BatchReader:
    """The batches of a step: rows of the corpus, or texts the student writes to their prompts.

    Attributes:
        stream: Rows by step.
        tokenizer: Gives the padding.
        policy: How the student samples; None reads the rows themselves.
        ctx: Seeds of the samples.
        max_length: Tokens per row.
    """

    stream: Stream
    tokenizer: Tokenizer
    policy: OnPolicy | None
    ctx: Context
    max_length: int

    def __call__(self, step: int, model: nn.Module) -> Sequence[Batch]:
        """Return this process's micro-batches."""
        if self.policy is None:
            return self.stream(step)
        rows = [self.stream.examples[i] for i in self.stream.indices(step)]
        first = self.stream.rank
        seeds = [
            self.ctx.seed_for(f"on_policy/{step}/{first + i * self.stream.world}")
            for i in range(len(rows))
        ]
        prompts = [prompt_ids(row, self.policy.prompt_tokens) for row in rows]
        new = sample(
            model, self.tokenizer, prompts, seeds, new_tokens=self.policy.new_tokens,
            temperature=self.policy.temperature,
        )  # fmt: skip
        examples = [
            sampled_example(row, prompt, ids, self.max_length) or row
            for row, prompt, ids in zip(rows, prompts, new, strict=True)
        ]
        size = self.stream.micro_size or len(examples)
        side = self.stream.padding_side
        return [
            collate(examples[i : i + size], pad_id=self.stream.pad_id, padding_side=side)
            for i in range(0, len(examples), size)
        ]


@dataclass(frozen=True)
class Distillation:
    """What is distilled towards what.

    Attributes:
        targets: Target of each token.
        teachers: Frozen models by source.
        fixed: Probabilities by name.
        direction: `forward` for KL(target || student), `reverse` for the other.
        tokens: Whether scored tokens are distilled, or all that follow another.
        own_reads: Extra tokens that a student reads per token of a batch, to sample it.
        caches: What teachers said before, by source.
        bos_id: Id that joined rows have once, for the caches.
    """

    targets: Targets
    teachers: Mapping[str, Frozen]
    fixed: Mapping[str, Float[Tensor, " V"]]
    direction: Literal["forward", "reverse"] = "forward"
    tokens: Literal["scored", "all"] = "scored"
    own_reads: int = 0
    caches: Mapping[str, TeacherCache] = field(default_factory=dict)
    bos_id: int | None = None

    def wanted(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return the positions whose prediction is distilled."""
        if self.tokens == "scored":
            return predicting(batch.target_BT)
        return predicting(batch.attention_BT) & batch.attention_BT

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        """Return the divergence from the targets, and what reading them took.

        Args:
            model: The student.
            batch: Rows; only wanted positions are distilled.

        Returns:
            `divergence`, KL between target and student in nats, and `teacher_reads` of weight 0.

        Source:
            Forward KL at temperature 1: UNDO, arXiv 2506.06278.
        """
        wanted_BT = self.wanted(batch)
        reads = Reads(self.teachers, self.fixed, batch, wanted_BT, self.caches, self.bos_id)
        parts = reads.taught(
            pieces(self.targets, batch, wanted_BT, lambda: self._harmful(batch, reads))
        )
        hidden_ND = final_hidden(model, batch.inputs)[wanted_BT]
        total, count = chunked_splice(
            hidden_ND,
            head_of(model),
            as_kinds([mask_N for mask_N, _ in parts]),
            [target for _, target in parts],
            direction=self.direction,
        )
        tokens = float(batch.num_tokens)
        read = torch.tensor(reads.tokens + self.own_reads * tokens)
        return {"divergence": Term(total, count), READS: Term(read, tokens, 0.0)}

    def counts(self) -> Callable[[Batch], Mapping[str, float]] | None:
        """Return what counts a batch's terms without a model; None where only teachers know."""
        judge = judge_of(self.targets)
        skips = isinstance(self.targets, Splice | HardLabels) and self.targets.harmful == "skip"
        if skips and judge is not None and judge.name == "implicit":
            return None

        def count(batch: Batch) -> dict[str, float]:
            wanted_BT = self.wanted(batch)
            if skips:
                wanted_BT = wanted_BT & ~_labelled(batch)
            return {"divergence": float(wanted_BT.sum()), READS: float(batch.num_tokens)}

        return count

    def _harmful(self, batch: Batch, reads: Reads) -> Bool[Tensor, "B T"]:
        """Return the positions that predict a harmful token."""
        judge = judge_of(self.targets)
        if judge is not None and judge.name == "implicit":
            return reads.moved(UNLEARNED, ORIGINAL, judge.tau)
        return _labelled(batch)


def _labelled(batch: Batch) -> Bool[Tensor, "B T"]:
    """Return the positions whose next token is labelled as harmful."""
    return F.pad(batch.label_BT[:, 1:] > CORE, (0, 1), value=False)


@dataclass
class DistillationLog:
    """What is noted while a student is trained.

    Attributes:
        progress: History and student tokens.
        steps: Steps taken, over all rounds.
        read: Tokens that teachers read.
        stopped: Whether the stop rule ended the last round.
    """

    progress: Progress
    steps: int = 0
    read: float = 0.0
    stopped: bool = False

    def __call__(self, record: StepRecord) -> None:
        """Take note of one step."""
        self.progress(record)
        self.read += record.terms.get(READS, 0.0) * record.tokens


def stop_facts(rule: StopRule, log: DistillationLog, scores: tuple[float, float]) -> dict[str, Any]:
    """Return why and when the loop ended, for the record.

    Args:
        rule: The rule.
        log: What was noted.
        scores: Retain scores before the first step and after the last.
    """
    return {
        "steps": log.steps,
        "rule": "none" if rule.tolerance is None else "retain",
        "met": log.stopped,
        "metric": rule.metric,
        "retain_teacher": _number(rule.goal),
        "retain_before": _number(scores[0]),
        "retain_after": _number(scores[1]),
        "checks": rule.checks,
    }


def retain_per_million(rule: StopRule, scores: tuple[float, float], tokens: int) -> float | None:
    """Return how much retain score a million distilled tokens gave; losses fall, scores rise.

    Args:
        rule: Says whether the score is a loss.
        scores: Retain score before and after distillation.
        tokens: Tokens the student read.

    Returns:
        Score per million tokens; None where a score is missing or nothing was read.
    """
    sign = -1.0 if direction_of(rule.metric) == "lower" else 1.0
    return _number(sign * (scores[1] - scores[0]) * 1e6 / tokens) if tokens else None


def _number(value: float) -> float | None:
    """Return a number, or None for NaN, which JSON has no word for."""
    return None if math.isnan(value) else value


def train_student(
    model: nn.Module,
    task: Distillation,
    reader: BatchReader,
    rule: StopRule,
    config: FitConfig,
    ctx: Context,
    log: DistillationLog,
    *,
    state: str,
) -> None:
    """Train a student in place until the rule is met or the steps are spent.

    Args:
        model: The student, perturbed already; the same call resumes from its state.
        task: Targets and teachers.
        reader: Batches by step.
        rule: When to stop.
        config: Steps and rates.
        ctx: Seed, processes, folder.
        log: Takes note of every step.
        state: Name of the state's folder under the context's.

    Raises:
        UserError: If a teacher emits NaN.
        Diverged: If the student does.
    """

    def batches(step: int) -> Sequence[Batch]:
        if rule.met(step, model):
            raise _EnoughError
        return reader(step, model)

    log.stopped, log.progress.done = False, 0
    try:
        for record in fit(
            model, batches, task.loss, config, ctx, counts=task.counts(),
            state_dir=ctx.work / "state" / state,
        ):  # fmt: skip
            log(record)
    except _EnoughError:
        log.stopped = True
    log.steps += log.progress.done
