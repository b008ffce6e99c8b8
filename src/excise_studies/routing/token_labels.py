"""Documents filtered, tokens filtered, routed or pushed: which slows plain training most?

The measure is that of token filtering (arXiv:2601.21571): how many times the compute of plain
training a method spends for the loss on what is to be forgotten that it ends with.

Shape legend: S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, model_validator

from excise.core.context import Context
from excise.core.errors import nearest
from excise.core.stages import Runtime
from excise.data.labels import Confidence, LabelNoise, forget_score
from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, Facts
from excise.evals.replicates import Contrast, Decision, MarginVerdict, contrasts
from excise.evals.stats import Array, Estimate
from excise.methods import Filtering, GradDiffPretrain, TokenFilter
from excise.methods.base import Method
from excise.methods.pretraining.pretrain import Pretrain, labelled_corpus
from excise.record import StudyRow, StudyTable
from excise.run.results import model_ref
from excise.run.study import Study, StudyResult
from excise.train.fit import FitConfig
from excise.train.pool import Pool
from excise_studies.base import Replicate, row
from excise_studies.levels import Levels, estimate, levels
from excise_studies.recovery import said
from excise_studies.routing.setting import (
    compute_ratio,
    facts_setting,
    groups_of,
    make_setting,
    plain_curve,
    routed,
    shorter,
    text_losses,
    train_conditions,
)
from excise_studies.setting import SIZE, ExperimentSetting, checkpoints, reference_models

Noise = Literal["words", "spans", "false words"]
"""What labels get wrong: words or spans that are missed, words that are labelled and teach no
capability."""

FIELDS: Final[Mapping[Noise, str]] = {
    "words": "missed_words", "spans": "missed_spans", "false words": "false_words",
}  # fmt: skip
"""The rate of `LabelNoise` behind each."""

THRESHOLDS: Final = ("filter_above", "drop_above", "push_above")
"""What methods call the probability above which they act."""

TOKENS, DOCUMENTS = "token_removal", "filtering"


def mixed_facts() -> ExperimentSetting:
    """Return facts in texts of two, of either kind, a quarter of them to be forgotten.

    Each is told in five texts, so that filtering documents leaves most facts that stay in some.
    """
    fit = FitConfig(**{**FACTS_FIT, "steps": 200, "lr": 4e-3, "batch_size": 64})
    domain = Facts(
        subjects=40, relations=4, objects=32, wordings=6, forget_share=0.25, facts_per_text=2
    )
    return facts_setting(
        domain=domain,
        pretrain=Pretrain(fit=fit, max_length=domain.facts_per_text * FACTS_MAX_LENGTH),
    )


def contestants() -> dict[str, Method]:
    """Return the methods that are compared, by name."""
    return {
        DOCUMENTS: Filtering(),
        "token_masking": TokenFilter(how="mask"),
        TOKENS: TokenFilter(how="remove"),
        "sgtm": routed(),
        "grad_diff_pretrain": GradDiffPretrain(),
    }


@dataclass(frozen=True)
class TokenLabelSetting:
    """One setting of the labels.

    Attributes:
        rate: Share of the words or spans that are labelled wrongly.
        noise: Which; empty at a rate of 0.
        above: Threshold at which methods act on the labeller's confidence; None where the labeller
            gives none.
    """

    rate: float = 0.0
    noise: Noise | Literal[""] = ""
    above: float | None = None

    def __str__(self) -> str:
        """Return its name."""
        wrong = {"words": "words missed", "spans": "spans missed", "": "labels right"}
        name = wrong.get(self.noise, self.noise)
        name = f"{100 * self.rate:g} % {name}" if self.noise else name
        return name if self.above is None else f"{name}, above {self.above:g}"

    def labels(self, confidence: Confidence) -> LabelNoise | None:
        """Return the labels of this setting."""
        given = None if self.above is None else confidence
        if not self.noise:
            return None
        return LabelNoise.model_validate({FIELDS[self.noise]: self.rate, "confidence": given})

    def method(self, method: Method) -> Method | None:
        """Return a method at this setting's threshold; None where it has none to move."""
        names = [name for name in THRESHOLDS if name in type(method).model_fields]
        if self.above is None:
            return method
        return method.model_copy(update={names[0]: self.above}) if names else None


RIGHT = TokenLabelSetting()
"""Every token has its true label."""


class TokenLabels(Study):
    """Document filtering, token filtering, routing and pushing per token, by errors of the labels.

    Stated beforehand. The *slowdown* of a condition is its compute over that at which plain
    training, read off runs with `shares` of the steps from the same random model, reaches its loss
    on the held-out test set; where no plain run has a loss as high it is at least one over the
    least share, and is called a bound. A condition is *compared* only if it keeps retain: the
    upper end of the 95 % interval of its loss on `retain_test`, minus that of plain training with
    all steps, is at most `retain_margin` nats a token; otherwise it is named as invalid. D of a
    method is log2 of the slowdown of `preset` minus log2 of its own, mean over `missed` at the
    share `decide_at` of errors. The preset slows more if the lower end of D's 95 % interval is
    above `margin` (1: twice the compute), less if the upper end is below minus it, alike if it lies
    between. A bound decides nothing against itself: D is undecided where both are bounds, where
    only the preset's is and D is not above the margin, or only the other's and D is not below. The
    study is invalid if log2 of the oracle's slowdown is not above `margin`. Right labels, invented
    words and thresholds are shown and decide nothing.
    """

    question: ClassVar[str] = (
        "Where a text teaches both, do labels of tokens slow the learning of what is to be "
        "forgotten more than labels of documents, at the same loss on what is to stay, and when "
        "labels are wrong?"
    )
    statistic: ClassVar[str] = (
        "D = log2 slowdown of `preset` minus that of a method (compute over the compute at which "
        "plain training reaches its loss on the held-out test set), mean over ways to miss at the "
        "share `decide_at` of errors, among conditions whose retain loss is within `retain_margin` "
        "nats of plain training; the preset slows more if the lower end of the 95 % interval is "
        "above the margin. Intervals over seeds and units."
    )
    takes: ClassVar[str] = "20 to 25 minutes, 1 GiB; resumes where it was stopped"

    name: Literal["token-labels"] = "token-labels"
    """Name on the command line."""
    margin: float = 1.0
    """Doublings of compute."""
    seeds: tuple[int, ...] = Field(default=(2, 3, 4), min_length=1)
    """Seeds that are reported; 1 sized the data."""
    experiment: ExperimentSetting = Field(default_factory=mixed_facts)
    """Data, models. Rows should have spans, or be put into texts that have."""
    methods: dict[str, SerializeAsAny[Method]] = Field(default_factory=contestants)
    """Methods by name."""
    arms: tuple[str, ...] = ()
    """Methods to run, by name; empty for all."""
    rates: tuple[float, ...] = Field(default=(0.0, 0.2, 0.4, 0.6), min_length=1)
    """Shares of errors."""
    noise: tuple[Noise, ...] = Field(default=("words", "spans", "false words"), min_length=1)
    """Kinds of errors."""
    missed: tuple[Noise, ...] = Field(default=("words", "spans"), min_length=1)
    """Kinds over which D is a mean."""
    decide_at: float = 0.4
    """Share of errors at which D is read, and thresholds are moved."""
    confidence: Confidence = Confidence(concentration=1.0)
    """What the labeller says of its labels where thresholds are moved."""
    thresholds: tuple[float, ...] = (0.2,)
    """Probabilities above which methods act, towards recall; empty for none."""
    preset: str = TOKENS
    """The method that others are held against."""
    retain_margin: float = Field(default=0.1, gt=0)
    """Nats a token by which the loss on retain may be above that of plain training."""
    shares: tuple[float, ...] = Field(default=(0.05, 0.1, 0.2, 0.4, 0.7, 1.0), min_length=2)
    """Shares of the steps of plain runs, ascending, all steps the last."""

    @model_validator(mode="after")
    def _decides(self) -> Self:
        """Refuse to decide about what is not run."""
        for field, names in (("arms", self.arms), ("preset", (self.preset,))):
            for name in names:
                if name not in self.methods:
                    raise ValueError(
                        f"{field}: there is no method '{name}'; {nearest(name, self.methods)}"
                    )
        if self.arms and self.preset not in self.arms:
            raise ValueError(f"preset: '{self.preset}' is not among 'arms'; name it there")
        if self.decide_at not in self.rates or not 0 < self.decide_at <= 1:
            raise ValueError(f"decide_at: {self.decide_at:g} is no error of 'rates'; name one")
        if lacking := set(self.missed) - set(self.noise):
            raise ValueError(f"missed: '{min(lacking)}' is not among 'noise'; name it there")
        if list(self.shares) != sorted(set(self.shares)) or self.shares[-1] != 1:
            raise ValueError("shares: give different ones in ascending order, 1 the last")
        return self

    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Train every method under every setting of the labels, score, read slowdowns, compare."""
        setting = make_setting(self.experiment, self.seeds, runtime, pool)
        wanted, empty = {}, []
        for labels in label_settings(self):
            given = labels.labels(self.confidence)
            for name, method in methods_of(self).items():
                ready = labels.method(method)
                condition = condition_name(name, labels)
                if ready is None:
                    continue
                if condition not in deciding(self, name) and drops_all(
                    ready, given, setting.replicates
                ):
                    empty.append(condition)
                else:
                    wanted[condition] = (ready, given)
        models = checkpoints(train_conditions(wanted, setting, runtime, pool))
        curve = plain_curve(setting, self.shares, runtime, pool)
        scored = {**reference_models(setting.replicates, self.seeds), **models, **curve}
        groups = groups_of(setting.replicates)
        outcome = Slowdowns(
            levels(text_losses(scored, setting, runtime, pool, "test"), groups),
            levels(text_losses(scored, setting, runtime, pool, "retain_test"), groups),
            self.shares,
        )
        found = {name: difference(self, outcome, name) for name in others(self)}
        decision = decide(self, outcome, found)
        named = (model_ref(f"{name}, seed {seed}", model) for (name, seed), model in models.items())
        return StudyResult(
            tables=(
                difference_table(self, outcome, found),
                slowdown_table(self, outcome),
                curve_table(outcome),
            ),
            decision=decision.text,
            contrasts=decision.contrasts,
            paragraph=" ".join([*words(self, outcome), f"Decision: {decision.text}."]),
            domain=setting.replicates[self.seeds[0]].domain,
            models=(*(ref for s in self.seeds for ref in setting.replicates[s].refs()), *named),
            notes=(
                "data were sized by hand on seed 1, so that filtering documents keeps retain; "
                "methods are as in partial-labels or as their defaults, untuned",
                *(f"{name} would leave no row to train on, and was not run" for name in empty),
                SIZE,
            ),
        )


def label_settings(study: TokenLabels) -> tuple[TokenLabelSetting, ...]:
    """Return all settings of the labels; at a rate of 0 nothing is wrong, so that is one."""
    grid = [
        TokenLabelSetting(rate, kind) if rate else RIGHT
        for rate in study.rates
        for kind in study.noise
    ]
    moved = [
        TokenLabelSetting(study.decide_at, kind, above)
        for kind in study.missed
        for above in study.thresholds
    ]
    return tuple(dict.fromkeys((*grid, *moved)))


def drops_all(
    method: Method, labels: LabelNoise | None, replicates: Mapping[int, Replicate]
) -> bool:
    """Return whether filtering leaves no document in some seed: each has a part that is taken."""
    if not isinstance(method, Filtering):
        return False
    return any(
        all(
            forget_score(row) > method.drop_above
            for row in labelled_corpus(replicate.domain, labels, Context(Path(), seed=seed))
        )
        for seed, replicate in replicates.items()
    )


def methods_of(study: TokenLabels) -> dict[str, Method]:
    """Return the methods that run, by name."""
    return {name: study.methods[name] for name in study.arms or study.methods}


def others(study: TokenLabels) -> list[str]:
    """Return the methods that the preset is held against."""
    return [name for name in methods_of(study) if name != study.preset]


def condition_name(name: str, labels: TokenLabelSetting) -> str:
    """Return the name of a method in a setting of the labels."""
    return f"{name} [{labels}]"


def deciding(study: TokenLabels, name: str) -> list[str]:
    """Return the conditions of a method over which D is a mean."""
    return [condition_name(name, TokenLabelSetting(study.decide_at, k)) for k in study.missed]


@dataclass(frozen=True)
class Slowdowns:
    """All conditions, reference models and plain runs, scored.

    Attributes:
        forget: Loss on the held-out test set, nats a token.
        retain: Loss on `retain_test`, for the same samples of seeds.
        shares: Shares of the steps of the plain runs.
    """

    forget: Levels
    retain: Levels
    shares: tuple[float, ...]

    def slowdown(self, condition: str) -> Array:
        """Return [1 + K + S] slowdowns; see `compute_ratio` for what lies between plain runs."""
        plain = np.stack([self.forget.at(shorter(share)) for share in self.shares])
        return 1 / compute_ratio(self.forget.at(condition), self.shares, plain)

    def bounded(self, condition: str) -> bool:
        """Return whether a condition's loss is above that of the shortest plain run."""
        return bool(self.forget.at(condition)[0] >= self.forget.at(shorter(self.shares[0]))[0])

    def rise(self, condition: str) -> Array:
        """Return [1 + K + S] losses on retain above that of plain training with all steps."""
        rise: Array = self.retain.at(condition) - self.retain.at(shorter(1.0))
        return rise

    def log2(self, condition: str) -> Estimate:
        """Return log2 of a slowdown."""
        return estimate(np.log2(self.slowdown(condition)), self.forget)


Fit = Literal["kept", "lost", "undecided"]
"""Whether retain was kept within the margin."""


def keeps(study: TokenLabels, outcome: Slowdowns, conditions: Sequence[str]) -> Fit:
    """Return whether conditions keep retain, by the interval of the worst of them."""
    rises = [estimate(outcome.rise(c), outcome.retain) for c in conditions]
    if any(rise.low > study.retain_margin for rise in rises):
        return "lost"
    return "kept" if all(rise.high <= study.retain_margin for rise in rises) else "undecided"


@dataclass(frozen=True)
class Difference:
    """How much more the preset slows than a method.

    Attributes:
        value: D.
        fits: Whether the method keeps retain.
        bounds: Whether the slowdown of the preset and that of the method are bounds.
    """

    value: Estimate
    fits: Fit
    bounds: tuple[bool, bool]


def difference(study: TokenLabels, outcome: Slowdowns, name: str) -> Difference:
    """Return D of a method."""
    both = deciding(study, study.preset), deciding(study, name)
    logs = [np.mean([np.log2(outcome.slowdown(c)) for c in each], axis=0) for each in both]
    bounds = [any(outcome.bounded(c) for c in each) for each in both]
    return Difference(
        estimate(logs[0] - logs[1], outcome.forget),
        keeps(study, outcome, both[1]),
        (bounds[0], bounds[1]),
    )


def compared(found: Difference, asked: Contrast) -> MarginVerdict | Literal["bounds"]:
    """Return what D says under the margin, bounds regarded."""
    mine, other = found.bounds
    open_ended = (mine and asked.verdict != "above") or (other and asked.verdict != "below")
    return "bounds" if open_ended and not asked.open else asked.verdict


def decide(study: TokenLabels, outcome: Slowdowns, found: Mapping[str, Difference]) -> Decision:
    """Return whom the preset slows more than, less than, alike, and what is not compared."""
    oracle = outcome.log2("oracle")
    if not oracle.low > study.margin:
        return Decision(
            f"invalid: the oracle's slowdown is {2**oracle.value:.1f}, not clearly above "
            f"{2**study.margin:g}, so that there is little to slow"
        )
    own = keeps(study, outcome, deciding(study, study.preset))
    if own != "kept":
        return Decision(f"invalid: {study.preset} {_unkept(study, own)}")
    phrases = {
        "above": f"{study.preset} slows more than {{}}",
        "below": f"{study.preset} slows less than {{}}",
        "equal": f"{study.preset} slows alike within {2**study.margin:g} times: {{}}",
        "undecided": "undecided against {}",
        "bounds": "undecided against {}, where slowdowns are bounds",
    }
    groups: dict[str, list[str]] = {phrase: [] for phrase in phrases.values()}
    values = {f"D against {name}": each.value for name, each in found.items()}
    asked = contrasts(values, (-study.margin, study.margin), study.error)
    for (name, each), contrast in zip(found.items(), asked.values(), strict=True):
        phrase = phrases[compared(each, contrast)]
        if each.fits != "kept":
            phrase = f"{{}} invalid and not compared: {_unkept(study, each.fits)}"
        groups.setdefault(phrase, []).append(name)
    parts = [phrase.format(", ".join(names)) for phrase, names in groups.items() if names]
    text = "; ".join(parts) or f"undecided: nothing was compared with {study.preset}"
    both = zip(found.values(), asked.values(), strict=True)
    return Decision(text, tuple(contrast for each, contrast in both if each.fits == "kept"))


def _unkept(study: TokenLabels, fits: Fit) -> str:
    """Return in words why a condition is not compared."""
    if fits == "lost":
        return f"raises the loss on retain by more than {study.retain_margin:g} nats a token"
    return f"is not shown to keep the loss on retain within {study.retain_margin:g} nats a token"


def words(study: TokenLabels, outcome: Slowdowns) -> list[str]:
    """Return the result in sentences, made of the numbers."""
    least = 1 / outcome.shares[0]
    sentences = [
        f"Over {len(study.seeds)} seed(s) the oracle's slowdown was "
        f"{_times(outcome, 'oracle')}; what plain training with {100 * outcome.shares[0]:g} % of "
        f"the steps knows less of is at least {least:.0f}."
    ]
    for labels in label_settings(study):
        if labels.above is None and labels.rate in (0, study.decide_at):
            named = ((name, condition_name(name, labels)) for name in methods_of(study))
            names = [pair for pair in named if pair[1] in outcome.forget.conditions]
            parts = [
                f"{name} {_times(outcome, key)} (retain {outcome.rise(key)[0]:+.2f} nats)"
                for name, key in names
            ]
            sentences.append(f"With {labels}: {', '.join(parts)}.")
    return sentences


def _times(outcome: Slowdowns, condition: str) -> str:
    """Return a slowdown in words."""
    value = said(estimate(outcome.slowdown(condition), outcome.forget))
    return f"at least {value}" if outcome.bounded(condition) else value


def difference_table(
    study: TokenLabels, outcome: Slowdowns, found: Mapping[str, Difference]
) -> StudyTable:
    """Return D of every method, the oracle's slowdown beside it."""
    rows = [row("oracle", "log2 slowdown", outcome.log2("oracle"))]
    rows += [row(name, "D, log2", each.value) for name, each in found.items()]
    return StudyTable(
        title=f"Against {study.preset} at {100 * study.decide_at:g} % errors",
        note=study.statistic,
        rows=tuple(rows),
    )


def slowdown_table(study: TokenLabels, outcome: Slowdowns) -> StudyTable:
    """Return slowdown, loss and change of retain of every condition that ran, by labels."""
    rows: list[StudyRow] = []
    for name in methods_of(study):
        for labels in label_settings(study):
            key = condition_name(name, labels)
            if key not in outcome.forget.conditions:
                continue
            least = ", at least" if outcome.bounded(key) else ""
            rise = estimate(outcome.rise(key), outcome.retain)
            fits = {"kept": "", "lost": ", lost", "undecided": ", undecided"}
            kept = fits[keeps(study, outcome, [key])]
            rows.append(
                row(
                    name,
                    f"slowdown{least}, {labels}",
                    estimate(outcome.slowdown(key), outcome.forget),
                )
            )
            rows.append(row(name, f"retain rise{kept}, {labels}", rise))
            rows.append(
                row(
                    name, f"forget loss, {labels}", estimate(outcome.forget.at(key), outcome.forget)
                )
            )
    return StudyTable(
        title="Slowdown by labels",
        note=(
            "Slowdown: the steps of a method over those at which plain training reaches its loss "
            "on the held-out test set; `at least` where no plain run has a loss as high. Retain "
            "rise: loss on `retain_test` above plain training with all steps, nats a token; `lost` "
            "and `undecided` where that is beyond, or not shown to be within, "
            f"{study.retain_margin:g}. `above`: the labeller gives confidences, and methods act "
            "above this probability."
        ),
        rows=tuple(rows),
    )


def curve_table(outcome: Slowdowns) -> StudyTable:
    """Return the losses of plain runs and reference models."""
    rows: list[StudyRow] = []
    for name in ("original", "oracle", *(shorter(share) for share in outcome.shares)):
        rows.append(row(name, "forget loss", estimate(outcome.forget.at(name), outcome.forget)))
        rows.append(row(name, "retain loss", estimate(outcome.retain.at(name), outcome.retain)))
    return StudyTable(
        title="Loss and compute of plain training",
        note="Nats a token of the held-out test set and of `retain_test`.",
        rows=tuple(rows),
    )
