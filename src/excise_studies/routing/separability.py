"""Is a domain that is far from the rest cheaper to route away than one that is near?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.errors import nearest
from excise.core.stages import Runtime
from excise.domains.definitions import DEFINITIONS_FIT
from excise.evals.replicates import Contrast, Decision, SeedEstimate, correlation
from excise.evals.stats import Array, Estimate
from excise.methods.base import ApplyMethod, Method, Removal
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain
from excise.methods.pretraining.token_filter import TokenFilter
from excise.models.spec import Scratch
from excise.record import StudyRow, StudyTable
from excise.requests.recipe import EvalSpec
from excise.run.results import model_ref
from excise.run.stages import MakeModel, ScoreModel
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.base import row
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import said
from excise_studies.routing.domain_pairs import (
    FETCHED,
    PAIRS,
    DomainPair,
    Sizes,
    make_pair,
    pair_groups,
    pair_tokenizer,
)
from excise_studies.routing.setting import of_masking, routed
from excise_studies.vision.autoencoder import SplitAutoencoderConfig
from excise_studies.vision.digit_pairs import (
    DIGITS,
    IMAGES,
    MODEL,
    digits_table,
    digits_words,
    run_pairs,
)
from excise_studies.vision.images import ImageSpec

PLAIN, FILTERED, ROUTED = "plain", "filtered", "routed"

SETS = {"adjacent_test": "beside", "retain_test": "general", "test": "away"}
"""Scored sets: the domain beside the one cut off, general text, the one cut off."""

PairRunKey = tuple[str, int, str]
"""Pair, seed, condition."""


class Separability(Study):
    """Pairs of domains from far apart to alike; one is routed away, the other pays.

    Stated beforehand. Separability of a pair is how far apart unigrams of words put held-out
    passages of the two domains, in nats per word, mean over seeds. The cost is the rise of the loss
    on the domain beside the one cut off: routed, module deleted, minus plain, over the same random
    model, in nats per token. rho is the rank correlation of the two over pairs. Near domains cost
    more if the upper end of rho's 95 % interval is below minus `margin`; they do not if the lower
    end is above it. G, the same correlation of the cost beyond that of filtering, the costs on
    general text and of the domain cut off, and pairs of digits (3 against 8 among them) whose
    encodings are split, stand beside it and decide nothing.
    """

    question: ClassVar[str] = (
        "Does routing a domain away cost the domain beside it less, the farther apart their words "
        "put them?"
    )
    statistic: ClassVar[str] = (
        "rho = rank correlation over pairs between held-out unigram divergence (nats per word) and "
        "the rise of the loss on the domain beside the one routed away, routed minus plain; near "
        "domains cost more if the upper end of the 95 % interval is below minus the margin, not if "
        "the lower end is above it. Seeds are averaged; the interval is over pairs (Fisher's z)."
    )
    takes: ClassVar[str] = "10 minutes, 1 GiB; --full: 15 minutes, after fetching cyber and biology"
    quoted: ClassVar[tuple[str, ...]] = ("Pairs, the farthest first",)
    pictured: ClassVar[str] = "beside: filtered - plain"

    name: Literal["separability"] = "separability"
    """Name on the command line."""
    margin: float = 0.3
    """Rank correlation."""
    pairs: tuple[str, ...] = Field(default=tuple(PAIRS), min_length=2)
    """Pairs of domains; those of `--full` are fetched."""
    sizes: Sizes = Sizes()
    """How much text a pair has."""
    together: bool = False
    """Whether every text that is trained on holds a passage of each domain of a pair, with labels
    for its parts. Filtering then takes the tokens of the domain that is routed away, and texts may
    be twice as long."""
    vocabulary: int = Field(default=640, ge=300)
    """Tokens of each pair's tokenizer."""
    model: Scratch = Scratch(width=64, blocks=2)
    """Architecture."""
    pretrain: Pretrain = Pretrain(
        fit=FitConfig(**{**DEFINITIONS_FIT, "steps": 200, "warmup": 20, "lr": 4e-3}),
        max_length=48,
    )
    """How all conditions are trained."""
    routed: SerializeAsAny[Method] = routed()
    """The routed method, with right labels; its schedule is replaced."""

    digits: tuple[tuple[int, int], ...] = DIGITS
    """Pairs of digits whose encodings are split, the one that is routed away first; () for none."""
    images: ImageSpec = IMAGES
    """The digits."""
    autoencoder: SplitAutoencoderConfig = MODEL
    """The split autoencoder; its classes are replaced."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        """Refuse pairs that are not there, and pairs named twice."""
        known = {**PAIRS, **FETCHED}
        for name in self.pairs:
            if name not in known:
                raise ValueError(f"pairs: there is no pair '{name}'; {nearest(name, known)}")
        if len(set(self.pairs)) < len(self.pairs):
            raise ValueError("pairs: names a pair twice; give different ones")
        if any(
            first == second or not {first, second} <= set(range(10))
            for first, second in self.digits
        ):
            raise ValueError("digits: give pairs of different digits from 0 to 9")
        return self

    @classmethod
    def full(cls) -> Self:
        """Return the settings with fetched texts: security and viruses inside biology."""
        return cls(pairs=(*PAIRS, *FETCHED))

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train three conditions on every pair and seed, score them, correlate."""
        data = {
            (name, seed): make_pair(name, self.sizes, seed, together=self.together)
            for name in self.pairs
            for seed in self.seeds
        }
        removals = train(self, data, runtime, pool)
        losses = score(self, removals, data, runtime, pool)
        pairs = PairCosts(self, data, losses)
        drawings = None
        if len(self.digits) > 1:
            drawings = run_pairs(
                self.digits, self.seeds, self.autoencoder, self.images, runtime, pool
            )
        rho, beyond = pairs.rho(PLAIN), pairs.rho(FILTERED)
        decision = of_masking(decide(self, rho), self.routed)
        first = data[self.pairs[0], self.seeds[0]]
        return StudyResult(
            tables=(
                correlations(self, rho, beyond),
                costs(pairs),
                *([digits_table(drawings)] if drawings else []),
            ),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=" ".join(
                [
                    words(self, pairs, rho, beyond),
                    *([digits_words(drawings)] if drawings else []),
                    f"Decision: {decision.text}.",
                ]
            ),
            domain=first.domain,
            models=tuple(
                model_ref(f"{condition}, {name}, seed {seed}", removal.checkpoint)
                for (name, seed, condition), removal in removals.items()
            ),
            notes=(
                "the data described above are those of the first pair",
                "settings of models and of the routed method were chosen by hand on seed 0",
            ),
        )


def conditions(study: Separability) -> dict[str, Method]:
    """Return what is trained on every pair."""
    config = study.pretrain
    if study.together:
        config = config.model_copy(update={"max_length": 2 * config.max_length})
    filtered = TokenFilter(pretrain=config) if study.together else Filtering(pretrain=config)
    return {
        PLAIN: Plain(pretrain=config),
        FILTERED: filtered,
        ROUTED: study.routed.model_copy(update={"pretrain": config}),
    }


DomainPairs = Mapping[tuple[str, int], DomainPair]
"""Pairs by name and seed."""


def train(
    study: Separability, data: DomainPairs, runtime: Runtime, pool: Pool
) -> dict[PairRunKey, Removal]:
    """Train every condition of a pair from the same random model."""
    inits = [
        MakeModel(study.model, pair_tokenizer(pair, study.vocabulary), seed)
        for (_, seed), pair in data.items()
    ]
    starts = dict(zip(data, pool.map(runtime.run, inits), strict=True))
    jobs = {
        (name, seed, condition): ApplyMethod(method, starts[name, seed], pair.domain, seed)
        for (name, seed), pair in data.items()
        for condition, method in conditions(study).items()
    }
    return dict(zip(jobs, pool.map(runtime.run, list(jobs.values())), strict=True))


PairLosses = Mapping[tuple[str, str], Levels]
"""Losses of the conditions by pair and scored set, resampled."""


def score(
    study: Separability,
    removals: Mapping[PairRunKey, Removal],
    data: DomainPairs,
    runtime: Runtime,
    pool: Pool,
) -> PairLosses:
    """Return the losses on text by pair and set; all pairs take the same seeds in a sample."""
    spec = EvalSpec(max_rows=0, max_length=study.pretrain.max_length, samples=0)
    jobs = [
        ScoreModel(removal.checkpoint, data[name, seed].domain, spec)
        for (name, seed, condition), removal in removals.items()
    ]
    by_set: dict[tuple[str, str], dict[str, dict[int, dict[str, float]]]] = {}
    for (name, seed, condition), scored in zip(removals, pool.map(runtime.run, jobs), strict=True):
        for item in scored.items:
            if item.metric == "text_loss":
                by_condition = by_set.setdefault((name, item.set.split(".")[0]), {}).setdefault(
                    condition, {}
                )
                by_condition.setdefault(seed, {})[item.unit] = item.value
    groups: dict[str, dict[int, dict[str, str]]] = {}
    for (name, seed), pair in data.items():
        groups.setdefault(name, {})[seed] = pair_groups(pair)
    return {key: levels(by_condition, groups[key[0]]) for key, by_condition in by_set.items()}


@dataclass(frozen=True)
class PairCosts:
    """Pairs, how far apart they are, and what routing cost."""

    study: Separability
    data: DomainPairs
    losses: PairLosses

    def apart(self, name: str) -> float:
        """Return a pair's divergence, nats per word, mean over seeds."""
        seeds = self.study.seeds
        return sum(self.data[name, seed].nats for seed in seeds) / len(seeds)

    def accuracy(self, name: str) -> float:
        """Return how well words tell a pair apart, mean over seeds."""
        seeds = self.study.seeds
        return sum(self.data[name, seed].accuracy for seed in seeds) / len(seeds)

    def cost(
        self, name: str, against: str, on: str = "adjacent_test", condition: str = ROUTED
    ) -> Array:
        """Return the loss of a condition above another's, of the data and of the samples."""
        levels = self.losses[name, on]
        rise: Array = levels.at(condition) - levels.at(against)
        return rise

    def estimate(self, name: str, values: Array, on: str = "adjacent_test") -> Estimate:
        """Return the estimate of a pair's values."""
        return estimate(values, self.losses[name, on])

    def rho(self, against: str) -> SeedEstimate:
        """Return the rank correlation of divergence and cost over pairs; n counts pairs."""
        names = self.study.pairs
        cost = np.array([self.cost(name, against)[0] for name in names])
        far = np.array([self.apart(name) for name in names])
        return correlation(far, cost, error=self.study.error)


def decide(study: Separability, rho: Estimate) -> Decision:
    """Return what rho says under the margin."""
    asked = Contrast("rho", rho, (-study.margin,), study.error, "pairs")
    text = f"undecided: rho's interval holds -{study.margin:g}"
    if asked.below(-study.margin):
        text = "near domains cost more: rho is below minus the margin"
    elif asked.above(-study.margin):
        text = f"near domains do not cost more: rho is above -{study.margin:g}"
    return Decision(text, (asked,))


def correlations(study: Separability, rho: Estimate, beyond: Estimate) -> StudyTable:
    """Return rho and G."""
    rows = (
        row("all pairs", "rho (divergence, cost over plain)", rho),
        row("all pairs", "G (divergence, cost over filtered)", beyond),
    )
    return StudyTable(title="Separability and cost", note=study.statistic, rows=rows)


def costs(pairs: PairCosts) -> StudyTable:
    """Return separability, costs and removal of every pair, the farthest first."""
    rows: list[StudyRow] = []
    for name in sorted(pairs.study.pairs, key=pairs.apart, reverse=True):
        replicates = len(pairs.study.seeds)
        rows.append(
            StudyRow(
                condition=name,
                metric="divergence, nats a word",
                value=pairs.apart(name),
                n=replicates,
            )
        )
        rows.append(
            StudyRow(
                condition=name,
                metric="naive Bayes accuracy",
                value=pairs.accuracy(name),
                n=replicates,
            )
        )
        for on, kind in SETS.items():
            for condition, against in ((ROUTED, PLAIN), (FILTERED, PLAIN), (ROUTED, FILTERED)):
                value = pairs.estimate(name, pairs.cost(name, against, on, condition), on)
                rows.append(row(name, f"{kind}: {condition} - {against}", value))
            plain = pairs.losses[name, on]
            rows.append(row(name, f"{kind}: loss, plain", estimate(plain.at(PLAIN), plain)))
    return StudyTable(
        title="Pairs, the farthest first",
        note=(
            "Losses in nats a token. Beside: the domain next to the one cut off; general: public "
            "addresses; away: the domain cut off, where more is more removed. n counts units, of "
            "divergence and accuracy seeds."
        ),
        rows=tuple(rows),
    )


def words(study: Separability, pairs: PairCosts, rho: Estimate, beyond: Estimate) -> str:
    """Return the result in words, made of the numbers."""
    parts = []
    for name in sorted(study.pairs, key=pairs.apart, reverse=True):
        cost = pairs.estimate(name, pairs.cost(name, PLAIN))
        gone = pairs.cost(name, PLAIN, "test")[0]
        parts.append(
            f"{name} ({pairs.apart(name):.2f} nats a word) {said(cost)}, {gone:.2f} removed"
        )
    return (
        f"Over {len(study.seeds)} seed(s) of {len(study.pairs)} pairs, routing the first away cost "
        f"the second, in nats a token over plain training: {'; '.join(parts)}. rho was "
        f"{said(rho)}, of the cost beyond filtering's {said(beyond)}."
    )
