"""Filter, then give every capability back as an adapter: what routing with full labels must beat.

The core is trained on what carries no forget label; then, for each capability, a LoRA adapter on
the frozen core is trained on its labelled rows. Whoever may have the capability loads the adapter.
With full labels this matches routed modules; with few labels the core learns what the labels miss.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.data.labels import LabelNoise, forget_score
from excise.evals.score import measure
from excise.methods.base import Cost, Method, Paper, Removal
from excise.methods.pretraining.pretrain import (
    Pretrain,
    cut_to,
    dropped,
    labelled_corpus,
    plain_counts,
    plain_loss,
    pretrain,
    schedule,
    texts,
)
from excise.methods.tuning import Progress, run_fit, state_dir
from excise.models.checkpoint import Checkpoint
from excise.models.lora import LoRA, adapted
from excise.train.distributed import barrier
from excise.train.fit import fit


class FilterLoRA(Method):
    """Train on what carries no forget label, then one LoRA adapter per capability on its rows."""

    name: Literal["filter_lora"] = "filter_lora"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing. Core and adapters share its steps."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    lora: LoRA = LoRA(rank=16, alpha=32.0)
    """The adapter of each capability."""
    adapter_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the steps spent on adapters, the same for every capability."""
    adapter_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the adapters; missing means that of the schedule."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Modular pretraining enables access control, baseline FT-LoRA",
        "arXiv:2607.08077",
        "filter the core, then fine-tune one LoRA adapter per domain",
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train the core and its adapters; the checkpoint is the core alone."""
        config = schedule(self.pretrain, self.name)
        with adapted(start.load(), self.lora):
            pass  # a module that is not there is found before any training
        rows = labelled_corpus(domain, self.labels, ctx)
        remaining = tuple(row for row in rows if forget_score(row) <= 0.5)
        shares = {
            name: tuple(r for r in rows if r.label == i + 1 and forget_score(r) > 0.5)
            for i, name in enumerate(domain.forget)
        }
        shares = {name: mine for name, mine in shares.items() if mine}
        spent = round(self.adapter_share * config.fit.steps) if shares else 0
        each = max(1, spent // len(shares)) if shares else 0
        core = cut_to(config, config.fit.steps - each * len(shares), self.name)
        removal = pretrain(
            start, remaining, core, ctx, stage=self.name, extras=dropped(rows, remaining)
        )
        facts: dict[str, Any] = {}
        files, cost = {}, removal.cost
        for name, mine in shares.items():
            files[f"adapter_{name}"] = f"adapters/{name}"
            adapter = self._adapter_schedule(cut_to(config, each, self.name))
            facts[name], took = self._adapter(name, mine, domain, removal.checkpoint, adapter, ctx)
            cost += took
        extras = {**removal.extras, "adapters": facts, "files": files}
        return replace(removal, cost=cost, extras=extras)

    def _adapter_schedule(self, config: Pretrain) -> Pretrain:
        """Return a schedule at the adapters' learning rate."""
        lr = config.fit.lr if self.adapter_lr is None else self.adapter_lr
        return config.model_copy(update={"fit": config.fit.model_copy(update={"lr": lr})})

    def _adapter(
        self,
        name: str,
        rows: Rows,
        domain: Domain,
        core: Checkpoint,
        config: Pretrain,
        ctx: Context,
    ) -> tuple[dict[str, Any], Cost]:
        """Train and write the adapter of one capability; return its facts and cost."""
        work = ctx.child(f"adapter-{name}")
        model, tokenizer = core.load(dtype=ctx.dtype, device=ctx.device), core.tokenizer()
        batches = texts(rows, tokenizer, config, ctx, purpose=f"adapter.{name}")
        progress = Progress(ctx, f"{self.name}.{name}", config.fit.steps)
        tested = {"forget": domain.dev_forget.get(name, ()), "retain": domain.dev_retain}
        before = _losses(model, tokenizer, tested, config)
        with adapted(model, self.lora, seed=ctx.seed_for(f"lora.{name}")) as live:
            live.train()
            steps = fit(
                live,
                batches,
                plain_loss,
                config.fit,
                work,
                counts=plain_counts,
                state_dir=state_dir(work),
            )
            run_fit(steps, progress)
            live.eval()
            after = _losses(live, tokenizer, tested, config)
            folder = ctx.work / "adapters" / name
            if ctx.rank == 0:
                _save(live, folder)
            barrier(ctx)
        facts = {
            "rows": len(rows),
            "steps": config.fit.steps,
            "loss": {role: {"core": before[role], "adapter": after[role]} for role in before},
        }
        return facts, progress.cost(core.num_parameters)


def _save(model: Any, folder: Any) -> None:
    """Write an adapter in place of an unfinished one; it names its core relative to itself."""
    if folder.exists():
        shutil.rmtree(folder)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "../../model"
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def _losses(
    model: Any, tokenizer: Any, tested: Mapping[str, tuple[Row, ...]], config: Pretrain
) -> dict[str, float | None]:
    """Return the mean nats per token on development rows, None where there are none."""
    return {
        role: measure(
            model,
            tokenizer,
            rows,
            "text_loss",
            max_length=config.max_length,
            batch_size=config.fit.batch_size,
        )
        .checked()
        .mean
        if rows
        else None
        for role, rows in tested.items()
    }
