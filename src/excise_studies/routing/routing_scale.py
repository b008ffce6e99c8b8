"""Does the alignment tax of routing shrink with size, under one rule for hyper-parameters?

Shape legend: K seeds, S samples, W widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.stages import Runtime
from excise.domains.definitions import DEFINITIONS_FIT
from excise.evals.replicates import Contrast, Decision, SeedEstimate
from excise.evals.stats import Array
from excise.methods.base import ApplyMethod, Method, Removal
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain, cut_to
from excise.models.spec import Scratch
from excise.record import StudyRow, StudyTable
from excise.run.results import model_ref
from excise.run.stages import MakeModel
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import listed, said
from excise_studies.routing.domain_pairs import (
    PAIRS,
    DomainPair,
    Sizes,
    make_pair,
    pair_groups,
    pair_tokenizer,
)
from excise_studies.routing.setting import (
    Missed,
    Rest,
    compute_ratio,
    labelled,
    losses_by_unit,
    misses,
    of_masking,
    routed,
    shorter,
)

ROUTED, FILTERED = "routed", "filtered"

KEPT = ("retain_test", "adjacent_test")
"""Scored sets that are to stay: general text and the domain beside the one routed away."""

AWAY = "test"


class RoutingScale(Study):
    """Plain, filtered and routed models of several widths on the same texts.

    Stated beforehand. The compute ratio of a condition is the share of plain steps that reaches its
    loss on held-out text that is to stay (general text and the domain beside, a token of either
    counting the same), read off plain runs with shorter and longer schedules, between neighbours
    and beyond the last two on a straight line in the logarithm of steps, so that it has no upper
    end at 1. S is the slope of the least-squares line of the routed condition's ratio over the
    decimal logarithm of the parameters without embeddings. The tax shrinks with size if the lower
    end of S's 95 % interval is above `margin`, grows if the upper end is below minus it, and stays
    if the interval lies between. One rule sets everything: the learning rate is `pretrain`'s times
    (`model`'s width / width) to the power `power`; steps, batch and the module's share of a block
    stay. Nothing is retuned. What filtering with all labels costs stands beside it, and how much
    of what filtering removes is gone; neither is attacked here.
    """

    question: ClassVar[str] = (
        "Does the share of compute that routing costs shrink in larger models, if one rule sets "
        "the hyper-parameters of all sizes?"
    )
    statistic: ClassVar[str] = (
        "S = slope of the routed condition's compute ratio over the decimal logarithm of the "
        "parameters without embeddings, by least squares; the tax shrinks if the lower end of the "
        "95 % interval is above the margin, grows if the upper end is below minus it. Intervals "
        "over seeds and units, the same samples at all sizes."
    )
    takes: ClassVar[str] = "an hour and a half of one core, 1 GiB; resumes where it was stopped"
    quoted: ClassVar[tuple[str, ...]] = ("By size",)

    name: Literal["routing-scale"] = "routing-scale"
    """Name on the command line."""
    margin: float = Field(default=0.05, gt=0)
    """Compute ratio per tenfold parameters."""
    pair: str = "animals / plants"
    """The domain that is routed away and the one beside it; near ones, so that there is a tax."""
    sizes: Sizes = Sizes(units=1500, prose=1500)
    """How much text there is."""
    vocabulary: int = Field(default=640, ge=300)
    """Tokens of the tokenizer."""
    model: Scratch = Scratch(width=64, blocks=2)
    """Architecture; its width is where the rule starts."""
    pretrain: Pretrain = Pretrain(
        fit=FitConfig(**{**DEFINITIONS_FIT, "steps": 300, "warmup": 30, "lr": 4e-3}),
        max_length=48,
    )
    """How all conditions are trained."""
    routed: SerializeAsAny[Method] = routed()
    """The routed condition."""
    widths: tuple[int, ...] = Field(default=(32, 48, 64, 96, 128, 192), min_length=4)
    """Widths of the models, ascending."""
    power: float = 0.5
    """How fast the learning rate falls with width."""
    rate: float = Field(default=0.5, gt=0, le=1)
    """Share of what is to be forgotten that carries a label."""
    missed: Missed = "occurrences"
    """What labels miss."""
    rest: Rest = "unlabeled"
    """What methods assume of rows without a label."""
    shares: tuple[float, ...] = Field(default=(0.25, 0.5, 0.75, 1.0, 1.5), min_length=2)
    """Shares of the steps of plain runs for the compute ratio, 1 among them."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Draws of texts and weights."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        """Refuse widths and shares out of order, and no plain run of all steps."""
        for name, values in (("widths", self.widths), ("shares", self.shares)):
            if sorted(set(values)) != list(values):
                raise ValueError(f"{name}: give different ones in ascending order")
        if 1.0 not in self.shares:
            raise ValueError("shares: 1 is missing, the plain run that the others are held to")
        if self.pair not in PAIRS:
            raise ValueError(f"pair: there is no '{self.pair}'; one of: {', '.join(PAIRS)}")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train all sizes, read the taxes, fit the line."""
        data = {seed: make_pair(self.pair, self.sizes, seed) for seed in self.seeds}
        removals = train(self, data, runtime, pool)
        outcome = score(self, removals, data, runtime, pool)
        effect = outcome.slope(ROUTED)
        beside = {
            "of filtering": outcome.slope(FILTERED),
            "of routing beyond filtering": outcome.beyond(),
        }
        by_width = ", ".join(f"{w}: {said(outcome.ratio(w, ROUTED))}" for w in self.widths)
        gone = ", ".join(f"{w}: {outcome.removed(w).value:.2f}" for w in self.widths)
        decision = of_masking(
            decide(self, effect), self.routed, misses(self.rate, self.missed, self.rest)
        )
        paragraph = (
            f"Over {len(self.seeds)} seed(s) of {self.pair}, from {outcome.parameters[0]:,} to "
            f"{outcome.parameters[-1]:,} parameters without embeddings, the compute ratio of the "
            f"routed condition with {100 * self.rate:g} % of the labels was by width {by_width}; "
            f"of the loss that filtering with all labels adds to what is routed away it had {gone}."
            f" S was {said(effect)} per tenfold parameters ({listed(beside)}). Decision: "
            f"{decision.text}."
        )
        return StudyResult(
            tables=(_table(outcome),),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=paragraph,
            domain=data[self.seeds[0]].domain,
            models=tuple(
                model_ref(f"{condition}, width {width}, seed {seed}", removal.checkpoint)
                for (width, seed, condition), removal in removals.items()
            ),
            notes=(
                "the data described above are those of the first seed",
                "settings of models and of the routed method were chosen by hand on seed 0",
            ),
        )


ModelKey = tuple[int, int, str]
"""Width, seed, condition."""


def conditions(study: RoutingScale, width: int) -> dict[str, Method]:
    """Return what is trained at a width, the learning rate set by the rule."""
    fit = study.pretrain.fit
    lr = fit.lr * (study.model.width / width) ** study.power
    full = study.pretrain.model_copy(update={"fit": fit.model_copy(update={"lr": lr})})
    labels = misses(study.rate, study.missed, study.rest)
    methods: dict[str, Method] = {
        shorter(share): Plain(pretrain=cut_to(full, max(1, round(share * fit.steps)), "plain"))
        for share in study.shares
    }
    methods[FILTERED] = Filtering(pretrain=full)
    methods[ROUTED] = labelled(study.routed.model_copy(update={"pretrain": full}), labels)
    return methods


def train(
    study: RoutingScale, data: Mapping[int, DomainPair], runtime: Runtime, pool: Pool
) -> dict[ModelKey, Removal]:
    """Train the conditions of a width and seed from the same random model."""
    tokenizers = {seed: pair_tokenizer(pair, study.vocabulary) for seed, pair in data.items()}
    inits = {
        (width, seed): MakeModel(
            study.model.model_copy(update={"width": width}), tokenizers[seed], seed
        )
        for width in study.widths
        for seed in data
    }
    starts = dict(zip(inits, pool.map(runtime.run, list(inits.values())), strict=True))
    jobs = {
        (width, seed, condition): ApplyMethod(method, start, data[seed].domain, seed)
        for (width, seed), start in starts.items()
        for condition, method in conditions(study, width).items()
    }
    return dict(zip(jobs, pool.map(runtime.run, list(jobs.values())), strict=True))


@dataclass(frozen=True)
class ScaleOutcome:
    """Losses of all sizes and what follows from them.

    Attributes:
        shares: Shares of the steps of the plain runs.
        widths: Widths, ascending.
        parameters: Parameters without embeddings at each width.
        kept: Loss on text that is to stay, by width.
        away: Loss on the domain routed away, by width.
    """

    shares: tuple[float, ...]
    widths: tuple[int, ...]
    parameters: tuple[int, ...]
    kept: Mapping[int, Levels]
    away: Mapping[int, Levels]

    def ratios(self, width: int, condition: str) -> Array:
        """Return [1 + K + S] compute ratios at a width, without an upper end."""
        loss = self.kept[width]
        plain = np.stack([loss.at(shorter(share)) for share in self.shares])
        return compute_ratio(loss.at(condition), self.shares, plain, beyond=True)

    def ratio(self, width: int, condition: str) -> SeedEstimate:
        """Return a compute ratio with its interval."""
        return estimate(self.ratios(width, condition), self.kept[width])

    def slope(self, condition: str) -> SeedEstimate:
        """Return S: the slope of a condition's compute ratio over log10 of the parameters."""
        ratios = np.stack([self.ratios(width, condition) for width in self.widths])
        return estimate(slope(self.parameters, ratios), self.kept[self.widths[-1]])

    def beyond(self) -> SeedEstimate:
        """Return the slope of what routing costs beyond filtering with all labels."""
        apart = [self.ratios(w, ROUTED) - self.ratios(w, FILTERED) for w in self.widths]
        return estimate(slope(self.parameters, np.stack(apart)), self.kept[self.widths[-1]])

    def removed(self, width: int) -> SeedEstimate:
        """Return how much of the loss that filtering adds to what is routed away routing adds."""
        loss = self.away[width]
        plain = loss.at(shorter(1.0))
        most = loss.at(FILTERED) - plain
        share = (loss.at(ROUTED) - plain) / np.where(most > 0, most, np.nan)
        return estimate(share, loss)


def slope(parameters: Sequence[int], values_W: Array) -> Array:
    """Return the slope of least squares over log10 of the parameters.

    Args:
        parameters: By size.
        values_W: [W, ...] values by size.

    Returns:
        [...] slopes, per tenfold parameters.
    """
    x_W = np.log10(np.asarray(parameters, dtype=np.float64))
    x_W -= x_W.mean()
    fitted: Array = np.tensordot(x_W / np.square(x_W).sum(), values_W, axes=1)
    return fitted


def score(
    study: RoutingScale,
    removals: Mapping[ModelKey, Removal],
    data: Mapping[int, DomainPair],
    runtime: Runtime,
    pool: Pool,
) -> ScaleOutcome:
    """Score every model on what is to stay and on what is routed away."""
    groups = {seed: pair_groups(pair) for seed, pair in data.items()}
    domains = {seed: pair.domain for seed, pair in data.items()}
    at_width = {
        width: {(name, seed): r.checkpoint for (w, seed, name), r in removals.items() if w == width}
        for width in study.widths
    }
    length = study.pretrain.max_length

    def on(sets: Sequence[str]) -> dict[int, Levels]:
        return {
            width: levels(
                losses_by_unit(models, domains, sets, runtime, pool, max_length=length), groups
            )
            for width, models in at_width.items()
        }

    first = study.seeds[0]
    return ScaleOutcome(
        study.shares,
        study.widths,
        tuple(_sized(removals[width, first, FILTERED]) for width in study.widths),
        on(KEPT),
        on((AWAY,)),
    )


def _sized(removal: Removal) -> int:
    """Return the parameters of a model without its embedding and head."""
    model = removal.checkpoint.shapes
    outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in outer)


def decide(study: RoutingScale, effect: SeedEstimate) -> Decision:
    """Return what S says under the margin."""
    words = {
        "above": "the tax shrinks with size: S is above the margin",
        "below": "the tax grows with size: S is below minus the margin",
        "equal": f"the tax stays: S lies within {study.margin:g}",
        "undecided": f"undecided: S's interval crosses {study.margin:g}",
    }
    asked = Contrast("S", effect, (-study.margin, study.margin), study.error)
    return Decision(asked.say(words), (asked,))


def _table(outcome: ScaleOutcome) -> StudyTable:
    """Return ratios, losses and what is removed, by width."""
    rows: list[StudyRow] = []
    for width, parameters in zip(outcome.widths, outcome.parameters, strict=True):
        name, kept, away = f"width {width}", outcome.kept[width], outcome.away[width]
        rows.append(
            StudyRow(condition=name, metric="parameters without embeddings", value=parameters)
        )
        for condition in (ROUTED, FILTERED):
            ratio = outcome.ratio(width, condition)
            rows.append(row(name, f"compute ratio, {condition}", ratio))
            rise = estimate(kept.at(condition) - kept.at(shorter(1.0)), kept)
            rows.append(row(name, f"kept: {condition} - plain", rise))
        rows.append(row(name, "kept: loss, plain", estimate(kept.at(shorter(1.0)), kept)))
        rows.append(row(name, "away: loss, plain", estimate(away.at(shorter(1.0)), away)))
        rows.append(row(name, "away: share of filtering's rise, routed", outcome.removed(width)))
    return StudyTable(
        title="By size",
        note=(
            "Compute ratio: the share of plain training's steps that reaches the condition's loss "
            "on text that is to stay; 1 is no tax, and above 1 it is better than plain training. "
            "Losses in nats a token; away is the domain routed away, before any attack."
        ),
        rows=tuple(rows),
    )
