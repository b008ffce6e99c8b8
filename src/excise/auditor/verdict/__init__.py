"""How a verdict comes about, for every candidate of an audit.

1. `reference`: each score lies between two reference models that are attacked alike, the oracle
   (0) and the original (1); where it lies is the depth gap, with an interval over units.
2. `power`: an attack that did not bring back what its positive control hides is invalid.
3. `residual_bits`: what the weights still save an attacker, in bits per unit.
4. `levels`: six depth levels, from "the behaviour is gone" to "as if never learned"; each holds
   the comparisons that decide it against the margin, and the worst one counts.
5. `verdict`: the sentence (does it come back, after how much work, at what cost to the rest) and
   the reasons to doubt it.

The gap of the model made by data filtering is the audit's measured null: two models that differ in
nothing but their seed lie that far apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from excise.auditor.base import POSITIVE_CONTROL, AttackResult, Results
from excise.auditor.budget import Budget
from excise.auditor.evaluation_set import dev_is_higher
from excise.auditor.verdict.levels import all_levels, metric_words
from excise.auditor.verdict.power import invalid_attacks, marked, uncontrolled
from excise.auditor.verdict.reference import FreeScore, VerdictCase
from excise.auditor.verdict.verdict import verdict_of
from excise.data.domain import Domain, all_rows
from excise.evals.score import chance_of, direction_of
from excise.record import Item, LevelResult, Score, Verdict


def judge_all(
    models: Sequence[str],
    results: Results,
    domain: Domain,
    budget: Budget,
    *,
    scores: Sequence[Score] = (),
    items: Sequence[Item] = (),
    vocabulary: int = 0,
    null_run: str = "",
    seed: int = 0,
) -> tuple[dict[tuple[str, str], AttackResult], tuple[Verdict, ...]]:
    """Judge every candidate of an audit.

    Args:
        models: Names of the candidates among the subjects of `results`.
        results: Results by attack and subject: `original`, names that begin with `oracle`,
            `positive-control`, and the candidates.
        domain: Rows by role, for metric, chance, groups and claim.
        budget: How hard the attacker tried.
        scores: Scores without an attack, to name suppression and damage.
        items: The same by row: what else than the headline metric decides "the behaviour is gone".
        vocabulary: Number of tokens of the model, to tell broken from ignorant.
        null_run: The candidate made by data filtering; its gap is the audit's measured null.
        seed: Seed of all bootstraps.

    Returns:
        The results with invalid variants marked, and one verdict per candidate.
    """
    free = free_scores(items, domain)
    cases = {
        name: case_of(name, results, domain, budget, free=free, vocabulary=vocabulary, seed=seed)
        for name in models
    }
    levels = {name: all_levels(case) for name, case in cases.items()}
    null = null_of(levels[null_run]) if null_run in levels else None
    verdicts = tuple(
        verdict_of(
            cases[name], levels[name], domain, scores=scores, vocabulary=vocabulary, null=null
        )
        for name in models
    )
    silent = {k: v for case in cases.values() for k, v in uncontrolled(case).items()}
    return marked(results, _why_invalid(cases, levels, results), silent), verdicts


def case_of(
    model: str,
    results: Results,
    domain: Domain,
    budget: Budget,
    *,
    free: Sequence[FreeScore] = (),
    vocabulary: int = 0,
    seed: int = 0,
) -> VerdictCase:
    """Return what a verdict about one candidate rests on, the attacks' power known.

    Args:
        model: Name of the candidate.
        results: Results by attack and subject.
        domain: Rows by role.
        budget: How hard the attacker tried.
        free: Scores beside the headline, before any attack.
        vocabulary: Number of tokens of the model, for what a uniform guess costs; 0 for unknown.
        seed: Seed of all bootstraps.
    """
    test = all_rows(domain.test)
    metric = domain.metrics[0]
    # Who guesses at an answer that is written out guesses among the same ones.
    guessed = "exact_match" if metric == "generate" else metric
    case = VerdictCase(
        model=model,
        results=results,
        budget=budget,
        oracles=tuple(dict.fromkeys(s for _, s in results if s.startswith("oracle"))),
        metric=metric,
        direction=direction_of(metric),
        retain_direction=direction_of(domain.retain_metrics[0]),
        dev_higher=dev_is_higher(domain),
        chance=chance_of(test, guessed) if test else None,
        guess=chance_of((), metric, vocabulary=vocabulary) if metric == "text_loss" else None,
        groups={row.unit: row.group for row in (*test, *domain.fresh) if row.group},
        free=tuple(free),
        seed=seed,
    )
    return replace(case, invalid=invalid_attacks(case))


CONFIDENCE = (
    "text_loss", "probability", "option_probability", "truth_ratio", "truth_ratio_geometric",
    "min_k", "min_k_plus_plus",
)  # fmt: skip
"""Metrics that move with confidence alone, which is no knowledge: beside a headline of answers they
decide nothing before an attack. Residual bits read the loss, once confidence is taken out."""


def free_scores(items: Sequence[Item], domain: Domain) -> tuple[FreeScore, ...]:
    """Return every score of answers beside the headline: further metrics, and paraphrases.

    Args:
        items: One value per model, set, metric and row.
        domain: For the headline metric and what chance scores.
    """
    headline = domain.metrics[0]
    values: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for item in items:
        role = item.set.partition(".")[0]
        if role not in ("test", "paraphrases") or (role, item.metric) == ("test", headline):
            continue
        if item.metric in CONFIDENCE and item.metric != headline:
            continue
        by_model = values.setdefault((role, item.metric), {})
        by_model.setdefault(item.model, {}).setdefault(item.unit, []).append(item.value)
    rows = {"test": all_rows(domain.test), "paraphrases": all_rows(domain.paraphrases)}
    return tuple(
        FreeScore(
            metric_words(metric) + (" in paraphrases" if role == "paraphrases" else ""),
            {
                model: {unit: sum(each) / len(each) for unit, each in units.items()}
                for model, units in by_model.items()
            },
            chance_of(rows[role], metric),
        )
        for (role, metric), by_model in values.items()
    )


def null_of(levels: Sequence[LevelResult]) -> float | None:
    """Return the gap of the model made by data filtering at relearning, else before any attack."""
    gaps = {result.level: result.gap for result in levels}
    return gaps["D0"] if gaps["D4"] is None else gaps["D4"]


def _why_invalid(
    cases: Mapping[str, VerdictCase], levels: Mapping[str, Sequence[LevelResult]], results: Results
) -> dict[tuple[str, str], str]:
    """Return why variants are invalid, by attack and subject.

    An attack that fails a level shows recovery, which needs no positive control: it stays. On the
    reference models an attack is invalid where it is for every candidate; the positive control
    itself is left as it was.
    """
    failed = {
        (result.decided_by.split(" ")[0], name)
        for name, decided in levels.items()
        for result in decided
        if result.status == "fail"
    }
    reasons = {
        (attack, name): why
        for name, case in cases.items()
        for attack, why in case.invalid.items()
        if (attack, name) not in failed
    }
    for attack, subject in results:
        if subject in cases or subject == POSITIVE_CONTROL:
            continue
        if all((attack, name) in reasons for name in cases) and cases:
            reasons[attack, subject] = reasons[attack, next(iter(cases))]
    return reasons
