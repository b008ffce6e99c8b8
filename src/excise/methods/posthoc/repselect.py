"""RepSelect: subtract the part of the forget gradient that is the forget set's own, and no other.

    A     = rank-8 adapters on the MLPs, one epoch of SGD at `elicit_lr` on CE(forget)
    G_W   = sum over the batches b of one epoch of  grad_W of -mean CE(b),  A being on
    A off;  G_W <- G_W with its top `components.count` principal components shrunk on both sides
    for k = 1 .. fit.steps:
        W = W0 - k fit.lr G_W
        KL(original || model) on `dev_retain` above `budget`:  back to k - 1, stop

for every gate-, up- and down-projection W of the MLPs. The adapter elicits what the model would
say once it was tuned on the forget set, so that the gradient is of that. Nothing is trained on
retain data, and two passes over the forget set are all there is. G grows with the number of
batches (a sum of means, as released), so `fit.lr` belongs to a size of set and of batch.

Source:
    arXiv 2606.17168 v2; filyp/open-unlearning@5955f30 (MIT), src/trainer/unlearn/
    repselect_simple.py, with the stop of src/evals/kl_eval.py.

Shape legend: N real tokens of a batch, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain, Rows
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.losses import nll
from excise.methods.base import Paper, PostHoc, Removal
from excise.methods.tuning import (
    Progress,
    forget_rows,
    logits_of,
    nlls,
    role_counts,
    run_fit,
    state_dir,
    stream,
    write_edit,
)
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.head import final_hidden, head_of
from excise.models.lora import FullLoRA, LoRA, adapted, on_modules
from excise.models.names import Names, select
from excise.train.components import Components, without_top
from excise.train.distributed import gather, sum_gradients
from excise.train.fit import FitConfig, fit
from excise.train.vocab import HiddenTarget, chunked_kl


class RepSelect(PostHoc):
    """Subtract the forget gradient without its top principal components until retain moves."""

    name: Literal["repselect"] = "repselect"
    components: Components = Components(count=512, how="shrink")
    """Principal components of each gradient that give way."""
    elicit: FullLoRA | None = LoRA(rank=8, alpha=8.0)
    """Adapter that is trained on forget rows before the gradient is taken; empty for none."""
    elicit_lr: float = Field(default=0.01, gt=0)
    """Learning rate of its epoch of SGD."""
    fit: FitConfig = FitConfig(steps=10, lr=0.05, batch_size=8, optimizer="sgd")
    """Subtractions at most, what the gradient is multiplied by in each, rows per batch."""
    budget: float = Field(default=0.01, ge=0)
    """KL from the original on `dev_retain`, nats per token, that ends it; 0 for no end."""
    budget_rows: int = Field(default=128, ge=1)
    """Rows of `dev_retain` that are read for it at most."""
    modules: Names = ()
    """Matrices to edit, by name; empty for gate, up and down of every MLP."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row."""

    needs: ClassVar[tuple[str, ...]] = ("forget",)
    refuses: ClassVar[Mapping[str, str]] = {
        "lora": "gradients of whole matrices are subtracted, whose components it selects; an "
        "adapter only elicits them ('elicit')",
        "stop": "it ends where 'budget' on `dev_retain` is spent",
        "drop_components": "that is what it does; set 'components'",
        "sam": "it takes one gradient at the model as it is",
    }
    paper: ClassVar[Paper] = Paper(
        "RepSelect: Robust LLM unlearning via representation selectivity",
        "arXiv:2606.17168",
        "version 2: principal components of weight gradients, after an adapter that elicits",
        "filyp/open-unlearning@5955f30 (MIT)",
        {
            "components": "configs/trainer/RepSelectSimple.yaml: n_pcs 512, hard_soft soft, "
            "collapse_on both",
            "elicit": "repselect_simple.py: LoraConfig() of peft, rank 8 and alpha 8, on "
            "gate_proj, up_proj and down_proj",
            "elicit_lr": "RepSelectSimple.yaml: lora_lr 0.01; swept over 0.005..0.5, and over "
            "0.5..50 for a mixture of experts",
            "fit": "RepSelectSimple.yaml: learning_rate 0.05, swept over 0.005..0.5 (0.5..50 for "
            "a mixture of experts); finetune.yaml: batch 8, 10 epochs. W is computed from W0 in "
            "float32 and rounded once, where the release subtracts in the model's dtype",
            "budget": "configs/experiment/unlearn/wmdp_low_mi/default.yaml: disr_budget 0.01, on "
            "wikitext; ours reads dev_retain",
            "budget_rows": "configs/experiment/unlearn/wmdp_low_mi/default.yaml: wikitext, range 0 "
            "to 128",
            "modules": "repselect_simple.py: gate, up and down of every block; of a mixture of "
            "experts only gate and up, where ours takes down too",
            "max_length": "the same default.yaml: tokenizer max_length 128",
        },
    )

    @property
    def readings(self) -> float:
        """The epoch that elicits, and that of the gradient."""
        return 1.0 + (self.elicit is not None)

    @model_validator(mode="after")
    def _subtracts(self) -> RepSelect:
        """Refuse an optimizer or a schedule: one fixed matrix is subtracted."""
        plain = FitConfig(
            steps=self.fit.steps, lr=self.fit.lr, batch_size=self.fit.batch_size,
            micro_size=self.fit.micro_size, save_every=self.fit.save_every,
            log_every=self.fit.log_every, optimizer="sgd",
        )  # fmt: skip
        if self.fit.model_dump() != plain.model_dump():
            raise ValueError(
                "repselect subtracts one fixed matrix; of 'fit' set only steps, lr, batch_size "
                "and micro_size, and leave optimizer at sgd"
            )
        return self

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Subtract what only `domain.forget` needs."""
        domain, quality = self.given(domain, ctx)
        model, tokenizer = start.load(dtype=ctx.dtype, device=ctx.device), start.tokenizer()
        names = self.matrices(model)
        rows = forget_rows(domain)
        batches = stream(
            rows, tokenizer, self.fit, ctx, purpose="forget", max_length=self.max_length
        )
        epoch = -(-len(rows) // self.fit.batch_size)  # the last batch is filled up from the next
        kl = self.disruption(model, domain, tokenizer, ctx)

        edited = {n: p for n, p in model.named_parameters() if n in set(names)}
        progress = Progress(ctx, self.name, epoch)
        with self.eliciting(model, names, batches, epoch, progress, ctx) as live:
            gradients, tokens = self.gradients(live, edited, batches, epoch, ctx)
        progress.tokens += tokens
        for i, name in enumerate(names):
            seed = ctx.seed_for(f"components/{i}")
            gradients[name] = without_top(gradients[name], self.components, seed)

        before, kept, moved = start.weights_of(names), 0, 0.0
        for k in range(1, self.fit.steps + 1):
            for name in names:
                put(edited[name], before[name], gradients[name], k * self.fit.lr)
            if self.budget:
                moved = kl()
                progress.history.append({"subtraction": float(k), "kl": moved})
                ctx.emit("note", {"text": f"repselect: KL {moved:.2g} after subtraction {k}"})
                if not moved <= self.budget:
                    break
            kept = k
        if not kept and self.fit.steps:
            raise UserError(
                f"repselect: the first subtraction moves dev_retain by {moved:.2g} nats a token, "
                f"over the budget of {self.budget:g}; lower fit.lr, or raise 'budget'"
            )
        for name in names:
            put(edited[name], before[name], gradients[name], kept * self.fit.lr)
        return write_edit(
            start, {name: edited[name].detach() for name in names}, ctx,
            extras={**quality, "subtractions": kept, "kl_budget": self.budget},
            cost=progress.cost(start.num_parameters), history=progress.history,
        )  # fmt: skip

    def matrices(self, model: nn.Module) -> list[str]:
        """Return the names of what is edited: weights of the MLPs, experts and all.

        Raises:
            UserError: If a name matches nothing, or no matrix.
        """
        if self.modules:
            paths: Sequence[str] = self.modules
        else:
            parts = anatomy(model)
            paths = [
                path
                for i, experts in enumerate(parts.experts)
                for path in (
                    (parts.mlp_gate[i], parts.mlp_up[i], parts.mlp_down[i])
                    if experts is None
                    else [w.parameter for w in (*experts.gate, *experts.up, *experts.down)]
                )
                if path
            ]
        names = [n for n in select(model, paths) if model.get_parameter(n).dim() > 1]
        if not names:
            raise UserError(f"repselect: '{paths[0]}' holds no matrix; name modules that do")
        return names

    @contextmanager
    def eliciting(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Callable[[int], Sequence[Batch]],
        epoch: int,
        progress: Progress,
        ctx: Context,
    ) -> Iterator[nn.Module]:
        """Put on an adapter that has read the forget set once; it is off again at the end."""
        if self.elicit is None:
            yield model
            return

        lora = on_modules(self.elicit, names)
        config = self.fit.model_copy(update={"steps": epoch, "lr": self.elicit_lr})
        with adapted(model, lora, seed=ctx.seed_for("lora")) as live:
            steps = fit(
                live, lambda step: [{"forget": b} for b in batches(step)], nlls, config, ctx,
                groups={"adapter": [p for p in live.parameters() if p.requires_grad]},
                counts=role_counts, state_dir=state_dir(ctx),
            )  # fmt: skip
            run_fit(steps, progress)
            yield live

    def gradients(
        self,
        live: nn.Module,
        edited: Mapping[str, nn.Parameter],
        batches: Callable[[int], Sequence[Batch]],
        epoch: int,
        ctx: Context,
    ) -> tuple[dict[str, Tensor], int]:
        """Return the gradient of -CE of each matrix, summed over batches, and the tokens read.

        Sums are float32 and take each gradient as soon as it is whole, so that of those in the
        model's dtype one exists at a time.
        """
        totals = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in edited.items()}
        tokens = 0
        with _only(edited.values(), live), ExitStack() as stack:
            for name, parameter in edited.items():
                hook = parameter.register_post_accumulate_grad_hook(_into(totals[name]))
                stack.callback(hook.remove)
            for step in range(epoch):
                micros = [batch.to(ctx.device) for batch in batches(step)]
                count = sum(gather(sum(b.num_targets for b in micros), ctx))
                for batch in micros:
                    total, _ = nll(logits_of(live, batch), batch)
                    (-total / count).backward()
                    tokens += batch.num_tokens
        zero = torch.zeros((), device=ctx.device)
        carriers = [zero.expand_as(total) for total in totals.values()]
        for carrier, total in zip(carriers, totals.values(), strict=True):
            carrier.grad = total  # what processes sum are gradients
        sum_gradients(carriers, ctx)
        summed = {n: c.grad for n, c in zip(totals, carriers, strict=True) if c.grad is not None}
        return summed, sum(gather(tokens, ctx))

    def disruption(
        self, model: nn.Module, domain: Domain, tokenizer: Tokenizer, ctx: Context
    ) -> Callable[[], float]:
        """Return a function that gives KL(original || model) per token on `dev_retain`.

        Of the original its last hidden states on those rows are kept, and no weights: the head is
        not edited.

        Raises:
            UserError: If there is a budget and no row to read it on.
        """
        rows: Rows = domain.dev_retain[: self.budget_rows]
        if not self.budget:
            return lambda: 0.0
        if not rows:
            raise UserError(
                f"repselect: domain '{domain.name}' has no dev_retain row to read the budget on; "
                "give some, or set 'budget' to 0 for no end"
            )
        examples = encode(rows, tokenizer, max_length=self.max_length, only_spans=True)
        size = self.fit.micro_size or self.fit.batch_size
        batches = [
            collate(examples[i : i + size], pad_id=tokenizer.pad_token_id).to(ctx.device)
            for i in range(0, len(examples), size)
        ]
        head = head_of(model).detach()

        @torch.no_grad()
        def hidden(batch: Batch) -> Float[Tensor, "N D"]:
            return final_hidden(model, batch.inputs)[batch.attention_BT]

        original = [hidden(batch) for batch in batches]

        @torch.no_grad()
        def kl() -> float:
            pairs = [
                chunked_kl(hidden(batch), head, HiddenTarget(first_ND, head))
                for batch, first_ND in zip(batches, original, strict=True)
            ]
            return sum(float(total) for total, _ in pairs) / sum(count for _, count in pairs)

        return kl


@contextmanager
def _only(parameters: Iterable[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Let gradients reach some parameters alone; by what they are, since adapters rename them."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def _into(total: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that adds a gradient to a sum and frees it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook runs when the gradient is there"
        total.add_(parameter.grad)
        parameter.grad = None

    return hook


@torch.no_grad()
def put(weight: Tensor, before: Tensor, gradient: Tensor, factor: float) -> None:
    """Write `before - factor gradient` into a weight, summed in float32 and rounded once."""
    weight.copy_(before.to(gradient.device, gradient.dtype) - factor * gradient)
