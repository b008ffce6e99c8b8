"""Circuit breakers (RR): turn forget activations away from where they were, hold the rest.

    for step t = 1..T:    c_s = alpha (1 - t / horizon),  c_r = alpha t / horizon
        reroute  =  mean over tokens and layers of relu(cos(h(forget), h0(forget)))
        retain   =  mean over tokens and blocks of |h(retain) - h0(retain)|
        AdamW step of the adapter on c_s reroute + c_r retain

with h the output of a block, h0 the same with the adapter off. Blocks above the last layer are
never loaded. An adapter begins as no change, where a cosine of 1 and a distance of 0 have no
gradient: the direction of the first step is that of rounding, here as in the release, so that two
machines, or two sides of padding, part ways at once.

Source:
    arXiv 2406.04313, algorithm 1 and appendix; GraySwanAI/circuit-breakers (MIT),
    src/lorra_circuit_breaker.py, read in the copy that NexusSin/Llama-3-IHL-Circuit-Breakers-
    Testing-and-Compliance@ad4ff3d holds.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Batch, zip_streams
from excise.losses import Summed, displacement, reroute
from excise.methods.base import Paper, Removal
from excise.methods.tuning import (
    Progress,
    TrainingMethod,
    finish,
    forget_rows,
    looking,
    numbered,
    run_fit,
    state_dir,
    stream,
    tuned,
)
from excise.models.anatomy import Backbone, backbone
from excise.models.checkpoint import Checkpoint
from excise.models.head import hidden_at
from excise.models.lora import LoRA, reference
from excise.train.fit import FitConfig, Term, fit

Hidden = Float[Tensor, "B T D"]


class CircuitBreakers(TrainingMethod):
    """Minimise relu(cos(h, h0)) on forget at some layers + |h - h0| on retain at all below them."""

    name: Literal["circuit_breakers"] = "circuit_breakers"
    layers: tuple[int, ...] = Field(default=(9, 19), min_length=1)
    """Blocks whose output is turned away; what stands above the last is neither loaded nor
    trained."""
    alpha: float = Field(default=10.0, gt=0)
    """Sum of the weights of both terms; it moves from rerouting to retain."""
    horizon: int = Field(default=0, ge=0)
    """Step at which all weight would be on retain; 0 for twice `fit.steps`."""
    as_published: bool = False
    """Average retain as the released code does: over padding and the embedding too, and over
    one block more, behind the model's last norm."""
    max_length: int = Field(default=512, ge=2)
    """Tokens per row to forget."""
    retain_max_length: int = Field(default=1024, ge=2)
    """Tokens per row to retain."""
    fit: FitConfig = FitConfig(steps=150, lr=1e-4, batch_size=16, clip=1.0)
    """Steps, rows per step of each role, learning rate."""
    lora: LoRA = LoRA(rank=16, alpha=16.0)
    """The adapter; off, it is the frozen model."""

    paper: ClassVar[Paper] = Paper(
        "Improving alignment and robustness with circuit breakers",
        "arXiv:2406.04313",
        "algorithm 1, L = c_s relu(cos(h, h0)) + c_r |h - h0|",
        "GraySwanAI/circuit-breakers (MIT), read in "
        "NexusSin/Llama-3-IHL-Circuit-Breakers-Testing-and-Compliance@ad4ff3d",
        {
            "layers": "scripts/lorra_circuit_breaker_llama3_8b.sh: target_layers 10,20 of "
            "hidden_states, which counts the embedding as 0",
            "alpha": "scripts/lorra_circuit_breaker_llama3_8b.sh: lorra_alpha 10",
            "horizon": "src/lorra_circuit_breaker.py divides by 300 whatever max_steps is; the "
            "script runs 150, so that weights end at 5 and 5; here it is twice the steps",
            "max_length": "src/cb_train_dataset.py: 256 tokens of prompt and 256 of answer; here "
            "of both together",
            "retain_max_length": "src/cb_train_dataset.py: 1024 tokens of retain text",
            "fit": "scripts/lorra_circuit_breaker_llama3_8b.sh: 150 steps, lr 1e-4, batch 16, "
            "constant; clip is the Trainer's",
            "lora": "scripts/lorra_circuit_breaker_llama3_8b.sh: r 16, alpha 16 on all linear "
            "layers; its dropout of 0.05 is left out",
        },
    )

    @property
    def whole_batch(self) -> str:
        """Why cutting a batch gives another model."""
        return "both terms begin without gradient, so rounding sets out the path"

    @property
    def step_cost(self) -> float:
        """The frozen pass is forward alone."""
        return 4 / 3

    @model_validator(mode="after")
    def _sound(self) -> CircuitBreakers:
        """Refuse a model that is cut as released and whole at once."""
        if self.stop is not None and self.as_published:
            raise ValueError(
                "'stop' needs the whole model, and 'as_published' what the norm puts out behind a "
                "part of it; set one"
            )
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Reroute `domain.forget`."""
        parts = backbone(start.shapes)
        blocks = max(self.layers) + 1 + self.as_published
        if min(self.layers) < 0 or blocks > parts.num_blocks:
            raise UserError(
                f"circuit_breakers: layers {', '.join(map(str, self.layers))} need {blocks} blocks "
                f"and this model has {parts.num_blocks}; set 'layers' lower"
            )
        if self.stop is None:
            model: Any = start.load_prefix(blocks, dtype=ctx.dtype, device=ctx.device)
        else:  # losses on dev need every block
            model = start.load(dtype=ctx.dtype, device=ctx.device)
        domain, quality = self.given(domain, ctx)
        size = sum(p.numel() for p in model.parameters())
        tokenizer = start.tokenizer()
        rows = {"forget": forget_rows(domain), "retain": domain.retain}
        lengths = {"forget": self.max_length, "retain": self.retain_max_length}
        batches = zip_streams(
            {
                role: stream(
                    rows[role], tokenizer, self.fit, ctx, purpose=role, max_length=lengths[role]
                )
                for role in rows
            }
        )
        turned = [parts.blocks[layer] for layer in self.layers]
        held = self.held(parts, blocks)

        def loss(live: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
            forget, retain = micro["forget"], micro["retain"]
            with torch.no_grad(), reference(live):
                from_forget = hidden_at(live, turned, forget.inputs)
                from_retain = hidden_at(live, held, retain.inputs)
            away = [
                reroute(now, was, forget.attention_BT)
                for now, was in zip(
                    hidden_at(live, turned, forget.inputs), from_forget, strict=True
                )
            ]
            kept = [
                displacement(now, was, retain.attention_BT)
                for now, was in zip(hidden_at(live, held, retain.inputs), from_retain, strict=True)
            ]
            share = min(1.0, (micro["step"] + 1) / (self.horizon or 2 * self.fit.steps))
            count = counts(micro)
            return {
                "reroute": Term(_sum(away), count["reroute"], self.alpha * (1 - share)),
                "retain": Term(_sum(kept), count["retain"], self.alpha * share),
            }

        def counts(micro: Mapping[str, Any]) -> dict[str, float]:
            retain: Batch = micro["retain"]
            # As released, the embedding is a state that never moves and padding tokens that do not.
            tokens = retain.ids_BT.numel() if self.as_published else retain.num_tokens
            return {
                "reroute": float(micro["forget"].num_tokens * len(turned)),
                "retain": float(tokens * (len(held) + self.as_published)),
            }

        progress = Progress(ctx, self.name, self.fit.steps)
        with tuned(model, parts.blocks[:blocks], self.lora, ctx) as (live, parameters):
            looks = looking(self, live, parameters, tokenizer, domain, ctx)
            steps = fit(
                live, numbered(batches), loss, self.fit, ctx,
                groups={"trained": list(parameters.values())}, counts=counts,
                state_dir=state_dir(ctx),
            )  # fmt: skip
            chosen = run_fit(steps, progress, looks)
            return finish(
                start, live, parameters, progress, ctx, lora=self.lora,
                extras={"hidden_at": turned, "blocks_loaded": blocks, **quality, **chosen},
                # Frozen and live forward, and a backward through frozen weights.
                flops_per_token=6.0 * size,
            )  # fmt: skip

    def held(self, parts: Backbone, blocks: int) -> list[str]:
        """Return the modules whose output is held on retain text.

        Args:
            parts: Backbone of the whole model.
            blocks: Number of blocks that are loaded.
        """
        if self.as_published and parts.final_norm:
            return [*parts.blocks[: blocks - 1], parts.final_norm]
        return list(parts.blocks[:blocks])


def _sum(terms: Sequence[Summed]) -> Tensor:
    """Return the sum over layers."""
    return torch.stack([total for total, _ in terms]).sum()
