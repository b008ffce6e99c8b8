"""How much penalty does a split need where what is routed away is rare, and what does it cost?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from excise.core.stages import Runtime
from excise.evals.replicates import Contrast, Decision
from excise.evals.stats import Estimate
from excise.record import StudyRow, StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.vision.autoencoder import SplitAutoencoderConfig
from excise_studies.vision.images import ImageSpec
from excise_studies.vision.split_jobs import (
    SECOND,
    Means,
    SplitConfig,
    by_seed,
    means_of,
    refs,
    train_conditions,
    value,
    words,
)

Balance = Literal["groups", "images"]


class ClassImbalance(Study):
    """The least L1 that splits an autoencoder, and its tax, against how rare the digits are.

    Stated beforehand. Digits 0-4 are to be routed away; their share of what the autoencoder learns
    from falls from one half to rare, while certificates always learn from all digits. An encoding
    is split where G (as in `digits-split`, against the plain autoencoder with the same images) is
    above `split_margin`. For every share the least L1 of the grid that splits on dev images of the
    tuned seed is reported on other seeds, with its tax: the decoder's error on digits 5-9 minus the
    plain one's. D is the tax at the smallest share minus that at the largest. Rarity makes a split
    dearer if the lower end of D's 95 % interval is above `margin`, no dearer if the upper end is
    below it.
    """

    question: ClassVar[str] = (
        "How much L1 does it take to split an encoding where the digits that are routed away are "
        "rare, and what does the split cost the digits that stay?"
    )
    statistic: ClassVar[str] = (
        "D = tax at the smallest share of digits 0-4 minus tax at the largest; tax: error of the "
        "decoder on 5-9, routed with the least L1 that splits on the tuned seed, minus plain with "
        "the same images. Dearer if the lower end of D is above the margin, no dearer if the upper "
        "end is below."
    )
    takes: ClassVar[str] = "6 minutes, 1 GiB"

    name: Literal["class-imbalance"] = "class-imbalance"
    """Name on the command line."""
    margin: float = 0.02
    """Difference of tax that counts, in mean absolute error of pixels from -1 to 1."""
    tuned_on: tuple[int, ...] = (0,)
    """Seeds on which settings are chosen, on `dev`; no number is reported from them."""
    split_margin: float = 0.03
    """G above which an encoding counts as split."""
    shares: tuple[float, ...] = (0.5, 0.2, 0.05)
    """Shares of digits 0-4, largest first."""
    l1_tried: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Weights of L1, least first."""
    also_by_image: bool = True
    """Whether the smallest share is also trained with every image weighing the same."""
    images: ImageSpec = ImageSpec(shrink=2)
    """The digits."""
    model: SplitAutoencoderConfig = SplitAutoencoderConfig(
        fit=SplitAutoencoderConfig().fit.model_copy(update={"steps": 1000, "log_every": 100})
    )
    """The routed autoencoder, but for L1."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Draws that are reported."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        """Refuse what has no order."""
        if list(self.shares) != sorted(set(self.shares), reverse=True) or len(self.shares) < 2:
            raise ValueError("shares: give at least two, largest first")
        if not 0 < self.shares[-1] <= self.shares[0] <= 0.5:
            raise ValueError("shares: give shares above 0 and up to 0.5")
        if list(self.l1_tried) != sorted(set(self.l1_tried)) or not self.l1_tried:
            raise ValueError("l1_tried: give weights, least first")
        if not self.tuned_on:
            raise ValueError("tuned_on: name the seed on which the least L1 is found")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Find the least L1 on the tuned seed, report it on others, and put numbers into tables."""
        least, tuning = find_least(self, runtime, pool)
        wanted: dict[str, SplitConfig] = {}
        for name, condition in share_conditions(self).items():
            wanted[f"{name}: plain"] = model_of(self, condition, None)
            wanted[f"{name}: routed"] = model_of(self, condition, least[name][0])
        conditions = train_conditions(wanted, self.seeds, self.images, "test", runtime, pool)
        means = means_of(conditions, ("bottom", "decoder"))
        pairs = {n: (f"{n}: routed", f"{n}: plain") for n in share_conditions(self)}
        gaps = {n: means.contrast(*pair) for n, pair in pairs.items()}
        taxes = {n: means.difference(*pair, "decoder", SECOND) for n, pair in pairs.items()}
        few, many = f"{self.shares[-1]:.0%}", f"{self.shares[0]:.0%}"
        change = dearer(means, few, many)
        decision = decide(self, change)
        rows: list[StudyRow] = []
        for name in share_conditions(self):
            rows.append(value(name, "least L1", least[name][0], len(self.tuned_on)))
            rows += [row(name, "G", gaps[name]), row(name, "tax", taxes[name])]
            each_seed = by_seed(conditions, *pairs[name])
            rows += [row(name, "G", gap, seed) for seed, gap in each_seed.items()]
        never = [n for n, (_, split) in least.items() if not split]
        note = " Nothing in the grid split at " + "; ".join(never) + ": the largest gap is shown."
        return StudyResult(
            tables=(
                StudyTable(
                    title="Least L1 that splits, and its tax, by share of digits 0-4",
                    note="G and tax on test images of the reported seeds."
                    + (note if never else ""),
                    rows=tuple(rows),
                ),
                tuning,
            ),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=paragraph(self, least, gaps, taxes, change),
            data=self.images.split(self.seeds[0]).describe(),
            models=refs(conditions),
            notes=(note.strip(),) if never else (),
        )


def share_conditions(study: ClassImbalance) -> dict[str, tuple[float, Balance]]:
    """Return share and balance by name of the condition."""
    out: dict[str, tuple[float, Balance]] = {f"{s:.0%}": (s, "groups") for s in study.shares}
    if study.also_by_image:
        rarest = study.shares[-1]
        out[f"{rarest:.0%}, every image alike"] = (rarest, "images")
    return out


def model_of(
    study: ClassImbalance, condition: tuple[float, Balance], l1: float | None
) -> SplitAutoencoderConfig:
    """Return the routed autoencoder of a condition; without L1 (None) the plain one."""
    share, balance = condition
    change: dict[str, object] = {"share": share, "balance": balance}
    change |= {"l1": (l1 or 0.0, l1 or 0.0)}
    if l1 is None:
        change |= {"routed": "none", "correlation": 0.0}
    return study.model.model_copy(update=change)


def find_least(
    study: ClassImbalance, runtime: Runtime, pool: Pool
) -> tuple[dict[str, tuple[float, bool]], StudyTable]:
    """Return by condition the least L1 that splits and whether any does, on dev."""
    wanted: dict[str, SplitConfig] = {}
    for name, condition in share_conditions(study).items():
        for l1 in (None, *study.l1_tried):
            wanted[f"{name}: {_l1(l1)}"] = model_of(study, condition, l1)
    tried = train_conditions(wanted, study.tuned_on, study.images, "dev", runtime, pool)
    means = means_of(tried, ("bottom",))
    least: dict[str, tuple[float, bool]] = {}
    rows: list[StudyRow] = []
    for name in share_conditions(study):
        plain = f"{name}: {_l1(None)}"
        gaps = {l1: means.contrast(f"{name}: {_l1(l1)}", plain).value for l1 in study.l1_tried}
        splits = [l1 for l1 in study.l1_tried if gaps[l1] > study.split_margin]
        widest = max(study.l1_tried, key=lambda l1: gaps[l1])
        least[name] = (splits[0], True) if splits else (widest, False)
        rows += [value(name, _l1(l1), gap, len(study.tuned_on)) for l1, gap in gaps.items()]
    title = "G by L1 on the tuned seed, dev images"
    return least, StudyTable(
        title=title, note="The least above the split margin is taken.", rows=tuple(rows)
    )


def _l1(weight: float | None) -> str:
    return "plain" if weight is None else f"L1 {weight:g}"


def dearer(means: Means, few: str, many: str) -> Estimate:
    """Return the tax in one condition minus that in another, by image."""
    taxes = [
        means.of(f"{condition}: routed", "decoder", SECOND)
        - means.of(f"{condition}: plain", "decoder", SECOND)
        for condition in (few, many)
    ]
    return means.estimate(taxes[0] - taxes[1], SECOND)


def decide(study: ClassImbalance, change: Estimate) -> Decision:
    """Return what the change of the tax says under the margin."""
    asked = Contrast("D", change, (study.margin,), study.error)
    text = "undecided"
    if asked.above(study.margin):
        text = "rarity makes a split dearer"
    elif asked.below(study.margin):
        text = "rarity makes a split no dearer"
    return Decision(f"{text}: D = {words(change)}, margin {study.margin:g}", (asked,))


def paragraph(
    study: ClassImbalance,
    least: Mapping[str, tuple[float, bool]],
    gaps: Mapping[str, Estimate],
    taxes: Mapping[str, Estimate],
    change: Estimate,
) -> str:
    """Return the result in words."""
    parts = [
        f"{name} ({'L1' if least[name][1] else 'no L1 splits; L1'} {least[name][0]:g}: "
        f"G {words(gaps[name])}, tax {words(taxes[name])})"
        for name in gaps
    ]
    return (
        f"Over {len(study.seeds)} seeds, by the share of digits 0-4 among what the autoencoder "
        f"learned from: {'; '.join(parts)}. From the largest share to the smallest the tax on "
        f"digits 5-9 changed by D = {words(change)}."
    )
