"""What does routing one class cost, the others trained as normal, and does it cost more if alike?

Shape legend: N images, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision, correlation, over_seeds
from excise.evals.stats import Estimate
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import ScoreByUnit, row
from excise_studies.vision.autoencoder import SplitAutoencoderConfig
from excise_studies.vision.images import Images, ImageSpec
from excise_studies.vision.split_jobs import (
    FIRST,
    SECOND,
    SplitConfig,
    SplitModel,
    SplitModels,
    refs,
    train_conditions,
    value,
    words,
)

PLAIN = "plain"
Part = Literal["dev", "test"]

MODEL = SplitAutoencoderConfig(
    balance="images",
    fit=SplitAutoencoderConfig().fit.model_copy(update={"steps": 1000, "log_every": 100}),
)
"""Every image weighs alike, so that one class of ten is as rare as it is."""


class ClassImbalance(Study):
    """The least L1 that splits one class off, and its tax, class by class and for five at once.

    Stated beforehand. The gradient of the routed class leaves the encoding through the bottom half
    alone; the other classes are trained as normal through the top half. A class counts as split
    off where what the top half's certificate lost on it, beyond what it lost on the others, is more
    than `split_share` of what the plain one draws better than one picture for all images, their
    median. The least L1 that splits is found on dev images of `tuned_on`: the first of `l1_tried`
    that does, then by bisection. The tax is the decoder's error on the classes that stay, minus
    that of plain training without penalties, on the same test images of the other seeds.

    Two contrasts decide and share the error. F is the mean tax of the classes routed one by one
    minus that of `halves`, five at once (of those that any L1 splits): routing few is cheaper if
    F's interval over seeds lies below minus `margin`, dearer if above it, as dear if between. Rho
    is the rank correlation over classes, seeds averaged, between the tax and the distance to the
    nearest other class (energy distance of pixels); a class that no L1 splits ranks as the dearest.
    Near classes cost more if its interval lies below minus `rho_margin`, not more if above it.
    """

    question: ClassVar[str] = (
        "Where one class alone is routed and the others are trained as normal, how much L1 does it "
        "take to split it off, what does that cost the classes that stay, and is it less for few "
        "classes than for many, and for classes far from all others?"
    )
    statistic: ClassVar[str] = (
        "F = tax of one routed class, mean of all, minus that of five at once, interval over "
        "seeds, against the margin from both sides; rho = rank correlation over classes of the tax "
        "with the distance to the nearest other class. Tax: error of the decoder on the classes "
        "that stay, at the least L1 that splits on dev of the tuned seeds, minus plain training's."
    )
    takes: ClassVar[str] = "35 minutes of one core, 1 GiB"

    name: Literal["class-imbalance"] = "class-imbalance"
    """Name on the command line."""
    seeds: tuple[int, ...] = Field(default=(*range(6, 11), *range(13, 30)), min_length=1)
    """Seeds that are reported; seeds 1 to 5 gave the margin."""
    margin: float = 0.01
    """Difference of tax that counts, in mean absolute error of pixels from -1 to 1: an eighth of
    the error of plain training. Doubled after seeds 1 to 5, where F lay on 0.005 itself, below zero
    for digits and above it for clothes; decided on others."""
    rho_margin: float = Field(default=0.3, ge=0, lt=1)
    """Rank correlation that counts."""
    tuned_on: tuple[int, ...] = (0, 11, 12)
    """Seeds on which the least L1 is found, on `dev`; no number is reported from them."""
    split_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of what the plain top half draws of a class that must be lost."""
    classes: tuple[int, ...] = tuple(range(10))
    """Classes that are routed, each alone."""
    halves: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
    """Classes that are routed together; empty to leave F out."""
    l1_tried: tuple[float, ...] = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Weights of L1 on both halves, least first."""
    bisections: int = Field(default=2, ge=0)
    """How often the step between the last that does not split and the first that does is halved."""
    images: ImageSpec = ImageSpec(shrink=2)
    """The images; `--images.source fashion` takes clothes, once fetched."""
    model: SplitAutoencoderConfig = MODEL
    """The routed autoencoder, but for L1 and what is routed."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        """Refuse what has no order, and groups that leave no class or no seed to choose on."""
        if list(self.l1_tried) != sorted(set(self.l1_tried)) or not self.l1_tried:
            raise ValueError("l1_tried: give weights, least first")
        if not self.tuned_on:
            raise ValueError("tuned_on: name a seed on which the least L1 is found")
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError("classes: give at least two different ones")
        known = set(range(10))
        for routed in (self.classes, *self.halves):
            if not set(routed) <= known:
                raise ValueError("classes, halves: classes are numbered 0 to 9")
        if any(not 0 < len(set(routed)) < len(known) for routed in self.halves):
            raise ValueError("halves: leave at least one class to stay, and name one to route")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Find the least L1 of every group, report it on other seeds, compare."""
        least, tuning = find_least(self, runtime, pool)
        chosen = {name: (group, least[name].l1) for name, group in groups_of(self).items()}
        models = train(self, chosen, self.seeds, "test", runtime, pool)
        taxes = {name: taxes_of(models, name) for name in chosen}
        lost = {name: lost_of(self, models, name, "test") for name in chosen}
        away = mean_distances(self)
        few = fewer(self, least, taxes)
        decided, rho = decide(self, few, ranked(self, least, taxes), away)
        rows: list[StudyRow] = []
        for name, group in groups_of(self).items():
            rows.append(value(name, "least L1", least[name].l1, len(self.tuned_on)))
            rows.append(row(name, "share lost by the top half", over_seeds(lost[name])))
            rows.append(row(name, "tax", over_seeds(taxes[name])))
            if len(group) == 1:
                rows.append(value(name, "distance", away[group[0]], len(self.seeds)))
        rows.append(row("all classes", "rho (distance, tax)", rho))
        if few:
            rows.append(row("all classes", "F (tax, one by one - five at once)", few))
        never = [name for name in chosen if not least[name].split]
        note = f"No L1 tried splits off {', '.join(never)}: that of the largest share is shown."
        return StudyResult(
            tables=(
                StudyTable(
                    title="Least L1 that splits, and its tax, by what is routed",
                    note="Share lost and tax on test images of the reported seeds; distance to the "
                    "nearest other class, in pixels." + (f" {note}" if never else ""),
                    rows=tuple(rows),
                ),
                tuning,
            ),
            decision=decided.text,
            contrasts=decided.contrasts,
            paragraph=paragraph(self, least, lost, taxes, few, rho, decided),
            data=self.images.split(self.seeds[0]).describe(),
            models=refs(models),
            notes=(note,) if never else (),
        )


# -- models ----------------------------------------------------------------------------------------


def groups_of(study: ClassImbalance) -> dict[str, tuple[int, ...]]:
    """Return what is routed, by name: each class alone, then the groups."""
    named = study.images.split(study.seeds[0]).train.classes
    alone = {named[c]: (c,) for c in study.classes}
    together = {" + ".join(named[c] for c in half): half for half in study.halves}
    return {**alone, **together}


def model_of(study: ClassImbalance, group: Sequence[int], l1: float | None) -> SplitConfig:
    """Return the autoencoder that routes some classes; without L1 (None) the plain one."""
    if l1 is None:
        plain = {"routed": "none", "l1": (0.0, 0.0), "correlation": 0.0}
        return study.model.model_copy(update=plain)
    stays = tuple(c for c in range(10) if c not in group)
    return study.model.model_copy(update={"first": stays, "l1": (l1, l1)})


def train(
    study: ClassImbalance,
    wanted: Mapping[str, tuple[tuple[int, ...], float]],
    seeds: Sequence[int],
    part: Part,
    runtime: Runtime,
    pool: Pool,
) -> SplitModels:
    """Train groups at an L1 each, and the plain model, which is the same for all groups."""
    configs = {name: model_of(study, group, l1) for name, (group, l1) in wanted.items()}
    configs[PLAIN] = model_of(study, (), None)
    return train_conditions(configs, seeds, study.images, part, runtime, pool)


@dataclass(frozen=True)
class Least:
    """What was chosen for a group of classes on the tuned seeds.

    Attributes:
        l1: The least weight that splits; that of the largest share where none does.
        split: Whether one does.
    """

    l1: float
    split: bool


def find_least(
    study: ClassImbalance, runtime: Runtime, pool: Pool
) -> tuple[dict[str, Least], StudyTable]:
    """Return the least L1 of every group, and the share lost at all weights tried, on dev."""
    groups = groups_of(study)
    shares: dict[str, dict[float, float]] = {name: {} for name in groups}

    def look(at: Mapping[str, float]) -> None:
        wanted = {name: (groups[name], l1) for name, l1 in at.items()}
        models = train(study, wanted, study.tuned_on, "dev", runtime, pool)
        for name, l1 in at.items():
            shares[name][l1] = mean(lost_of(study, models, name, "dev"))

    def splitting(name: str) -> float | None:
        return min((l1 for l1, x in shares[name].items() if x > study.split_share), default=None)

    for l1 in study.l1_tried:
        pending = {name: l1 for name in groups if splitting(name) is None}
        if pending:
            look(pending)
    for _ in range(study.bisections):
        between: dict[str, float] = {}
        for name in groups:
            high = splitting(name)
            low = max((l1 for l1 in shares[name] if high is not None and l1 < high), default=None)
            if high is not None and low is not None:
                between[name] = math.sqrt(low * high) if low else high / 2
        if between:
            look(between)
    least = {}
    for name, tried in shares.items():
        first = splitting(name)
        most = max(tried, key=lambda l1: tried[l1])
        least[name] = Least(most if first is None else first, first is not None)
    rows = [
        value(name, f"L1 {l1:.2g}", share, len(study.tuned_on))
        for name, tried in shares.items()
        for l1, share in sorted(tried.items())
    ]
    title = "Share lost by the top half, by L1, on dev images of the tuned seeds"
    note = f"Split where it is above {study.split_share:g}; the least that splits is taken."
    return least, StudyTable(title=title, note=note, rows=tuple(rows))


# -- scores ----------------------------------------------------------------------------------------


def rise(routed: SplitModel, plain: SplitModel, score: str, group: str) -> float:
    """Return a group's mean score minus that of the plain model on the same images."""
    usual = {**plain.scores.get((score, FIRST), {}), **plain.scores.get((score, SECOND), {})}
    return mean(x - usual[unit] for unit, x in routed.scores[score, group].items())


def taxes_of(models: SplitModels, name: str) -> list[float]:
    """Return by how much the decoder is worse on the classes that stay, by seed."""
    return [
        rise(model, models[PLAIN][seed], "decoder", FIRST) for seed, model in models[name].items()
    ]


def lost_of(study: ClassImbalance, models: SplitModels, name: str, part: Part) -> list[float]:
    """Return what the top half lost of the routed classes, as a share of what it had, by seed."""
    out = []
    for seed, model in models[name].items():
        plain = models[PLAIN][seed]
        beyond = rise(model, plain, "top", SECOND) - rise(model, plain, "top", FIRST)
        data = study.images.split(seed)
        same = one_picture(data.train, getattr(data, part))
        had = {**plain.scores.get(("top", FIRST), {}), **plain.scores.get(("top", SECOND), {})}
        out.append(beyond / mean(same[u] - had[u] for u in model.scores["top", SECOND]))
    return out


def one_picture(taught: Images, scored: Images) -> ScoreByUnit:
    """Return the error of drawing the same for every image: the median pixels of those taught."""
    drawn_P = np.median(_pixels(taught), axis=0)
    errors_N = np.abs(_pixels(scored) - drawn_P).mean(1)
    return {str(key): float(x) for key, x in zip(scored.keys_N, errors_N, strict=True)}


def _pixels(images: Images) -> NDArray[np.float64]:
    """Return [N, P] pixels from -1 to 1."""
    flat_NP: NDArray[np.float64] = images.pixels_NHW.reshape(len(images), -1) / 127.5 - 1
    return flat_NP


def distances(images: Images) -> dict[int, float]:
    """Return how far every class lies from the nearest other one, in pixels.

    The energy distance: 2 E|x - y| - E|x - x'| - E|y - y'| with the Euclidean norm, x and y images
    of two classes; it is 0 if and only if their pixels have one distribution.

    Source: Szekely and Rizzo (2013), Journal of Statistical Planning and Inference 143.

    Args:
        images: With at least two of every class.
    """
    pixels_NP = torch.from_numpy(_pixels(images))
    present = sorted(set(images.labels_N.tolist()))
    by_class = {c: pixels_NP[torch.from_numpy(images.labels_N == c)] for c in present}
    apart = {
        (a, b): float(torch.cdist(by_class[a], by_class[b]).mean())
        for a in present
        for b in present
        if a <= b
    }
    inside = {c: apart[c, c] * len(by_class[c]) / (len(by_class[c]) - 1) for c in present}
    return {
        c: min(
            2 * apart[min(c, other), max(c, other)] - inside[c] - inside[other]
            for other in present
            if other != c
        )
        for c in present
    }


def mean_distances(study: ClassImbalance) -> dict[int, float]:
    """Return the distance of every class to the nearest other one, mean over reported seeds."""
    by_seed = [distances(study.images.split(seed).test) for seed in study.seeds]
    return {c: mean(of_seed[c] for of_seed in by_seed) for c in by_seed[0]}


# -- what decides ----------------------------------------------------------------------------------


def fewer(
    study: ClassImbalance, least: Mapping[str, Least], taxes: Mapping[str, Sequence[float]]
) -> Estimate | None:
    """Return F over seeds; None where no class, or no half, is split by any L1."""
    split: dict[bool, list[Sequence[float]]] = {True: [], False: []}
    for name, group in groups_of(study).items():
        if least[name].split:
            split[len(group) == 1].append(taxes[name])
    if not split[True] or not split[False]:
        return None
    one, many = (np.mean(split[alone], axis=0) for alone in (True, False))
    return over_seeds((one - many).tolist())


def ranked(
    study: ClassImbalance, least: Mapping[str, Least], taxes: Mapping[str, Sequence[float]]
) -> dict[int, float]:
    """Return the tax of every class, mean over seeds; one that nothing splits is the dearest."""
    means = {
        group[0]: (mean(taxes[name]), least[name].split)
        for name, group in groups_of(study).items()
        if len(group) == 1
    }
    most = max(tax for tax, _ in means.values())
    return {c: tax if split else most + 1 for c, (tax, split) in means.items()}


def decide(
    study: ClassImbalance,
    few: Estimate | None,
    taxes: Mapping[int, float],
    away: Mapping[int, float],
) -> tuple[Decision, Estimate]:
    """Return what F and rho say, each at its share of the error, and rho with its 95 % interval.

    Args:
        study: The margins.
        few: F, where it is defined.
        taxes: By class, for their ranks.
        away: Distance to the nearest other class.
    """
    share = study.error / (1 if few is None else 2)
    sides = np.array([away[c] for c in taxes]), np.array(list(taxes.values()))
    near = Contrast("rho", correlation(*sides, error=share), (-study.rho_margin,), share, "classes")
    said = {
        "below": "near classes cost more: rho is below minus the margin",
        "above": f"near classes do not cost more: rho is above -{study.rho_margin:g}",
        "undecided": f"whether near classes cost more is undecided (-{study.rho_margin:g})",
    }
    text = said[near.verdict]
    asked: tuple[Contrast, ...] = (near,)
    if few is None:
        start = "one class against five is not compared: no L1 splits one side"
    else:
        contrast = Contrast("F", few, (-study.margin, study.margin), share)
        asked = (contrast, near)
        start = contrast.say(
            {
                "below": f"one class costs less than five: F = {words(few)}",
                "above": f"one class costs more than five: F = {words(few)}",
                "equal": f"one class costs what five do, within {study.margin:g}: F = {words(few)}",
                "undecided": f"one class against five is undecided: F = {words(few)}",
            }
        )
    return Decision(f"{start}; {text}", asked), correlation(*sides)


def paragraph(
    study: ClassImbalance,
    least: Mapping[str, Least],
    lost: Mapping[str, Sequence[float]],
    taxes: Mapping[str, Sequence[float]],
    few: Estimate | None,
    rho: Estimate,
    decided: Decision,
) -> str:
    """Return the result in words."""
    parts = []
    for name in groups_of(study):
        l1 = "L1" if least[name].split else "no L1 splits; L1"
        share, tax = over_seeds(lost[name]), over_seeds(taxes[name])
        parts.append(
            f"{name} ({l1} {least[name].l1:.2g}: the top half lost {share.value:.2f} of it, tax "
            f"{words(tax)})"
        )
    compared = f" One class costs F = {words(few)} more than five at once." if few else ""
    return (
        f"Over {len(study.seeds)} seeds, by what was routed, the others as normal: "
        f"{'; '.join(parts)}.{compared} Over {rho.n} classes the tax goes with the distance to the "
        f"nearest other class by rho = {words(rho)}. Decision: {decided.text}."
    )
