"""Alternate dense training and MoE-fication: train dense, give neurons to domains, route, repeat.

After each dense phase every capability gets the MLP neurons that matter most to it and least to
the rest, by measured attribution; while they are routed, its rows write into them alone and part
of the core rows runs without them. Each round the modules grow, so that the network is split
further and further. At the end the modules are emptied.

The proposal is a comment of 2024 on gradient routing: a MoE that the network shows us how to cut,
"as much splitting for minimal utility cost as possible". Splitting a trained MLP into experts is
MoEfication (Zhang et al. 2022); theirs groups neurons that fire together and trains no further.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.data.labels import LabelNoise
from excise.methods.base import Method, Paper, Removal
from excise.methods.pretraining.moefy_neurons import (
    attribution,
    captured,
    choose,
    contrast,
    gather_units,
)
from excise.methods.pretraining.moefy_run import Rounds, domains_of, everything
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import Pretrain, told_corpus
from excise.methods.tuning import Progress, finish
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.names import parameters_by_name
from excise.routing.ablation import BEFORE, described
from excise.routing.absorption import losses, sample
from excise.routing.change import ranges_of
from excise.routing.groups import GroupMap, resolve
from excise.routing.modules import Placed, Shared, alternatives, cut, groups_of
from excise.routing.profiles import save_before
from excise.routing.rules import Policy, Rule


class Moefy(Method):
    """Dense training and routing by turns; neurons go to the domain that they serve."""

    name: Literal["moefy"] = "moefy"
    pretrain: Pretrain | None = None
    """Schedule; taken from the recipe when missing. All phases share its steps."""
    labels: LabelNoise | None = None
    """How the labels one has differ from the truth; missing means they are right."""
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
    blocks: tuple[int, ...] = ()
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
            "score": "not in the paper: neurons are grouped there by co-activation",
            "dense_share": "not in a paper: what dense steps teach the core stays in it",
        },
    )

    def apply(self, start: Checkpoint, domain: Domain, ctx: Context) -> Removal:
        """Train `start` in rounds and empty the modules that came out of it."""
        config = schedule(self.pretrain, self.name)
        rows = told_corpus(domain, self.labels, ctx)
        model, tokenizer = start.load(dtype=ctx.dtype, device=ctx.device), start.tokenizer()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        names = tuple(domain.forget)
        run = Rounds(
            model=model,
            tokenizer=tokenizer,
            rows=rows,
            names=names,
            blocks=self._blocks(model),
            config=config,
            ctx=ctx,
            domains=domains_of(rows, len(names), tokenizer, config, self.read_rows),
            sets=sample(rows, tokenizer, max_length=config.max_length),
            progress=Progress(ctx, self.name, config.fit.steps),
        )
        rounds = [self._round(run, number) for number in range(self.rounds)]
        placed = run.placed()
        extras = described(model, self._map(model, placed), rows, run.sets, ctx)
        before = losses(model, run.sets, ctx.device)
        if ctx.rank == 0:
            save_before(model, placed, names, ctx.work / BEFORE)
        cut(model, placed, self.ablate, ctx.seed_for("reinit"))
        extras["losses"] = {"before": before, "after": losses(model, run.sets, ctx.device)}
        extras["rounds"] = rounds
        parameters = dict(model.named_parameters())
        return finish(start, model, parameters, run.progress, ctx, extras=extras)

    def _blocks(self, model: nn.Module) -> tuple[int, ...]:
        """Return the blocks that are split.

        Raises:
            UserError: If one is not there.
        """
        count = anatomy(model).num_blocks
        for block in self.blocks:
            if not -count <= block < count:
                raise UserError(f"moefy.blocks names {block}; the model has {count}, from 0")
        return tuple(sorted({b % count for b in self.blocks or range(count)}))

    def _round(self, run: Rounds, number: int) -> dict[str, Any]:
        """Train dense, assign neurons, route; return what the record keeps of it."""
        steps = run.config.fit.steps
        begin, end = (round(steps * (number + i) / self.rounds) for i in (0, 1))
        middle = begin + round(self.dense_share * (end - begin))
        dense = Policy(rules=everything(), capabilities=run.names)
        run.train(f"round-{number + 1}-dense", begin, middle, dense, self.name)
        self._assign(run, number)
        policy = Policy(
            groups=groups_of(run.placed(), self.joint),
            rules=everything() if self.control == "dense" else self._rules(),
            capabilities=run.names,
        )
        run.train(f"round-{number + 1}-routed", middle, end, policy, self.name)
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
            got = choose(score_CM, count, run.owned(block) if self.keep else ())
            run.parts[block] = gather_units(run.model, block, got)

    def _rules(self) -> dict[str, tuple[Rule, ...]]:
        """Return what rows of each label read and write while routing."""
        joint = ("joint",) if self.joint else ()
        core = ("core", *joint)
        return {
            "core": alternatives(
                (self.p_off, Rule(read=core, write=core)), (1 - self.p_off, Rule())
            ),
            "forget": (Rule(write=("self", *joint)),),
            "unlabeled": (Rule(),),
        }

    def _map(self, model: nn.Module, placed: Placed) -> GroupMap:
        """Return who owns what."""
        return resolve(model, groups_of(placed, self.joint))

    def _measured(self, run: Rounds) -> dict[str, Any]:
        """Return utility, separation and active parameters after a round."""
        placed, device = run.placed(), run.ctx.device
        on = losses(run.model, run.sets, device)
        off = _without(run.model, placed, run)
        sizes = self._map(run.model, placed).sizes()
        modules = {n: sizes[f"module_{i + 1}"] for i, n in enumerate(run.names)}
        core = sum(sizes.values()) - sum(modules.values())
        scores = attribution(run.model, run.domains, run.blocks, device)
        both = "labelled" in on
        return {
            "units": {str(block): [len(mine) for mine in run.owned(block)] for block in run.blocks},
            "losses": {"on": on, "off": off},
            "utility": off.get("retain"),
            "separation": off["labelled"] - on["labelled"] if both else None,
            "active": {"core": core, **{n: core + size for n, size in modules.items()}},
            "captured": dict(zip(run.names, captured(scores, run.parts), strict=True)),
        }


@torch.no_grad()
def _without(model: nn.Module, placed: Placed, run: Rounds) -> dict[str, float]:
    """Return the losses of the model with its modules emptied, which it then gets back."""
    named = parameters_by_name(model)
    held: list[tuple[Tensor, Tensor]] = []
    for name, spans in ranges_of(model, placed.every).items():
        for dim, start, stop in spans:
            piece = named[name].narrow(dim, start, stop - start)
            held.append((piece, piece.clone()))
    cut(model, placed, "zero", 0)
    try:
        return losses(model, run.sets, run.ctx.device)
    finally:
        for piece, value in held:
            piece.copy_(value)
