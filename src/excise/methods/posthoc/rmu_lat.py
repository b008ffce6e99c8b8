"""RMU + LAT: RMU against an adversary that shifts the residual stream on forget text.

    for topic k:          u_k = c_k v / |v|,  v uniform in [0, 1)^D
    for adversary a:      k = a mod K, batch a div K of topic k and of the retain text
        delta = 0, one vector per row and token, added behind the MLP of block `attack_layer`
        16 times:  AdamW step of delta on CE(forget; delta) - mean log(1 - p(retain; delta))
                   |delta| <= epsilon at every token
        4 times:   forget  =  mean over tokens and D of (h(forget; delta) - u_k)^2
                   retain  =  mean over tokens and D of (h(retain) - h0(retain))^2
                   AdamW step on forget + alpha_k retain

with h the output of block `layer`, h0 that of the original, and three matrices trained as in RMU.
delta is added to the stream where the MLP has been added to it, which is the same but for families
with a norm between the two (Gemma). Blocks below run once an adversary, and copies of the trained
matrices stand for the original model.

Left out of the release: a control vector for every batch, because a list of batches is handed over
where topics are expected; 512 tokens for the first batch and 768 for all others; a mask of the
first n positions where rows are padded on the left.

Source:
    arXiv 2407.15549, section 4.3; aengusl/latent-adversarial-training@53ac752 (MIT),
    latent_at/lat_methods.py, `run_rmu` and `projected_gradient_descent`.

Shape legend: B rows, T tokens, P tokens of the rows attacked, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.stream import Batch, Stream
from excise.losses import not_p, rmu_forget, rmu_retain
from excise.methods.base import Paper, Removal
from excise.methods.posthoc.rmu.parameters import (
    EditableModel,
    TargetParameters,
    editing,
    find_target_parameters,
    flops_per_token,
)
from excise.methods.posthoc.rmu.topics import control_vector, per_topic, topics_of
from excise.methods.tuning import (
    Progress,
    TrainingMethod,
    finish,
    looking,
    run_fit,
    state_dir,
    stream,
)
from excise.models.checkpoint import Checkpoint
from excise.models.head import Head, head_of
from excise.models.lora import LoRA
from excise.models.names import Names, find_module
from excise.models.span import SpanInputs, record_calls, run_span
from excise.train.fit import FitConfig, Term, fit
from excise.train.vocab import chunked_nll, next_tokens

Hidden = Float[Tensor, "B T D"]


class RMULAT(TrainingMethod):
    """RMU's loss at one layer, on forget text under the perturbation of a latent adversary."""

    name: Literal["rmu_lat"] = "rmu_lat"
    layer: int = Field(default=8, ge=1)
    """Block whose output is steered."""
    attack_layer: int = Field(default=-1, ge=-1)
    """Block behind whose MLP the adversary adds its vectors; -1 for the one below `layer`."""
    blocks: tuple[int, ...] = ()
    """Blocks whose MLP matrix is trained; empty for layer-2, layer-1, layer."""
    modules: Names = ()
    """Modules to train by name, instead of `blocks`."""
    steering: float | tuple[float, ...] = 6.5
    """c: norm of the control vector."""
    alpha: float | tuple[float, ...] = 1200.0
    """Weight of the retain term; one value, or one for each topic."""
    epsilon: float = Field(default=2.0, gt=0)
    """Largest norm of the adversary's vector at a token."""
    attack_steps: int = Field(default=16, ge=1)
    """Steps of every adversary."""
    attack_lr: float = Field(default=0.05, gt=0)
    """Learning rate of the adversary."""
    per_attack: int = Field(default=4, ge=1)
    """Steps of the model against one adversary, on its batch."""
    max_length: int = Field(default=768, ge=2)
    """Tokens per row."""
    fit: FitConfig = FitConfig(steps=800, lr=5e-5, batch_size=4, weight_decay=0.01)
    """Steps of the model over all adversaries and topics, rows per step of each role, learning
    rate."""
    lora: LoRA | None = None
    """Train an adapter instead; the frozen model is the adapter switched off."""

    paper: ClassVar[Paper] = Paper(
        "Latent adversarial training improves robustness to persistent harmful behaviors in LLMs",
        "arXiv:2407.15549",
        "section 4.3, RMU under perturbations delta with |delta| <= epsilon",
        "aengusl/latent-adversarial-training@53ac752 (MIT)",
        {
            "layer": "latent_at/lat_methods.py, run_rmu: layer_id 8, layer_ids 6, 7, 8",
            "attack_layer": "latent_at/lat_methods.py, run_rmu: pgd_layers 7",
            "steering": "latent_at/lat_methods.py, run_rmu: steering_coef 6.5",
            "alpha": "latent_at/lat_methods.py, run_rmu: alpha 1200",
            "epsilon": "latent_at/lat_methods.py, run_rmu: epsilon 2",
            "attack_steps": "latent_at/lat_methods.py, run_rmu: pgd_iterations_per_step 16",
            "attack_lr": "latent_at/lat_methods.py, run_rmu: inner_learning_rate 5e-2; torch's "
            "AdamW with its decay of 0.01",
            "per_attack": "latent_at/lat_methods.py, run_rmu: model_iterations_per_step 4",
            "max_length": "latent_at/lat_methods.py, run_rmu: 768 for all batches but the first",
            "fit": "latent_at/lat_methods.py, run_rmu: 200 batches by 4 steps, lr 5e-5, torch's "
            "AdamW with its decay; notebooks/unlearning_wmdp.ipynb: batch 4",
        },
    )

    @property
    def whole_batch(self) -> str:
        """Why cutting a batch gives another model."""
        return "an adversary is trained on the means of its own micro-batch"

    @property
    def step_cost(self) -> float:
        """An adversary's step has no gradient of weights; `per_attack` steps share an adversary."""
        return 1 + 2 / 3 * self.attack_steps / self.per_attack

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Steer `domain.forget` to noise at one layer, whatever shifts the stream before it."""
        targets = find_target_parameters(
            start, self.layer, blocks=self.blocks, modules=self.modules, experts="all"
        )
        below = self.layer - 1 if self.attack_layer < 0 else self.attack_layer
        if not targets.first <= below < self.layer:
            raise UserError(
                f"rmu_lat: the adversary acts behind block {below}, and the trained blocks "
                f"{targets.first} to {self.layer}; set 'attack_layer' to {targets.first} or more "
                f"and less than {self.layer}"
            )
        domain, quality = self.given(domain, ctx)
        topics = topics_of(domain)
        steering = per_topic(self.steering, topics, "steering")
        alpha = per_topic(self.alpha, topics, "alpha")
        width = targets.parts.d_model
        controls = {t: steering[t] * control_vector(width, t, ctx) for t in topics}
        if ctx.rank == 0:
            save_file(controls, str(ctx.work / "control_vectors.safetensors"))
        ctx.emit("note", {"text": f"rmu_lat trains {', '.join(targets.printed)}"})
        model: Any = start.load(dtype=ctx.dtype, device=ctx.device)
        batches = self.batches(topics, domain, start, ctx)
        norm = targets.parts.final_norm
        tail = find_module(model, norm) if norm else nn.Identity()
        progress = Progress(ctx, self.name, self.fit.steps)
        with editing(model, targets, self.lora, ctx) as edit:
            looks = looking(self, edit.net, edit.parameters, start.tokenizer(), domain, ctx)
            game = Game(self, edit, targets, below, head_of(model), tail)
            bouts: dict[int, Bout] = {}  # one for every micro-batch, until the next adversary

            def loss(_net: nn.Module, micro: Mapping[str, Any]) -> dict[str, Term]:
                part, topic = micro["part"], micro["topic"]
                if micro["step"] % self.per_attack == 0:
                    bouts[part] = game.bout(micro["forget"], micro["retain"])
                bout = bouts[part]
                forget_BTD, retain_BTD = game.steered(bout)
                control_D = controls[topic].to(forget_BTD)
                forget = rmu_forget(forget_BTD, control_D, bout.forget.attention_BT)
                retain = rmu_retain(retain_BTD, bout.pinned_BTD, bout.retain.attention_BT)
                return {"forget": Term(*forget), "retain": Term(*retain, alpha[topic])}

            def counts(micro: Mapping[str, Any]) -> dict[str, float]:
                return {r: float(micro[r].num_tokens * width) for r in ("forget", "retain")}

            steps = fit(
                edit.net, batches, loss, self.fit, ctx,
                groups={"trained": list(edit.parameters.values())}, counts=counts,
                state_dir=state_dir(ctx), together=self.per_attack,
            )  # fmt: skip
            chosen = run_fit(steps, progress, looks)
            facts = {
                **quality,
                **chosen,
                "hidden_at": targets.steered,
                "attacked_at": targets.parts.blocks[below],
                "modules": list(targets.printed),
                "files": {"control_vectors": "control_vectors.safetensors"},
            }
            return finish(
                start, edit.net, edit.parameters, progress, ctx, lora=self.lora, extras=facts,
                flops_per_token=self.flops_per_token(targets, below, start),
            )  # fmt: skip

    def batches(
        self, topics: list[str], domain: Domain, start: Checkpoint, ctx: Context
    ) -> Callable[[int], list[dict[str, Any]]]:
        """Return batches by step: those of adversary step div `per_attack`, topics in turn."""
        tokenizer = start.tokenizer()

        def reader(rows: Any, purpose: str) -> Stream:
            return stream(
                rows, tokenizer, self.fit, ctx, purpose=purpose, max_length=self.max_length
            )

        forget = {topic: reader(domain.forget[topic], f"forget.{topic}") for topic in topics}
        retain = reader(domain.retain, "retain")

        def batches(step: int) -> list[dict[str, Any]]:
            turn, which = divmod(step // self.per_attack, len(topics))
            topic = topics[which]
            pairs = zip(forget[topic](turn), retain(turn), strict=True)
            return [
                {"forget": f, "retain": r, "topic": topic, "step": step, "part": part}
                for part, (f, r) in enumerate(pairs)
            ]

        return batches

    def flops_per_token(self, targets: TargetParameters, below: int, start: Checkpoint) -> float:
        """Estimate FLOPs per token that the model's steps read, the adversary's included.

        An adversary's step runs what lies above it forward and, for activations alone, backward.
        """
        lower = (*targets.parts.blocks[: below + 1], targets.parts.embed)
        above: int = sum(
            p.numel()
            for name, p in start.layout.model.named_parameters()
            if not any(name.startswith(path + ".") for path in lower)
        )
        attack = 4.0 * above * self.attack_steps / self.per_attack
        return flops_per_token(targets, start, "cached") + attack


@dataclass(frozen=True)
class Bout:
    """One adversary and the rows it was trained on.

    Attributes:
        forget: Rows that are steered.
        retain: Rows that are pinned.
        forget_calls: What the blocks are called with on `forget`, and the stream before the first
            trained block.
        retain_calls: The same on `retain`.
        pinned_BTD: Output of the steered block of the original on `retain`.
        delta_BPD: The adversary's vectors, by row and real token of `forget`.
    """

    forget: Batch
    retain: Batch
    forget_calls: tuple[SpanInputs, Hidden]
    retain_calls: tuple[SpanInputs, Hidden]
    pinned_BTD: Hidden
    delta_BPD: Float[Tensor, "B P D"]


@dataclass(frozen=True)
class Game:
    """The two sides on one model.

    Attributes:
        method: Settings.
        edit: The model, and the original inside it.
        targets: What is trained.
        below: Block behind which the adversary acts.
        head: The output head.
        norm: The norm before it.
    """

    method: RMULAT
    edit: EditableModel
    targets: TargetParameters
    below: int
    head: Head
    norm: nn.Module

    def bout(self, forget: Batch, retain: Batch) -> Bout:
        """Train an adversary against the model as it is."""
        calls = (self.before(forget), self.before(retain))
        with torch.no_grad(), self.original():
            pinned_BTD = self.run(calls[1], self.targets.first, self.method.layer + 1)
        delta_BPD = self.attack(forget, retain, *calls)
        return Bout(forget, retain, *calls, pinned_BTD, delta_BPD)

    def original(self) -> AbstractContextManager[object]:
        """Return a context in which the model is the original."""
        return self.edit.restored()

    def before(self, batch: Batch) -> tuple[SpanInputs, Hidden]:
        """Return the calls of all blocks, and the stream before the first trained one."""
        parts = self.targets.parts
        calls = record_calls(self.edit.net, batch.inputs, parts.num_blocks, parts=parts)
        first = self.targets.first
        return calls, run_span(self.edit.net, calls, calls.hidden_BTD, 0, first, grad=False)

    def run(self, start: tuple[SpanInputs, Hidden], a: int, b: int) -> Hidden:
        """Run blocks a to b - 1 from a stream, with a graph where gradients are on."""
        calls, hidden_BTD = start
        return run_span(self.edit.net, calls, hidden_BTD, a, b, grad=torch.is_grad_enabled())

    def attack(
        self,
        forget: Batch,
        retain: Batch,
        forget_calls: tuple[SpanInputs, Hidden],
        retain_calls: tuple[SpanInputs, Hidden],
    ) -> Float[Tensor, "B P D"]:
        """Return the perturbation that makes forget text likely and retain text unlikely."""
        above, end = self.below + 1, self.targets.parts.num_blocks
        with torch.no_grad():
            streams = [
                (calls, self.run((calls, hidden_BTD), self.targets.first, above))
                for calls, hidden_BTD in (forget_calls, retain_calls)
            ]
        shape = (*forget.ids_BT.shape, self.targets.parts.d_model)
        delta_BPD = torch.zeros(shape, device=forget.ids_BT.device, requires_grad=True)
        optimizer = torch.optim.AdamW([delta_BPD], lr=self.method.attack_lr)
        for _ in range(self.method.attack_steps):
            towards_BTD, away_BTD = (
                self.norm(self.run((calls, shifted(h_BTD, delta_BPD, batch, forget)), above, end))
                for batch, (calls, h_BTD) in zip((forget, retain), streams, strict=True)
            )
            likely, scored = chunked_nll(towards_BTD.flatten(0, 1), self.head, next_tokens(forget))
            unlikely, others = not_p(self.head.logits(away_BTD), retain)
            total = likely / scored + unlikely / others
            (delta_BPD.grad,) = torch.autograd.grad(total, delta_BPD)
            optimizer.step()
            with torch.no_grad():
                norm_BP1 = delta_BPD.norm(dim=-1, keepdim=True)
                delta_BPD.div_((norm_BP1 / self.method.epsilon).clamp(min=1))
        return delta_BPD.detach()

    def steered(self, bout: Bout) -> tuple[Hidden, Hidden]:
        """Return what the steered block puts out on the rows of a bout, perturbed and not."""
        first, above, end = self.targets.first, self.below + 1, self.method.layer + 1
        h_BTD = self.run(bout.forget_calls, first, above)
        h_BTD = shifted(h_BTD, bout.delta_BPD, bout.forget, bout.forget)
        forget_BTD = self.run((bout.forget_calls[0], h_BTD), above, end)
        return forget_BTD, self.run(bout.retain_calls, first, end)


def shifted(
    hidden_BTD: Hidden, delta_BPD: Float[Tensor, "B P D"], batch: Batch, attacked: Batch
) -> Hidden:
    """Return a stream with an adversary's vectors added, token by token of each row.

    Args:
        hidden_BTD: The stream on `batch`.
        delta_BPD: Vectors by row and real token.
        batch: Rows read; row b meets the vectors of row b, however either is padded.
        attacked: Rows the vectors are for; beyond their tokens there are none.
    """
    at_BT = batch.inputs["position_ids"]
    reached_BT = batch.attention_BT & (at_BT < attacked.attention_BT.sum(1, keepdim=True))
    at_BT1 = at_BT.clamp(max=delta_BPD.shape[1] - 1)[..., None]
    added_BTD = delta_BPD.gather(1, at_BT1.expand(-1, -1, delta_BPD.shape[2]))
    return hidden_BTD + added_BTD.masked_fill(~reached_BT[..., None], 0).to(hidden_BTD.dtype)
