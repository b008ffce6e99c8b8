"""Alternate dense training and MoE-fication: train dense, give neurons to domains, route, repeat.

After each dense phase every capability gets the MLP neurons that matter most to it and least to
the rest, by measured attribution; while they are routed, its rows write into them alone and part
of the core rows runs without them. Each round the modules grow, so that the network is split
further and further. At the end the modules are emptied.

The proposal is a comment of 2024 on gradient routing: a MoE that the network shows us how to cut,
"as much splitting for minimal utility cost as possible". Splitting a trained MLP into experts is
MoEfication (Zhang et al. 2022); theirs groups neurons that fire together and trains no further.

Every phase is a loop of training of its own with fresh moments. Its learning rate falls in a
straight line between the values that the shared schedule has at its two ends.

Shape legend: C capabilities, M units of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from excise.core.config import SIGNED
from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import CORE, Domain, Rows
from excise.data.labels import LabelNoise
from excise.data.stream import Batch, Tokenizer
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.moefy.neurons import (
    attribution,
    captured,
    choose,
    contrast,
    gather_units,
)
from excise.methods.pretraining.pretrain import Pretrain, labelled_corpus, schedule
from excise.methods.pretraining.routed import EVERYTHING, ModularModel, core_rules, cut_off
from excise.methods.pretraining.routed.absorption import (
    Samples,
    batches_of,
    hash_ordered,
    losses,
    sample,
)
from excise.methods.pretraining.routed.modules import Placed, Shared, blocks_of, cut, groups_of
from excise.methods.pretraining.routed.training import RoutedTraining, routed_fit
from excise.methods.tuning import Progress
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.routing import Part, Policy, Rule, resolve
from excise.routing.surgery import entries_of
from excise.train.fit import FitConfig
from excise.train.optim import schedule_share


class Moefy(Method):
    """Dense training and routing by turns; neurons go to the domain that they serve."""

    name: Literal["moefy"] = "moefy"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing. All phases share its steps."""
    labels: LabelNoise | None = None
    """How the given labels differ from the truth; missing means they are right."""
    rounds: int = Field(default=3, ge=1)
    """How often dense training, assignment and routing follow each other."""
    dense_share: float = Field(default=0.2, ge=0, lt=1)
    """Share of each round's steps that is dense."""
    neurons: float = Field(default=0.1, gt=0, lt=1)
    """MLP neurons of each capability at the end, as a share of each block's (at least one)."""
    grow: bool = True
    """Whether modules grow from round to round, by the same number each; else they start whole."""
    keep: bool = True
    """Whether a capability keeps the neurons it has; else all are assigned anew every round."""
    blocks: Annotated[tuple[int, ...], SIGNED] = ()
    """Blocks that are split, negative from the last; empty for all."""
    score: Literal["difference", "ratio"] = "difference"
    """How attribution to a capability is set against that to the rest."""
    control: Literal["none", "random", "dense"] = "none"
    """`random`: neurons drawn by chance, as many; `dense`: no routing in any of the steps."""
    p_off: float = Field(default=0.5, ge=0, le=1)
    """Share of core rows that are read without the modules while routing."""
    joint: tuple[Shared, ...] = ("embed",)
    """What rows of a capability may write beside their module."""
    read_rows: int = Field(default=128, ge=1)
    """Rows of each domain that attribution reads at most."""
    ablate: Literal["zero", "reinit"] = "zero"
    """How modules are cut off at the end."""

    starts_from: ClassVar[Literal["original", "scratch"]] = "scratch"
    paper: ClassVar[Paper] = Paper(
        "MoEfication: transformer feed-forward layers are mixtures of experts",
        "arXiv:2110.01786",
        "in alternation with dense training, as proposed for gradient routing (arXiv:2410.04332)",
        defaults={
            "score": "ours: arXiv:2110.01786 groups neurons by co-activation",
            "dense_share": "ours: no published value; what dense steps teach the core stays in it",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` in rounds and empty the modules that came out of it."""
        config, names = schedule(self.pretrain, self.name), tuple(domain.forget)
        rows = labelled_corpus(domain, self.labels, ctx)
        model, tokenizer = start.load(dtype=ctx.dtype, device=ctx.device), start.tokenizer()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        run = Rounds(
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            names=names,
            blocks=self._blocks(model),
            config=config,
            ctx=ctx,
            domains=domains_of(rows, len(names), tokenizer, config.max_length, self.read_rows),
            samples=sample(rows, tokenizer, max_length=config.max_length),
            progress=Progress(ctx, self.name, config.fit.steps),
        )
        facts = {"rounds": [self._round(run, number) for number in range(self.rounds)]}
        modular = ModularModel(model, run.placed(), self._policy(run))
        trained = RoutedTraining(resolve(model, modular.policy.groups), run.progress)
        return cut_off(start, modular, trained, rows, config, ctx, how=self.ablate, extras=facts)

    def _blocks(self, model: nn.Module) -> tuple[int, ...]:
        """Return the blocks that are split.

        Raises:
            UserError: If one is not there.
        """
        count = anatomy(model).num_blocks
        for block in self.blocks:
            if not -count <= block < count:
                raise UserError(f"moefy.blocks names {block}; the model has {count}, from 0")
        return tuple(blocks_of(model, self.blocks))

    def _round(self, run: Rounds, number: int) -> dict[str, Any]:
        """Train dense, assign neurons, route; return what the record keeps of it."""
        steps = run.config.fit.steps
        begin, end = (round(steps * (number + i) / self.rounds) for i in (0, 1))
        middle = begin + round(self.dense_share * (end - begin))
        dense = Policy(rules=EVERYTHING, capabilities=run.names)
        run.train(f"round-{number + 1}-dense", begin, middle, dense, self.name)
        self._assign(run, number)
        run.train(f"round-{number + 1}-routed", middle, end, self._policy(run), self.name)
        at = {"begin": begin, "routed_from": middle, "end": end}
        return {"round": number + 1, "steps": at, **self._measured(run)}

    def _assign(self, run: Rounds, number: int) -> None:
        """Give every capability its neurons in every block, and put them side by side."""
        scores = attribution(run.model, run.domains, run.blocks, run.ctx.device)
        share = self.neurons * ((number + 1) / self.rounds if self.grow else 1.0)
        for block in run.blocks:
            score_CM = contrast(scores[block], self.score)
            if self.control == "random":
                generator = run.ctx.generator(f"moefy.random.{number}.{block}")
                score_CM = torch.rand(score_CM.shape, generator=generator)
            count = max(1, round(share * score_CM.shape[1]))
            units = choose(score_CM, count, run.owned(block) if self.keep else ())
            run.parts[block] = gather_units(run.model, block, units)

    def _policy(self, run: Rounds) -> Policy:
        """Return the groups as they are now, and what rows of each label read and write."""
        joint = ("joint",) if self.joint else ()
        routed: dict[str, tuple[Rule, ...]] = {
            "core": core_rules(("core", *joint), p_off=self.p_off),
            "forget": (Rule(write=("self", *joint)),),
            "unlabeled": (Rule(),),
        }
        return Policy(
            groups=groups_of(run.placed(), self.joint),
            rules=EVERYTHING if self.control == "dense" else routed,
            capabilities=run.names,
        )

    def _measured(self, run: Rounds) -> dict[str, Any]:
        """Return utility, separation and active parameters after a round."""
        device = run.ctx.device
        on, off = losses(run.model, run.samples, device), run.losses_without(run.placed())
        sizes = resolve(run.model, groups_of(run.placed(), self.joint)).sizes()
        modules = {n: sizes[f"module_{i + 1}"] for i, n in enumerate(run.names)}
        core = sum(sizes.values()) - sum(modules.values())
        scores = attribution(run.model, run.domains, run.blocks, device)
        both = "labelled" in on
        return {
            "units": {str(b): [len(units) for units in run.owned(b)] for b in run.blocks},
            "losses": {"on": on, "off": off},
            "utility": off.get("retain"),
            "separation": off["labelled"] - on["labelled"] if both else None,
            "active": {"core": core, **{n: core + size for n, size in modules.items()}},
            "captured": dict(zip(run.names, captured(scores, run.parts), strict=True)),
        }


@dataclass
class Rounds:
    """A model on its way through the rounds.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        rows: What is read, with the given labels.
        names: Capabilities, in the order of their labels.
        blocks: Blocks that are split.
        config: The schedule that all phases share.
        ctx: Seed, device, folder.
        domains: Batches that attribution reads, core first.
        samples: Rows on which losses are measured.
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
    samples: Samples
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
        """Train from step `begin` to step `end` of the shared schedule.

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
        progress = routed_fit(
            self.model, policy, self.rows, self.tokenizer, config, ctx, stage=f"{stage}.{name}"
        ).progress
        self.progress.tokens += progress.tokens
        self.progress.done += progress.done
        self.progress.history += [{**row, "step": row["step"] + begin} for row in progress.history]

    @torch.no_grad()
    def losses_without(self, placed: Placed) -> dict[str, float]:
        """Return the losses of the model with its modules emptied, which it then gets back."""
        before = [(entries, entries.clone()) for entries in entries_of(self.model, placed.every)]
        cut(self.model, placed, "zero", 0)
        try:
            return losses(self.model, self.samples, self.ctx.device)
        finally:
            for entries, value in before:
                entries.copy_(value)


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


def domains_of(
    rows: Rows, count: int, tokenizer: Tokenizer, max_length: int, limit: int
) -> tuple[tuple[Batch, ...], ...]:
    """Draw rows of core and of each capability, by their given labels and content alone.

    Args:
        rows: What is read in training, with the given labels.
        count: Number of capabilities.
        tokenizer: The model's tokenizer.
        max_length: Tokens per row.
        limit: Rows of each at most.

    Returns:
        Batches on the CPU, core first; none where no row carries the label.
    """
    domains = []
    for label in range(CORE, count + 1):
        labelled = [row for row in dict.fromkeys(rows) if row.label == label]
        drawn = hash_ordered(labelled, 0)[:limit]
        domains.append(batches_of(drawn, tokenizer, max_length=max_length))
    return tuple(domains)
