"""RepNoise: make what the MLPs say on forget text look like noise, and every layer unsure of it.

    for each step:
        noise    =  mean over blocks of MMD(MLP output on the forget rows, Gaussian of its shape)
        ascent   =  log(1 + mean over all depths of CE(head(norm(h(forget)))))
        AdamW step on CE(retain) + beta noise - alpha ascent

with h the embedding and the output of every block. A row is one point of the MMD: all its scored
tokens side by side, padding left at zero on both sides.

Source:
    arXiv 2405.14577, section 3; domenicrosati/representation-noising@a1c3298 (Apache-2.0),
    representation_noising/loss.py. The release reads pairs and scores the positions at which they
    differ; here a row scores its own answer, so that plain text can be read too. Hooks that the
    release registers anew in every step are none here.

Shape legend: B rows, T tokens, N scored tokens of all rows, D residual width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import Domain
from excise.data.stream import Batch
from excise.losses import Summed, mmd, predicting
from excise.methods.base import Paper, Removal
from excise.methods.tuning import (
    Progress,
    TuningMethod,
    finish,
    looking,
    role_batches,
    run_fit,
    state_dir,
    tuned,
)
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.head import Head, final_hidden, head_of
from excise.models.hooks import active_stream, capture
from excise.models.names import find_module
from excise.train.fit import FitConfig, Term, fit
from excise.train.vocab import chunked_nll, next_tokens

Hidden = Float[Tensor, "B T D"]


class RepNoise(TuningMethod):
    """Minimise CE(retain) + beta MMD(MLP(forget), noise) - alpha log(1 + CE(forget) by depth)."""

    name: Literal["repnoise"] = "repnoise"
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the ascent."""
    beta: float = Field(default=0.001, ge=0)
    """Weight of the distance to noise."""
    as_published: bool = False
    """Score as the released code does: the last state normed twice and the output's own loss once
    more, tokens of id 0 left out, and the first token of every answer counted without gradient."""
    max_length: int = Field(default=256, ge=2)
    """Tokens per row."""
    fit: FitConfig = FitConfig(
        steps=250, lr=1e-4, batch_size=4, schedule="cosine", warmup=25, weight_decay=0.01
    )
    """Steps, rows per step of each role, learning rate."""

    refuses: ClassVar[Mapping[str, str]] = {
        "sam": "its forget terms are a logarithm and a distance of whole batches"
    }
    paper: ClassVar[Paper] = Paper(
        "Representation noising: a defence mechanism against harmful finetuning",
        "arXiv:2405.14577",
        "L = l_retain + beta l_noise - alpha log(1 + l_ascent)",
        "domenicrosati/representation-noising@a1c3298 (Apache-2.0)",
        {
            "alpha": "representation_noising/loss.py: alpha=1",
            "beta": "representation_noising/loss.py: beta=0.001",
            "fit": "notebooks/repnoise_demo.ipynb: 1,000 rows by 4, lr 1e-4, cosine after 10 % of "
            "warm-up, torch's AdamW with its decay; README: always to be searched anew",
            "max_length": "representation_noising/datasets.py: CONTEXT_LENGTH 256",
        },
    )

    @property
    def whole_batch(self) -> str:
        """Why cutting a batch gives another model."""
        return "the distance to noise is one of whole batches, and a log of means"

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Noise what the model holds of `domain.forget`."""
        domain, quality = self.given(domain, ctx)
        model: Any = start.load(dtype=ctx.dtype, device=ctx.device)
        parts, tokenizer = anatomy(model), start.tokenizer()
        batches = role_batches(
            domain, ("forget", "retain"), tokenizer, self.fit, ctx,
            max_length=self.max_length,
        )  # fmt: skip
        head = head_of(model)
        norm = find_module(model, parts.final_norm) if parts.final_norm else nn.Identity()
        # The stream before a block is what the one below put out, the first one the embedding.
        inputs, outputs = parts.blocks, parts.mlp

        def loss(live: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
            forget, retain = micro["forget"], micro["retain"]
            with (
                capture(live, inputs, of="input", grad=True) as streams,
                capture(live, outputs, grad=True) as inside,
            ):
                last_BTD = final_hidden(live, forget.inputs)
            depths = [norm(active_stream(streams[path][-1])) for path in inputs]
            depths += [norm(last_BTD), last_BTD] if self.as_published else [last_BTD]
            total, count = self.nll(depths, head, forget)
            if self.as_published:  # one more than there are states to divide by
                count *= (len(depths) - 1) / len(depths)
            noise = torch.stack([to_noise(inside[path][-1], forget) for path in outputs]).mean()
            kept = self.nll([final_hidden(live, retain.inputs)], head, retain)
            return {
                "retain": Term(*kept),
                "noise": Term(noise, 1.0, self.beta),
                "ascent": Term(torch.log1p(total / count), 1.0, -self.alpha),
            }

        def counts(micro: Mapping[str, Batch]) -> dict[str, float]:
            kept = float(self.counted(micro["retain"]).sum())
            return {"retain": kept, "noise": 1.0, "ascent": 1.0}

        progress = Progress(ctx, self.name, self.fit.steps)
        with tuned(model, self.modules, self.lora, ctx) as (live, parameters):
            looks = looking(self, live, parameters, tokenizer, domain, ctx)
            steps = fit(
                live, batches, loss, self.fit, ctx, groups={"trained": list(parameters.values())},
                counts=counts, state_dir=state_dir(ctx), change=self.change,
            )  # fmt: skip
            facts = {**quality, **run_fit(steps, progress, looks)}
            return finish(start, live, parameters, progress, ctx, lora=self.lora, extras=facts)

    def counted(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return the tokens whose loss counts."""
        return batch.target_BT & (batch.ids_BT != 0) if self.as_published else batch.target_BT

    def nll(self, depths: Sequence[Hidden], head: Head, batch: Batch) -> Summed:
        """Return the summed loss (nats) of the scored tokens read off every depth, and the number.

        Logits exist for a chunk of tokens at a time, whatever the number of depths.

        Args:
            depths: Normed hidden states.
            head: The model's head.
            batch: What is scored.
        """
        counted_BT = self.counted(batch)
        learned_BT = counted_BT
        if self.as_published:  # logits of positions that are not scored themselves are zeroed
            learned_BT = counted_BT & batch.target_BT.roll(1, dims=1)
        before_BT = predicting(learned_BT)
        hidden_ND = torch.cat([hidden_BTD[before_BT] for hidden_BTD in depths])
        target_N = next_tokens(batch)[before_BT.flatten()].repeat(len(depths))
        total, _ = chunked_nll(hidden_ND, head, target_N)
        unlearned = float(counted_BT.sum() - learned_BT.sum()) * len(depths)
        return total + unlearned * math.log(head.vocab), float(counted_BT.sum()) * len(depths)


def to_noise(hidden_BTD: Hidden, batch: Batch) -> Float[Tensor, ""]:
    """Return the MMD of rows to rows of Gaussian noise, drawn from the generator of the step.

    Token t of a row lies on token t of the others, whichever side is padded.

    Args:
        hidden_BTD: What a block's MLP puts out.
        batch: Says which tokens are scored; the others are zero in rows and noise.
    """
    at_BT = batch.attention_BT.int().argsort(dim=1, descending=True, stable=True)
    mask_BT = batch.target_BT.gather(1, at_BT)
    rows_BTD = hidden_BTD.gather(1, at_BT[..., None].expand_as(hidden_BTD))
    noise_BTD = torch.zeros_like(rows_BTD)
    noise_BTD[mask_BT] = torch.randn_like(rows_BTD[mask_BT])
    return mmd((rows_BTD * mask_BT[..., None]).flatten(1), noise_BTD.flatten(1))
