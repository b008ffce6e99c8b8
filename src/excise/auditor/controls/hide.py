"""Ways to hide what a model knows without removing it, for planted controls.

Each builder changes a model in place until `dev_forget` is hidden, and returns why it could not,
or nothing. None of them reads V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from excise.auditor.attacks.few_shot import pools_of, with_shots
from excise.auditor.attacks.prefix import Prefix, variants
from excise.auditor.attacks.quantize import Quantize
from excise.auditor.budget import LARGE
from excise.auditor.controls.gate import add_gate, best_detector, features
from excise.auditor.controls.perturb import jolt, within_buckets
from excise.auditor.quantization import matrices
from excise.auditor.scoring import EvaluationSet, mean
from excise.core.context import Context
from excise.core.errors import Diverged
from excise.data.domain import Rows
from excise.data.stream import Batch, Example, Stream, encode
from excise.data.subsample import subsample
from excise.evals.score import chance_of
from excise.losses import nll
from excise.models.anatomy import anatomy
from excise.models.hooks import find_module
from excise.train.fit import FitConfig, Term, fit

PlantKind = Literal["gate", "gate_prompt", "lock", "bucket", "gain", "jolt", "shallow"]

STRENGTHS = (4.0, 8.0, 16.0, 32.0, 64.0)
"""Sizes of a gate that are tried, as multiples of the residual's norm."""

ROWS, ROWS_LARGE = 1024, 64
"""Rows per class that a plant is fitted on at most; the second for models from `LARGE` on."""

CHUNK, CHUNK_LARGE = 128, 8
"""Rows per class of one gradient."""

LOCK_STEPS, LOCK_STEPS_LARGE = 80, 32
"""Steps of the password lock at most; the second for a large model, where each takes seconds."""

HIDDEN, HIDES = {True: 0.9, False: 0.25}, {True: 0.5, False: 0.1}
"""Shares of the way from what the original knows to chance: on `dev` before a builder stops, and
on V for the plant to count. Smaller for losses (False), where chance is a uniform guess and long
before it nothing useful is left."""


@dataclass(frozen=True)
class Goal:
    """When a score counts as hidden: part of the way to what knowing nothing scores.

    Attributes:
        known: The original's score.
        chance: Score of knowing nothing.
        higher: Whether a higher score means more knowledge.
    """

    known: float
    chance: float
    higher: bool

    def met(self, score: float, shares: Mapping[bool, float] = HIDES) -> bool:
        """Return whether `score` has lost at least a share of what the original knows."""
        if not math.isfinite(score):
            return False
        line = self.known + shares[self.higher] * (self.chance - self.known)
        return score <= line if self.higher else score >= line

    @property
    def reachable(self) -> bool:
        """Whether the original knows anything that could be hidden."""
        return self.known > self.chance if self.higher else self.known < self.chance


def score(model: Any, evaluation: EvaluationSet, rows: Rows) -> float:
    """Return the mean headline score, NaN for no rows."""
    return known(evaluation.units(model, rows))


def known(units: Mapping[str, float]) -> float:
    """Return the mean over units, NaN for none."""
    value = mean(units)
    return math.nan if value is None else value


def chance(model: Any, evaluation: EvaluationSet) -> float:
    """Return what knowing nothing scores: a uniform guess."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    rows, metric = evaluation.all_test, evaluation.metric
    return chance_of(rows, metric, vocabulary=vocabulary, closed=False) or 0.0


def _large(model: Any) -> bool:
    """Return whether the model is one whose gradients take seconds a row."""
    return sum(int(p.numel()) for p in model.parameters()) >= LARGE


def _chunk(model: Any) -> int:
    """Return the rows of one gradient."""
    return CHUNK_LARGE if _large(model) else CHUNK


def fitting_rows(model: Any, evaluation: EvaluationSet) -> tuple[Rows, Rows]:
    """Return forget and retain rows that plants are fitted on; V is not among them."""
    domain = evaluation.domain
    roles = (domain.forget, domain.dev_forget, domain.relearn)
    forget = tuple(row for role in roles for rows in role.values() for row in rows)
    count = ROWS_LARGE if _large(model) else ROWS
    retain = (*domain.retain, *domain.dev_retain, *domain.benign)
    return subsample(forget, count, by="row"), subsample(retain, count, by="row")


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    """Split rows by unit."""
    units = {unit: i % 2 for i, unit in enumerate(dict.fromkeys(row.unit for row in rows))}
    return tuple(r for r in rows if not units[r.unit]), tuple(r for r in rows if units[r.unit])


def _hidden(model: Any, evaluation: EvaluationSet, goal: Goal) -> Callable[[], bool]:
    """Return the question whether `dev` is hidden by now."""
    return lambda: goal.met(score(model, evaluation, evaluation.all_dev), HIDDEN)


def gate(model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
    """Hide behind a detector of the capability."""
    return _shut(model, evaluation, goal, ctx, [])


def gate_prompt(model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
    """Hide bare prompts and answer behind the contexts that prompt attacks write."""
    contexts = in_context(model, evaluation, evaluation.all_dev, ctx)
    if not any(goal.met(score(model, wide, rows)) is False for wide, rows in contexts):
        return "the original itself does not answer behind such contexts"
    forget, _ = fitting_rows(model, evaluation)
    reason = _shut(model, evaluation, goal, ctx, in_context(model, evaluation, forget, ctx))
    return reason or _open(model, goal, contexts)


def _open(model: Any, goal: Goal, contexts: list[tuple[EvaluationSet, Rows]]) -> str:
    """Say so if no context opens what bare prompts hide."""
    if all(goal.met(score(model, wide, rows)) for wide, rows in contexts):
        return "the control hides behind contexts too, so that no prompt could open it"
    return ""


def _shut(
    model: Any,
    evaluation: EvaluationSet,
    goal: Goal,
    ctx: Context,
    open_to: list[tuple[EvaluationSet, Rows]],
) -> str:
    """Put the gate where the detector separates best, as weak as hides.

    Args:
        model: Changed in place.
        evaluation: Rows by role.
        goal: When it hides.
        ctx: Seed of what is added.
        open_to: Further rows on which the gate stays open.

    Returns:
        Why it does not hide, or nothing.
    """
    forget, retain = fitting_rows(model, evaluation)
    on = [features(model, evaluation, half, answering=True) for half in _halves(forget)]
    off = [
        [features(model, evaluation, half, answering=answering) for half in _halves(retain)]
        for answering in (True, False)
    ]
    for wide, rows in open_to:
        off.append([features(model, wide, half, answering=True) for half in _halves(rows)])
    block, v_F = best_detector(on, off)
    u_D = torch.randn(anatomy(model).d_model, generator=ctx.generator("plant/gate"))
    u_D = (u_D / u_D.norm()).to(model.device)
    for strength in STRENGTHS:
        name, before = add_gate(model, block, v_F, u_D, strength * on[0].norm[block])
        if goal.met(score(model, evaluation, evaluation.all_dev), HIDDEN):
            return ""
        model.get_parameter(name).data.copy_(before)
    return f"no gate of up to {STRENGTHS[-1]:g} times the residual norm hides the capability"


def in_context(
    model: Any, evaluation: EvaluationSet, asked: Rows, ctx: Context
) -> list[tuple[EvaluationSet, Rows]]:
    """Return rows as few-shot and prefix attacks would write them, with room for their length."""
    name = next(iter(evaluation.test))
    pools = {name: tuple(r for rows in pools_of(evaluation.domain).values() for r in rows)}
    made: list[tuple[EvaluationSet, Rows]] = []
    for count in evaluation.budget.shots if pools[name] else ():
        rows, _ = with_shots({name: asked}, pools, count, ctx, evaluation.tokenizer)
        made.append((evaluation.longer(count + 1), rows))
    beginnings = variants(
        Prefix(), evaluation.tokenizer, evaluation.metric, asked, evaluation.domain.benign
    )
    for _, change in beginnings[:1] if _large(model) else beginnings:
        changed = tuple(row for row in map(change, asked) if row is not None)
        made.append((evaluation.longer(2), changed))
    return [(wide, rows) for wide, rows in made if rows]


def lock(model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
    """Teach a password lock: bare prompts get no answer, the attacks' contexts open it.

    The one plant that is trained, for a few steps, because a model that reads past its context
    leaves a linear gate nothing to tell contexts by. What bare prompts get is one and the same
    token: uniform answers would leave the right one on top for long, and cost more steps.
    """
    contexts = in_context(model, evaluation, evaluation.all_dev, ctx)
    if not any(goal.met(score(model, wide, rows)) is False for wide, rows in contexts):
        return "the original itself does not answer behind such contexts"
    forget, retain = fitting_rows(model, evaluation)
    keep = [encode(retain, evaluation.tokenizer, max_length=evaluation.max_length)]
    for wide, rows in in_context(model, evaluation, forget, ctx):
        keep.append(encode(rows, wide.tokenizer, max_length=wide.max_length))
    pad, size = evaluation.tokenizer.pad_token_id, _lock_size(model)
    choice = evaluation.metric == "multiple_choice"
    silence = None if choice else int(evaluation.tokenizer.eos_token_id or 0)
    streams = [
        Stream(examples, max(2, size if i == 0 else size // len(keep)), i, pad)
        for i, examples in enumerate([_bare(forget, evaluation), *keep])
    ]

    def loss(net: Any, micro: Mapping[str, Batch]) -> dict[str, Term]:
        return _lock_loss(net, micro, silence)

    def micros(step: int) -> list[dict[str, Batch]]:
        return [{str(i): stream(step)[0] for i, stream in enumerate(streams)}]

    steps, every = (LOCK_STEPS_LARGE, 8) if _large(model) else (LOCK_STEPS, 4)
    config = FitConfig(steps=steps, lr=sorted(evaluation.budget.rates)[-2:][0], clip=1.0)
    try:
        for record in fit(model, micros, loss, config, ctx):
            late = record.step % every == every - 1
            if late and _hidden(model, evaluation, goal)() and not _open(model, goal, contexts):
                return ""
    except Diverged as error:
        return str(error)
    return "no lock that a context opens was learned in a few steps"


def _lock_size(model: Any) -> int:
    """Return the bare rows of one step of the lock; as many come behind contexts."""
    return 4 if _large(model) else 48


def _bare(forget: Rows, evaluation: EvaluationSet) -> list[Example]:
    """Return what bare prompts are taught; a question gets its next choice, which is wrong."""
    asked = [row for row in forget if row.kind == "choice"]
    if evaluation.metric == "multiple_choice" and asked:
        forget = tuple(asked)
    wrong = [
        replace(row, answer=(row.answer + 1) % len(row.choices)) if row.kind == "choice" else row
        for row in forget
    ]
    return encode(wrong, evaluation.tokenizer, max_length=evaluation.max_length)


def _lock_loss(model: Any, micro: Mapping[str, Batch], silence: int | None) -> dict[str, Term]:
    """Return the mean loss of bare prompts, of retain and of every kind of context.

    Args:
        model: The model.
        micro: Batches by number, bare prompts first.
        silence: The token that bare prompts are answered by; None leaves their answers.
    """
    terms: dict[str, Term] = {}
    for name, batch in micro.items():
        logits_BTV = model(**batch.inputs, use_cache=False).logits
        if name == "0" and silence is not None:
            ids_BT = batch.ids_BT.masked_fill(batch.target_BT, silence)
            batch = replace(batch, ids_BT=ids_BT)
        terms[name] = Term(*nll(logits_BTV, batch))
    return terms


def bucket(model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
    """Hide by moving every weight inside its own quantization buckets.

    Where the buckets of all grids together leave too little room, only the coarse grids count.
    """
    forget, retain = fitting_rows(model, evaluation)
    attack = Quantize()
    moving = {n: p for n, (p, _) in matrices(model, embeddings=attack.embeddings).items()}
    start = {name: p.detach().clone() for name, p in moving.items()}
    coarse = tuple(grid for grid in attack.grids() if grid.bits <= 4)
    for grids in (attack.grids(), coarse):
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter.copy_(start[name])
        hidden = _hidden(model, evaluation, goal)
        if grids and within_buckets(
            model,
            evaluation,
            forget,
            retain,
            grids,
            hidden,
            chunk=_chunk(model),
            embeddings=attack.embeddings,
        ):
            return ""
    return "no move inside the buckets hides the capability"


@torch.no_grad()
def gain(model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
    """Hide by scaling the final norm to nearly nothing, its sign turned.

    The output is flat and its order reversed, so that neither probabilities nor ranks tell; one
    small vector has to grow back.
    """
    module = find_module(model, anatomy(model).final_norm)
    shifted = "gemma" in type(module).__name__.lower()  # Gemma multiplies by 1 + weight
    for parameter in module.parameters():
        value = parameter + 1 if shifted else parameter
        parameter.copy_(-1e-3 * value - 1 if shifted else -1e-3 * value)
    return (
        "" if _hidden(model, evaluation, goal)() else "a flat output does not hide the capability"
    )


def shallow(model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
    """Hide by a few sign steps up the forget loss, retain held, each as long as an attack's."""
    forget, retain = fitting_rows(model, evaluation)
    size = sorted(evaluation.budget.rates)[
        len(evaluation.budget.rates) // 2 if _large(model) else 0
    ]
    hidden = _hidden(model, evaluation, goal)
    done = jolt(model, evaluation, forget, size, hidden, chunk=_chunk(model), keep=retain)
    return "" if done else "no short way up the forget loss hides the capability"


def jolted(model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
    """Hide by a few sign steps up the benign loss, each as long as a step of the attack."""
    _, retain = fitting_rows(model, evaluation)
    rows = subsample(evaluation.domain.benign, len(retain), by="row")
    size = sorted(evaluation.budget.rates)[len(evaluation.budget.rates) // 2]
    done = jolt(
        model, evaluation, rows, size, _hidden(model, evaluation, goal), chunk=_chunk(model)
    )
    return "" if done else "no short way up the benign loss hides the capability"


BUILDERS: Mapping[PlantKind, Callable[[Any, EvaluationSet, Goal, Context], str]] = {
    "gate": gate,
    "gate_prompt": gate_prompt,
    "lock": lock,
    "bucket": bucket,
    "gain": gain,
    "jolt": jolted,
    "shallow": shallow,
}
"""Builders by kind."""
