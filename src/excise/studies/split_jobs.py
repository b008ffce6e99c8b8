"""What the studies of split models share: one trained model is one stage; groups are compared."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from excise.domains.images import DrawnImages, ImageSpec
from excise.evals.stats import Estimate, bootstrap_mean, quantiles, resampled_means
from excise.jobs import Setting
from excise.record import ModelRef, StudyRow, StudyTable, write_text
from excise.stages import Store
from excise.studies.base import Units, pooled, row
from excise.train.grid import Pool, emit
from excise.vision.autoencoder import SplitAutoencoderConfig, errors, train_autoencoder
from excise.vision.classifier import SplitClassifierConfig, accuracies, train_classifier

FIRST, SECOND = "first", "second"
"""The two groups of classes."""

SplitConfig = SplitAutoencoderConfig | SplitClassifierConfig


@dataclass(frozen=True)
class SplitJob:
    """Train one split model and score it.

    Attributes:
        setting: Store, device.
        model: Which model.
        images: Where its images come from.
        seed: The draw: split of the images, weights, order.
        part: Which images are scored.
    """

    setting: Setting
    model: SplitConfig
    images: ImageSpec
    seed: int
    part: Literal["dev", "test"] = "test"


@dataclass(frozen=True)
class Split:
    """What became of one model.

    Attributes:
        scores: Score by unit, by name of the score and group of the image.
        fingerprint: SHA-256 of the weights.
        parameters: How many there are.
        path: File of the weights.
    """

    scores: Mapping[tuple[str, str], Units]
    fingerprint: str
    parameters: int
    path: str

    def mean(self, score: str, group: str = "") -> float:
        """Return the mean score of a group, or of all images."""
        groups = (group,) if group else (FIRST, SECOND)
        return float(np.mean([v for g in groups for v in self.scores[score, g].values()]))

    def gap(self, score: str = "bottom") -> float:
        """Return the mean of the first group minus that of the second."""
        return self.mean(score, FIRST) - self.mean(score, SECOND)


def make_split(job: SplitJob) -> Split:
    """Train and score a model, or read what was found before."""
    drawn = job.images.draw(job.seed)
    key = job.setting.key(
        model=job.model.model_dump(mode="json"),
        kind=type(job.model).__name__,
        images=drawn.fingerprint,
        seed=job.seed,
        part=job.part,
        version=1,
    )
    kind = "autoencoder" if isinstance(job.model, SplitAutoencoderConfig) else "classifier"
    store = Store(job.setting.store, emit)
    folder = store.stage(f"split-{kind}", key, lambda work: _fill(job, drawn, work))
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for name, values in found["scores"].items():
        for unit, value, own in zip(found["keys"], values, found["first"], strict=True):
            scores.setdefault((name, FIRST if own else SECOND), {})[str(unit)] = value
    weights = str(folder / "model.safetensors")
    return Split(scores, found["fingerprint"], found["parameters"], weights)


def _fill(job: SplitJob, drawn: DrawnImages, work: Path) -> None:
    """Train, score, and write weights and scores."""
    from safetensors.torch import save_file

    ctx = job.setting.context(work, job.seed)
    scored = getattr(drawn, job.part)
    state = work / "state"
    scores: Mapping[str, Tensor]
    model: nn.Module
    if isinstance(job.model, SplitAutoencoderConfig):
        model = coder = train_autoencoder(drawn.train, job.model, ctx, state_dir=state)
        scores = errors(coder, scored, job.model.first)
    else:
        model = teller = train_classifier(drawn.train, job.model, ctx, state_dir=state)
        scores = accuracies(teller, drawn.train, scored, job.model, ctx)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, work / "model.safetensors")
    digest = hashlib.sha256((work / "model.safetensors").read_bytes()).hexdigest()
    first = torch.isin(torch.from_numpy(scored.labels_N), torch.tensor(job.model.first))
    found = {
        "keys": scored.keys_N.tolist(),
        "first": first.tolist(),
        "scores": {k: [round(x, 7) for x in v.tolist()] for k, v in scores.items()},
        "fingerprint": digest,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    write_text(work / "scores.json", json.dumps(found))
    shutil.rmtree(state, ignore_errors=True)


Arms = Mapping[str, Mapping[int, Split]]
"""Models by arm and draw."""


def train_arms(
    arms: Mapping[str, SplitConfig],
    seeds: Sequence[int],
    images: ImageSpec,
    part: Literal["dev", "test"],
    setting: Setting,
    pool: Pool,
) -> Arms:
    """Train every arm on every draw."""
    wanted = [(name, seed) for seed in seeds for name in arms]
    jobs = [SplitJob(setting, arms[name], images, seed, part) for name, seed in wanted]
    found: dict[str, dict[int, Split]] = {name: {} for name in arms}
    for (name, seed), split in zip(wanted, pool.map(make_split, jobs), strict=True):
        found[name][seed] = split
    return found


def scores_of(arm: Mapping[int, Split], score: str, group: str) -> Units:
    """Return a score of all draws in one mapping."""
    return pooled({seed: split.scores[score, group] for seed, split in arm.items()})


def average(arm: Mapping[int, Split], score: str, group: str = "") -> Estimate:
    """Return a mean over the images of all draws, of one group or of both."""
    groups = (group,) if group else (FIRST, SECOND)
    return bootstrap_mean({k: v for g in groups for k, v in scores_of(arm, score, g).items()})


def contrast(
    arm: Mapping[int, Split], control: Mapping[int, Split], score: str = "bottom", sign: int = 1
) -> Estimate:
    """Return how much wider the gap between the groups is than in the control.

    Args:
        arm: Models by draw.
        control: Models of the same draws.
        score: Which score.
        sign: -1 where the second group's score minus the first's is meant.

    Returns:
        (mean of the first group - mean of the second), the arm's minus the control's, with its
        95 % interval: images of each group are resampled, an image's scores together.
    """
    sides = []
    for i, group in enumerate((FIRST, SECOND)):
        pair = [scores_of(one, score, group) for one in (arm, control)]
        means, draws = resampled_means(pair, seed=i)
        sides.append((float(means[0] - means[1]), draws[:, 0] - draws[:, 1], len(pair[0])))
    (one, ones, n), (two, twos, m) = sides
    low, high = quantiles(sign * (ones - twos), 0.95)
    return Estimate(sign * (one - two), low, high, n + m)


def by_draw(
    arm: Mapping[int, Split], control: Mapping[int, Split], score: str = "bottom", sign: int = 1
) -> dict[int, Estimate]:
    """Return `contrast` of every draw."""
    return {s: contrast({s: arm[s]}, {s: control[s]}, score, sign) for s in arm}


def verdict(found: Estimate, draws: Mapping[int, Estimate], margin: float) -> str:
    """Return what the contrast says: the interval decides, and every draw must agree.

    Args:
        found: All draws.
        draws: Each draw.
        margin: The margin.
    """
    if found.low > margin and all(d.value > margin for d in draws.values()):
        return "split"
    if found.high < margin:
        return "not split"
    return "undecided"


def table_of(
    title: str,
    note: str,
    arms: Arms,
    columns: Mapping[str, tuple[str, str]],
) -> StudyTable:
    """Return means of all draws, an arm a line.

    Args:
        title: Of the table.
        note: How to read it.
        arms: Models by arm and draw.
        columns: Score and group by name of the column.
    """
    rows = tuple(
        row(name, column, average(arm, score, group))
        for name, arm in arms.items()
        for column, (score, group) in columns.items()
    )
    return StudyTable(title=title, note=note, rows=rows)


def draws_table(
    title: str, note: str, metric: str, arms: Mapping[str, Mapping[int, Estimate]]
) -> StudyTable:
    """Return one number of every draw, and of all draws where `None` is given as the draw."""
    rows: list[StudyRow] = []
    for name, draws in arms.items():
        rows += [row(name, metric, found, seed) for seed, found in draws.items()]
    return StudyTable(title=title, note=note, rows=tuple(rows))


def value(arm: str, metric: str, number: float, n: int) -> StudyRow:
    """Return a number without an interval."""
    return StudyRow(arm=arm, metric=metric, value=number, n=n)


def refs(arms: Arms) -> tuple[ModelRef, ...]:
    """Return all models for the record."""
    return tuple(
        ModelRef(
            name=f"{name}, draw {seed}",
            path=split.path,
            fingerprint=split.fingerprint,
            parameters=split.parameters,
        )
        for name, arm in arms.items()
        for seed, split in arm.items()
    )


def words(found: Estimate) -> str:
    """Return an estimate with its interval in words."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
