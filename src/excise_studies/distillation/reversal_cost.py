"""Is RMU easier to reverse than loss maximisation?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.errors import nearest
from excise.core.stages import Runtime
from excise.evals.replicates import Decision, contrasts
from excise.evals.stats import Array, Estimate
from excise.methods.base import Method
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import Attacker
from excise_studies.base import row
from excise_studies.distillation.presets import graddiff, maxent, rmu, tar
from excise_studies.levels import estimate, levels, of_seeds
from excise_studies.matching import (
    CHOSEN_BY_SEED,
    Search,
    matched_by_seed,
    matched_table,
    mean_factors,
)
from excise_studies.recovery import RECOVERY, RecoveryScores, gaps, groups_of, listed
from excise_studies.setting import (
    ExperimentSetting,
    make_replicates,
    measure_conditions,
    result,
)

STEPS = (0, 2, 4, 8, 16, 32, 64, 128, 256, 400)
"""Steps of relearning at which models are scored."""


class ReversalCost(Study):
    """Steps of relearning until as much is back as both of two methods give back.

    Stated beforehand. Strengths are matched in every seed, on its own dev: of each method the
    learning rate is taken, of those that a bisection tried, whose exact match on `dev_forget` is
    nearest to `search.level` among those that cost at most `search.retain_cost` on `dev_retain`.
    (One rate for all seeds, chosen on seeds of tuning, missed the level on others.)
    Unlearned models are relearned on the relearn set, each at the rate and to the step that dev
    chose. RMU and another method are compared at a bar of their own in every seed: half-way
    (`half`) between the higher of their scores on the held-out test set after unlearning and the
    lower of their scores at the step that dev chose. Both reach it, so that no cost is cut off at
    the last step, and both are asked for the same knowledge; a bar half-way to the original was out
    of reach for most, and one half-way to a model's own end would call cheap what gives little
    back. The cost is the number of steps at which the score first reaches the bar, interpolated in
    the logarithm of the steps.

    What decides is the mean over seeds of the binary logarithm of RMU's cost over the other's, for
    each of `against`, which share the error: RMU is easier to reverse if the interval over seeds
    and units lies below minus `margin` doublings, harder if above it, alike if within. There is no
    such bar in a seed in which one side begins above what the other ends at; then nothing is
    decided of that pair, and the sentence says so.
    """

    question: ClassVar[str] = (
        "At matched forgetting, does relearning bring back what RMU removed in fewer steps than "
        "what TAR and GradDiff removed?"
    )
    statistic: ClassVar[str] = (
        "log2 of the steps at which RMU reaches a bar over those at which the other does; the bar "
        "lies half-way between the higher start and the lower end of both, so that both reach it; "
        "against the margin in doublings from both sides; strengths matched on dev of every seed; "
        "intervals over seeds and units."
    )
    takes: ClassVar[str] = "25 minutes of one core, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = ("Reversal cost", RECOVERY)

    name: Literal["reversal-cost"] = "reversal-cost"
    """Name on the command line."""
    margin: float = 1.0
    """Doublings of the number of steps."""
    half: float = Field(default=0.5, gt=0, lt=1)
    """Where the bar lies between the higher start and the lower end."""
    experiment: ExperimentSetting = ExperimentSetting(
        attacker=Attacker(steps=STEPS[-1], checkpoints=STEPS)
    )
    """Data, models, attacker."""
    methods: dict[str, SerializeAsAny[Method]] = {
        "rmu": rmu(), "tar": tar(), "grad_diff": graddiff(), "maxent": maxent(),
    }  # fmt: skip
    """The removals at their middle strength; RMU is called `rmu`."""
    against: tuple[str, ...] = Field(default=("tar", "grad_diff"), min_length=1)
    """What RMU is held against; of others the doublings are shown."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """Draws of the data."""
    tuned_on: tuple[int, ...] = ()
    """Strengths are chosen on dev of the reported seeds."""
    search: Search = Search()
    """How strengths are matched."""
    match_margin: float = Field(default=0.1, gt=0)
    """Exact match on the held-out test set and on retain by which matched methods may differ."""

    @model_validator(mode="after")
    def _named(self) -> ReversalCost:
        """Refuse a comparison with what is not there, or with itself."""
        if "rmu" not in self.methods:
            raise ValueError("methods: needs 'rmu', which the others are held against")
        for name in self.against:
            if name == "rmu":
                raise ValueError("against: 'rmu' is what is compared; name others")
            if name not in self.methods:
                known = nearest(name, self.methods)
                raise ValueError(f"against: no method is called '{name}'; {known}")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Match strengths, remove, relearn, find the costs."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        chosen = matched_by_seed(
            self.methods, self.search, self.experiment, replicates, runtime, pool
        )
        models = {key: trial.removal.checkpoint for key, trial in chosen.items()}
        recovery = measure_conditions(self.experiment, models, replicates, runtime, pool)
        groups = {seed: groups_of(replicates[seed].domain) for seed in self.seeds}
        costs = {
            name: costs_at_bar(self, recovery, ("rmu", name), groups)
            for name in self.methods
            if name != "rmu"
        }
        apart = {
            name: estimate(ours - theirs, recovery.after) for name, (ours, theirs) in costs.items()
        }
        words = [
            unmatched(self, recovery),
            f"Doublings of steps to the bar, rmu over the others: {listed(apart)}.",
            gaps(recovery),
        ]
        decision = decide(self, apart)
        tables = (
            _costs(apart, costs, recovery),
            matched_table(
                mean_factors(chosen),
                recovery,
                {name: name for name in self.methods},
                "Factor: geometric mean of those that dev chose seed by seed. "
                f"{unmatched(self, recovery)}",
            ),
        )
        return result(
            recovery, words, decision, replicates, models, tables=tables, chosen=CHOSEN_BY_SEED
        )


def costs_at_bar(
    study: ReversalCost,
    recovery: RecoveryScores,
    pair: tuple[str, str],
    groups: Mapping[int, Mapping[str, str]],
) -> tuple[Array, Array]:
    """Return the binary logarithm of both costs over seeds, in the layout of `levels`.

    Args:
        study: Where the bar lies.
        recovery: The attacks.
        pair: The two methods.
        groups: Group of units by seed.
    """
    logs: dict[str, dict[int, Array]] = {name: {} for name in pair}
    for seed in study.seeds:
        attacks = {name: recovery.attacked[name, seed] for name in pair}
        curves = {
            name: np.stack(
                [
                    levels({"": {seed: at}}, {seed: groups[seed]}).by_seed[seed][:, 0]
                    for at in attack.v
                ]
            )
            for name, attack in attacks.items()
        }
        start = np.max([curve[0] for curve in curves.values()], axis=0)
        end = np.min([curves[name][attack.at] for name, attack in attacks.items()], axis=0)
        bar = np.where(end > start, start + study.half * (end - start), np.nan)
        for name, attack in attacks.items():
            logs[name][seed] = log_cost(attack.steps, curves[name], bar)
    return of_seeds(logs[pair[0]]), of_seeds(logs[pair[1]])


def log_cost(steps: Sequence[int], values: Array, bar: Array) -> Array:
    """Return the binary logarithm of the first step at which a curve reaches a bar.

    Args:
        steps: Steps, the first 0, which counts as half a step.
        values: Scores, (steps, samples), below the bar at first.
        bar: Score to reach, by sample; NaN where there is none.

    Returns:
        By sample, interpolated in the logarithm of the steps; NaN where the bar is not reached.
    """
    logs = np.log2(np.maximum(np.array(steps, dtype=np.float64), 0.5))
    out = np.full(values.shape[1], np.nan)
    for s in range(values.shape[1]):
        for i in range(1, len(steps)):
            low, high = values[i - 1, s], values[i, s]
            if high >= bar[s]:
                share = (bar[s] - low) / (high - low) if high > low else 1.0
                out[s] = logs[i - 1] + min(1.0, max(0.0, share)) * (logs[i] - logs[i - 1])
                break
    return out


def unmatched(study: ReversalCost, recovery: RecoveryScores) -> str:
    """Return where matching failed on the reported seeds, in a sentence; else that it held.

    Args:
        study: How far matched methods may lie apart.
        recovery: Scores before the attack.
    """
    apart = []
    for name in recovery.conditions:
        for what, scores in (
            ("the held-out test set", recovery.before),
            ("retain", recovery.retain),
        ):
            ours, theirs = float(scores.at("rmu")[0]), float(scores.at(name)[0])
            if abs(theirs - ours) > study.match_margin:
                apart.append(
                    f"{name} knew {theirs:.2f} of {what} before the attack, rmu {ours:.2f}"
                )
    if not apart:
        return f"Before the attack all methods lay within {study.match_margin:g} of rmu."
    return f"Matching failed: {'; '.join(apart)}."


def decide(study: ReversalCost, apart: Mapping[str, Estimate]) -> Decision:
    """Return what the doublings say under the margin."""
    words = {
        "below": "RMU is easier to reverse",
        "above": "RMU is harder to reverse",
        "equal": f"alike within {study.margin:g} doubling(s) of the steps",
        "undecided": f"undecided, the interval crosses {study.margin:g} doubling(s)",
    }
    asked = contrasts(
        {f"The cost of RMU over {name}": apart[name] for name in study.against},
        (-study.margin, study.margin),
        study.error,
    )
    parts = []
    for name, contrast in zip(study.against, asked.values(), strict=True):
        no_bar = "no bar: in some seed one side begins above what the other ends at"
        text = no_bar if np.isnan(contrast.value.value) else contrast.say(words)
        parts.append(f"against {name}: {text}")
    return Decision("; ".join(parts), tuple(asked.values()))


def _costs(
    apart: Mapping[str, Estimate],
    costs: Mapping[str, tuple[Array, Array]],
    recovery: RecoveryScores,
) -> StudyTable:
    """Return steps to the bar of every pair, and doublings."""
    rows: list[StudyRow] = []
    for name, sides in costs.items():
        condition = f"rmu and {name}"
        for side, logs in zip(("rmu", name), sides, strict=True):
            e = estimate(logs, recovery.after)
            steps = Estimate(2.0**e.value, 2.0**e.low, 2.0**e.high, e.n)
            rows.append(
                row(condition, f"steps of {'rmu' if side == 'rmu' else 'the other'}", steps)
            )
        rows.append(row(condition, "doublings, rmu over the other", apart[name]))
    return StudyTable(
        title="Reversal cost",
        note="Steps until the bar of the pair, interpolated in the logarithm of the steps.",
        rows=tuple(rows),
    )
