"""RMU: push forget activations at one layer to a random vector, pin retain activations.

Shape legend: B rows, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn

from excise.context import Context
from excise.domains.base import Domain
from excise.domains.stream import Batch, Tokenizer
from excise.errors import UserError
from excise.losses import rmu_forget, rmu_retain
from excise.methods.base import Method, Paper, Removal
from excise.methods.tuning import stream, tune
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import capture
from excise.models.lora import LoRA, reference
from excise.train.fit import FitConfig, Term


class RMU(Method):
    """Minimise |h(forget) - c u|^2 + alpha |h(retain) - h0(retain)|^2 at one layer, per entry."""

    name: Literal["rmu"] = "rmu"
    layer: int = 7
    """Block whose output is steered."""
    blocks: tuple[int, ...] = ()
    """Blocks whose MLP down-projection is trained; empty for layer-2, layer-1, layer."""
    steering: float = 20.0
    """c: norm of the control vector (with `adaptive`, the factor on the mean forget norm)."""
    alpha: float = 100.0
    """Weight of the retain term."""
    adaptive: bool = False
    """Adaptive RMU: c is `steering` times the mean norm of the first batch of each topic."""
    masked: bool = True
    """Leave padding out of both means; the released code does not."""
    order: Literal["shuffled", "file"] = "shuffled"
    """Order of rows; the released code reads them in file order."""
    fit: FitConfig = FitConfig(steps=80, lr=5e-5, batch_size=4, optimizer="hf_adamw")
    """Steps over all topics together, rows per step of each role, learning rate."""
    modules: tuple[str, ...] = ()
    """Modules to train by name, instead of `blocks`."""
    max_length: int = 512
    """Tokens per row."""
    lora: LoRA | None = None
    """Train an adapter instead; the frozen model is the adapter switched off."""

    paper: ClassVar[Paper] = Paper(
        "The WMDP benchmark: measuring and reducing malicious use with unlearning",
        "arXiv:2403.03218",
        "section 4, L = L_forget + alpha L_retain",
        "centerforaisafety/wmdp@bc5e1ba (MIT)",
        {
            "layer": "rmu/unlearn.py --layer_id 7",
            "steering": "rmu/unlearn.py --steering_coeff_list 20",
            "alpha": "rmu/unlearn.py --alpha 100",
            "fit": "rmu/unlearn.py: lr 5e-5, batch 4, 80 batches; transformers' AdamW",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Steer `domain.forget` to noise at one layer."""
        model = start.load(dtype=ctx.dtype, device=ctx.device)
        frozen = None if self.lora else start.load(dtype=ctx.dtype, device=ctx.device)
        at, modules = places(self, model)
        topics = [name for name in domain.forget if domain.forget[name]]
        batches = alternate(self, topics, domain, start.tokenizer(), ctx)
        controls = {
            topic: self.steering * control_vector(start.config.hidden_size, topic, ctx)
            for topic in topics
        }
        if self.adaptive:
            for i, topic in enumerate(topics):
                batch = batches(i)[0][topic].to(ctx.device)
                with torch.no_grad():
                    norm_BT = hidden_at(model, at, batch).float().norm(dim=-1)
                controls[topic] *= float(norm_BT[batch.attention_BT].mean())

        def loss(net: nn.Module, micro: Mapping[str, Batch]) -> dict[str, Term]:
            topic = next(role for role in micro if role != "retain")
            forget, retain = micro[topic], micro["retain"]
            with torch.no_grad(), switched_off(net, self.lora):
                kept_BTD = hidden_at(net if frozen is None else frozen, at, retain)
            control_D = controls[topic].to(kept_BTD)
            forget_sum, forget_count = rmu_forget(
                hidden_at(net, at, forget), control_D, self.mask(forget)
            )
            retain_sum, retain_count = rmu_retain(
                hidden_at(net, at, retain), kept_BTD, self.mask(retain)
            )
            return {
                "forget": Term(forget_sum, forget_count),
                "retain": Term(retain_sum, retain_count, self.alpha),
            }

        control_file = ctx.work / "control_vectors.safetensors"
        save_file(controls, str(control_file))
        return tune(
            start, model, batches, loss, self.fit, ctx,
            stage=self.name, modules=modules, lora=self.lora, counts=None,
            extras={
                "hidden_at": at,
                "modules": modules,
                "steering_norm": {topic: float(c.norm()) for topic, c in controls.items()},
                "files": {"control_vectors": control_file.name},
            },
        )

    def mask(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """Return the positions that enter the means."""
        return batch.attention_BT if self.masked else torch.ones_like(batch.attention_BT)


def places(method: RMU, model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Return the path of the steered block and the modules that are trained.

    Raises:
        UserError: If the layer is beyond the model.
    """
    parts = anatomy(model)
    count = parts.num_blocks
    chosen = method.blocks or tuple(range(max(0, method.layer - 2), method.layer + 1))
    for block in (method.layer, *chosen):
        if not 0 <= block < count:
            raise UserError(
                f"rmu: block {block} is beyond this model, which has blocks 0 to {count - 1}; "
                "set 'layer' (and 'blocks') lower"
            )
    modules = method.modules or tuple(parts.mlp_down[block] for block in chosen)
    return parts.blocks[method.layer], modules


def control_vector(width: int, topic: str, ctx: Context) -> Float[Tensor, "D"]:
    """Draw a unit vector from uniform [0, 1) entries, a draw of its own for each topic."""
    u_D = torch.rand(width, generator=ctx.generator(f"rmu.control.{topic}"))
    return u_D / u_D.norm()


def alternate(
    method: RMU, topics: Sequence[str], domain: Domain, tokenizer: Tokenizer, ctx: Context
) -> Callable[[int], list[dict[str, Batch]]]:
    """Return batches by step: topic = step mod K, batch = step div K, retain shared by topics."""
    if not topics:
        raise UserError(f"domain '{domain.name}' has no forget row for the method; check the split")
    length, shuffle = method.max_length, method.order == "shuffled"
    forget = {
        topic: stream(
            domain.forget[topic], tokenizer, method.fit, ctx,
            purpose=f"forget.{topic}", max_length=length, shuffle=shuffle,
        )
        for topic in topics
    }
    retain = stream(
        domain.retain, tokenizer, method.fit, ctx,
        purpose="retain", max_length=length, shuffle=shuffle,
    )

    def batches(step: int) -> list[dict[str, Batch]]:
        turn, which = divmod(step, len(topics))
        topic = topics[which]
        pairs = zip(forget[topic](turn), retain(turn), strict=True)
        return [{topic: f, "retain": r} for f, r in pairs]

    return batches


def hidden_at(model: nn.Module, path: str, batch: Batch) -> Float[Tensor, "B T D"]:
    """Return the output of the block at `path`, by a plain full forward."""
    with capture(model, [path], grad=torch.is_grad_enabled()) as seen:
        model(**batch.inputs)
    return seen[path][-1]


def switched_off(model: nn.Module, lora: LoRA | None) -> AbstractContextManager[object]:
    """Return a context in which an adapter does nothing; without one, an empty context."""
    return reference(model) if lora is not None else nullcontext()
