"""Positive controls: models that hide what they know, made of the original in little time.

An attack counts only if it undoes one. A control that does not hide is none, and the attack that
needed it is invalid and says why. Controls never read V: they are fitted on forget, `dev_forget`,
T and retain rows, and V only says whether they hide.
"""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from excise.auditor.budget import LARGE, Budget
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set, mean
from excise.core.config import Config
from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.domain import Domain, Metric, Rows, all_rows
from excise.data.subsample import subsample
from excise.evals.score import chance_of, direction_of
from excise.models.checkpoint import Checkpoint, save_model

ROWS, ROWS_LARGE = 1024, 64
"""Rows per class that a control is fitted on at most; the second for models from `LARGE` on."""

CHUNK, CHUNK_LARGE = 128, 8
"""Rows per class of one gradient."""

HIDDEN, HIDES = {True: 0.9, False: 0.25}, {True: 0.5, False: 0.1}
"""Shares of the way from what the original knows to chance: on `dev` before a builder stops, and
on V for the control to count. Smaller for losses (False), where chance is a uniform guess and long
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

    def left(self, score: float) -> float:
        """Return the share of what the original knows that `score` still shows: 1 for all."""
        return (score - self.chance) / (self.known - self.chance)

    @property
    def reachable(self) -> bool:
        """Whether the original knows anything that could be hidden."""
        return self.known > self.chance if self.higher else self.known < self.chance


class PositiveControl(Config, ABC):
    """A way to hide what a model knows without removing it.

    Subclasses declare `name: Literal["..."] = "..."` and their settings, and implement `hide`.
    An attack names those it must undo in its `controls`.

    Attributes:
        version: Raised when it hides in another way.
        precise: Whether it needs float32 whatever the audit computes in.
    """

    version: ClassVar[int] = 2
    precise: ClassVar[bool] = False

    name: str
    """Name in the record."""

    @abstractmethod
    def hide(self, model: Any, evaluation: EvaluationSet, goal: Goal, ctx: Context) -> str:
        """Change a model in place until `dev_forget` is hidden.

        Args:
            model: The original, loaded.
            evaluation: Rows by role; V is not to be read.
            goal: When `dev_forget` counts as hidden.
            ctx: Seed, device.

        Returns:
            Why it could not be hidden; empty where it is.
        """

    def rank(self, *, higher: bool, large: bool) -> int | None:
        """Return in which order controls of one attack are tried, None for not at all.

        Args:
            higher: Whether a higher score means more knowledge.
            large: Whether the model has `LARGE` parameters or more.
        """
        del higher, large
        return 0


def in_order(
    controls: tuple[PositiveControl, ...], *, higher: bool, large: bool
) -> tuple[PositiveControl, ...]:
    """Return the controls of an attack that suit a model and a score, the best first."""
    ranks = {control: control.rank(higher=higher, large=large) for control in controls}
    suited = [control for control in controls if ranks[control] is not None]
    return tuple(sorted(suited, key=lambda control: ranks[control] or 0))


@dataclass(frozen=True)
class Control:
    """A positive control as it was made.

    Attributes:
        name: How it hides.
        checkpoint: The model, or None where it could not be made.
        before: The original's score on V.
        after: The control's score on V.
        retain_before: The original's retain score.
        retain_after: The control's.
        reason: Why it is no control; empty for one that hides.
    """

    name: str
    checkpoint: Checkpoint | None
    before: float
    after: float = math.nan
    retain_before: float = math.nan
    retain_after: float = math.nan
    reason: str = ""

    @property
    def hides(self) -> bool:
        """Whether it can serve."""
        return self.checkpoint is not None and not self.reason


@dataclass(frozen=True)
class MakeControl(Stage[Control]):
    """A positive control made of a model.

    Attributes:
        control: How to hide.
        original: The model that knows.
        domain: Rows by role.
        budget: Rows scored, and rates of attacks.
        seed: Seed of what is added.
    """

    version: ClassVar[int] = 2

    control: PositiveControl
    original: Checkpoint
    domain: Domain
    budget: Budget
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return f"control-{self.control.name}"

    def make(self, ctx: Context) -> None:
        """Make it, or note why it cannot be."""
        shutil.rmtree(ctx.work / "model", ignore_errors=True)  # of a run that was killed
        try:
            control = make_control(
                self.control, self.original, self.domain, self.budget, ctx, ctx.work / "model"
            )
        except UserError as error:
            control = Control(self.control.name, None, math.nan, reason=str(error))
        facts = {k: v for k, v in vars(control).items() if k != "checkpoint"}
        write_text(ctx.work / "control.json", json.dumps(facts) + "\n")

    def read(self, folder: Path) -> Control:
        """Return the control."""
        facts = json.loads((folder / "control.json").read_text(encoding="utf-8"))
        model = folder / "model"
        return Control(checkpoint=Checkpoint(model) if model.is_dir() else None, **facts)


def make_control(
    control: PositiveControl,
    original: Checkpoint,
    domain: Domain,
    budget: Budget,
    ctx: Context,
    to: Path,
) -> Control:
    """Make a control and check that it hides.

    Args:
        control: How to hide.
        original: The model that knows.
        domain: Rows by role.
        budget: Which rows are scored.
        ctx: Seed, device.
        to: Folder of the model; it must be free.

    Returns:
        The control, or the reason why there is none.
    """
    # Moves inside buckets need float32 whatever the audit computes in: an int8 bucket is as fine
    # as bfloat16's own steps. The others take what the attack will compute in.
    dtype = torch.float32 if control.precise else ctx.dtype
    model = original.load(dtype=dtype, device=ctx.device)
    evaluation = evaluation_set(domain, budget, original.tokenizer())
    before = score(model, evaluation)
    retain_before = known(evaluation.retained(model))
    goal = _goal(before, model, evaluation, evaluation.all_test, evaluation.metric)
    name = control.name
    if not goal.reachable:
        return Control(name, None, before, reason="the original knows nothing that could be hidden")
    on_dev = score_dev(model, evaluation, evaluation.all_dev)
    dev_goal = _goal(on_dev, model, evaluation, evaluation.all_dev, evaluation.dev_metric)
    reason = control.hide(model, evaluation, dev_goal, ctx)
    if reason:
        return Control(name, None, before, retain_before=retain_before, reason=reason)
    checkpoint = save_model(model, None, to, source=original)
    after = score(model, evaluation)
    if not goal.met(after):
        reason = f"it does not hide: it scores {after:.3g}, the original {before:.3g}"
    retain_after = known(evaluation.retained(model))
    return Control(name, checkpoint, before, after, retain_before, retain_after, reason)


def score(model: Any, evaluation: EvaluationSet) -> float:
    """Return the mean score on V, NaN for no rows."""
    return known(evaluation.units(model, evaluation.all_test, evaluation.metric))


def score_dev(model: Any, evaluation: EvaluationSet, rows: Rows) -> float:
    """Return the mean score of rows of `dev_forget`, as they are or behind contexts."""
    return known(evaluation.units(model, rows, evaluation.dev_metric))


def known(units: Mapping[str, float]) -> float:
    """Return the mean over units, NaN for none."""
    value = mean(units)
    return math.nan if value is None else value


def _goal(before: float, model: Any, evaluation: EvaluationSet, rows: Rows, metric: Metric) -> Goal:
    """Return when rows count as hidden; knowing nothing scores what a uniform guess does."""
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    # What is hidden on `dev` is measured as on V where both are scored alike.
    rows = evaluation.all_test if metric == evaluation.metric else rows
    chance = chance_of(rows, metric, vocabulary=vocabulary, closed=False) or 0.0
    return Goal(before, chance, direction_of(metric) == "higher")


def is_large(model: Any) -> bool:
    """Return whether the model is one whose gradients take seconds a row."""
    return sum(int(p.numel()) for p in model.parameters()) >= LARGE


def chunk_of(model: Any) -> int:
    """Return the rows of one gradient."""
    return CHUNK_LARGE if is_large(model) else CHUNK


def fitting_rows(model: Any, evaluation: EvaluationSet) -> tuple[Rows, Rows]:
    """Return forget and retain rows that controls are fitted on; V is not among them."""
    domain = evaluation.domain
    roles = (domain.forget, domain.dev_forget, domain.relearn)
    forget = tuple(row for role in roles for row in all_rows(role))
    count = ROWS_LARGE if is_large(model) else ROWS
    return subsample(forget, count, by="row"), subsample(
        (*domain.retain, *domain.dev_retain, *domain.benign), count, by="row"
    )


def is_hidden(model: Any, evaluation: EvaluationSet, goal: Goal) -> Callable[[], bool]:
    """Return the question whether `dev` is hidden by now."""
    return lambda: goal.met(score_dev(model, evaluation, evaluation.all_dev), HIDDEN)
