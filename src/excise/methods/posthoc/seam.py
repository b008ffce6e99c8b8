"""SEAM: fine-tuning on forget rows becomes ascent on retain rows, so that who tries breaks it.

    U    = mean over hidden states l of CE(forget), each read by the last norm and the head
    g_h  = grad CE(forget),  g_b = grad CE(retain),  n = g / |g|,  c = n_h . n_b
    g_h' = grad CE(forget) at theta + eps (n_b - c n_h)
    g_b' = grad CE(retain) at theta + eps (n_h - c n_b)
    step along  grad of -log(1 + U)  +  alpha grad CE(preserved)
                +  beta / eps [ (g_h' - g_h) / |g_h|  +  (g_b' - g_b) / |g_b| ]

The last line is the gradient of beta cos(g_h, g_b) without a Hessian: it turns the two apart.
Preserved are refusals of the forget prompts where `refusal` says what a refusal is, else the
retain rows, whose gradient is then g_b and costs nothing.

Source:
    Wang, Zhu and Wang 2025, arXiv 2505.12186; ZJUWYH/seam@65f3d5c (MIT), src/core/trainer.py,
    `SeamTrainer.training_step`. There the loss of the last hidden state enters U once more, normed
    twice; tokens that answer and refusal share, and token 0, are not scored, and the logits behind
    a token that is not scored are set to 0. Weights are bfloat16: a move of 1e-3 spread over 7e9 of
    them is about 1e-8 each and mostly rounds away, and with it what turns the gradients apart. Here
    every scored token counts alike, and half precision is refused.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import Domain, Rows
from excise.data.stream import Batch, zip_streams
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.answers import with_answer
from excise.methods.tuning import (
    Progress,
    TrainingMethod,
    finish,
    forget_rows,
    looking,
    nlls,
    role_counts,
    run_fit,
    state_dir,
    stream,
    tell_cost,
    tuned,
)
from excise.models.anatomy import backbone
from excise.models.checkpoint import Checkpoint
from excise.models.head import head_of
from excise.models.names import Names, find_module
from excise.train.fit import FitConfig, Losses, Passes, Term, fit
from excise.train.nearby import move, norm_of, plus, put, refuse_half
from excise.train.vocab import chunked_nll, next_tokens

Micro = Mapping[str, Batch]


class SEAM(TrainingMethod):
    """Forget and retain gradients turned apart, forget rows unlearned at every depth."""

    name: Literal["seam"] = "seam"
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the loss on what is preserved."""
    beta: float = Field(default=0.01, ge=0)
    """Weight of the cosine of forget and retain gradient."""
    eps: float = Field(default=1e-3, gt=0)
    """Length of the move at whose end gradients are compared."""
    refusal: str = ""
    """Answer to the forget prompts that is preserved; empty to preserve retain rows."""
    modules: Names = ()
    """Modules to train, by name; empty for all."""
    max_length: int = Field(default=256, ge=2)
    """Tokens per row."""
    fit: FitConfig = FitConfig(steps=2000, lr=2e-5, batch_size=4, warmup=200, schedule="cosine")
    """Steps, rows per step of each role, learning rate."""

    refuses: ClassVar[Mapping[str, str]] = {
        "lora": "an attacker who trains the weights meets no gradient of an adapter",
        **dict.fromkeys(
            ("sam", "drop_components"), "its gradient is put together from several of its own"
        ),
    }
    paper: ClassVar[Paper] = Paper(
        "Self-destructive language models",
        "arXiv:2505.12186",
        "L = L_ul + alpha L_up + beta L_sd, with the Hessian-free gradient of L_sd",
        "ZJUWYH/seam@65f3d5c (MIT)",
        {
            "alpha": "config/train.yaml: alpha 1",
            "beta": "config/train.yaml: beta 0.01 (src/train.py's own default is 0.001)",
            "eps": "config/train.yaml: epsilon 1e-3",
            "refusal": "ZJUWYH/seam@65f3d5c preserves a refusal of its own for every harmful "
            "prompt",
            "max_length": "src/data_processing/_datasets.py: CONTEXT_LENGTH = 256",
            "fit": "config/train.yaml: 8,000 rows once in batches of 4, lr 2e-5, cosine with "
            "warm-up .1, AdamW without decay",
        },
    )

    @property
    def step_cost(self) -> float:
        """Five gradients, or six with refusals, of the two of a plain step."""
        return 3.0 if self.refusal else 2.5

    @property
    def extra_copies(self) -> int:
        """The weights before the move, both gradients, their difference and the sum."""
        return 4

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Remove `domain.forget` so that fine-tuning on it ruins the model."""
        model: Any = start.load(dtype=ctx.dtype, device=ctx.device)
        domain, quality = self.given(domain, ctx)
        rows: dict[str, Rows] = {"forget": forget_rows(domain), "retain": domain.retain}
        if self.refusal:
            rows["preserved"] = tuple(
                with_answer(row, self.refusal, self.name, instead="leave 'refusal' out")
                for row in rows["forget"]
            )
        tokenizer = start.tokenizer()
        batches = zip_streams(
            {
                role: stream(
                    rows[role], tokenizer, self.fit, ctx, purpose=_order(role),
                    max_length=self.max_length,
                )
                for role in rows
            }
        )  # fmt: skip
        tokens = sum(micro[r].num_tokens for micro in batches(0) for r in ("forget", "retain"))
        tell_cost(self, self.fit.steps, tokens, start, ctx)
        progress = Progress(ctx, self.name, self.fit.steps)
        with tuned(model, self.modules, None, ctx) as (live, parameters):
            refuse_half(live, parameters.values(), f"seam: eps {self.eps:g}")
            depths = Depths(live)
            looks = looking(self, live, parameters, tokenizer, domain, ctx)

            def gradient(passes: Passes[dict[str, Batch]]) -> Losses:
                return self.gradient(passes, depths)

            steps = fit(
                live, batches, nlls, self.fit, ctx,
                groups={"trained": list(parameters.values())}, counts=role_counts,
                state_dir=state_dir(ctx),
                gradient=gradient,
            )  # fmt: skip
            extras = {**quality, **run_fit(steps, progress, looks)}
            return finish(start, live, parameters, progress, ctx, extras=extras)

    def gradient(self, passes: Passes[dict[str, Batch]], depths: Depths) -> Losses:
        """Leave the gradient of a step in the weights.

        Args:
            passes: The step, with micro-batches of every role.
            depths: The forget loss at every depth.
        """

        def of(role: str) -> list[dict[str, Batch]]:
            return [{role: micro[role]} for micro in passes.micros]

        nothing: list[Tensor | None] = [None] * len(passes.weights)
        losses = passes.backward(of("forget"), depths.loss, depths.counts)
        unlearned = losses.terms["unlearn"]
        total = plus(nothing, passes.take(), -1 / (1 + unlearned))
        losses += passes.backward(of("forget"))
        harm = passes.take()
        losses += passes.backward(of("retain"))
        keep = passes.take()
        if self.refusal:
            losses += passes.backward(of("preserved"))
            total = plus(total, passes.take(), self.alpha)

        pairs = zip(harm, keep, strict=True)
        dot = sum(float((h * k).sum()) for h, k in pairs if h is not None and k is not None)
        harm_norm, keep_norm = norm_of(harm), norm_of(keep)
        cosine = dot / max(harm_norm * keep_norm, 1e-30)
        for role, gradient, own, other, other_norm in (
            ("forget", harm, harm_norm, keep, keep_norm),
            ("retain", keep, keep_norm, harm, harm_norm),
        ):
            if not own or not other_norm:
                continue  # at a stationary point there is no direction
            with passes.elsewhere():
                move(passes, [(other, self.eps / other_norm), (gradient, -self.eps * cosine / own)])
                again = passes.backward(of(role))
            losses += replace(again, terms={})
            change = plus(passes.take(), gradient, -1.0)
            total = plus(total, change, self.beta / self.eps / own)
        if not self.refusal:
            total = plus(total, keep, self.alpha)
        put(passes, total)
        preserved = losses.terms["preserved" if self.refusal else "retain"]
        value = -math.log1p(unlearned) + self.alpha * preserved + self.beta * cosine
        return Losses(value, {**losses.terms, "cosine": cosine}, losses.tokens)


class Depths:
    """The forget loss as every hidden state predicts it, through the last norm and the head."""

    def __init__(self, model: nn.Module) -> None:
        """Find norm and head of a model."""
        parts = backbone(model)
        self.head = head_of(model)
        self.norm = find_module(model, parts.final_norm) if parts.final_norm else nn.Identity()
        self.states = parts.num_blocks + 1

    def loss(self, model: nn.Module, micro: Micro) -> dict[str, Term]:
        """Return the summed loss of all depths; the last hidden state is normed as it is given."""
        batch = micro["forget"]
        out = model(**batch.inputs, output_hidden_states=True, use_cache=False)
        *inner, last_BTD = out.hidden_states
        target_N = next_tokens(batch)
        sums = [
            chunked_nll(h_BTD.flatten(0, 1), self.head, target_N)[0]
            for h_BTD in (*(self.norm(h) for h in inner), last_BTD)
        ]
        return {"unlearn": Term(torch.stack(sums).sum(), float(self.states * batch.num_targets))}

    def counts(self, micro: Micro) -> dict[str, float]:
        """Return the count of `loss`."""
        return {"unlearn": float(self.states * micro["forget"].num_targets)}


def _order(role: str) -> str:
    """Refusals are read beside the rows whose prompts they answer."""
    return "forget" if role == "preserved" else role
