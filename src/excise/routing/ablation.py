"""What every preset of gradient routing does: place modules, train under a policy, cut them off.

The model before the cut lies as safetensors beside the ablated one, so that any subset of modules
can still be served (`profiles.serve`). The record keeps the map of groups, losses of retained,
labelled and missed rows before and after, and which group each kind of row writes into.

Shape legend: V vocabulary, B rows, T tokens, M neurons of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import CORE, Domain, Rows
from excise.data.labels import LabelNoise, label_quality
from excise.data.split import hashed_order
from excise.data.stream import Tokenizer
from excise.methods.base import Removal
from excise.methods.pretraining.plain import schedule
from excise.methods.pretraining.pretrain import Pretrain, told_corpus
from excise.methods.tuning import finish
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import capture
from excise.models.names import modules_by_name
from excise.routing.absorption import Sets, losses, sample, writes
from excise.routing.groups import GroupMap, Part
from excise.routing.measures import count_units
from excise.routing.modules import How, Module, Placed, Shared, cut, groups_of, place
from excise.routing.profiles import save_before
from excise.routing.rules import Policy, Rule
from excise.routing.train import RoutedBatch, Trained, routed_fit
from excise.train.fit import Term

BEFORE = "before_ablation.safetensors"
"""Weights before modules were cut off, under `ctx.work`."""


@dataclass(frozen=True)
class Setup:
    """What a preset decides once it sees the model and the rows.

    Attributes:
        policy: Groups and rules.
        placed: What is cut off at the end.
        soften_V: How much each token of a labelled row counts as forget; None for wholly.
        blocks: Blocks whose MLP activations are penalised; empty for all.
    """

    policy: Policy
    placed: Placed
    soften_V: Tensor | None = None
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What a preset may look at before training.

    Attributes:
        names: Capabilities, in the order of their labels.
        rows: What is read, labelled as told.
        tokenizer: The model's tokenizer.
    """

    names: tuple[str, ...]
    rows: Rows
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Cutting:
    """How modules are trained and cut off.

    Attributes:
        how: Delete, zero, or draw anew.
        rate: Learning rate of modules, as a multiple of the schedule's.
        l1: Weight of the L1 norm of MLP activations.
        zeroed: Whether one optimizer moves what a batch may not write, by momentum and decay.
        repair: What is done to the model after the cut; it returns facts for the record.
    """

    how: How
    rate: float = 1.0
    l1: float = 0.0
    zeroed: bool = False
    repair: Callable[[nn.Module, Seen], Mapping[str, Any]] | None = None


class FromScratch(Protocol):
    """What presets that train from scratch have in common."""

    name: Any
    pretrain: Pretrain | None
    labels: LabelNoise | None


def train_preset(
    preset: FromScratch,
    start: Checkpoint,
    domain: Domain,
    ctx: Context,
    setup: Callable[[nn.Module, Seen], Setup],
    cutting: Cutting,
    *,
    read: float = 1.0,
) -> Removal:
    """Train `start` on the corpus with the labels a preset is told, and cut its modules off.

    Args:
        preset: Its schedule, labels and name.
        start: What is trained.
        domain: Rows by role.
        ctx: Seed, device, folder.
        setup: As `train_and_cut`.
        cutting: How modules are trained and cut off.
        read: Share of labelled rows that are read.
    """
    rows = thinned(told_corpus(domain, preset.labels, ctx), read, ctx.seed_for("read"))
    config = schedule(preset.pretrain, preset.name)
    names = tuple(domain.forget)
    return train_and_cut(start, rows, names, ctx, setup, config, cutting, stage=preset.name)


def thinned(rows: Rows, share: float, seed: int) -> Rows:
    """Return the rows with a share of those labelled as a capability, drawn by hash."""
    if share >= 1:
        return rows
    labelled = [row for row in rows if row.label > CORE]
    keys = [f"{row.unit}:{row.wording}:{row.text}:{row.prompt}" for row in labelled]
    kept = {id(row) for row in hashed_order(labelled, keys, seed)[: round(share * len(labelled))]}
    return tuple(row for row in rows if row.label <= CORE or id(row) in kept)


def modular(
    module: Module,
    rules: Mapping[str, tuple[Rule, ...]],
    ctx: Context,
    *,
    joint: Sequence[Shared] = (),
    joint_down: bool = False,
) -> Callable[[nn.Module, Seen], Setup]:
    """Return the setup of one module per capability, everything else core or joint.

    Args:
        module: Size and place of each module.
        rules: What rows of each label read and write.
        ctx: Seed of grown modules.
        joint: What labelled rows may write beside their module.
        joint_down: Whether every row writes the modules' down-projections.
    """

    def setup(model: nn.Module, seen: Seen) -> Setup:
        placed = place(model, module, len(seen.names), ctx.seed_for("grow"))
        groups = groups_of(placed, tuple(joint), joint_down=joint_down)
        policy = Policy(groups=groups, rules=dict(rules), capabilities=seen.names)
        return Setup(policy, placed, blocks=module.blocks)

    return setup


def train_and_cut(
    start: Checkpoint,
    rows: Rows,
    names: Sequence[str],
    ctx: Context,
    setup: Callable[[nn.Module, Seen], Setup],
    config: Pretrain,
    cutting: Cutting,
    *,
    stage: str,
) -> Removal:
    """Train `start` under a policy and cut its modules off.

    Args:
        start: What is trained.
        rows: What is read, labelled as told.
        names: Capabilities, in the order of their labels.
        ctx: Seed, device, folder.
        setup: Places modules in the loaded model and says what each label reads and writes.
        config: The schedule.
        cutting: How modules are trained and cut off.
        stage: Name shown beside the progress.

    Returns:
        The ablated model and what was measured on the way.
    """
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    seen = Seen(tuple(names), rows, start.tokenizer())
    plan = setup(model, seen)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trained = train(model, plan, seen, config, cutting, ctx, stage=stage)
    sets = sample(rows, seen.tokenizer, max_length=config.max_length)
    extras = described(model, trained.map, rows, sets, ctx)
    before = losses(model, sets, ctx.device)
    if ctx.rank == 0:
        save_before(model, plan.placed, seen.names, ctx.work / BEFORE)
    cut(model, plan.placed, cutting.how, ctx.seed_for("reinit"))
    extras["losses"] = {"before": before, "after": losses(model, sets, ctx.device)}
    if cutting.repair is not None:
        extras["repair"] = dict(cutting.repair(model, seen))
        extras["losses"]["repaired"] = losses(model, sets, ctx.device)
    parameters = dict(model.named_parameters())
    return finish(start, model, parameters, trained.progress, ctx, extras=extras)


def described(
    model: nn.Module, map: GroupMap, rows: Rows, sets: Sets, ctx: Context
) -> dict[str, Any]:
    """Return what the record keeps of a routed model, modules still on.

    Args:
        model: The trained model.
        map: Who owned what.
        rows: What was read, labelled as told.
        sets: Rows to measure on.
        ctx: Device.
    """
    return {
        "groups": map.table(),
        "group_sizes": map.sizes(),
        "group_notes": list(map.notes),
        "labels": {k: None if v != v else v for k, v in label_quality(rows).items()},
        "absorption": writes(model, map, sets, ctx.device),
        "files": {"before_ablation": BEFORE},
    }


def train(
    model: nn.Module,
    plan: Setup,
    seen: Seen,
    config: Pretrain,
    cutting: Cutting,
    ctx: Context,
    *,
    stage: str,
) -> Trained:
    """Train a model in place under a plan, with the penalty and the rates of `cutting`."""
    fast = config.fit.lr * cutting.rate
    rates = None if cutting.rate == 1 else dict.fromkeys(plan.placed.parts, fast)
    paths = penalised(model, plan.blocks) if cutting.l1 else []
    with capture(model, paths, of="input", grad=True) as inputs:

        def more(model: nn.Module, micro: RoutedBatch, output: Any) -> dict[str, Term]:
            total = absolute_sum(inputs, micro.batch.attention_BT)
            for held in inputs.values():
                held.clear()
            return {"l1": Term(total, float(micro.num_tokens), cutting.l1)}

        return routed_fit(
            model,
            plan.policy,
            seen.rows,
            seen.tokenizer,
            config,
            ctx,
            stage=stage,
            soften_V=plan.soften_V,
            more=more if paths else None,
            more_counts=(lambda micro: {"l1": float(micro.num_tokens)}) if paths else None,
            rates=rates,
            zeroed=cutting.zeroed,
        )


def penalised(model: nn.Module, blocks: Sequence[int]) -> list[str]:
    """Return the modules whose inputs are the activations of the MLPs of some blocks.

    Fused experts have no such module, and no penalty.

    Args:
        model: A causal model.
        blocks: Blocks, negative from the last; empty for all.
    """
    found, named = anatomy(model), modules_by_name(model)
    chosen = {block % found.num_blocks for block in blocks or range(found.num_blocks)}
    return [found.mlp_down[block] for block in sorted(chosen) if found.mlp_down[block] in named]


def absolute_sum(inputs: Mapping[str, Sequence[Tensor]], attention_BT: Tensor) -> Tensor:
    """Return the summed absolute activations at real tokens, of the last call of each module.

    Args:
        inputs: Activations [B, T, M] by module.
        attention_BT: True where a token is real.
    """
    parts = [held[-1].float().abs().sum(-1)[attention_BT].sum() for held in inputs.values()]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def own_units(model: nn.Module, blocks: Sequence[int]) -> tuple[Part, ...]:
    """Return the neurons or experts that blocks have, before any is grown.

    Args:
        model: A causal model.
        blocks: Blocks, negative from the last; empty for all.
    """
    found = anatomy(model)
    parts = []
    for block in sorted({b % found.num_blocks for b in blocks or range(found.num_blocks)}):
        at = "mlp" if found.experts[block] is None else "experts"
        count = count_units(model, block, at)  # type: ignore[arg-type]
        parts.append(Part(at=at, blocks=(block,), units=(0, count)))  # type: ignore[arg-type]
    return tuple(parts)
