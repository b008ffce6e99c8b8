"""Pairs of digits from unlike to alike (3 against 8): what splitting an encoding costs each.

Shape legend: N images, P pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.stages import Runtime
from excise.evals.replicates import SeedEstimate, correlation
from excise.evals.stats import Array
from excise.record import StudyRow, StudyTable
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import said
from excise_studies.vision.autoencoder import SplitAutoencoderConfig, errors, train_autoencoder
from excise_studies.vision.images import Images, ImageSets, ImageSpec

DIGITS = ((0, 1), (1, 4), (2, 7), (0, 6), (7, 9), (3, 5), (4, 9), (3, 8))
"""Pairs of digits; the second is the one beside the one that is routed away."""

PLAIN, ROUTED = "plain", "routed"

IMAGES = ImageSpec(shrink=2)
"""The digits, 14 x 14."""

MODEL = SplitAutoencoderConfig(
    hidden=(128,),
    l1=(1e-2, 1e-2),
    fit=FitConfig(steps=400, lr=4e-3, batch_size=64, weight_decay=5e-5, schedule="cosine"),
)
"""A split autoencoder of two digits; penalties are the same with and without routing."""

ErrorKind = Literal["decoder", "bottom"]


@dataclass(frozen=True)
class TrainPair(Stage[dict[str, dict[str, float]]]):
    """One autoencoder of one pair of digits, and its errors by kind and image.

    Attributes:
        digits: The two, the one that is routed away first.
        seed: Seed of the split and of the training.
        model: The autoencoder.
        images: Where the digits come from.
    """

    digits: tuple[int, int]
    seed: int
    model: SplitAutoencoderConfig
    images: ImageSpec

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "digit-pair"

    def make(self, ctx: Context) -> None:
        """Train it and write its errors."""
        data = only(self.images.split(self.seed), self.digits)
        model = train_autoencoder(data.train, self.model, ctx)
        off = errors(model, data.test, self.model.first)
        test = data.test
        keys = [f"{c}:{k}" for c, k in zip(test.labels_N, test.keys_N, strict=True)]
        kinds = {kind: off[kind].tolist() for kind in ("decoder", "bottom")}
        scores = {kind: dict(zip(keys, values, strict=True)) for kind, values in kinds.items()}
        write_text(ctx.work / "errors.json", json.dumps(scores))

    def read(self, folder: Path) -> dict[str, dict[str, float]]:
        """Return what was written."""
        data: dict[str, dict[str, float]] = json.loads(
            (folder / "errors.json").read_text(encoding="utf-8")
        )
        return data


@dataclass(frozen=True)
class Digits:
    """What all pairs cost.

    Attributes:
        pairs: Their names, in order.
        apart: Held-out divergence of pixels, nats an image, means over seeds.
        losses: Errors by pair and kind of score, on the digit beside, resampled.
        gone: The same on the digit that is routed away.
    """

    pairs: tuple[str, ...]
    apart: Mapping[str, float]
    losses: Mapping[tuple[str, ErrorKind], Levels]
    gone: Mapping[tuple[str, ErrorKind], Levels]

    def cost(self, pair: str) -> Array:
        """Return the rise of the decoder's error on the digit beside, relative to plain."""
        levels = self.losses[pair, "decoder"]
        rise: Array = levels.at(ROUTED) / levels.at(PLAIN) - 1
        return rise

    def split(self, pair: str) -> Array:
        """Return how much worse the half beside shows the routed digit, above the other's rise."""
        away, beside = self.gone[pair, "bottom"], self.losses[pair, "bottom"]
        rise: Array = (away.at(ROUTED) - away.at(PLAIN)) - (beside.at(ROUTED) - beside.at(PLAIN))
        return rise

    def rho(self) -> SeedEstimate:
        """Return the rank correlation of divergence and cost over pairs; n counts pairs."""
        cost = np.array([self.cost(pair)[0] for pair in self.pairs])
        return correlation(np.array([self.apart[pair] for pair in self.pairs]), cost)


def name_of(digits: tuple[int, int]) -> str:
    """Return the name of a pair."""
    return f"{digits[0]} / {digits[1]}"


def only(data: ImageSets, digits: tuple[int, int]) -> ImageSets:
    """Return the images of two digits."""

    def part(images: Images) -> Images:
        return images.take(np.flatnonzero(np.isin(images.labels_N, digits)))

    return ImageSets(part(data.train), part(data.dev), part(data.test))


def divergence(data: ImageSets, digits: tuple[int, int]) -> float:
    """Return how far apart pixels put two digits, nats an image.

    Ink of each pixel is a coin of its own, fitted on images to train on; the mean log odds of
    held-out images for the digit they show, mean of both, as for the words of texts.

    Args:
        data: Images to fit on and held-out ones.
        digits: The two digits.
    """

    def ink(images: Images, digit: int) -> NDArray[np.float64]:
        chosen = images.pixels_NHW[images.labels_N == digit]
        share_NP: NDArray[np.float64] = chosen.reshape(len(chosen), -1).astype(np.float64) / 255
        return share_NP

    coins = []
    for digit in digits:
        taught_NP = ink(data.train, digit)
        coins.append((taught_NP.sum(0) + 0.5) / (len(taught_NP) + 1))
    on_P = np.log(coins[0]) - np.log(coins[1])
    off_P = np.log1p(-coins[0]) - np.log1p(-coins[1])
    odds = []
    for digit, sign in zip(digits, (1, -1), strict=True):
        held_NP = ink(data.test, digit)
        odds.append(sign * float((held_NP @ on_P + (1 - held_NP) @ off_P).mean()))
    return sum(odds) / 2


def run_pairs(
    pairs: Sequence[tuple[int, int]],
    seeds: Sequence[int],
    model: SplitAutoencoderConfig,
    images: ImageSpec,
    runtime: Runtime,
    pool: Pool,
) -> Digits:
    """Train both conditions of every pair and seed, and put the scores together.

    Args:
        pairs: Digits, the one that is routed away first.
        seeds: Seeds of the images and of training.
        model: The autoencoder; its classes and whether it is routed are replaced.
        images: Where the digits come from.
        runtime: Where stages are kept.
        pool: Worker processes.
    """
    data = {seed: images.split(seed) for seed in seeds}
    jobs = {
        (name_of(pair), condition, seed): TrainPair(
            pair,
            seed,
            model.model_copy(
                update={"first": pair[:1], "routed": "both" if condition == ROUTED else "none"}
            ),
            images,
        )
        for pair in pairs
        for condition in (PLAIN, ROUTED)
        for seed in seeds
    }
    off = dict(zip(jobs, pool.map(runtime.run, list(jobs.values())), strict=True))
    kinds: tuple[ErrorKind, ...] = ("decoder", "bottom")

    def of(pair: tuple[int, int], kind: ErrorKind, digit: int) -> Levels:
        def units(condition: str, seed: int) -> dict[str, float]:
            scores = off[name_of(pair), condition, seed][kind]
            return {key: v for key, v in scores.items() if key.startswith(f"{digit}:")}

        return levels(
            {condition: {s: units(condition, s) for s in seeds} for condition in (PLAIN, ROUTED)},
            {},
        )

    return Digits(
        pairs=tuple(map(name_of, pairs)),
        apart={
            name_of(pair): sum(divergence(data[s], pair) for s in seeds) / len(seeds)
            for pair in pairs
        },
        losses={(name_of(pair), kind): of(pair, kind, pair[1]) for pair in pairs for kind in kinds},
        gone={(name_of(pair), kind): of(pair, kind, pair[0]) for pair in pairs for kind in kinds},
    )


def digits_table(digits: Digits) -> StudyTable:
    """Return divergence, cost and split of every pair, the farthest first."""
    rows = [row("all pairs", "rho (divergence, cost)", digits.rho())]
    for pair in sorted(digits.pairs, key=lambda pair: digits.apart[pair], reverse=True):
        levels = digits.losses[pair, "decoder"]
        rows += [
            StudyRow(
                condition=pair,
                metric="divergence, nats an image",
                value=digits.apart[pair],
                n=len(levels.by_seed),
            ),
            row(pair, "cost: error on the second, routed / plain - 1",
                estimate(digits.cost(pair), levels)),
            row(pair, "split: second half's error on the first, above plain and the second",
                estimate(digits.split(pair), levels)),
            row(pair, "error on the second, plain", estimate(levels.at(PLAIN), levels)),
        ]  # fmt: skip
    return StudyTable(
        title="Pairs of digits, the farthest first",
        note=(
            "A split autoencoder of two digits: the first passes the top half of the encoding, the "
            "second the bottom half; plain has the same penalties and no routing. Mean absolute "
            "error of pixels from -1 to 1."
        ),
        rows=tuple(rows),
    )


def digits_words(digits: Digits) -> str:
    """Return the pairs of digits in words, made of the numbers."""
    parts = []
    for pair in sorted(digits.pairs, key=lambda pair: digits.apart[pair], reverse=True):
        parts.append(f"{pair} {100 * digits.cost(pair)[0]:.0f} %")
    rho = digits.rho()
    return (
        "Splitting an autoencoder of two digits made it render the second worse by, the farthest "
        f"pair first, {', '.join(parts)}: rho {said(rho)} over {rho.n} pairs."
    )
