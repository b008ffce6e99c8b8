"""E8: what is left of a student's first weights when its outputs are another model's?

Shape legend: M neurons of an MLP.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from excise.core.context import Context, Stage
from excise.core.errors import UserError
from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Estimate
from excise.methods.base import ApplyMethod
from excise.methods.distillation.targets import FromOracle, FromTeacher
from excise.methods.distillation.undo import Undo
from excise.methods.pretraining.plain import Plain
from excise.models.anatomy import anatomy
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.hooks import find_module
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import Replicate, row
from excise_studies.distillation.presets import student
from excise_studies.recovery import RECOVERY, RecoveryScores, gaps, listed
from excise_studies.setting import (
    ExperimentSetting,
    Make,
    checkpoints,
    conditions_of,
    make_conditions,
    make_inits,
    make_replicates,
    measure_conditions,
    result,
)

OTHER = 5000
"""An original of another initialisation starts from the seed plus this."""

Init = Literal["random", "unlearned", "original", "permuted", "another original", "oracle"]
"""`permuted`: the original with the neurons of every MLP in another order."""


class InitLeak(Study):
    """Students of one target from several first weights, all their steps alike.

    Stated beforehand. Every student imitates the oracle's predictions on the mix for equal steps;
    what differs is where it starts: random weights, the unlearned model, the original, the same
    with its neurons in another order (as near in function, far in weights), an original of another
    initialisation and order, or the oracle itself. What decides is the depth gap on the held-out
    test set of the start at the original minus that of the random start after relearning:
    initialisation leaks if the 95 % interval over seeds and units lies above `margin`, and does not
    if it lies within the margin on both sides. The same students of the unlearned teacher's
    predictions, and the cosine between student and original, stand beside it.
    """

    question: ClassVar[str] = (
        "Does a student that starts from a model that knows keep something of it, though its "
        "predictions are those of one that never knew?"
    )
    statistic: ClassVar[str] = (
        "Depth gap on the held-out test set after relearning of the student of the oracle that "
        "starts from the original minus that of the one that starts from random weights; a leak if "
        "the 95 % interval lies above the margin, none if within it. Intervals over seeds and "
        "units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["init-leak"] = "init-leak"
    """Name on the command line."""
    margin: float = 0.05
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data, models, attacker."""
    student: Undo = student()
    """The student; targets, first weights and perturbation are replaced."""
    inits: tuple[Init, ...] = (
        "random", "unlearned", "original", "permuted", "another original", "oracle",
    )  # fmt: skip
    """First weights."""
    teacher_too: bool = True
    """Whether students of the unlearned teacher run as well, from random and unlearned weights."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Distil from every start, relearn, compare."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        others = (
            another(self, replicates, runtime, pool) if "another original" in self.inits else {}
        )
        orders = permuted(replicates, runtime, pool) if "permuted" in self.inits else {}
        wanted = {}
        for seed, replicate in replicates.items():
            assert replicate.oracle is not None
            target = FromOracle(path=str(replicate.oracle.path))
            places = {
                "random": "original",
                "unlearned": "unlearned",
                "original": "original",
                "permuted": str(orders[seed].path) if orders else "",
                "another original": str(others[seed].path) if others else "",
                "oracle": str(replicate.oracle.path),
            }
            for init in self.inits:
                alpha = 1.0 if init == "random" else 0.0
                update = {"targets": target, "student": places[init], "alpha": alpha}
                method = self.student.model_copy(update=update)
                wanted[f"oracle's logits, from {init}", seed] = Make(
                    method, replicate.original, replicate.domain
                )
        if self.teacher_too:
            from_teacher = {"targets": FromTeacher(), "student": "unlearned"}
            taught = {
                "teacher's logits, from random": self.student.model_copy(update=from_teacher),
                "teacher's logits, from unlearned": self.student.model_copy(
                    update={**from_teacher, "alpha": 0.0}
                ),
            }
            wanted |= conditions_of(taught, replicates, self.seeds)
        models = checkpoints(make_conditions(wanted, runtime, pool))
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        leak = leaks(self, recovery)
        near = {key: cosine(model, replicates[key[1]].original) for key, model in models.items()}
        words = [f"From an init minus from random, depth gap: {listed(leak)}.", gaps(recovery)]
        tables = (_table(leak), _near(near, self.seeds))
        return result(recovery, words, decide(self, leak), replicates, models, tables=tables)


def another(
    study: InitLeak, replicates: Mapping[int, Replicate], runtime: Runtime, pool: Pool
) -> dict[int, Checkpoint]:
    """Return originals of the same data, of other initialisations and orders of rows."""
    inits = make_inits(study.experiment, replicates, runtime, pool, OTHER)
    plain = Plain(pretrain=study.experiment.pretrain)
    jobs = [
        ApplyMethod(plain, inits[seed], replicate.domain, seed + OTHER)
        for seed, replicate in replicates.items()
    ]
    removals = pool.map(runtime.run, jobs)
    return {seed: removal.checkpoint for seed, removal in zip(replicates, removals, strict=True)}


@dataclass(frozen=True)
class PermuteNeurons(Stage[Checkpoint]):
    """A model's function in other coordinates: its neurons in another order.

    Attributes:
        model: The model.
        seed: Seed of the order.
    """

    model: Checkpoint
    seed: int

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "permuted"

    def make(self, ctx: Context) -> None:
        """Write the model."""
        shutil.rmtree(ctx.work / "model", ignore_errors=True)  # of a run that was killed
        net = self.model.load(dtype=torch.float32)
        permute_neurons(net, torch.Generator().manual_seed(self.seed))
        save_model(net, None, ctx.work / "model", source=self.model)

    def read(self, folder: Path) -> Checkpoint:
        """Return the model."""
        return Checkpoint(folder / "model")


def permuted(
    replicates: Mapping[int, Replicate], runtime: Runtime, pool: Pool
) -> dict[int, Checkpoint]:
    """Return every seed's original with its neurons in another order."""
    jobs = [PermuteNeurons(replicate.original, seed) for seed, replicate in replicates.items()]
    return dict(zip(replicates, pool.map(runtime.run, jobs), strict=True))


def leaks(study: InitLeak, recovery: RecoveryScores) -> dict[str, Estimate]:
    """Return each start's gap minus that of the random start."""
    base = ["oracle's logits, from random"]
    return {
        init: recovery.contrast([f"oracle's logits, from {init}"], base)
        for init in study.inits
        if init != "random"
    }


def decide(study: InitLeak, leak: Mapping[str, Estimate]) -> Decision:
    """Return what the start at the original says under the margin."""
    words = {
        "above": f"initialisation leaks: more than {study.margin:g}",
        "equal": f"initialisation does not leak: within {study.margin:g}",
        "below": "initialisation does not leak: the start at the original went deeper",
        "undecided": f"undecided: the interval crosses {study.margin:g}",
    }
    margin = (-study.margin, study.margin)
    asked = Contrast("The leak from the original", leak["original"], margin, study.error)
    return Decision(asked.say(words), (asked,))


def _table(leak: Mapping[str, Estimate]) -> StudyTable:
    """Return the leaks."""
    return StudyTable(
        title="First weights against random ones",
        note=(
            "Students of the oracle's predictions; depth gap on the held-out test set, 0 is no "
            "leak."
        ),
        rows=tuple(row(f"from {name}", "depth gap", e) for name, e in leak.items()),
    )


def _near(near: Mapping[tuple[str, int], float], seeds: tuple[int, ...]) -> StudyTable:
    """Return the cosine of every student to the original."""
    rows = []
    for condition in dict.fromkeys(condition for condition, _ in near):
        value = sum(near[condition, seed] for seed in seeds) / len(seeds)
        rows.append(
            StudyRow(
                condition=condition, metric="cosine to the original", value=value, n=len(seeds)
            )
        )
    return StudyTable(
        title="Distance in weights",
        note="Cosine over all matrices; n counts seeds. Neurons are not matched.",
        rows=tuple(rows),
    )


@torch.no_grad()
def permute_neurons(model: Any, generator: torch.Generator) -> int:
    """Reorder the neurons of every MLP in place; predictions stay what they are.

    Args:
        model: A dense causal model.
        generator: What the orders are drawn from, on the CPU.

    Returns:
        How many neurons have another place.

    Raises:
        UserError: If the model mixes experts.
    """
    layout = anatomy(model)
    if any(layout.experts):
        raise UserError(f"{layout.family} mixes experts; neurons of a dense model can be permuted")
    moved = 0
    for i in range(layout.num_blocks):
        order_M = torch.randperm(layout.d_mlp, generator=generator)
        moved += int((order_M != torch.arange(layout.d_mlp)).sum())
        spans = sorted(layout.slices.values()) or [(0, layout.d_mlp)]
        for path in dict.fromkeys((layout.mlp_up[i], layout.mlp_gate[i])):
            if path:
                _reorder(find_module(model, path), order_M, spans, outputs=not layout.transposed)
        down = find_module(model, layout.mlp_down[i]).get_parameter("weight")
        into = 0 if layout.transposed else 1
        down.copy_(down.index_select(into, order_M.to(down.device)))
    return moved


def _reorder(
    module: nn.Module, order_M: Tensor, spans: list[tuple[int, int]], *, outputs: bool
) -> None:
    """Reorder what a matrix puts out, span by span; `outputs`: those are its first dimension."""
    for parameter in module.parameters(recurse=False):
        dim = 0 if outputs or parameter.dim() == 1 else 1
        for start, stop in spans:
            part = parameter.narrow(dim, start, stop - start)
            part.copy_(part.index_select(dim, order_M.to(part.device)))


def cosine(model_a: Checkpoint, model_b: Checkpoint) -> float:
    """Return the cosine between the matrices of two models of one shape, as one long vector.

    Args:
        model_a: A model.
        model_b: Another; only tensors that both have under one name count.
    """
    a, b = (
        {n: p.detach().double() for n, p in model.load(dtype=torch.float32).named_parameters()}
        for model in (model_a, model_b)
    )
    names = [name for name in a if name in b and a[name].dim() > 1]
    dot = sum(float((a[n] * b[n]).sum()) for n in names)
    squares = (sum(float(m[n].square().sum()) for n in names) for m in (a, b))
    size = 1.0
    for square in squares:
        size *= max(square, 1e-24) ** 0.5
    return dot / size
