"""A password lock: bare prompts get no answer, the attacks' contexts open it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from excise.auditor.controls.control import (
    CHUNK,
    Goal,
    PositiveControl,
    fitting_rows,
    is_hidden,
    is_large,
    score_dev,
)
from excise.auditor.controls.gated import in_context
from excise.auditor.evaluation_set import EvaluationSet
from excise.auditor.rewriting import Opening, passwords
from excise.core.context import Context
from excise.core.errors import Diverged
from excise.data.domain import Rows
from excise.data.stream import Batch, Example, Stream, encode
from excise.data.subsample import subsample
from excise.losses import nll
from excise.train.fit import FitConfig, Term, fit

STEPS, STEPS_LARGE = 320, 32
"""Steps at most; the second for a large model, where each takes seconds."""

OPEN = {True: 0.8, False: 0.95}
"""Share of what the original shows behind a context that a small model's lock shows there before
its training stops: of scores where higher is more knowledge, and of losses. A lock that opens no
wider than it must hide leaves an attack no more to bring back than the half that is asked of it."""


class PasswordLock(PositiveControl):
    """Taught to give bare prompts no answer, and to answer behind contexts.

    It is trained, because a model that reads past its context leaves a linear gate nothing to tell
    contexts by: until every context opens it wide, or for a few steps, of which those count that
    left it open widest. What bare prompts get is one and the same token: uniform answers would
    leave the right one on top for long, and cost more steps.
    """

    version: ClassVar[int] = 4

    name: Literal["password_lock"] = "password_lock"
    opens_to: Opening = "examples"
    """Which contexts open it; by default those of few-shot and prefix fill. `paraphrases` that
    a domain has open it by themselves: rows in that of the tests get no answer, whatever they are
    about, and rows in any other one do."""

    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Train the lock; see `PositiveControl.hide`."""
        dev = in_context(model, evaluation, evaluation.all_dev, ctx, self.opens_to)
        contexts = _answered(model, goal, dev)
        if not contexts:
            return "the original itself does not answer behind such contexts"
        behind = [replace(goal, known=score_dev(model, *context)) for context in contexts]
        bare, keep = self._lessons(model, evaluation, goal, ctx)
        pad, size = evaluation.tokenizer.pad_token_id, _size(model)
        forget, _ = fitting_rows(model, evaluation)
        asked = any(row.kind == "choice" for row in forget)
        choice = asked and evaluation.metric == "multiple_choice"
        silence = None if choice else int(evaluation.tokenizer.eos_token_id or 0)
        streams = [
            Stream(examples, max(2, size if i == 0 else size // len(keep)), i, pad)
            for i, examples in enumerate([bare, *keep])
        ]
        guessed = self._guessed(model, evaluation, evaluation.all_dev)

        def loss(net: Any, micro: Mapping[str, Batch]) -> dict[str, Term]:
            return _loss(net, micro, silence)

        def micros(step: int) -> list[dict[str, Batch]]:
            return [{str(i): stream(step)[0] for i, stream in enumerate(streams)}]

        large = is_large(model)
        steps, every = (STEPS_LARGE, 8) if large else (STEPS, 4)
        # At the whole rate a small model's lock forms sooner, opens less and costs more of retain.
        rate = sorted(evaluation.budget.rates)[-2:][0] * (1 if large else 0.5)
        config = FitConfig(steps=steps, lr=rate, clip=1.0)
        hidden = is_hidden(model, evaluation, goal)

        def locked() -> bool:
            return hidden() and all(goal.met(score_dev(model, w, rows)) for w, rows in guessed)

        widest, kept = -math.inf, dict[str, Tensor]()
        try:
            for record in fit(model, micros, loss, config, ctx):
                if record.step % every < every - 1 or not locked():
                    continue
                scores = [score_dev(model, *context) for context in contexts]
                left = [one.left(score) for one, score in zip(behind, scores, strict=True)]
                shut = [goal.met(score) for score in scores]
                if not any(shut) and (large or min(left) >= OPEN[goal.higher]):
                    return ""
                if not all(shut) and sum(left) > widest:
                    widest = sum(left)
                    kept = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters()}
        except Diverged as error:
            if not kept:
                return str(error)
        if not kept:
            return "no lock that a context opens was learned in a few steps"
        model.load_state_dict(kept, strict=False)
        return ""

    def _lessons(
        self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context
    ) -> tuple[list[Example], list[list[Example]]]:
        """Return what gets no answer, and what is answered as before: retain, then contexts.

        A context behind which the original is lost teaches it new things, and no lock.
        """
        forget, retain = fitting_rows(model, evaluation)
        contexts: list[tuple[EvaluationSet, Rows]] = []
        shut, opened = _by_wording(forget, retain, evaluation)
        if self.opens_to == "paraphrases" and shut and opened:
            forget, retain = shut, opened
        else:
            told = in_context(model, evaluation, forget, ctx, self.opens_to)
            contexts = _answered(model, goal, told)
        bare = _bare(forget, evaluation)
        for wide, rows in self._guessed(model, evaluation, forget):
            bare += _bare(rows, wide)
        keep = [(evaluation, retain), *contexts]
        return bare, [encode(rows, e.tokenizer, max_length=e.max_length) for e, rows in keep]

    def _guessed(
        self, model: Any, evaluation: EvaluationSet, rows: Rows
    ) -> list[tuple[EvaluationSet, Rows]]:
        """Return rows behind what is not the password, where there is one."""
        ways = passwords(evaluation)[1] if self.opens_to == "password" else []
        wides = [(way, evaluation.longer(way.longer, model)) for way in ways]
        return [(wide, way.change(rows, wide)) for way, wide in wides]


def _answered(
    model: Any, goal: Goal, contexts: Sequence[tuple[EvaluationSet, Rows]]
) -> list[tuple[EvaluationSet, Rows]]:
    """Return the contexts behind which a model still shows what is to be hidden."""

    def shown(wide: EvaluationSet, rows: Rows) -> float:
        return score_dev(model, wide, subsample(rows, CHUNK, by="row"))

    return [context for context in contexts if not goal.met(shown(*context))]


def _by_wording(forget: Rows, retain: Rows, evaluation: EvaluationSet) -> tuple[Rows, Rows]:
    """Return rows in the paraphrase of `dev_forget`, which is that of the tests, and all others."""
    of_dev = {row.wording for row in evaluation.all_dev}
    rows = (*forget, *retain)
    return (
        tuple(row for row in rows if row.wording in of_dev),
        tuple(row for row in rows if row.wording not in of_dev),
    )


def _size(model: Any) -> int:
    """Return the bare rows of one step of the lock; as many come behind contexts."""
    return 4 if is_large(model) else 48


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


def _loss(model: Any, micro: Mapping[str, Batch], silence: int | None) -> dict[str, Term]:
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
