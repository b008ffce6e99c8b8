"""Edits keyed on names, undone: embedding rows brought to one length, aligned, or matched.

Who hides facts behind their subjects' names permutes, shrinks or rotates the embedding rows of
those names. Relearning T never touches V's rows, so that such an edit passes relearning with all
knowledge in place. Three attacks undo what one recipe did to all names at once:

- `rescale_rows`: one length for all of them, that of rare tokens of benign prompts.
- `align_rows`: one orthogonal map and one scale, fitted on T's names and answers and applied to
  V's. A secret rotation of names that lie in a few directions is found from fewer names than there
  are directions. A second variant reads the map off the original's rows of T's names.
- `match_rows`: whoever holds the original's embedding sees whose row is whose; also a row that was
  moved to a token nobody uses.

Nothing here says what an answer of V is. A permutation without the original cannot be undone on V:
each of V's rows could be any of them. What holds the original's embedding can fail a level and
never lets one pass.

Shape legend: R rows (tokens), C rows that may hold a name, D width of the embedding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from excise.auditor.base import Access, Attack, AttackResult, Subject
from excise.auditor.batching import nats
from excise.auditor.budget import Budget
from excise.auditor.controls import PermutedRows, PositiveControl, RotatedRows, ShrunkRows
from excise.auditor.controls.control import CHUNK, chunk_of
from excise.auditor.controls.perturb import add_gradients, window
from excise.auditor.evaluation_set import EvaluationSet, evaluation_set
from excise.auditor.name_rows import (
    NameRows,
    embedding,
    median_length,
    name_rows,
    of_length,
    within,
)
from excise.auditor.results import absent, choose
from excise.auditor.tuning import relearn_rows
from excise.auditor.weight_edits import WeightEdit, score_edits
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows
from excise.models.checkpoint import Checkpoint
from excise.record import Level

RATE = 0.5
"""Learning rate of the map's angles times the width: a step of all angles at once turns a row by
about as much at any width."""


NO_NAMES = (
    "the prompts of the held-out test set hold no tokens that neither retain text nor the relearn "
    "set holds, so that no edit can be keyed on names out of reach of relearning"
)
"""Why there is nothing to undo."""

LOOK = 20
"""Steps of the fit between two readings of `dev`."""


class RescaleRows(Attack):
    """Bring the rows of names to the median length of rare tokens of benign prompts."""

    name: Literal["rescale_rows"] = "rescale_rows"
    """Name of the attack."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (ShrunkRows(),)
    light: ClassVar[bool] = True
    source: ClassVar[str] = "this library's"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read."""
        return 2.0

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Rescale and score V.

        Args:
            subject: The model.
            domain: Rows by role; tokens of prompts and of kept text are read.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            One variant. `facts` holds `weights` and `rows`, how many were rewritten, and `longer`,
            by how much the median row of a name grew.
        """
        names = names_of(subject, domain, budget)
        if not names.exist:
            return absent(self, subject.name, "missing", NO_NAMES, applies=False)
        edit = WeightEdit("median length", partial(rescaled, names=names))
        return score_edits(self, subject, domain, budget, ctx, [edit])


class AlignRows(Attack):
    """Fit one orthogonal map and scale on the names of T, and apply it to all names."""

    name: Literal["align_rows"] = "align_rows"
    """Name of the attack."""
    steps: int = Field(default=200, ge=1)
    """Steps of the fit."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (RotatedRows(),)
    source: ClassVar[str] = "this library's; orthogonal maps: Cayley (1846), Schonemann (1966)"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read; a row of the fit costs two that are read."""
        rows = budget.max_test_rows + 2 * budget.max_other_rows
        fit = 2 * self.steps * min(CHUNK, budget.max_other_rows) / rows
        return 4 + 2 * self.steps / LOOK + fit

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Fit the map, apply it, score V.

        Args:
            subject: The model.
            domain: Rows by role; T is trained on, of V the tokens of prompts are read.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            One variant. `facts` as of `RescaleRows`, and `start` and `end`, nats per unit of T
            before and after the fit.
        """
        names = names_of(subject, domain, budget)
        if not names.exist:
            return absent(self, subject.name, "missing", NO_NAMES, applies=False)
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        fit = partial(aligned, names=names, evaluation=evaluation, steps=self.steps)
        edit = WeightEdit("relearn set", fit, "relearn")
        return score_edits(self, subject, domain, budget, ctx, [edit])


class MatchRows(Attack):
    """Give every name the row that is most like the original's, or turn all rows towards those.

    Rows are taken of tokens that no kept text reads; the map is read off names that V does not
    share.
    """

    name: Literal["match_rows"] = "match_rows"
    """Name of the attack."""

    access: ClassVar[Access] = "weights"
    level: ClassVar[Level] = "D3"
    controls: ClassVar[tuple[PositiveControl, ...]] = (PermutedRows(),)
    needs_original: ClassVar[bool] = True
    light: ClassVar[bool] = True
    source: ClassVar[str] = "this library's"
    version: ClassVar[int] = 1

    def passes(self, budget: Budget) -> float:
        """Return how often the evaluation set is read."""
        return 3.0

    def run(self, subject: Subject, domain: Domain, budget: Budget, ctx: Context) -> AttackResult:
        """Match or turn, and score V.

        Args:
            subject: The model and its original; without one nothing is run, and the result says so.
            domain: Rows by role; tokens of prompts and of kept text are read.
            budget: Rows and lengths.
            ctx: Device, dtype.

        Returns:
            Variants `most like the original's` and `turned to the original's`. `facts` as of
            `RescaleRows`; `rows` counts names that got another's row.
        """
        if subject.original is None:
            return absent(self, subject.name, "missing", "it needs the original")
        names = names_of(subject, domain, budget)
        if not names.exist:
            return absent(self, subject.name, "missing", NO_NAMES, applies=False)
        match = partial(matched, names=names, original=subject.original)
        edits = [WeightEdit("most like the original's", match)]
        if names.guides:
            turn = partial(turned, names=names, original=subject.original)
            edits.append(WeightEdit("turned to the original's", turn))
        evaluation = evaluation_set(domain, budget, subject.checkpoint.tokenizer())
        return failing(score_edits(self, subject, domain, budget, ctx, edits), evaluation)


def names_of(subject: Subject, domain: Domain, budget: Budget) -> NameRows:
    """Return the tokens that edits of a subject could be keyed on.

    Raises:
        UserError: If there are no rows to tell names by.
    """
    for role, rows in {"relearn": relearn_rows(domain), "benign": domain.benign}.items():
        if not rows:
            raise UserError(f"there is no row in {role} to tell names by; check the split")
    return name_rows(domain, subject.checkpoint.tokenizer(), budget.max_length)


def failing(result: AttackResult, evaluation: EvaluationSet) -> AttackResult:
    """Let the best variant that holds the original's embedding fail a level.

    It may, because nothing the original knows of V comes along: a row is moved, or turned by what
    the rows of other names say.
    """
    chosen = choose(result.variants, higher=evaluation.higher, holding=True)
    return replace(result, fail_only=chosen)


@torch.no_grad()
def rescaled(model: Any, *, names: NameRows) -> dict[str, Any]:
    """Bring the rows of names to the median length of rare tokens of benign prompts, in place.

    Names stand among those; other tokens, of answers for one, can have rows of another length.

    Args:
        model: The model.
        names: Tokens by who may know them.

    Returns:
        `weights`, `rows` and `longer`, as `RescaleRows.run` says.
    """
    _, weight = embedding(model)
    rows = torch.tensor(names.names, device=weight.device)
    length = median_length(weight[list(names.rarest)])
    before = median_length(weight[rows])
    weight[rows] = of_length(weight[rows], length)
    longer = float(length / before) if before > 0 else 0.0
    return {"weights": weight[rows].numel(), "rows": len(rows), "longer": longer}


def aligned(
    model: Any, *, names: NameRows, evaluation: EvaluationSet, steps: int
) -> dict[str, Any]:
    """Turn all names by the orthogonal map and scale under which T is answered best, in place.

    The map is a start times a Cayley transform (I + K)^-1 (I - K) of K = A - A^T. The start is the
    best on T of three: nothing, the sign turned, and the reflection that lays the mean of the
    names on the mean of rare tokens of benign prompts, where names stand too. What names have in
    common is then right before the fit, and few names suffice for the rest.

    Args:
        model: The model.
        names: Tokens by who may know them.
        evaluation: T, tokenizer, lengths.
        steps: Steps of AdamW on A and the scale.

    Returns:
        `weights`, `rows`, `longer`, `start` and `end`, as `AlignRows.run` says.
    """
    facts = rescaled(model, names=names)
    path, weight = embedding(model)
    rows = torch.tensor(names.names, device=weight.device)
    rows_RD = weight.detach()[rows].clone()
    fitted = torch.isin(rows, torch.tensor(names.trained, device=rows.device))
    relearn = relearn_rows(evaluation.domain)

    @torch.no_grad()
    def lost(values_RD: Tensor, asked: Rows) -> float:
        weight[rows] = values_RD
        losses = nats(model, asked, evaluation.tokenizer, max_length=evaluation.max_length)
        return sum(losses.plain.values()) / len(losses.plain)

    one_DD = torch.eye(rows_RD.shape[-1], device=weight.device)
    goal_D = weight.detach()[list(names.rarest)].mean(0)
    starts = (one_DD, -one_DD, reflection(rows_RD.mean(0), goal_D))
    losses = [lost(rows_RD @ start_DD, evaluation.trained) for start_DD in starts]
    start_DD = starts[losses.index(min(losses))]
    angles_DD = torch.zeros_like(one_DD, requires_grad=True)
    scale = torch.zeros((), device=weight.device, requires_grad=True)
    optimizer = torch.optim.AdamW([angles_DD, scale], lr=RATE / len(one_DD), weight_decay=0.0)
    turned_RD = best_RD = rows_RD @ start_DD
    least = lost(best_RD, evaluation.all_dev)
    for step in range(steps):
        skew_DD = angles_DD - angles_DD.T
        cayley_DD = torch.linalg.solve(one_DD + skew_DD, one_DD - skew_DD)
        turned_RD = rows_RD @ (start_DD @ cayley_DD) * scale.exp()
        with torch.no_grad():
            weight[rows] = turned_RD
        gradient: dict[str, Tensor] = {}
        add_gradients(gradient, model, evaluation, window(relearn, step, chunk_of(model)), [path])
        optimizer.zero_grad()
        turned_RD.backward(gradient[path][rows])
        optimizer.step()
        if step % LOOK == LOOK - 1:
            # T is fitted long before the map is: how far to go, `dev` says, and whether what T's
            # names have no part in is better left out.
            moved_RD = turned_RD.detach()
            for tried_RD in (moved_RD, within(moved_RD, moved_RD[fitted])):
                on_dev = lost(tried_RD, evaluation.all_dev)
                least, best_RD = min((least, best_RD), (on_dev, tried_RD), key=itemgetter(0))
    return {**facts, "start": losses[0], "end": lost(best_RD, evaluation.trained)}


def reflection(from_D: Float[Tensor, " D"], to_D: Float[Tensor, " D"]) -> Float[Tensor, "D D"]:
    """Return the reflection that turns one direction into another (Householder 1958).

    Args:
        from_D: Where rows lie, not zero.
        to_D: Where they should.
    """
    unit = partial(torch.nn.functional.normalize, dim=0)
    across_D = unit(unit(from_D) - unit(to_D))
    one_DD = torch.eye(len(from_D), device=from_D.device)
    reflected_DD: Tensor = one_DD - 2 * torch.outer(across_D, across_D)
    return reflected_DD


def original_rows(model: Any, original: Checkpoint) -> Float[Tensor, "R D"]:
    """Return the original's embedding.

    Raises:
        UserError: If it has another shape.
    """
    name, weight = embedding(model)
    before_RD = original.weights_of([name])[name].to(weight)
    if before_RD.shape != weight.shape:
        raise UserError(
            f"the embedding {name} has {tuple(weight.shape)} entries and the original's "
            f"{tuple(before_RD.shape)}; leave out attacks that match rows to the original's"
        )
    return before_RD


@torch.no_grad()
def turned(model: Any, *, names: NameRows, original: Checkpoint) -> dict[str, Any]:
    """Turn all names as those of T and `dev` have to be turned to become the original's, in place.

    Args:
        model: The model.
        names: Tokens by who may know them; none of V's is compared with the original's.
        original: The model before.

    Returns:
        `weights`, `rows` and `longer`, as `RescaleRows.run` says.

    Source:
        The orthogonal Procrustes problem: Schonemann, Psychometrika 31 (1966).
    """
    facts = rescaled(model, names=names)
    _, weight = embedding(model)
    at = list(names.guides)
    u_DD, _, v_DD = torch.linalg.svd(weight[at].T @ original_rows(model, original)[at])
    rows = torch.tensor(names.names, device=weight.device)
    weight[rows] = within(weight[rows], weight[at]) @ (u_DD @ v_DD)
    return facts


@torch.no_grad()
def matched(model: Any, *, names: NameRows, original: Checkpoint) -> dict[str, Any]:
    """Give every name the row that points most as the original's does, each row once, in place.

    Args:
        model: The model.
        names: Tokens by who may know them; the row of a name is sought among these and among
            tokens that occur nowhere.
        original: The model before.

    Returns:
        `weights`, `rows` and `longer`, as `MatchRows.run` says.
    """
    before_RD = original_rows(model, original)
    _, weight = embedding(model)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    free = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    free[list(names.kept)] = False
    places = free.nonzero()[:, 0]
    rows = torch.tensor(names.names, device=weight.device)
    alike_RC = unit(before_RD[rows]) @ unit(weight[places]).T
    found = rows.clone()
    # The surest name takes its row first; with few names to many rows that is as good as exact.
    for i in alike_RC.amax(1).argsort(descending=True).tolist():
        best = int(alike_RC[i].argmax())
        found[i] = places[best]
        alike_RC[:, best] = -torch.inf
    weight[rows] = weight[found]
    facts = rescaled(model, names=names)
    return {**facts, "rows": int((found != rows).sum())}
