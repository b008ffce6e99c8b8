"""`measure`: one value per row with unit, direction, chance and a versioned definition.

All metrics run in eval mode without gradients, on the model's own device and in its dtype, and
leave the model as it was. Memory: see `evals/tokens.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from excise.core.errors import NotFinite, UserError, nearest
from excise.data.domain import Domain, Row, Rows
from excise.data.rows import METRICS
from excise.data.stream import encode
from excise.data.subsample import subsample
from excise.evals import generate, likelihood, multiple_choice, refusal, rouge
from excise.evals.stats import bootstrap_mean
from excise.evals.tokens import answer_examples
from excise.models.limits import readable
from excise.record import Item, Score, ScoreDirection

DEFINITIONS: dict[str, str] = {
    **likelihood.DEFINITIONS,
    **multiple_choice.DEFINITION,
    "generate": generate.DEFINITION,
    "refusal": refusal.DEFINITION,
    **{name: rule.definition for name, rule in rouge.RULES.items()},
}
"""Every metric `measure` knows, with its versioned definition."""

LOWER = ("text_loss", "refusal", "truth_ratio", "truth_ratio_geometric")
"""Metrics whose lower value means more knowledge."""


@dataclass(frozen=True)
class ItemScores:
    """The score of every row.

    Attributes:
        metric: Name of the metric.
        definition: Versioned definition.
        direction: Which way is more knowledge.
        chance: Score of a model that knows nothing, where that is known.
        items: (unit, value) of every row, in the order of the rows.
    """

    metric: str
    definition: str
    direction: ScoreDirection
    chance: float | None
    items: tuple[tuple[str, float], ...]

    @property
    def broken(self) -> int:
        """Number of rows whose score is NaN or infinite: there the model gave no numbers."""
        return sum(not math.isfinite(value) for _, value in self.items)

    def checked(self, model: str = "the model") -> ItemScores:
        """Return the scores, if all of them are numbers.

        Args:
            model: What the model is called in the error.

        Raises:
            NotFinite: If one is NaN or infinite.
        """
        if self.broken:
            raise NotFinite(model, self.metric, self.broken, len(self.items))
        return self

    def by_unit(self) -> dict[str, float]:
        """Return the mean over the rows (paraphrases) of each unit, in order of appearance."""
        values: dict[str, list[float]] = {}
        for unit, value in self.items:
            values.setdefault(unit, []).append(value)
        return {unit: sum(v) / len(v) for unit, v in values.items()}

    @property
    def mean(self) -> float:
        """Mean over units, every unit with the same weight.

        A unit without numbers stands at chance where that is known, since nothing is told apart
        there. Whoever draws a conclusion asks `checked` first.
        """
        guess = math.nan if self.chance is None else self.chance
        values = [v if math.isfinite(v) else guess for v in self.by_unit().values()]
        return sum(values) / len(values)


def direction_of(metric: str) -> ScoreDirection:
    """Return which way of a metric is more knowledge."""
    return "lower" if metric in LOWER else "higher"


def measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    metric: str,
    *,
    max_length: int = 128,
    batch_size: int = 64,
    device: torch.device | None = None,
    padding_side: Literal["right", "left"] = "right",
    chance: float | None = None,
) -> ItemScores:
    """Score every row with one metric.

    Args:
        model: A causal model; its mode is restored.
        tokenizer: Its tokenizer.
        rows: Rows of a shape the metric can read.
        metric: A name from `DEFINITIONS`.
        max_length: Tokens of a row at most; a model of fewer positions reads as many as it has.
        batch_size: Sequences per forward at most.
        device: Where the inputs go; None takes the model's.
        padding_side: Side of the padding; scores do not depend on it (`generate` and `refusal`
            always pad on the left).
        chance: Score of a model that knows nothing; None asks the rows.

    Returns:
        One value per row. Where the model gives no numbers it is NaN: call `checked` before the
        mean is used.

    Raises:
        UserError: If there are no rows, the metric is unknown, or it cannot read a row.
    """
    by_metric = measure_all(
        model,
        tokenizer,
        rows,
        (metric,),
        max_length=max_length,
        batch_size=batch_size,
        device=device,
        padding_side=padding_side,
        chance=chance,
    )
    return by_metric[metric]


def measure_all(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    metrics: Sequence[str],
    *,
    max_length: int = 128,
    batch_size: int = 64,
    device: torch.device | None = None,
    padding_side: Literal["right", "left"] = "right",
    chance: float | None = None,
) -> dict[str, ItemScores]:
    """Score every row with several metrics, sharing their forwards.

    Args:
        model: As `measure` takes it, like all that is not named here.
        tokenizer: Its tokenizer.
        rows: Rows of a shape that every metric can read.
        metrics: Names from `DEFINITIONS`.
        max_length: Tokens of a row at most.
        batch_size: Sequences per forward at most.
        device: Where the inputs go.
        padding_side: Side of the padding.
        chance: Score of a model that knows nothing.

    Returns:
        One value per row, by metric.

    Raises:
        UserError: If there are no rows, a metric is unknown, or it cannot read a row.
    """
    for metric in metrics:
        if metric not in DEFINITIONS:
            raise UserError(f"no metric is called '{metric}'; {nearest(metric, DEFINITIONS)}")
    if not rows:
        raise UserError(f"there is no row to score with {metrics[0]}; check the split")
    settings = {
        "max_length": readable(model, max_length),
        "batch_size": batch_size,
        "device": device,
    }
    standardize = any(metric in likelihood.STANDARDIZED for metric in metrics)
    cache: dict[str, Any] = {}
    out = {}
    for metric in metrics:
        values = _values(model, tokenizer, rows, metric, settings, padding_side, standardize, cache)
        out[metric] = ItemScores(
            metric=metric,
            definition=DEFINITIONS[metric],
            direction=direction_of(metric),
            chance=chance_of(rows, metric) if chance is None else chance,
            items=tuple((row.unit, v) for row, v in zip(rows, values, strict=True)),
        )
    return out


def _values(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    metric: str,
    settings: Mapping[str, Any],
    padding_side: str,
    standardize: bool,
    cache: dict[str, Any],
) -> list[float]:
    """Return the metric's value for every row; `cache` holds what metrics share."""
    if metric == "generate":
        return generate.generate(model, tokenizer, rows, **settings)
    if metric == "refusal":
        outcomes = refusal.refusal(model, tokenizer, rows, **settings)
        return [math.nan if o == "broken" else float(o == "refused") for o in outcomes]
    if metric in rouge.RULES:
        return rouge.rouge_scores(model, tokenizer, rows, rouge.RULES[metric], **settings)
    if metric.startswith("multiple_choice") or metric in likelihood.OF_OPTIONS:
        if "choice" not in cache:
            cache["choice"] = multiple_choice.choice_answers(
                model, tokenizer, rows, padding_side=padding_side, **settings
            )
        if metric.startswith("multiple_choice"):
            totals = [[choice.total for choice in choices] for choices in cache["choice"]]
            return multiple_choice.pick(rows, totals, metric)
        score = likelihood.OF_OPTIONS[metric]
        return [
            score([choice.mean for choice in choices], row.answer)
            for row, choices in zip(rows, cache["choice"], strict=True)
        ]
    if "token" not in cache:
        rest = {k: v for k, v in settings.items() if k != "max_length"}
        examples = encode(rows, tokenizer, max_length=settings["max_length"], only_spans=True)
        cache["token"] = answer_examples(
            model,
            tokenizer,
            examples,
            padding_side=padding_side,
            standardize=standardize,
            **rest,
        )
    return [likelihood.OF_TOKENS[metric](answer) for answer in cache["token"]]


def chance_of(
    rows: Sequence[Row], metric: str, *, vocabulary: int = 0, closed: bool = True
) -> float | None:
    """Return the score of a model that knows nothing, where it is known.

    Multiple choice: one over the number of choices, averaged over rows. Exact match: one over the
    number of distinct completions. Token loss: that of a uniform guess, log(vocabulary) in nats.

    Args:
        rows: The rows that are scored, or better all rows of their kind.
        metric: Name of the metric.
        vocabulary: Number of tokens of the model; 0 for unknown.
        closed: Whether who guesses at a completion knows which ones occur; who does not scores 0.

    Returns:
        The score; None for any other metric, and where rows or vocabulary do not tell it.
    """
    if metric.startswith("multiple_choice"):
        shares = [1 / len(row.choices) for row in rows if row.choices]
        return sum(shares) / len(shares) if shares else None
    if metric == "exact_match":
        texts = {row.completion.strip() for row in rows if row.kind == "completion"}
        guess = 1 / len(texts) if len(texts) > 1 else None
        return guess if closed else 0.0
    return math.log(vocabulary) if metric == "text_loss" and vocabulary else None


def score_of(
    items: ItemScores,
    *,
    model: str,
    on: str,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Score:
    """Return the record's score, with a 95 % interval bootstrapped by unit.

    Args:
        items: What was measured.
        model: Name of the model.
        on: Name of the set.
        groups: Group of each unit, where groups and not units are independent.
        seed: Seed of the bootstrap.
    """
    units = items.by_unit()
    mean = bootstrap_mean(units, groups=groups, seed=seed)
    return Score(
        model=model,
        set=on,
        metric=items.metric,
        value=mean.value,
        low=mean.low,
        high=mean.high,
        n=len(units),
        direction=items.direction,
        chance=items.chance,
        definition=items.definition,
    )


def fitting(metrics: Sequence[str], rows: Rows) -> tuple[str, ...]:
    """Return the metrics that can read all rows, or `text_loss`, which reads any."""
    choices = all(row.kind == "choice" for row in rows)
    answers = all(row.kind != "text" for row in rows)
    completions = all(row.kind == "completion" for row in rows)
    readable = [
        m
        for m in metrics
        if (choices or not (m.startswith("multiple_choice") or m in likelihood.OF_OPTIONS))
        and (answers or m not in ("generate", "refusal"))
        and (completions or m not in rouge.RULES)
    ]
    return tuple(readable) or ("text_loss",)


def _metrics_beside(rows: Rows, others: Rows, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Return the metrics of `others`, or those of the rows' own shape where it is another."""
    kinds = {row.kind for row in rows}
    if len(kinds) != 1 or kinds == {row.kind for row in others}:
        return metrics
    return METRICS[kinds.pop()]


def evaluate(
    model: Any,
    tokenizer: Any,
    domain: Domain,
    *,
    name: str,
    max_rows: int = 0,
    max_length: int = 128,
    batch_size: int = 64,
    device: torch.device | None = None,
) -> tuple[list[Score], list[Item]]:
    """Score a model on every scored set of a domain.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        domain: Its `metrics` score `test.NAME`, its `retain_metrics` `retain_test`, each of its
            `benchmark_metrics` the benchmark set of that name; rows of `adjacent_test`,
            `paraphrases.NAME` and `multi_hop.NAME` whose shape is another are scored by its own.
        name: Name of the model in the record.
        max_rows: Rows per set at most; 0 for all.
        max_length: Tokens of a row at most.
        batch_size: Sequences per forward at most.
        device: Where the inputs go; None takes the model's.

    Returns:
        Scores with intervals, and one item per row and metric.

    Raises:
        NotFinite: If a score of the model is NaN or infinite.
    """
    sets: list[tuple[str, Rows, tuple[str, ...]]] = [
        (f"test.{capability}", rows, domain.metrics) for capability, rows in domain.test.items()
    ]
    sets.append(("retain_test", domain.retain_test, domain.retain_metrics))
    beside = _metrics_beside(domain.adjacent_test, domain.retain_test, domain.retain_metrics)
    sets.append(("adjacent_test", domain.adjacent_test, beside))
    for role in ("paraphrases", "multi_hop"):
        for capability, rows in getattr(domain, role).items():
            beside = _metrics_beside(rows, domain.test[capability], domain.metrics)
            sets.append((f"{role}.{capability}", rows, beside))
    for benchmark, rows in domain.benchmark.items():
        sets.append((f"benchmark.{benchmark}", rows, domain.benchmark_metrics[benchmark]))
    scores: list[Score] = []
    items: list[Item] = []
    for on, all_rows, metrics in sets:
        rows = subsample(all_rows, max_rows)
        if not rows:
            continue
        groups = {row.unit: row.group for row in rows if row.group}
        by_metric = measure_all(
            model,
            tokenizer,
            rows,
            fitting(metrics, rows),
            max_length=max_length,
            batch_size=batch_size,
            device=device,
        )
        for metric, values in by_metric.items():
            score = score_of(values.checked(name), model=name, on=on, groups=groups)
            scores.append(score.model_copy(update={"chance": chance_of(all_rows, metric)}))
            items += [
                Item(model=name, set=on, unit=unit, metric=metric, value=value)
                for unit, value in values.items
            ]
    return scores, items
