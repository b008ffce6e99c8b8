"""Does routing put the classes of a ResNet into halves of its channels, on real pictures?

Source: Cloud et al. (2024), arXiv 2410.04332, appendix B.1 (CIFAR-100, ResNet-34). Here: pictures
of clothes in ten classes and a ResNet of transformers with two stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from excise.core.stages import Runtime
from excise.evals.stats import Estimate
from excise.record import StudyTable
from excise.run.study import Study, StudyResult
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.vision.classifier import SplitClassifierConfig
from excise_studies.vision.images import ImageSpec
from excise_studies.vision.split_jobs import (
    FIRST,
    SECOND,
    Means,
    SplitConfig,
    by_seed,
    decide,
    means_of,
    refs,
    table_of,
    train_conditions,
    value,
    words,
)

ROUTED, PLAIN = "routed, L1", "plain"
BARE, PENALTY = "routed, no L1", "not routed, L1"


class ObjectsSplit(Study):
    """A split ResNet classifier of clothes: five classes to the top channels, five to the bottom.

    Stated beforehand. A is the accuracy of the bottom half's certificate on classes 5-9 minus that
    on 0-4, routed with L1 minus plain, over the test images of all reported seeds. The channels are
    called split if the lower end of A's 95 % interval is above `margin` and A is above it in every
    seed, not split if the upper end is below it. The weight of L1 is chosen on dev images of the
    tuned seed: the largest A among those whose accuracy is at most `accuracy_budget` below the
    plain model's. The tax is the accuracy of the plain model minus that of the routed one.
    """

    question: ClassVar[str] = (
        "Does routing the gradient of five classes through the top half of a ResNet's channels "
        "and that of the others through the bottom half put what tells them apart into those "
        "halves, what does it cost, and what happens where five classes are rare?"
    )
    statistic: ClassVar[str] = (
        "A = (accuracy of the bottom half's certificate on classes 5-9 - on 0-4), routed with L1 "
        "minus plain; over seeds and test images. Split if the lower end of A "
        "is above the margin and so is every seed, not split if the upper end is below."
    )
    takes: ClassVar[str] = "6 minutes, 1 GiB, after excise fetch fashion"

    name: Literal["objects-split"] = "objects-split"
    """Name on the command line."""
    margin: float = 0.1
    """A above which the channels count as split."""
    tuned_on: tuple[int, ...] = (0,)
    """Seeds on which settings are chosen, on `dev`; no number is reported from them."""
    accuracy_budget: float = 0.02
    """How much less accurate the routed model may be where the weight of L1 is chosen."""
    images: ImageSpec = ImageSpec(source="fashion", train=8000)
    """The pictures."""
    model: SplitClassifierConfig = SplitClassifierConfig()
    """The routed model, but for the weight of L1, which is chosen."""
    l1_tried: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    """Weights of L1 to choose from."""
    rare: float | None = 0.1
    """Share of classes 0-4 in conditions where they are rare; empty for no such conditions."""

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Choose the weight of L1, train the conditions on every seed, tabulate."""
        data = self.images.split(self.seeds[0])
        base, tuning = choose(self, runtime, pool)
        wanted = conditions_of(base, self.rare)
        conditions = train_conditions(wanted, self.seeds, self.images, "test", runtime, pool)
        means = means_of(conditions)
        effects = {
            n: means.contrast(n, control_of(n), sign=-1)
            for n in conditions
            if not n.startswith(PLAIN)
        }
        tax = {n: means.difference(control_of(n), n, "decoder") for n in effects}
        each_seed = by_seed(conditions, ROUTED, PLAIN, sign=-1)
        decision = decide("A", effects[ROUTED], each_seed, self.margin, self.error)
        nets = {"decoder": "whole", "top": "top half", "bottom": "bottom half"}
        sides = {"0-4": FIRST, "5-9": SECOND}
        columns = {f"{nets[n]}, {d}": (n, g) for n in nets for d, g in sides.items()}
        rows = [
            row(n, metric, numbers[n])
            for n in effects
            for metric, numbers in (("A", effects), ("tax", tax))
        ]
        rows += [row(ROUTED, "A", e, seed) for seed, e in each_seed.items()]
        return StudyResult(
            tables=(
                table_of("Accuracy", "Test images of all seeds.", means, list(conditions), columns),
                StudyTable(
                    title="Gap of the bottom half, and tax",
                    note=(
                        "A as stated, against the plain condition with the same images; tax in "
                        "accuracy."
                    ),
                    rows=tuple(rows),
                ),
                tuning,
            ),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=paragraph(means, effects, tax, base, self),
            data=data.describe(),
            models=refs(conditions),
        )


def conditions_of(base: SplitClassifierConfig, rare: float | None) -> dict[str, SplitConfig]:
    """Return the conditions by name.

    Args:
        base: The routed model.
        rare: Share of the first group where it is rare.
    """
    changes: dict[str, dict[str, object]] = {
        ROUTED: {},
        BARE: {"l1": 0.0},
        PENALTY: {"routed": "none"},
        PLAIN: {"routed": "none", "l1": 0.0},
    }
    if rare is not None:
        changes[f"{PLAIN}, 0-4 rare"] = {"routed": "none", "l1": 0.0, "share": rare}
        changes[f"{ROUTED}, 0-4 rare"] = {"share": rare}
        changes[f"{ROUTED}, 0-4 rare, every image alike"] = {"share": rare, "balance": "images"}
    return {name: base.model_copy(update=change) for name, change in changes.items()}


def control_of(name: str) -> str:
    """Return the plain condition with the same images."""
    return f"{PLAIN}, 0-4 rare" if "rare" in name else PLAIN


def choose(
    study: ObjectsSplit, runtime: Runtime, pool: Pool
) -> tuple[SplitClassifierConfig, StudyTable]:
    """Return the model with the weight chosen on dev images of the tuned seeds, and the table."""
    title = "Weights of L1 tried on the tuned seed, dev images"
    if not study.tuned_on or not study.l1_tried:
        return study.model, StudyTable(title=title, note="None: it was given.")
    grid = {f"L1 {l1:g}": study.model.model_copy(update={"l1": l1}) for l1 in study.l1_tried}
    wanted: dict[str, SplitConfig] = {**grid, PLAIN: conditions_of(study.model, None)[PLAIN]}
    tried = train_conditions(wanted, study.tuned_on, study.images, "dev", runtime, pool)
    means = means_of(tried, ("bottom", "decoder"))
    gaps = {n: means.contrast(n, PLAIN, sign=-1).value for n in tried}
    right = {n: means.mean(n, "decoder").value for n in tried}
    within = [n for n in grid if right[n] >= right[PLAIN] - study.accuracy_budget]
    chosen = max(within, key=lambda n: gaps[n]) if within else max(grid, key=lambda n: right[n])
    rows = [
        value(n, metric, numbers[n], len(study.tuned_on))
        for n in tried
        for metric, numbers in (("A", gaps), ("accuracy", right))
    ]
    return grid[chosen], StudyTable(title=title, note=f"Chosen: {chosen}.", rows=tuple(rows))


def paragraph(
    means: Means,
    effects: Mapping[str, Estimate],
    tax: Mapping[str, Estimate],
    base: SplitClassifierConfig,
    study: ObjectsSplit,
) -> str:
    """Return the result in words."""

    def pair(name: str, net: str) -> str:
        two = (means.of(name, net, g)[0] for g in (FIRST, SECOND))
        return " and ".join(f"{x:.3f}" for x in two)

    text = (
        f"Over {len(study.seeds)} seeds the bottom half told classes 0-4 and 5-9 with accuracy "
        f"{pair(ROUTED, 'bottom')} where the channels were routed (L1 {base.l1:g}) and "
        f"{pair(PLAIN, 'bottom')} in the plain model; the top half with {pair(ROUTED, 'top')} and "
        f"{pair(PLAIN, 'top')}. The gap grew by A = {words(effects[ROUTED])}, at a tax of "
        f"{words(tax[ROUTED])} in accuracy. Routing without L1 gives {words(effects[BARE])}, L1 "
        f"without routing {words(effects[PENALTY])}."
    )
    name = f"{ROUTED}, 0-4 rare"
    if name in effects:
        alike = f"{name}, every image alike"
        text += (
            f" Where classes 0-4 are {study.rare:.0%} of the images, A is {words(effects[name])} "
            "at "
            f"a tax of {words(tax[name])} with the two groups weighed alike, and "
            f"{words(effects[alike])} at {words(tax[alike])} with every image weighed alike."
        )
    return text
