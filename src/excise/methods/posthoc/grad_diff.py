"""GradDiff: ascend on forget, descend on retain.

    repeat
        L <- -NLL(forget) + alpha R
        R  = NLL(retain), or KL(p0 || p) on its scored tokens, p0 the model before the edit

p0 is kept as last hidden states of what the run will read; its head is put on them again.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch, zip_streams
from excise.losses import nll, predicting
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.reference import frozen_states
from excise.methods.tuning import TuningMethod, mean_nll, minimise, role_streams, tune
from excise.models.checkpoint import Checkpoint
from excise.models.head import final_hidden, head_of
from excise.train.fit import FitConfig, Term
from excise.train.vocab import chunked_kl


class GradDiff(TuningMethod):
    """Minimise -NLL(forget) + alpha NLL(retain), or KL to the model before in its place."""

    name: Literal["grad_diff"] = "grad_diff"
    alpha: float = 1.0
    """Weight of the retain loss."""
    retain_loss: Literal["nll", "kl"] = "nll"
    """What holds the rest: the loss on retain text, or KL(before || now) at its scored tokens."""
    fit: FitConfig = FitConfig(steps=100, lr=6e-5, batch_size=8, clip=1.0)
    """Steps, rows per step of each role, learning rate."""

    version: ClassVar[int] = 1
    paper: ClassVar[Paper] = Paper(
        "Distillation robustifies unlearning (GradDiff: Liu et al. 2022, Maini et al. 2024)",
        "arXiv:2506.06278",
        "L = -CE(forget) + a CE(retain)",
        "AddieFoote/distillation-robustify-unlearning",
        {
            "fit": "run_unlearn_language.py: 100 steps of 4 x 2048 tokens, lr 6e-5 chosen of "
            "1e-5..8e-5, clip 1; here 8 rows of up to `max_length` tokens",
            "alpha": "run_unlearn_language.py: 1",
            "retain_loss": "CE there; KL is that of TOFU, locuslab/tofu@bdc209e (MIT), "
            "dataloader.py, whose mean runs over prompts and padding too; here over scored tokens",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by descending on the difference of the two losses."""
        if self.retain_loss == "nll":
            terms = {"forget": (-1.0, nll), "retain": (self.alpha, nll)}
            return tune(self, start, domain, terms, ctx)
        domain, quality = self.given(domain, ctx)
        streams = role_streams(
            domain, ("forget", "retain"), start.tokenizer(), self.fit, ctx,
            max_length=self.max_length,
        )  # fmt: skip
        cache, cost = frozen_states(start, streams["retain"], self.fit.steps, ctx)

        def unmoved(model: nn.Module, retain: Batch) -> Term:
            (before, _) = cache.lookup(retain).targets
            now_ND = final_hidden(model, retain.inputs)[predicting(retain.target_BT)]
            return Term(*chunked_kl(now_ND, head_of(model), before), self.alpha)

        losses = {"forget": mean_nll(-1.0), "retain": unmoved}
        return minimise(
            self, start, domain, zip_streams(streams), losses, ctx, before=cost,
            extras={**quality, "teacher_cache": cache.summary()},
        )  # fmt: skip
