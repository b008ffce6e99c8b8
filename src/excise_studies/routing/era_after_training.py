"""Expand-Route-Ablate on a model that is trained already, against continued training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision, end_of
from excise.evals.stats import Estimate
from excise.methods.base import Method
from excise.methods.pretraining.era import ERAAfter, Expand
from excise.methods.pretraining.filtering import Filtering
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.attacking import RunKey
from excise_studies.base import row
from excise_studies.levels import estimate, levels
from excise_studies.recovery import RECOVERY, gaps, said
from excise_studies.routing.presets import era
from excise_studies.routing.setting import (
    RoutingOutcome,
    RoutingSetting,
    conclude,
    facts_setting,
    groups_of,
    make_setting,
    score_conditions,
    text_losses,
)
from excise_studies.setting import (
    ExperimentSetting,
    Make,
    checkpoints,
    make_conditions,
    reference_models,
)


class ERAAfterTraining(Study):
    """ERA from the original for growing numbers of steps, beside training on retain alone.

    Stated beforehand. D is the depth gap on the held-out test set (after relearning) of continued
    training on retained rows minus that of ERA, both for the most steps and from the same original.
    ERA removes after training if the lower end of D's 95 % interval is above `margin`; it does not
    if the upper end is below it. N is the loss on the held-out test set after ERA minus the
    original's, in nats before any attack: one re-run of the published code found 0.26. It decides
    nothing.
    """

    question: ClassVar[str] = (
        "Does Expand-Route-Ablate remove knowledge that a model has before it is expanded, and "
        "how does that grow with the tokens of continued training?"
    )
    statistic: ClassVar[str] = (
        "D = depth gap on the held-out test set after relearning, continued training on retained "
        "rows minus ERA, at the most steps; ERA removes if the lower end of the 95 % interval is "
        "above the margin, not if the upper end is below it. Intervals over seeds and units."
    )
    takes: ClassVar[str] = "12 minutes, 1 GiB"
    quoted: ClassVar[tuple[str, ...]] = (RECOVERY,)

    name: Literal["era-after-training"] = "era-after-training"
    """Name on the command line."""
    margin: float = 0.1
    """Share of the distance between the reference models."""
    experiment: ExperimentSetting = facts_setting()
    """Data, models, attacker."""
    expand: Expand = era().expand
    """What is grown, how gradients are routed, and the repair."""
    steps: tuple[int, ...] = Field(default=(30, 100, 300), min_length=1)
    """Steps of continued training."""
    lr: float = Field(default=1e-3, gt=0)
    """Its learning rate, a quarter of training's."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Continue the original in both ways, relearn, compare."""
        setting = make_setting(self.experiment, self.seeds, runtime, pool)
        removals = make_conditions(wanted(self, setting), runtime, pool)
        outcome = score_conditions(removals, setting, self.seeds, runtime, pool, shares=())
        models = {**reference_models(setting.replicates, self.seeds), **checkpoints(removals)}
        on_v = levels(
            text_losses(models, setting, runtime, pool, "test"), groups_of(setting.replicates)
        )
        nats = {
            condition: estimate(on_v.at(condition) - on_v.at("original"), on_v)
            for condition in on_v.conditions
            if condition != "original"
        }
        tokens: dict[RunKey, int] = {key: removal.cost.tokens for key, removal in removals.items()}
        effect = difference(self, outcome)
        last = named("era", max(self.steps))
        words = [
            f"D was {said(effect)}.",
            f"Before any attack ERA raised the loss on the held-out test set by {said(nats[last])} "
            "nats.",
            gaps(outcome.recovery),
        ]
        table = _table(self, nats, tokens)
        return conclude(outcome, setting, words, decide(self, effect), more=(table,))


def named(side: str, steps: int) -> str:
    """Return the name of a condition."""
    return f"{side}, {steps} steps"


def wanted(study: ERAAfterTraining, setting: RoutingSetting) -> dict[RunKey, Make]:
    """Return ERA and training on retain, from the original, for all numbers of steps."""
    full = study.experiment.pretrain
    out: dict[RunKey, Make] = {}
    for steps in study.steps:
        fit = full.fit.model_copy(
            update={"steps": steps, "lr": study.lr, "warmup": 0, "schedule": "constant"}
        )
        routed = ERAAfter(fit=fit, max_length=full.max_length, pack=full.pack, expand=study.expand)
        plain = Filtering(pretrain=full.model_copy(update={"fit": fit}))
        sides: dict[str, Method] = {"era": routed, "retain alone": plain}
        for seed in study.seeds:
            replicate = setting.replicates[seed]
            for side, method in sides.items():
                out[named(side, steps), seed] = Make(method, replicate.original, replicate.domain)
    return out


def difference(study: ERAAfterTraining, outcome: RoutingOutcome) -> Estimate:
    """Return D at the most steps."""
    last = max(study.steps)
    recovery = outcome.recovery
    return recovery.contrast([named("retain alone", last)], [named("era", last)])


def decide(study: ERAAfterTraining, effect: Estimate) -> Decision:
    """Return what D says under the margin."""
    asked = Contrast("D", effect, (study.margin,), study.error)
    text = f"undecided: D's interval crosses {study.margin:g}"
    if asked.above(study.margin):
        text = "ERA removes after training: D is above the margin"
    elif asked.below(study.margin):
        text = "ERA does not remove after training: D is below the margin"
        end = end_of(effect, study.margin)
        if end:
            text += f", with both at the {end}"
    return Decision(text, (asked,))


def _table(
    study: ERAAfterTraining, nats: Mapping[str, Estimate], tokens: dict[RunKey, int]
) -> StudyTable:
    """Return nats on the held-out test set and tokens by condition."""
    rows: list[StudyRow] = []
    for condition, value in nats.items():
        rows.append(
            row(condition, "loss on the held-out test set minus the original's, nats", value)
        )
        read = [count for (name, _), count in tokens.items() if name == condition]
        if read:
            mean = sum(read) / len(read)
            rows.append(
                StudyRow(condition=condition, metric="tokens read", value=mean, n=len(read))
            )
    return StudyTable(
        title="By tokens of continued training",
        note="Before any attack. " + study.statistic,
        rows=tuple(rows),
    )
