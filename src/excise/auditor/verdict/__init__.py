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

from excise.auditor.base import ORIGINAL, POSITIVE_CONTROL, AttackResult, Results
from excise.auditor.budget import Budget
from excise.auditor.evaluation_set import UnitScores, dev_is_higher
from excise.auditor.verdict.levels import all_levels, metric_words
from excise.auditor.verdict.power import (
    broken_attacks,
    invalid_attacks,
    marked,
    seeing,
    spared,
    uncontrolled,
)
from excise.auditor.verdict.reference import (
    FreeScore,
    VerdictCase,
    averaged,
    knows_more,
    mean,
    nothing_to_remove,
)
from excise.auditor.verdict.verdict import verdict_of
from excise.data.domain import Domain, all_rows
from excise.evals.score import chance_of, direction_of
from excise.record import Item, LevelResult, Score, ScoreDirection, Verdict


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
    free = free_scores(items, domain, seed=seed)
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
    for name, case in cases.items():  # reference models are chosen for alike beside every candidate
        results = {
            **results,
            **{k: v for k, v in case.results.items() if k[1] == name or k[1] not in cases},
        }
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
    case = seeing(case)
    case = replace(case, invalid=invalid_attacks(case))
    broken = broken_attacks(case)
    if not broken:
        return case
    # What came back in a ruin came back: only where nothing did, another setting is looked at.
    failed = {result.level for result in all_levels(case) if result.status == "fail"}
    failed |= {"D4"} if "D5" in failed else set()
    case = spared(case, [attack for attack in broken if case.level(attack) not in failed])
    return replace(case, invalid=invalid_attacks(case))


CONFIDENCE = (
    "text_loss", "probability", "option_probability", "truth_ratio", "truth_ratio_geometric",
    "min_k", "min_k_plus_plus",
)  # fmt: skip
"""Metrics that move with confidence alone, which is no knowledge: beside a headline of answers they
decide nothing before an attack. Residual bits read the loss, once confidence is taken out."""


ASKED_BESIDE = {
    "test": "",
    "paraphrases": " in paraphrases",
    "multi_hop": " by multi-hop questions",
}
"""Roles whose scores count before any attack, and how a reader tells them apart."""


def free_scores(items: Sequence[Item], domain: Domain, *, seed: int = 0) -> tuple[FreeScore, ...]:
    """Return every score of answers beside the headline: further metrics, in all of `ASKED_BESIDE`.

    One by which the original knows no more than chance, or than the oracles, has no power: it says
    so and is not counted.

    Args:
        items: One value per model, set, metric and row.
        domain: For the headline metric and what chance scores.
        seed: Seed of the bootstrap.
    """
    headline = domain.metrics[0]
    values: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for item in items:
        role = item.set.partition(".")[0]
        if role not in ASKED_BESIDE or (role, item.metric) == ("test", headline):
            continue
        if item.metric in CONFIDENCE and item.metric != headline:
            continue
        by_model = values.setdefault((role, item.metric), {})
        by_model.setdefault(item.model, {}).setdefault(item.unit, []).append(item.value)
    scores = []
    for (role, metric), by_model in values.items():
        words = metric_words(metric) + ASKED_BESIDE[role]
        rows = all_rows(getattr(domain, role))
        groups = {row.unit: row.group for row in rows if row.group}
        chance = chance_of(rows, metric)
        units = {
            model: {unit: sum(each) / len(each) for unit, each in by_unit.items()}
            for model, by_unit in by_model.items()
        }
        no_power = _no_power(words, units, chance, direction_of(metric), groups, seed)
        scores.append(FreeScore(words, units, chance, no_power))
    return tuple(scores)


def _no_power(
    words: str,
    units: Mapping[str, UnitScores],
    chance: float | None,
    direction: ScoreDirection,
    groups: Mapping[str, str],
    seed: int,
) -> str:
    """Say that the original knows no more by a score than chance, or than the oracles; or nothing.

    Args:
        words: What a reader calls the score.
        units: Scores by model and unit.
        chance: Score of a model that knows nothing; None where unknown.
        direction: Which way is more knowledge.
        groups: Group of each unit that has one.
        seed: Seed of the bootstrap.
    """
    top = units.get(ORIGINAL, {})
    low = averaged([each for name, each in units.items() if name.startswith("oracle")])
    beaten = ""
    if nothing_to_remove(top, chance, direction, groups=groups, seed=seed):
        beaten = f"chance ({chance:.2f})"
    elif top and low and not knows_more(top, low, direction, groups=groups, seed=seed):
        beaten = f"the oracles ({mean(low):.2f})"
    if not beaten:
        return ""
    return (
        f"By {words} the original itself scores {mean(top):.2f}, no better than {beaten}: this "
        "score has no power and decides nothing."
    )


def null_of(levels: Sequence[LevelResult]) -> float | None:
    """Return the gap of the model made by data filtering at relearning, else before any attack."""
    gaps = {result.level: result.gap for result in levels}
    return gaps["D0"] if gaps["D4"] is None else gaps["D4"]


def _why_invalid(
    cases: Mapping[str, VerdictCase], levels: Mapping[str, Sequence[LevelResult]], results: Results
) -> dict[tuple[str, str], str]:
    """Return why variants are invalid, by attack and subject.

    An attack that fails its own level shows recovery, which needs no positive control: it stays. On
    the reference models an attack is invalid where it is for every candidate; the positive control
    itself is left as it was.
    """
    failed = {
        (result.decided_by.split(" ")[0], name)
        for name, decided in levels.items()
        for result in decided
        if result.status == "fail"
        and result.level == cases[name].level(result.decided_by.split(" ")[0])
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
