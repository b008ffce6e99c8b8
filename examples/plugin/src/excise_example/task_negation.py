"""Task negation: subtract from the weights what fine-tuning on the forget set would add."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

import excise as ex
from excise.data.stream import Batch
from excise.losses import nll
from excise.methods.tuning import (
    Progress,
    forget_rows,
    role_counts,
    run_fit,
    state_dir,
    stream,
    tuned,
    write_edit,
)
from excise.train.fit import Term, fit


class TaskNegation(ex.Method):
    """theta <- theta - strength * (theta_forget - theta), theta_forget tuned on the forget set."""

    name: Literal["task_negation"] = "task_negation"
    """Name of the method."""
    strength: float = 1.0
    """Multiple of the fine-tuning that is subtracted; 0.05 to 1 in the paper, chosen on dev."""
    fit: ex.FitConfig = ex.FitConfig(steps=20, lr=1e-3, batch_size=16)
    """The fine-tuning."""
    max_length: int = 128
    """Tokens per row."""

    paper: ClassVar[ex.Paper] = ex.Paper(
        "Editing models with task arithmetic", "arXiv:2212.04089", "section 3, tau_new = -tau"
    )
    needs: ClassVar[tuple[str, ...]] = ("forget",)

    def apply(self, start: ex.Checkpoint, domain: ex.Domain, ctx: ex.Context) -> ex.Removal:
        """Remove `domain.forget` by subtracting the task vector of it."""
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        tokenizer, rows = start.tokenizer(), forget_rows(domain)
        forget = stream(
            rows, tokenizer, self.fit, ctx, purpose="forget", max_length=self.max_length
        )

        def batches(step: int) -> list[dict[str, Batch]]:
            return [{"forget": batch} for batch in forget(step)]

        def loss(model: nn.Module, micro: dict[str, Batch]) -> dict[str, Term]:
            total, count = nll(model(**micro["forget"].inputs).logits, micro["forget"])
            return {"forget": Term(total, count)}

        progress = Progress(ctx, self.name, self.fit.steps)
        with tuned(model, (), None, ctx) as (live, parameters):
            groups = {"trained": list(parameters.values())}
            steps = fit(
                live,
                batches,
                loss,
                self.fit,
                ctx,
                groups=groups,
                counts=role_counts,
                state_dir=state_dir(ctx),
            )
            run_fit(steps, progress)
            before = start.weights_of(list(parameters))
            negated = {
                name: before[name] - self.strength * (tuned_to.detach().cpu() - before[name])
                for name, tuned_to in parameters.items()
            }
        cost = progress.cost(start.num_parameters)
        return write_edit(start, negated, ctx, extras={}, cost=cost, history=progress.history)
