"""UNDIAL: distil the model from itself, with the logit of every right token turned down.

    z0 <- logits of the model before the edit on forget text, kept as last hidden states
    repeat
        L <- mean_t CE(softmax(z0_t - beta onehot(y_t)), p_t) on forget [+ alpha NLL(retain)]

What is minimised has an end, the turned-down distribution. The value reported is the KL to it,
which is the cross-entropy of the paper less a constant, so that 0 is the end.

Shape legend: B rows, T tokens, N scored tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, cast

from pydantic import Field
from torch import nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch, zip_streams
from excise.losses import predicting
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.reference import frozen_states
from excise.methods.tuning import TuningMethod, mean_nll, minimise, role_streams
from excise.models.checkpoint import Checkpoint
from excise.models.head import final_hidden, head_of
from excise.train.fit import FitConfig, Term
from excise.train.vocab import HiddenTarget, chunked_kl


class UNDIAL(TuningMethod):
    """Minimise KL(softmax(z0 - beta onehot(y)) || model) on forget tokens + alpha NLL(retain)."""

    name: Literal["undial"] = "undial"
    beta: float = Field(default=10.0, ge=0)
    """By how much the logit of the right token is turned down."""
    alpha: float = Field(default=0.0, ge=0)
    """Weight of the retain loss; with 0 no retain row is read."""
    fit: FitConfig = FitConfig(
        steps=125, lr=1e-4, batch_size=32, warmup=12, schedule="linear", weight_decay=0.01, clip=1.0
    )
    """Steps, rows per step of each role, learning rate."""

    needs: ClassVar[tuple[str, ...]] = ("forget",)
    paper: ClassVar[Paper] = Paper(
        "UNDIAL: self-distillation with adjusted logits for robust unlearning in large language "
        "models",
        "arXiv:2402.10052",
        "E CE(softmax(z0 - gamma onehot(y)), p)",
        "locuslab/open-unlearning@d3d7cf9 (MIT); the authors' is dong-river/LLM_unlearning@89856dc "
        "(no licence)",
        {
            "beta": "open-unlearning, configs/trainer/UNDIAL.yaml: 10.0; main.py of the authors: "
            "5, their README: 3",
            "alpha": "configs/trainer/UNDIAL.yaml: 0.0, where retain rows are still read and "
            "back-propagated; here they are not",
            "fit": "configs/trainer/UNDIAL.yaml: lr 1e-4, 10 epochs, of 32 rows (125 steps on the "
            "400 of TOFU's forget10); configs/experiment/unlearn/tofu/default.yaml: weight decay "
            "0.01, warm-up of one epoch, then linear; clipping at 1 is the default of its Trainer. "
            "There the mean runs over prompts and padding too, with -100 as an index; here over "
            "the scored tokens",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` by distilling what the model said without its right tokens."""
        domain, quality = self.given(domain, ctx)
        roles = ("forget", "retain") if self.alpha else ("forget",)
        streams = role_streams(
            domain, roles, start.tokenizer(), self.fit, ctx, max_length=self.max_length
        )
        cache, cost = frozen_states(start, streams["forget"], self.fit.steps, ctx)

        def turned_down(model: nn.Module, forget: Batch) -> Term:
            said = cast(HiddenTarget, cache.lookup(forget).targets[0])
            at_BT = predicting(forget.target_BT)
            right_N = forget.ids_BT.roll(-1, dims=1)[at_BT]
            target = replace(said, lowered_N=right_N, by=self.beta)
            hidden_ND = final_hidden(model, forget.inputs)[at_BT]
            return Term(*chunked_kl(hidden_ND, head_of(model), target))

        losses = {"forget": turned_down, "retain": mean_nll(self.alpha)}
        return minimise(
            self, start, domain, zip_streams(streams), losses, ctx, before=cost,
            extras={**quality, "teacher_cache": cache.summary()},
        )  # fmt: skip
