"""Filter, then give every capability back as an adapter: what routing with full labels must beat.

The core is trained on what carries no forget label; then, for each capability, a LoRA adapter on
the frozen core is trained on its labelled rows and on `core_ratio` core rows for each of them, so
that it learns the capability without unlearning the rest. Whoever may have the capability loads the
adapter. With full labels this matches routed modules; with few labels the core learns what the
labels miss.

Source:
    arXiv:2607.08077, baseline FT-LoRA; agencyenterprise/modular-pretraining, read in the fork
    JR-Vickers/modular-pretraining@526ef78 (no licence file; read only), src/run/train/routed.py,
    do_routed_ordered.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, ClassVar, Literal

from pydantic import Field

from excise.core.context import Context
from excise.data.domain import CORE, Domain, Row, Rows
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
from excise.methods.pretraining.routed.absorption import hash_ordered
from excise.methods.tuning import Progress, run_fit, state_dir
from excise.models.checkpoint import Checkpoint
from excise.models.lora import FullLoRA, LoRA, adapted
from excise.train.distributed import barrier
from excise.train.fit import fit


class FilterLoRA(Method):
    """Train on what carries no forget label, then a LoRA adapter per capability on its rows."""

    name: Literal["filter_lora"] = "filter_lora"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing. Core and adapters share its steps."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    lora: FullLoRA = LoRA(rank=16, alpha=32.0)
    """The adapter of each capability."""
    adapter_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the steps spent on adapters, the same for every capability."""
    adapter_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the adapters; missing means that of the schedule."""
    core_ratio: float = Field(default=2.0, ge=0)
    """Core rows that an adapter reads for each labelled row; 0 for labelled rows alone."""

    version: ClassVar[int] = 2
    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "Modular pretraining enables access control, baseline FT-LoRA",
        "arXiv:2607.08077",
        "filter the core, then fine-tune one LoRA adapter per domain",
        "agencyenterprise/modular-pretraining (no licence file; read only)",
        {
            "core_ratio": "src/run/experiment/stories/methods/run.py: core_aux_ratio 2.0 on "
            "stories; 1.0 in the runs with partial labels (partial/run.py)",
            "adapter_share": "src/run/train/routed.py: 1 + core_aux_ratio times the share of "
            "labelled texts, each read once (aux_factor 1); here 0.2 whatever the labels, since "
            "with a third to forget and 2 core rows for each nothing would be left for the core",
            "adapter_lr": "src/run/train/routed.py: one rate for core and adapters",
            "lora": "stories/methods/run.py: adapters of a tenth of the core's parameters "
            "(aux_param_prc 0.1); here rank 16 and alpha 32, whatever the model",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train the core and its adapters; the checkpoint is the core alone."""
        config = schedule(self.pretrain, self.name)
        with adapted(start.load(), self.lora):
            pass  # a module that is not there is found before any training
        rows = labelled_corpus(domain, self.labels, ctx)
        remaining = tuple(row for row in rows if forget_score(row) <= 0.5)
        core_rows = tuple(row for row in remaining if row.label == CORE)
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
            facts[name], took = self._adapter(
                name, mine, core_rows, domain, removal.checkpoint, adapter, ctx
            )
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
        labelled: Rows,
        core_rows: Rows,
        domain: Domain,
        core: Checkpoint,
        config: Pretrain,
        ctx: Context,
    ) -> tuple[dict[str, Any], Cost]:
        """Train and write the adapter of one capability; return its facts and cost."""
        work = ctx.child(f"adapter-{name}")
        model, tokenizer = core.load(dtype=ctx.dtype, device=ctx.device), core.tokenizer()
        reads = config.fit.steps * config.fit.batch_size
        order = hash_ordered(core_rows, ctx.seed_for(f"adapter.{name}.core"))
        rows = adapter_rows(labelled, tuple(order), self.core_ratio, reads)
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
            "rows": len(labelled),
            "core_share": sum(row.label == CORE for row in rows) / len(rows),
            "steps": config.fit.steps,
            "loss": {role: {"core": before[role], "adapter": after[role]} for role in before},
        }
        return facts, progress.cost(core.num_parameters)


def adapter_rows(labelled: Rows, core: Rows, ratio: float, reads: int) -> Rows:
    """Return what an epoch of an adapter consists of: `ratio` core rows for each labelled row.

    Where core rows are many, labelled rows stand in it more than once, so that an adapter of few
    labelled rows sees the whole core instead of the same few rows of it.

    Args:
        labelled: Rows of the capability, at least one.
        core: Rows labelled core, in the order in which they are taken.
        ratio: Core rows per labelled row.
        reads: Rows that the training reads in all; an epoch need not be longer.
    """
    if not (core and ratio):
        return labelled
    times = math.ceil(min(len(core) / ratio, reads / (1 + ratio)) / len(labelled))
    count = round(ratio * times * len(labelled))
    return (*(labelled * times), *islice(cycle(core), count))


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
