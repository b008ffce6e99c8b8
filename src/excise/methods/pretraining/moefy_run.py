"""What the rounds of `moefy` share: the model, its data, where modules are, and its phases.

Every phase is a loop of training of its own with fresh moments. Its learning rate falls in a
straight line between the values that the common schedule has at its two ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from excise.core.context import Context
from excise.data.domain import CORE, Rows
from excise.data.split import hashed_order
from excise.data.stream import Batch, Tokenizer, collate, encode
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.tuning import Progress
from excise.routing.absorption import CHUNK, Sets
from excise.routing.groups import Part
from excise.routing.modules import Placed
from excise.routing.rules import Policy, Rule
from excise.routing.train import routed_fit
from excise.train.fit import FitConfig
from excise.train.optim import schedule_share


@dataclass
class Rounds:
    """A model on its way through the rounds.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        rows: What is read, labelled as told.
        names: Capabilities, in the order of their labels.
        blocks: Blocks that are split.
        config: The schedule that all phases share.
        ctx: Seed, device, folder.
        domains: Batches that attribution reads, core first.
        sets: Rows on which losses are measured.
        progress: What all loops have said so far.
        parts: Part of each capability by block.
    """

    model: Any
    tokenizer: Tokenizer
    rows: Rows
    names: tuple[str, ...]
    blocks: tuple[int, ...]
    config: Pretrain
    ctx: Context
    domains: tuple[tuple[Batch, ...], ...]
    sets: Sets
    progress: Progress
    parts: dict[int, list[Part]] = field(default_factory=dict)

    def placed(self) -> Placed:
        """Return the modules as they are now."""
        parts = {
            f"module_{i + 1}": tuple(self.parts[block][i] for block in self.blocks)
            for i in range(len(self.names))
        }
        return Placed(parts, grown=False)

    def owned(self, block: int) -> list[list[int]]:
        """Return the units that each capability has in a block; empty before the first round."""
        spans = [part.units or (0, 0) for part in self.parts.get(block, [])]
        return [list(range(*span)) for span in spans]

    def train(self, name: str, begin: int, end: int, policy: Policy, stage: str) -> None:
        """Train from step `begin` to step `end` of the common schedule.

        Args:
            name: Name of the phase: of its folder, and of its draws of rows and rules.
            begin: First step.
            end: Step after the last; a phase of no step does nothing.
            policy: Groups and rules.
            stage: Name shown beside the progress.
        """
        if begin == end:
            return
        config = self.config.model_copy(update={"fit": phase(self.config.fit, begin, end)})
        ctx = self.ctx.child(name, seed=self.ctx.seed_for(f"moefy.{name}"))
        trained = routed_fit(
            self.model, policy, self.rows, self.tokenizer, config, ctx, stage=f"{stage}.{name}"
        )
        self.progress.tokens += trained.progress.tokens
        self.progress.done += trained.progress.done
        self.progress.history += [
            {**row, "step": row["step"] + begin} for row in trained.progress.history
        ]


def phase(fit: FitConfig, begin: int, end: int) -> FitConfig:
    """Return the schedule of the steps from `begin` to `end` of a longer one.

    Args:
        fit: The whole schedule.
        begin: First step.
        end: Step after the last.
    """

    def share(step: int) -> float:
        return schedule_share(
            step, fit.steps, warmup=fit.warmup, schedule=fit.schedule, min_lr=fit.min_lr
        )

    steps = end - begin
    # Fresh moments need a few steps before they know the scale of the gradient.
    warmup = max(0, fit.warmup - begin) or fit.warmup * steps // max(1, fit.steps)
    top = max(share(step) for step in (begin, min(begin + warmup, end - 1)))
    change: dict[str, Any] = {"steps": steps, "warmup": min(warmup, steps), "lr": fit.lr * top}
    if fit.schedule != "constant":
        last = min(1.0, share(end) / top)
        change |= {"schedule": "linear", "min_lr": last}
    return fit.model_copy(update=change)


def everything() -> dict[str, tuple[Rule, ...]]:
    """Return the rules of dense training: every row reads and writes everything."""
    return {label: (Rule(),) for label in ("core", "forget", "unlabeled")}


def domains_of(
    rows: Rows, count: int, tokenizer: Tokenizer, config: Pretrain, limit: int
) -> tuple[tuple[Batch, ...], ...]:
    """Draw rows of core and of each capability, as labels tell them.

    Args:
        rows: What is read in training, labelled as told.
        count: Number of capabilities.
        tokenizer: The model's tokenizer.
        config: Gives the length.
        limit: Rows of each at most; which depends on content alone.

    Returns:
        Batches on the CPU, core first; none where no row carries the label.
    """
    out = []
    for label in range(CORE, count + 1):
        mine = [row for row in dict.fromkeys(rows) if row.label == label]
        keys = [f"{row.unit}:{row.wording}:{row.text}" for row in mine]
        chosen: Sequence[Any] = encode(
            hashed_order(mine, keys, 0)[:limit], tokenizer, max_length=config.max_length
        )
        batches = [
            collate(chosen[i : i + CHUNK], pad_id=tokenizer.pad_token_id)
            for i in range(0, len(chosen), CHUNK)
        ]
        out.append(tuple(batches))
    return tuple(out)
