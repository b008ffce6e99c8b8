"""What the studies of split models share: one trained model is one stage; groups are compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from excise.core.context import Context, Stage
from excise.core.disk import file_sum, write_text
from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision, SeedEstimate
from excise.evals.stats import Array, Estimate
from excise.record import ModelRef, StudyPicture, StudyPictureRow, StudyRow, StudyTable
from excise.train.pool import Pool
from excise_studies.base import ScoreByUnit, row
from excise_studies.levels import Levels, estimate, estimate_of_seed, levels
from excise_studies.vision.autoencoder import (
    SplitAutoencoder,
    SplitAutoencoderConfig,
    absolute_error,
    errors,
    train_autoencoder,
)
from excise_studies.vision.classifier import SplitClassifierConfig, accuracies, train_classifier
from excise_studies.vision.halves import as_batch
from excise_studies.vision.images import ImageSets, ImageSpec

FIRST, SECOND = "first", "second"
"""The two groups of classes."""

SplitConfig = SplitAutoencoderConfig | SplitClassifierConfig


@dataclass(frozen=True)
class SplitModel:
    """What became of one model.

    Attributes:
        scores: Score by unit, by name of the score and group of the image.
        fingerprint: SHA-256 of the weights.
        parameters: How many there are.
        path: File of the weights.
    """

    scores: Mapping[tuple[str, str], ScoreByUnit]
    fingerprint: str
    parameters: int
    path: str


@dataclass(frozen=True)
class TrainSplit(Stage[SplitModel]):
    """One model of split images, trained and scored.

    Attributes:
        model: Which model, and how it is trained.
        images: The images.
        seed: Seed of the split and of the training.
        part: Which images are scored.
    """

    model: SplitConfig
    images: ImageSpec
    seed: int
    part: Literal["dev", "test"] = "test"

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        kind = isinstance(self.model, SplitAutoencoderConfig)
        return f"split-{'autoencoder' if kind else 'classifier'}"

    def make(self, ctx: Context) -> None:
        """Train, score, and write weights and scores."""
        data = self.images.split(self.seed)
        scored = getattr(data, self.part)
        state = ctx.work / "state"
        scores: Mapping[str, Tensor]
        model: nn.Module
        if isinstance(self.model, SplitAutoencoderConfig):
            model = coder = train_autoencoder(data.train, self.model, ctx, state_dir=state)
            scores = errors(coder, scored, self.model.first)
        else:
            model = teller = train_classifier(data.train, self.model, ctx, state_dir=state)
            scores = accuracies(teller, data.train, scored, self.model, ctx)
        weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, ctx.work / "model.safetensors")
        first = torch.isin(torch.from_numpy(scored.labels_N), torch.tensor(self.model.first))
        facts = {
            "keys": scored.keys_N.tolist(),
            "first": first.tolist(),
            "scores": {k: [round(x, 7) for x in v.tolist()] for k, v in scores.items()},
            "fingerprint": file_sum(ctx.work / "model.safetensors"),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        write_text(ctx.work / "scores.json", json.dumps(facts))
        shutil.rmtree(state, ignore_errors=True)

    def read(self, folder: Path) -> SplitModel:
        """Return scores by kind and group of images."""
        facts = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        scores: dict[tuple[str, str], dict[str, float]] = {}
        for name, values in facts["scores"].items():
            for unit, value, in_first in zip(facts["keys"], values, facts["first"], strict=True):
                scores.setdefault((name, FIRST if in_first else SECOND), {})[str(unit)] = value
        weights = str(folder / "model.safetensors")
        return SplitModel(scores, facts["fingerprint"], facts["parameters"], weights)


LEVELS = 9
"""Darkest ink of a drawing."""


def drawings(
    conditions: Mapping[str, tuple[SplitAutoencoderConfig, SplitModel]],
    data: ImageSets,
    *,
    seed: int,
) -> StudyPicture:
    """Return one test image of each class, and what whole and half encodings show of it.

    Args:
        conditions: Configuration and trained model by name.
        data: The images they were trained on.
        seed: Seed of those images.
    """
    images, classes = data.test, data.test.classes
    shown = images.take(np.array([np.argmax(images.labels_N == i) for i in range(len(classes))]))
    rows = [StudyPictureRow(name="the image", images=_levels(as_batch(shown, ()).x_BHW.flatten(1)))]
    for name, (config, split) in conditions.items():
        batch = as_batch(shown, config.first)
        model = SplitAutoencoder(config, int(batch.x_BHW[0].numel()), 0)
        model.load_state_dict(load_file(split.path))
        with torch.no_grad():
            code_BC = model.encode(batch.x_BHW)
            top_BP, bottom_BP = model.certify(code_BC)
            whole_BP = model.decode(code_BC, batch.first_B)
        for part, x_BP in (("whole", whole_BP), ("top half", top_BP), ("bottom half", bottom_BP)):
            errors_B = absolute_error(x_BP, batch.x_BHW).tolist()
            rows.append(
                StudyPictureRow(
                    name=f"{name}: {part}",
                    images=_levels(x_BP),
                    values=tuple(round(e, 4) for e in errors_B),
                )
            )
    return StudyPicture(
        title=f"What whole and half encodings show, seed {seed}",
        note="Mean absolute error of each drawing, pixels from -1 to 1.",
        width=images.pixels_NHW.shape[2],
        columns=classes,
        rows=tuple(rows),
    )


def _levels(x_BP: Tensor) -> tuple[str, ...]:
    """Return the ink of each pixel as a digit."""
    ink = ((x_BP.clamp(-1, 1) + 1) / 2 * LEVELS).round().int()
    return tuple("".join(map(str, row)) for row in ink.tolist())


SplitModels = Mapping[str, Mapping[int, SplitModel]]
"""Models by condition and seed."""


def train_conditions(
    conditions: Mapping[str, SplitConfig],
    seeds: Sequence[int],
    images: ImageSpec,
    part: Literal["dev", "test"],
    runtime: Runtime,
    pool: Pool,
) -> SplitModels:
    """Train every condition on every seed."""
    wanted = [(name, seed) for seed in seeds for name in conditions]
    jobs = [TrainSplit(conditions[name], images, seed, part) for name, seed in wanted]
    models: dict[str, dict[int, SplitModel]] = {name: {} for name in conditions}
    for (name, seed), split in zip(wanted, pool.map(runtime.run, jobs), strict=True):
        models[name][seed] = split
    return models


@dataclass(frozen=True)
class Means:
    """Means of conditions over seeds and, inside them, images; conditions share their images.

    Attributes:
        groups: Levels of every condition and score, by group of the images.
    """

    groups: Mapping[str, Levels]

    def of(self, condition: str, score: str, group: str = "") -> Array:
        """Return the mean of one group, or of all images, in the layout of `levels`."""
        name = _named(condition, score)
        if group:
            return self.groups[group].at(name)
        sizes = {g: levels.n for g, levels in self.groups.items()}
        each = [self.groups[g].at(name) for g in sizes]
        both: Array = np.average(each, axis=0, weights=list(sizes.values()))
        return both

    def estimate(self, values: Array, group: str = "") -> SeedEstimate:
        """Return values with their interval; of all images n counts both groups."""
        sizes = [levels.n for g, levels in self.groups.items() if group in ("", g)]
        return estimate(values, self.groups[group or FIRST], n=sum(sizes))

    def mean(self, condition: str, score: str, group: str = "") -> SeedEstimate:
        """Return a mean with its interval."""
        return self.estimate(self.of(condition, score, group), group)

    def difference(self, condition: str, control: str, score: str, group: str = "") -> SeedEstimate:
        """Return the condition's mean minus the control's, image by image."""
        apart = self.of(condition, score, group) - self.of(control, score, group)
        return self.estimate(apart, group)

    def contrast(
        self, condition: str, control: str, score: str = "bottom", sign: int = 1
    ) -> SeedEstimate:
        """Return how much wider the gap between the groups is than in the control.

        Args:
            condition: Name of the condition.
            control: Name of the control.
            score: Which score.
            sign: -1 where the second group's score minus the first's is meant.

        Returns:
            (mean of the first group - mean of the second), the condition's minus the control's.
        """
        first, second = (
            self.of(condition, score, group) - self.of(control, score, group)
            for group in (FIRST, SECOND)
        )
        return self.estimate(sign * (first - second))


def _named(condition: str, score: str) -> str:
    """Return the name of one score of a condition."""
    return f"{condition}: {score}"


def means_of(conditions: SplitModels, scores: Sequence[str] = ()) -> Means:
    """Return the means of all conditions over the seeds and the images of each.

    Args:
        conditions: Models by condition and seed; all of the same seeds.
        scores: Which scores; empty for all.
    """
    some = next(iter(next(iter(conditions.values())).values()))
    wanted = scores or tuple(dict.fromkeys(score for score, _ in some.scores))
    groups = {}
    for i, group in enumerate((FIRST, SECOND)):
        by_name = {
            _named(name, score): {s: split.scores[score, group] for s, split in models.items()}
            for name, models in conditions.items()
            for score in wanted
        }
        groups[group] = levels(by_name, {}, seed=i)
    return Means(groups)


def by_seed(
    conditions: SplitModels, condition: str, control: str, score: str = "bottom", sign: int = 1
) -> dict[int, Estimate]:
    """Return `Means.contrast` of every seed, with its interval over images."""
    means = means_of({name: conditions[name] for name in (condition, control)}, (score,))
    out = {}
    for seed in conditions[condition]:
        first, second = (
            means.groups[group].at(_named(condition, score), seed)
            - means.groups[group].at(_named(control, score), seed)
            for group in (FIRST, SECOND)
        )
        out[seed] = estimate_of_seed(sign * (first - second), means.groups[FIRST], seed)
    return out


def decide(
    name: str, overall: Estimate, each_seed: Mapping[int, Estimate], margin: float, error: float
) -> Decision:
    """Return what the contrast says: the interval over seeds decides, and every seed must agree.

    Args:
        name: Of the contrast.
        overall: Over all seeds.
        each_seed: Of each seed alone.
        margin: The margin.
        error: What the decision may be wrong by.
    """
    asked = Contrast(name, overall, (margin,), error)
    text = "undecided"
    if asked.above(margin) and all(d.value > margin for d in each_seed.values()):
        text = "split"
    elif asked.below(margin):
        text = "not split"
    return Decision(f"{text}: {name} = {words(overall)}, margin {margin:g}", (asked,))


def table_of(
    title: str,
    note: str,
    means: Means,
    conditions: Sequence[str],
    columns: Mapping[str, tuple[str, str]],
) -> StudyTable:
    """Return means of all seeds, a condition a line.

    Args:
        title: Of the table.
        note: How to read it.
        means: All means.
        conditions: Which conditions.
        columns: Score and group by name of the column.
    """
    rows = tuple(
        row(name, column, means.mean(name, score, group))
        for name in conditions
        for column, (score, group) in columns.items()
    )
    return StudyTable(title=title, note=note, rows=rows)


def value(condition: str, metric: str, number: float, n: int) -> StudyRow:
    """Return a number without an interval."""
    return StudyRow(condition=condition, metric=metric, value=number, n=n)


def refs(conditions: SplitModels) -> tuple[ModelRef, ...]:
    """Return all models for the record."""
    return tuple(
        ModelRef(
            name=f"{name}, seed {seed}",
            path=split.path,
            fingerprint=split.fingerprint,
            parameters=split.parameters,
        )
        for name, condition in conditions.items()
        for seed, split in condition.items()
    )


def words(value: Estimate) -> str:
    """Return an estimate in words: value and, where it has one, interval."""
    if math.isnan(value.low):
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
