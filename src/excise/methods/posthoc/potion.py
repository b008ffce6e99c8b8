"""Potion: dampen ever more of what forget rows lean on, until they are no longer known.

    I_f, I_D = mean over batches of |gradient of the mean of ||z|||, on D_f and on D_r   (XLF)
    s = |D_f| / |D| / 25
    repeat:                                                                              (PTN)
        alpha = percentile 100 - ln(1 + 100 s) of I_f / I_D
        w <- min(I_D / I_f, 1) w     for every weight with I_f > alpha I_D
        stop when the forget rows are known at most rho times as well as before
        s <- 1.1 s

The factor of a weight does not depend on alpha, so that a lower alpha dampens what a higher one
did and more: the weights between the two are looked up among sorted ratios and multiplied. Nothing
is put back, and there is no copy of the model.

Source:
    arXiv 2406.09173; if-loops/towards_poison_unlearning@5b5e83f (GPL-3, read only), src/methods.py
    and src/utils.py, which restore a copy of the model in every turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows, all_rows, text_of
from excise.data.rows import READS
from excise.data.subsample import subsample
from excise.evals.score import measure
from excise.methods.base import Cost, Paper, Removal
from excise.methods.importance import (
    ImportanceMethod,
    SortedRatios,
    dampened,
    drop_ratios,
    percentile_of,
    share_of,
)
from excise.methods.search import Space
from excise.methods.tuning import forget_rows
from excise.models.checkpoint import Checkpoint
from excise.models.names import parameters_by_name


class Potion(ImportanceMethod):
    """Outlier-resistant label-free SSD whose alpha a search finds (PTN)."""

    name: Literal["potion"] = "potion"
    rho: float = Field(default=0.2, ge=0, le=1)
    """The search ends where forget rows are known at most so much as well as before."""
    start_divisor: float = Field(default=25.0, gt=0)
    """The search starts at |D_f| / |D| over it."""
    step: float = Field(default=1.1, gt=1)
    """Factor from one share to the next."""
    tries: int = Field(default=500, ge=1)
    """Shares that are tried at most."""
    rows: int = Field(default=256, ge=1)
    """Rows that are asked in every turn at most."""
    loss: Literal["logits", "squared_logits", "nll"] = "logits"
    """What importances come from: length of the logits (XLF), its square (LFSSD's), or the loss
    (SSD's)."""
    against: Literal["all", "retain"] = "retain"
    """What I_D is measured on: forget and retain rows, or retain rows alone."""

    search: ClassVar[Space] = {"rho": (0.2, 0.0, 0.05, 0.1, 0.4, 0.6)}
    paper: ClassVar[Paper] = Paper(
        "Potion: towards poison unlearning",
        "arXiv:2406.09173",
        "XLF importance and PTN search",
        "if-loops/towards_poison_unlearning@5b5e83f (GPL-3)",
        {
            "rho": "CIFAR_ptn_runs.sh sweeps p_cut over 0 to 0.75, 0.2 among them; the option's "
            "own default is 0, which a language model may never reach",
            "start_divisor": "src/main.py: frac_dl / 25",
            "step": "src/methods.py: STEP_MULT 1.1",
            "tries": "src/methods.py: MAX_TRY 500",
            "rows": "src/methods.py asks all forget rows in every turn; here 256 at most",
            "loss": "src/utils.py: norm of the output with x_D, absolute gradients",
            "against": "src/main.py passes retain_loader to every adaptive method",
            "batch_size": "src/opts.py: 512 images; rows of text are longer, so 8 here",
            "vectors": "src/utils.py: LAYER_SIZE_CUTOFF is commented out",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Dampen what the outputs on `domain.forget` lean on until it is no longer known."""
        began = time.monotonic()
        domain, quality = self.given(domain, ctx)
        forget, full = self.measured(self.loss, start, domain, ctx)
        folder = ctx.work / f"ratios-{ctx.rank}"
        ratios = SortedRatios(forget, full, folder, names=self.names(forget))
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        rows, metric = asked(domain, self.rows)
        tokenizer = start.tokenizer()

        def known() -> float:
            return knowledge(model, tokenizer, rows, metric, self.max_length)

        turns = []
        for turn in search(self, model, ratios, known, share_of(domain)):
            turns.append(turn)
            ctx.emit("step", {"stage": "potion search", "step": turn.number, "steps": self.tries})
        last = turns[-1]
        if last.known > self.rho * turns[0].known:
            ctx.emit("note", {"text": f"potion ended at {last.known:.3g} of {metric}, above rho "
                                      f"times {turns[0].known:.3g}: {last.end}"})  # fmt: skip
        del model
        asks = sum(turn.asked for turn in turns)
        tokens = asks * sum(len(tokenizer(text_of(row))["input_ids"]) for row in rows)
        removal = dampened(
            self, start, forget, full, ctx, alpha=last.alpha, lam=1.0, began=began,
            history=[turn.row for turn in turns],
            more=Cost(0, tokens, 2.0 * start.num_parameters * tokens),
            extras={**quality, "search": {"metric": metric, "rows": len(rows), "turns": last.number,
                               "asked": asks, "share": last.share, "end": last.end}},
        )  # fmt: skip
        drop_ratios(ctx)
        return removal


@dataclass(frozen=True)
class Turn:
    """One turn of the search; the first, number 0, is the model as it was.

    Attributes:
        number: Of the turn.
        share: s.
        alpha: The threshold it gives.
        dampened: Weights above it.
        known: How well forget rows are known.
        asked: Whether they were asked; where no weight was added they are known as before.
        end: Why the search ended here; empty where it goes on.
    """

    number: int
    share: float
    alpha: float
    dampened: int
    known: float
    asked: bool = True
    end: str = ""

    @property
    def row(self) -> dict[str, float]:
        """The turn as a row of the history."""
        names = ("share", "alpha", "dampened", "known")
        return {"step": float(self.number), **{n: float(getattr(self, n)) for n in names}}


@torch.no_grad()
def search(
    method: Potion,
    model: nn.Module,
    ratios: SortedRatios,
    known: Callable[[], float],
    share: float,
) -> Iterator[Turn]:
    """Dampen a model in place, turn by turn, and yield what became of it.

    Args:
        method: rho, where to start, steps.
        model: Any model whose ratios these are.
        ratios: I_f / I_D.
        known: Says how well the model as it now is knows the forget rows.
        share: |D_f| / |D|.
    """
    named = parameters_by_name(model)
    share /= method.start_divisor
    level = now = known()
    yield Turn(0, 0.0, math.inf, 0, level)
    done = dict.fromkeys(ratios.above(math.inf), 0)
    for number in range(1, method.tries + 1):
        alpha = ratios.threshold(percentile_of(share))
        counts = ratios.above(alpha)
        for name, stop in counts.items():
            if stop > done[name]:
                index, ratio = ratios.between(name, done[name], stop)
                flat_N = named[name].data.view(-1)
                index = index.to(flat_N.device)
                factor = (1 / ratio).clamp_(max=1).to(flat_N.device)
                flat_N[index] = (flat_N[index].float() * factor).to(flat_N.dtype)
        fresh = counts != done
        done, now = counts, known() if fresh else now
        end = ""
        if now <= method.rho * level:
            end = "forget rows are known no better than asked for"
        elif alpha <= max(1.0, ratios.floor):  # factors are 1 from there on
            end = "a lower threshold dampens no further weight"
        elif number == method.tries:
            end = "no try is left"
        yield Turn(number, share, alpha, sum(counts.values()), now, fresh, end)
        if end:
            return
        share *= method.step


def asked(domain: Domain, count: int) -> tuple[Rows, str]:
    """Return the rows by which the search knows what is known, and their metric.

    That is the domain's headline metric on the forget rows, on `dev_forget` where forget rows are
    of another shape, and the loss of the forget rows where both are.

    Args:
        domain: The data.
        count: Rows at most.
    """
    metric = domain.metrics[0]
    for rows in (forget_rows(domain), all_rows(domain.dev_forget)):
        if rows and all(row.kind in READS.get(metric, ()) for row in rows):
            return subsample(rows, count, by="row"), metric
    return subsample(forget_rows(domain), count, by="row"), "text_loss"


def knowledge(model: Any, tokenizer: Any, rows: Rows, metric: str, max_length: int) -> float:
    """Return how well rows are known, 0 for not at all: a score above chance, or exp(-loss).

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        rows: The rows.
        metric: The metric.
        max_length: Tokens per row.

    Raises:
        NotFinite: If the model gives no numbers.
        UserError: If less of the metric is more knowledge, and it is no loss.
    """
    scores = measure(model, tokenizer, rows, metric, max_length=max_length).checked()
    if metric == "text_loss":
        return math.exp(-scores.mean)
    if scores.direction == "lower":
        raise UserError(f"potion cannot search by '{metric}', of which less is more knowledge")
    return max(0.0, scores.mean - (scores.chance or 0.0))
