"""Is RMU easier to reverse than loss maximisation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import Attacker
from excise_studies.base import row
from excise_studies.distillation.presets import graddiff, maxent, rmu
from excise_studies.levels import estimate, levels, of_seeds
from excise_studies.recovery import RECOVERY, RecoveryScores, groups_of, said
from excise_studies.setting import (
    ExperimentSetting,
    checkpoints,
    conditions_of,
    make_conditions,
    make_replicates,
    measure_conditions,
    result,
)

STEPS = (0, 2, 4, 8, 16, 32, 64, 128, 200)
"""Steps of relearning at which models are scored."""


class ReversalCost(Study):
    """Steps of relearning until knowledge is half-way back.

    Stated beforehand. Unlearned models are relearned on the relearn set, each at the rate that dev
    chose. Its reversal cost is the number of steps at which its score on the held-out test set
    first has come half the way from what it is after unlearning to the original's, interpolated in
    the logarithm of the steps; a model that never comes half-way costs all steps. What decides is
    the mean over seeds of the binary logarithm of RMU's cost over that of `against`: RMU is easier
    to reverse if the 95 % interval over seeds and units lies below minus `margin` doublings, harder
    if above it, alike if within. A pair of which both never come half-way is undecided.
    """

    question: ClassVar[str] = (
        "Does relearning bring back what RMU removed in fewer steps than what loss maximisation "
        "removed?"
    )
    statistic: ClassVar[str] = (
        "log2 of the steps at which knowledge is half-way back after RMU over those after "
        "GradDiff, "
        "against the margin in doublings from both sides; intervals over seeds and units."
    )
    takes: ClassVar[str] = "6 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["reversal-cost"] = "reversal-cost"
    """Name on the command line."""
    margin: float = 1.0
    """Doublings of the number of steps."""
    half: float = Field(default=0.5, gt=0, lt=1)
    """Share of the way back."""
    experiment: ExperimentSetting = ExperimentSetting(attacker=Attacker(checkpoints=STEPS))
    """Data, models, attacker."""
    methods: dict[str, SerializeAsAny[Method]] = {
        "rmu": rmu(), "grad_diff": graddiff(), "maxent": maxent(),
    }  # fmt: skip
    """The removals; RMU is called `rmu`."""
    against: str = "grad_diff"
    """What RMU is held against."""

    @model_validator(mode="after")
    def _named(self) -> ReversalCost:
        """Refuse a comparison with what is not there."""
        if not {"rmu", self.against} <= set(self.methods):
            raise ValueError(f"methods: needs 'rmu' and '{self.against}', which are compared")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Remove, relearn, find the costs."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        models = checkpoints(
            make_conditions(conditions_of(self.methods, replicates, self.seeds), runtime, pool)
        )
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        groups = {seed: groups_of(replicates[seed].domain) for seed in self.seeds}
        costs = {name: log_costs(self, recovery, name, groups) for name in self.methods}
        steps = {name: _power(estimate(logs, recovery.after)) for name, logs in costs.items()}
        apart = {
            name: estimate(costs["rmu"] - costs[name], recovery.after)
            for name in self.methods
            if name != "rmu"
        }
        end = np.log2(recovery.attacked["rmu", self.seeds[0]].steps[-1])
        never = all(float(costs[name][0]) >= end - 1e-9 for name in ("rmu", self.against))
        counts = ", ".join(f"{name} {said(e)}" for name, e in steps.items())
        words = [
            f"Steps until knowledge was half-way back: {counts}.",
            "Doublings, rmu over the others: "
            f"{', '.join(f'{n} {said(e)}' for n, e in apart.items())}.",
        ]
        decision = decide(self, apart[self.against], never=never)
        return result(recovery, words, decision, replicates, models, tables=(_table(steps, apart),))


def log_costs(
    study: ReversalCost,
    recovery: RecoveryScores,
    name: str,
    groups: Mapping[int, Mapping[str, str]],
) -> Array:
    """Return the binary logarithm of the cost over seeds, in the layout of `levels`."""
    conditions = {seed: recovery.attacked[name, seed] for seed in study.seeds}
    curve = [
        levels({name: {seed: attack.v[i] for seed, attack in conditions.items()}}, groups).by_seed
        for i in range(len(next(iter(conditions.values())).steps))
    ]
    per_seed = {}
    for seed, attack in conditions.items():
        goal = recovery.before.at("original", seed)
        values = np.stack([at[seed][:, 0] for at in curve])
        per_seed[seed] = log_cost(attack.steps, values, goal, study.half)
    return of_seeds(per_seed)


def log_cost(steps: Sequence[int], values: Array, goal: Array, half: float) -> Array:
    """Return the binary logarithm of the first step at which a curve is half-way back.

    Args:
        steps: Steps, the first 0.
        values: Scores, (steps, samples).
        goal: Score of the original, by sample.
        half: Share of the way from the first score to the goal.
    """
    halfway = values[0] + half * (goal - values[0])
    logs = np.log2(np.maximum(np.array(steps, dtype=np.float64), 0.5))
    out = np.full(values.shape[1], logs[-1])
    for s in range(values.shape[1]):
        for i in range(1, len(steps)):
            low, high = values[i - 1, s], values[i, s]
            if high >= halfway[s]:
                share = (halfway[s] - low) / (high - low) if high > low else 1.0
                out[s] = logs[i - 1] + min(1.0, max(0.0, share)) * (logs[i] - logs[i - 1])
                break
    return out


def _power(logs: Estimate) -> Estimate:
    """Return steps of an estimate of their binary logarithm."""
    return Estimate(2.0**logs.value, 2.0**logs.low, 2.0**logs.high, logs.n)


def decide(study: ReversalCost, apart: Estimate, *, never: bool) -> Decision:
    """Return what the doublings say under the margin."""
    if never:
        return Decision("undecided: at the ceiling, neither came half-way back within the steps")
    words = {
        "below": "RMU is easier to reverse",
        "above": "RMU is harder to reverse",
        "equal": f"alike: within {study.margin:g} doubling(s) of the steps",
        "undecided": f"undecided: the interval crosses {study.margin:g} doubling(s)",
    }
    margin = (-study.margin, study.margin)
    asked = Contrast(f"The cost of RMU over {study.against}", apart, margin, study.error)
    return Decision(f"{asked.say(words)} (against {study.against})", (asked,))


def _table(steps: Mapping[str, Estimate], apart: Mapping[str, Estimate]) -> StudyTable:
    """Return costs and doublings."""
    rows = [row(name, "steps until knowledge is half-way back", e) for name, e in steps.items()]
    rows += [row(f"rmu over {name}", "doublings of steps", e) for name, e in apart.items()]
    return StudyTable(
        title="Reversal cost",
        note="Interpolated in the logarithm of the steps; all steps where it never came half-way.",
        rows=tuple(rows),
    )
