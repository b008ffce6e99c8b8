"""Gradient routing as training from scratch: place modules, train under a policy, cut them off.

A preset is a method whose file says where its modules lie (`place`) and what rows of each label
read and write (a `Policy`); `train_and_cut` does the rest, the same for all. The model before the
cut lies as safetensors beside the ablated one, so that any subset of modules can still be served
(`serve`). The record keeps the map of groups, losses of retained, labelled and missed rows before
and after, and which group each kind of row writes into.

Shape legend: V vocabulary, B rows, T tokens, M neurons of an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from excise.core.context import Context
from excise.data.domain import Rows
from excise.methods.base import Removal
from excise.methods.pretraining.pretrain import Pretrain, quality_of_labels
from excise.methods.pretraining.routed.absorption import (
    Samples,
    gradient_shares,
    losses,
    sample,
)
from excise.methods.pretraining.routed.coherence import Coherence, coherence
from excise.methods.pretraining.routed.modules import (
    How,
    Module,
    Placed,
    Shared,
    blocks_of,
    cut,
    groups_of,
    place,
    save_before,
)
from excise.methods.pretraining.routed.training import RoutedBatch, RoutedTraining, routed_fit
from excise.methods.tuning import finish
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint
from excise.models.hooks import capture
from excise.models.names import modules_by_name
from excise.routing import GroupMap, Names, Policy, Rule
from excise.train.fit import Term

BEFORE = "before_ablation.safetensors"
"""Weights before modules were cut off, under `ctx.work`."""
EVERYTHING: dict[str, tuple[Rule, ...]] = dict.fromkeys(("core", "forget", "unlabeled"), (Rule(),))
"""The rules of plain training: every row reads and writes everything."""


@dataclass(frozen=True)
class ModularModel:
    """A loaded model with modules placed in it, and the policy under which it is trained.

    Attributes:
        model: The model.
        placed: Its modules.
        policy: Groups and rules, capabilities in the order of their modules.
    """

    model: nn.Module
    placed: Placed
    policy: Policy


def with_modules(
    start: Checkpoint,
    module: Module,
    names: tuple[str, ...],
    rules: dict[str, tuple[Rule, ...]],
    ctx: Context,
    joint: Sequence[Shared] = (),
    *,
    joint_down: bool = False,
) -> ModularModel:
    """Load a model and place one module per capability in it; everything else is core or joint.

    Args:
        start: What is loaded.
        module: Size and place of each module.
        names: Capabilities, in the order of their labels.
        rules: What rows of each label read and write.
        ctx: Device, dtype, seed of grown modules.
        joint: What labelled rows may write beside their module.
        joint_down: Whether every row writes the modules' down-projections.
    """
    model = start.load(dtype=ctx.dtype, device=ctx.device)
    placed = place(model, module, len(names), ctx.seed_for("grow"))
    groups = groups_of(placed, joint, joint_down=joint_down)
    return ModularModel(model, placed, Policy(groups=groups, rules=rules, capabilities=names))


def train_and_cut(
    start: Checkpoint,
    modular: ModularModel,
    rows: Rows,
    config: Pretrain,
    ctx: Context,
    *,
    stage: str,
    how: How,
    l1: float = 0.0,
    soften_V: Float[Tensor, "V"] | None = None,
    zeroed: bool = False,
    repair: Coherence | None = None,
) -> Removal:
    """Train a model with modules under a policy and cut the modules off.

    Args:
        start: What the method started from.
        modular: It with its modules; changed in place.
        rows: What is read, with the given labels.
        config: The schedule.
        ctx: Seed, device, folder.
        stage: Name shown beside the progress.
        how: How modules are cut off.
        l1: Weight of the L1 norm of MLP activations, per token, in the blocks with modules.
        soften_V: How much each token of a labelled row counts as forget; None for wholly.
        zeroed: Whether one optimizer moves what a batch may not write, by momentum and decay.
        repair: The light training after the cut; None for none.

    Returns:
        The ablated model and what was measured on the way.
    """
    model, placed = modular.model, modular.placed
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    paths = _penalised(model, placed.blocks) if l1 else []
    with capture(model, paths, of="input", grad=True) as inputs:

        def penalty(model: nn.Module, micro: RoutedBatch, output: Any) -> dict[str, Term]:
            total = _absolute_sum(inputs, micro.batch.attention_BT)
            for calls in inputs.values():
                calls.clear()
            return {"l1": Term(total, float(micro.num_tokens), l1)}

        trained = routed_fit(
            model,
            modular.policy,
            rows,
            start.tokenizer(),
            config,
            ctx,
            stage=stage,
            soften_V=soften_V,
            more=penalty if paths else None,
            more_counts=(lambda micro: {"l1": float(micro.num_tokens)}) if paths else None,
            rates=module_rates(placed, config),
            zeroed=zeroed,
        )
    return cut_off(start, modular, trained, rows, config, ctx, how=how, repair=repair)


def module_rates(placed: Placed, config: Pretrain) -> dict[str, float] | None:
    """Return learning rates of modules by group, None where they are the schedule's."""
    return None if placed.lr == 1 else dict.fromkeys(placed.parts, config.fit.lr * placed.lr)


def cut_off(
    start: Checkpoint,
    modular: ModularModel,
    trained: RoutedTraining,
    rows: Rows,
    config: Pretrain,
    ctx: Context,
    *,
    how: How,
    repair: Coherence | None = None,
    extras: Mapping[str, Any] | None = None,
) -> Removal:
    """Measure a trained model, keep it, cut its modules off, and hand back what is left.

    Args:
        start: What the method started from.
        modular: The trained model, modules on; changed in place.
        trained: Who owned what, and what the training took.
        rows: What was read, with the given labels.
        config: Gives the length of rows.
        ctx: Seed, device, folder.
        how: How modules are cut off.
        repair: The light training after the cut; None for none.
        extras: Further facts for the record.
    """
    model, placed, tokenizer = modular.model, modular.placed, start.tokenizer()
    samples = sample(rows, tokenizer, max_length=config.max_length)
    facts = described(model, trained.map, rows, samples, ctx)
    before = losses(model, samples, ctx.device)
    if ctx.rank == 0:
        save_before(model, placed, modular.policy.capabilities, ctx.work / BEFORE)
    cut(model, placed, how, ctx.seed_for("reinit"))
    facts["losses"] = {"before": before, "after": losses(model, samples, ctx.device)}
    if repair is not None:
        length = config.max_length
        facts["repair"] = coherence(model, rows, tokenizer, repair, ctx, max_length=length)
        facts["losses"]["repaired"] = losses(model, samples, ctx.device)
    parameters = dict(model.named_parameters())
    facts |= extras or {}
    return finish(start, model, parameters, trained.progress, ctx, extras=facts)


def described(
    model: nn.Module, map: GroupMap, rows: Rows, samples: Samples, ctx: Context
) -> dict[str, Any]:
    """Return what the record keeps of a routed model, modules still on.

    Args:
        model: The trained model.
        map: Who owned what.
        rows: What was read, with the given labels.
        samples: Rows to measure on.
        ctx: Device.
    """
    return {
        "groups": map.table(),
        "group_sizes": map.sizes(),
        "group_notes": list(map.notes),
        "labels": quality_of_labels(rows),
        "absorption": gradient_shares(model, map, samples, ctx.device),
        "files": {"before_ablation": BEFORE},
    }


def _penalised(model: nn.Module, blocks: Sequence[int]) -> list[str]:
    """Return the modules whose inputs are the activations of the MLPs of some blocks.

    Fused experts have no such module, and no penalty.

    Args:
        model: A causal model.
        blocks: Blocks, negative from the last; empty for all.
    """
    downs, named = anatomy(model).mlp_down, modules_by_name(model)
    return [downs[block] for block in blocks_of(model, blocks) if downs[block] in named]


def _absolute_sum(inputs: Mapping[str, Sequence[Tensor]], attention_BT: Tensor) -> Tensor:
    """Return the summed absolute activations at real tokens, of the last call of each module.

    Args:
        inputs: Activations [B, T, M] by module, of each of its calls.
        attention_BT: True where a token is real.
    """
    parts = [calls[-1].float().abs().sum(-1)[attention_BT].sum() for calls in inputs.values()]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def alternatives(*drawn: tuple[float, Rule]) -> tuple[Rule, ...]:
    """Return rules with their probabilities; those that never happen are left out."""
    return tuple(rule.model_copy(update={"share": share}) for share, rule in drawn if share > 0)


def core_rules(core: tuple[str, ...], *, p_off: float) -> tuple[Rule, ...]:
    """Return what core rows do in SGTM: a share of them is read with the modules off.

    Args:
        core: Groups of a model without modules, `joint` among them.
        p_off: The share.
    """
    return alternatives((p_off, Rule(read=core, write=core)), (1 - p_off, Rule()))


def forget_rules(
    core: tuple[str, ...],
    joint: tuple[str, ...],
    *,
    p_as: float,
    read: Names = "all",
    alpha: float = 1.0,
    p_push: float = 0.0,
    push: float = 1.0,
) -> tuple[Rule, ...]:
    """Return what labelled rows do in SGTM and GRAM: they write their module and `joint`.

    Args:
        core: Groups of a model without modules, `joint` among them.
        joint: Groups that every row writes.
        p_as: Share of the rows that write the core too.
        read: Groups that take part in the forward pass.
        alpha: Weight of the gradient that passes back through the core's neurons.
        p_push: Share of the rows that are read without their module and pushed out of the core.
        push: How hard: minus the weight of their loss.
    """
    edges = {} if alpha == 1 else {"core": alpha}
    return alternatives(
        ((1 - p_push) * (1 - p_as), Rule(read=read, write=("self", *joint), edges=edges)),
        ((1 - p_push) * p_as, Rule(read=read, write=("self", *core), edges=edges)),
        (p_push, Rule(read=core, write=core, weight=-push)),
    )
