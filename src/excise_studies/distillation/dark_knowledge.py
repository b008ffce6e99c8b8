"""E2: does the noise of an unlearned model carry what it was meant to lose?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import SerializeAsAny

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.stages import Runtime
from excise.data.domain import Domain, Rows
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Estimate
from excise.methods.base import Method
from excise.models.checkpoint import Checkpoint
from excise.record import StudyTable
from excise.run.results import model_ref
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.distillation.predictions import predictions, readout_bits, shuffled
from excise_studies.distillation.presets import graddiff, maxent, rmu
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import groups_of, said
from excise_studies.setting import (
    CHOSEN,
    SIZE,
    ExperimentSetting,
    checkpoints,
    conditions_of,
    make_conditions,
    make_replicates,
    reference_models,
)

VERSION = 1
"""Raised when what a stage computes changes."""

SHUFFLED = "shuffled"
"""Suffix of the control whose predictions are dealt out among the tokens."""


class DarkKnowledge(Study):
    """A readout of the unlearned model's predictions: what it pays for on the held-out test set.

    Stated beforehand. For every model a readout from its log-probabilities at answer tokens (and
    the place of the token) to the right token is fitted on the relearn set, its penalty chosen on
    dev. What decides is the number of bits per answer token of the held-out test set that the
    readout of the unlearned model pays less than that of the oracle. The noise of a teacher carries
    signal if the 95 % interval over seeds and units lies above `margin`, none if it lies within the
    margin on both sides. The decision is that of the first teacher; the others stand beside it. The
    same predictions dealt out at random among tokens are the control: they carry nothing by
    construction.
    """

    question: ClassVar[str] = (
        "Do the predictions of an unlearned model on what it forgot still tell the right answer?"
    )
    statistic: ClassVar[str] = (
        "Bits per answer token of the held-out test set that an affine readout of the unlearned "
        "model's predictions, fitted on the relearn set, pays less than one of the oracle's. "
        "Signal if the 95 % interval lies above the margin, none if it lies within the margin on "
        "both sides. Intervals over seeds and units; the first teacher decides."
    )
    takes: ClassVar[str] = "5 minutes, 1 GiB"

    name: Literal["dark-knowledge"] = "dark-knowledge"
    """Name on the command line."""
    margin: float = 0.1
    """Bits per answer token."""
    experiment: ExperimentSetting = ExperimentSetting()
    """Data and models; nobody relearns anything."""
    teachers: dict[str, SerializeAsAny[Method]] = {
        "maxent": maxent(), "grad_diff": graddiff(), "rmu": rmu(),
    }  # fmt: skip
    """The unlearned models; the first decides."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Make the teachers, fit the readouts, compare."""
        replicates = make_replicates(self.experiment, self.seeds, runtime, pool)
        teachers = checkpoints(
            make_conditions(conditions_of(self.teachers, replicates, self.seeds), runtime, pool)
        )
        models = {**reference_models(replicates, self.seeds), **teachers}
        length = self.experiment.pretrain.max_length
        jobs = {
            (condition, seed): FitReadout(model, replicates[seed].domain, length)
            for (condition, seed), model in models.items()
        }
        jobs |= {
            (f"{condition}, {SHUFFLED}", seed): FitReadout(
                model, replicates[seed].domain, length, shuffle=seed
            )
            for (condition, seed), model in teachers.items()
        }
        readouts = dict(zip(jobs, pool.map(runtime.run, list(jobs.values())), strict=True))
        scores: dict[str, dict[int, Mapping[str, float]]] = {}
        for (condition, seed), readout in readouts.items():
            scores.setdefault(condition, {})[seed] = readout["bits"]
        paid = levels(scores, {seed: groups_of(replicates[seed].domain) for seed in self.seeds})
        saved = saved_bits(paid)
        decision = decide(self, saved)
        return StudyResult(
            tables=(_table(paid, saved),),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=_paragraph(paid, saved, decision.text),
            domain=replicates[self.seeds[0]].domain,
            models=tuple(
                model_ref(f"{condition}, seed {seed}", m) for (condition, seed), m in models.items()
            ),
            notes=(CHOSEN, SIZE),
        )


@dataclass(frozen=True)
class FitReadout(Stage[dict[str, Any]]):
    """The readout of one model, fitted and scored.

    Attributes:
        model: The model.
        domain: Rows by role.
        max_length: Tokens per row.
        shuffle: Seed by which predictions are dealt out at random; None for as they are.
    """

    version: ClassVar[int] = VERSION

    model: Checkpoint
    domain: Domain
    max_length: int
    shuffle: int | None = None

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "readout"

    def make(self, ctx: Context) -> None:
        """Write `bits` by unit of the held-out test set and the chosen `ridge`."""
        net, tokenizer = self.model.load(dtype=ctx.dtype, device=ctx.device), self.model.tokenizer()
        parts = []
        sides = (self.domain.relearn, self.domain.dev_forget, self.domain.test)
        for i, side in enumerate(sides):
            rows: Rows = tuple(row for rows in side.values() for row in rows)
            predicted = predictions(net, rows, tokenizer, max_length=self.max_length)
            parts.append(
                predicted if self.shuffle is None else shuffled(predicted, 10 * self.shuffle + i)
            )
        bits, ridge = readout_bits(*parts)
        write_text(ctx.work / "readout.json", json.dumps({"bits": bits, "ridge": ridge}))

    def read(self, folder: Path) -> dict[str, Any]:
        """Return what was written."""
        data: dict[str, Any] = json.loads((folder / "readout.json").read_text(encoding="utf-8"))
        return data


def saved_bits(paid: Levels) -> dict[str, Estimate]:
    """Return the bits per token that each condition's readout pays less than the oracle's."""
    oracle = paid.at("oracle")
    return {
        condition: estimate(oracle - paid.at(condition), paid)
        for condition in paid.conditions
        if condition != "oracle"
    }


def decide(study: DarkKnowledge, saved: Mapping[str, Estimate]) -> Decision:
    """Return what the first teacher's bits say under the margin."""
    first = next(iter(study.teachers))
    margin = (-study.margin, study.margin)
    asked = Contrast(f"What {first} saves", saved[first], margin, study.error)
    words = {
        "above": f"signal: the predictions of {first} hold more than {study.margin:g} bits a token",
        "equal": f"no signal: {first} lies within {study.margin:g} bits of the oracle",
        "below": f"no signal: the predictions of {first} tell less than those of the oracle",
        "undecided": f"undecided: the interval crosses {study.margin:g} bits a token",
    }
    return Decision(asked.say(words), (asked,))


def _table(paid: Levels, saved: Mapping[str, Estimate]) -> StudyTable:
    """Return what every readout pays, and what it saves against the oracle's."""
    rows = []
    for condition in paid.conditions:
        rows.append(
            row(
                condition,
                "bits per answer token of the held-out test set",
                estimate(paid.at(condition), paid),
            )
        )
        if condition in saved:
            rows.append(row(condition, "bits saved against the oracle", saved[condition]))
    return StudyTable(
        title="Readouts fitted on the relearn set",
        note="Lower is better for a readout; 'shuffled' deals predictions out among the tokens.",
        rows=tuple(rows),
    )


def _paragraph(paid: Levels, saved: Mapping[str, Estimate], decision: str) -> str:
    """Return the result in words."""
    parts = [
        f"{condition} {said(value)}"
        for condition, value in saved.items()
        if condition != "original"
    ]
    return (
        f"A readout of the oracle's predictions paid {paid.at('oracle')[0]:.2f} bits per answer "
        f"token of the held-out test set, one of the original's {paid.at('original')[0]:.2f}. Bits "
        f"saved against the oracle: {', '.join(parts)}. Decision: {decision}."
    )
