"""The rows that every attack scores, the same for every subject, cut to the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from excise.auditor.batching import Memo
from excise.auditor.budget import Budget
from excise.core.errors import UserError
from excise.data.domain import Domain, Metric, Row, Rows, all_rows
from excise.data.subsample import subsample
from excise.evals.score import direction_of, measure
from excise.models.limits import readable

PICKED = ("exact_match", "multiple_choice")
"""Metrics of answers that one forward pass tells."""

PROMPT = 4096
"""Tokens of a prompt at most where the tokenizer names no limit."""

NEEDED = {
    "test": "which is what an audit scores",
    "dev_forget": "by which attacks choose",
    "retain_test": "which shows what an attack breaks",
}
"""Roles without which nothing can be said, and why."""

UnitScores = Mapping[str, float]
"""Score by unit."""


@dataclass(frozen=True)
class EvaluationSet:
    """The rows that are scored, cut to the budget.

    Attributes:
        domain: Where they come from.
        budget: What they were cut to.
        tokenizer: The subject's tokenizer.
        test: V by capability.
        dev: `dev_forget` by capability, for choices.
        retain: `retain_test`.
        trained: T, as it is shown beside V.
        fresh_train: First half of `fresh`, by unit.
        fresh_test: Second half.
        max_length: Tokens per row.
    """

    domain: Domain
    budget: Budget
    tokenizer: Any
    test: Mapping[str, Rows]
    dev: Mapping[str, Rows]
    retain: Rows
    trained: Rows
    fresh_train: Rows
    fresh_test: Rows
    max_length: int

    @property
    def metric(self) -> Metric:
        """Headline metric of the forget side."""
        return self.domain.metrics[0]

    @property
    def metrics_beside(self) -> tuple[Metric, ...]:
        """Metrics of answers beside the headline that need no generation and that V's rows take."""
        return tuple(
            metric
            for metric in self.domain.metrics[1:]
            if metric in PICKED and all(fits(row, metric) for row in self.all_test)
        )

    @property
    def trained_metric(self) -> Metric:
        """Metric of T."""
        return self.metric_of(self.trained)

    @property
    def dev_metric(self) -> Metric:
        """Metric of `dev_forget`, also of its rows in another wording or behind a context."""
        return dev_metric(self.domain)

    @property
    def higher(self) -> bool:
        """Whether a higher score on `dev_forget`, by which variants are chosen, is more knowledge.

        Where V is questions and `dev_forget` is texts, the two are scored differently.
        """
        return dev_is_higher(self.domain)

    def metric_of(self, rows: Sequence[Row]) -> Metric:
        """Return the headline metric of V where every one of `rows` takes it, else the loss."""
        return fitting_metric(self.metric, rows)

    @property
    def all_test(self) -> Rows:
        """V of all capabilities."""
        return all_rows(self.test)

    @property
    def all_dev(self) -> Rows:
        """Dev of all capabilities."""
        return all_rows(self.dev)

    def longer(self, factor: int, model: Any) -> EvaluationSet:
        """Return the evaluation with room for prompts `factor` times as long, if `model` has it."""
        limit = getattr(self.tokenizer, "model_max_length", 0) or 0
        limit = readable(model, limit if 0 < limit < 1 << 20 else PROMPT)
        return replace(self, max_length=max(self.max_length, min(limit, self.max_length * factor)))

    def units(self, model: Any, rows: Sequence[Row], metric: Metric | None = None) -> UnitScores:
        """Return the score of `rows` by unit, by `metric_of` them by default; {} for no rows.

        Raises:
            NotFinite: If the model gives no numbers.
        """
        if not rows:
            return {}
        metric = metric or self.metric_of(rows)
        scores = measure(model, self.tokenizer, rows, metric, max_length=self.max_length)
        return {unit: float(value) for unit, value in scores.checked().by_unit().items()}

    def retained(self, model: Any, rows: Sequence[Row] | None = None) -> UnitScores:
        """Return the retain score by unit."""
        chosen = self.retain if rows is None else rows
        metric = fitting_metric(self.domain.retain_metrics[0], chosen)
        return self.units(model, chosen, metric)

    def retain_lost(self, start: UnitScores, end: UnitScores) -> float:
        """Return how much worse the retain score became, as a share of what it was; 0 for none."""
        metric = fitting_metric(self.domain.retain_metrics[0], self.retain)
        before, after = mean(start), mean(end)
        if not before or after is None:
            return 0.0
        worse = before - after if direction_of(metric) == "higher" else after - before
        return worse / before


def fits(row: Row, metric: Metric) -> bool:
    """Return whether a row can be scored by a metric: a plain text has no choices to pick from."""
    if metric == "multiple_choice":
        return len(row.choices) > 1 and row.answer >= 0
    return metric == "text_loss" or row.kind in ("completion", "choice")


def fitting_metric(metric: Metric, rows: Sequence[Row]) -> Metric:
    """Return `metric` where every row takes it, else the token loss, which any row takes."""
    return metric if all(fits(row, metric) for row in rows) else "text_loss"


def dev_metric(domain: Domain) -> Metric:
    """Return the metric of `dev_forget`: that of V where every row takes it, else the loss."""
    return fitting_metric(domain.metrics[0], all_rows(domain.dev_forget))


def dev_is_higher(domain: Domain) -> bool:
    """Return whether a higher score on `dev_forget` means more knowledge."""
    return direction_of(dev_metric(domain)) == "higher"


def more_is_known(domain: Domain) -> bool:
    """Return whether a higher score on V, by the headline metric, means more knowledge."""
    return direction_of(domain.metrics[0]) == "higher"


def check_scored(domain: Domain) -> None:
    """Refuse a domain of which nothing could be said, instead of scoring nothing.

    Raises:
        UserError: If it has no row of a role that every attack reads.
    """
    filled = {role.split(".")[0] for role, rows in domain.roles() if rows}
    for role, why in NEEDED.items():
        if role not in filled:
            raise UserError(
                f"domain '{domain.name}' has no row in {role}, {why}; give it some, or check the "
                "split"
            )


def evaluation_set(domain: Domain, budget: Budget, tokenizer: Any) -> EvaluationSet:
    """Cut what is scored to the budget.

    Args:
        domain: Rows by role.
        budget: Rows at most.
        tokenizer: The subject's tokenizer.

    Returns:
        The evaluation; equal for all subjects of one audit.

    Raises:
        UserError: As `check_scored`.
    """
    check_scored(domain)
    share = max(1, budget.max_test_rows // max(len(domain.test), 1))
    other = max(1, budget.max_other_rows // max(len(domain.test), 1))
    units = list(dict.fromkeys(row.unit for row in domain.fresh))
    first = set(units[: len(units) // 2])
    fresh = {
        half: tuple(row for row in domain.fresh if (row.unit in first) == half)
        for half in (True, False)
    }
    return EvaluationSet(
        domain=domain,
        budget=budget,
        tokenizer=Memo(tokenizer),
        test={name: subsample(rows, share, by="row") for name, rows in domain.test.items()},
        dev={name: subsample(rows, other, by="row") for name, rows in domain.dev_forget.items()},
        retain=subsample(domain.retain_test, budget.max_other_rows, by="row"),
        trained=subsample(all_rows(domain.relearn), budget.max_other_rows, by="row"),
        fresh_train=fresh[True],
        fresh_test=subsample(fresh[False], budget.max_other_rows, by="row"),
        max_length=budget.max_length,
    )


def times_as_long(factor: int, budget: Budget) -> float:
    """Return how much longer rows become that `EvaluationSet.longer` gives room, for estimates."""
    return max(1.0, min(factor, PROMPT / budget.max_length))


def mean(units: Mapping[str, float]) -> float | None:
    """Return the mean over units, None for none."""
    return sum(units.values()) / len(units) if units else None
