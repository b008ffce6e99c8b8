"""The verdict: first how much came back after how many tokens, then the ladder.

`judge_all` is what a run calls: it finds which attacks have power, climbs the ladder of every
candidate, measures the null, marks void arms, and writes the sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from excise.auditor.base import ORIGINAL, POSITIVE_CONTROL, AttackResult, Budget
from excise.auditor.verdict.bits import prequential
from excise.auditor.verdict.case import Case, Results, averaged, mean
from excise.auditor.verdict.ladder import BEYOND, WORDS, climb, highest
from excise.auditor.verdict.power import marked, powerless, uncontrolled, voided
from excise.auditor.verdict.rails import refuse_equal
from excise.auditor.verdict.readings import bits_arms
from excise.auditor.verdict.recovery import Recovery, recovery_of, sentence_of
from excise.auditor.verdict.suppression import retain_note, suppression_notes
from excise.data.domain import Domain
from excise.evals.score import chance_of, direction_of
from excise.record import LevelResult, Score, Verdict


def judge_all(
    arms: Sequence[str],
    results: Results,
    domain: Domain,
    budget: Budget,
    *,
    fingerprints: Mapping[str, str] | None = None,
    scores: Sequence[Score] = (),
    vocabulary: int = 0,
    null_run: str = "",
    seed: int = 0,
) -> tuple[dict[tuple[str, str], AttackResult], tuple[Verdict, ...]]:
    """Judge every candidate of an audit.

    Args:
        arms: Names of the candidates among the subjects of `results`.
        results: Results by attack and subject; `original` is the upper rail, names that begin
            with `oracle` the lower one, `planted` the positive control.
        domain: Rows by role, for metric, chance, groups and claim.
        budget: How hard the attacker tried.
        fingerprints: SHA-256 of every subject's weights, to refuse a candidate that is a rail.
        scores: Scores without an attack, to name suppression and damage.
        vocabulary: Number of tokens of the model, to tell broken from ignorant.
        null_run: The arm whose method is data filtering: its gap is the audit's measured null.
        seed: Seed of all bootstraps.

    Returns:
        The results with void arms marked, and one verdict per candidate.

    Raises:
        UserError: If a candidate has the same weights as one of its rails.
    """
    known = dict(fingerprints or {})
    rails = {n: f for n, f in known.items() if n == ORIGINAL or n.startswith("oracle")}
    refuse_equal({n: known.get(n, "") for n in arms}, rails)
    cases = {arm: case_of(arm, results, domain, budget, seed=seed) for arm in arms}
    ladders = {arm: climb(case) for arm, case in cases.items()}
    null = null_of(ladders[null_run]) if null_run in ladders else None
    verdicts = tuple(
        verdict(cases[arm], ladders[arm], domain, scores=scores, vocabulary=vocabulary, null=null)
        for arm in arms
    )
    reasons = _void_reasons(cases, ladders, results)
    silent = {k: v for case in cases.values() for k, v in uncontrolled(case).items()}
    return marked(voided(results, reasons), silent), verdicts


def _void_reasons(
    cases: Mapping[str, Case], ladders: Mapping[str, Sequence[LevelResult]], results: Results
) -> dict[tuple[str, str], str]:
    """Return why arms are void, by attack and subject.

    An arm that fails a level shows recovery, which needs no positive control: it stays. On the
    rails an attack is void where it is for every candidate; the control itself is left as it was.
    """
    failed = {
        (level.decided_by.split(" ")[0], arm)
        for arm, levels in ladders.items()
        for level in levels
        if level.status == "fail"
    }
    reasons = {
        (attack, arm): f"no power: {why}"
        for arm, case in cases.items()
        for attack, why in case.powerless.items()
        if (attack, arm) not in failed
    }
    for attack, subject in results:
        if subject in cases or subject == POSITIVE_CONTROL:
            continue
        if all((attack, arm) in reasons for arm in cases) and cases:
            reasons[attack, subject] = reasons[attack, next(iter(cases))]
    return reasons


def judge(
    arm: str,
    results: Results,
    domain: Domain,
    budget: Budget,
    *,
    fingerprints: Mapping[str, str] | None = None,
    scores: Sequence[Score] = (),
    vocabulary: int = 0,
    null: float | None = None,
    seed: int = 0,
) -> Verdict:
    """Judge one candidate; arguments as in `judge_all`, `null` given."""
    _, verdicts = judge_all(
        [arm],
        results,
        domain,
        budget,
        fingerprints=fingerprints,
        scores=scores,
        vocabulary=vocabulary,
        seed=seed,
    )
    return verdicts[0].model_copy(update={"null": null})


def case_of(arm: str, results: Results, domain: Domain, budget: Budget, *, seed: int = 0) -> Case:
    """Return what a verdict about one candidate reads, the attacks' power found.

    Args:
        arm: Name of the candidate.
        results: Results by attack and subject.
        domain: Rows by role.
        budget: How hard the attacker tried.
        seed: Seed of all bootstraps.
    """
    test = [row for rows in domain.test.values() for row in rows]
    metric = domain.metrics[0]
    case = Case(
        arm=arm,
        results=results,
        budget=budget,
        oracles=tuple(dict.fromkeys(s for _, s in results if s.startswith("oracle"))),
        metric=metric,
        direction=direction_of(metric),
        chance=chance_of(test, metric) if test else None,
        groups={row.unit: row.group for row in (*test, *domain.fresh) if row.group},
        seed=seed,
    )
    return replace(case, powerless=powerless(case))


def null_of(levels: Sequence[LevelResult]) -> float | None:
    """Return the gap of the filtering arm at relearning, else before any attack."""
    for wanted in ("D4", "D0"):
        for level in levels:
            if level.level == wanted and level.gap is not None:
                return level.gap
    return None


def verdict(
    case: Case,
    levels: tuple[LevelResult, ...],
    domain: Domain,
    *,
    scores: Sequence[Score] = (),
    vocabulary: int = 0,
    null: float | None = None,
) -> Verdict:
    """Write the verdict of one candidate.

    Args:
        case: The candidate with all results.
        levels: Its ladder.
        domain: For the claim and what kind of thing a unit is.
        scores: Scores without an attack.
        vocabulary: Number of tokens of the model; 0 for unknown.
        null: The audit's measured null.

    Returns:
        The verdict; its first sentence says how much came back after how many tokens.
    """
    recovery = recovery_of(case)
    bits = [found for _, _, found in bits_arms(case)] if case.oracles else []
    worst = max((b for b, _ in bits), key=lambda b: abs(b.value), default=None)
    broken = suppression_notes(case, scores, vocabulary)
    lead = sentence_of(case, recovery, domain)
    reasons = [
        *broken,
        *retain_note(case, domain),
        *_power_reasons(case),
        *_early_reasons(case),
        *_other_reasons(case, domain, recovery),
    ]
    return Verdict(
        model=case.arm,
        sentence=" ".join([lead, *broken[:1]]),
        budget=case.budget.name,
        levels=levels,
        highest=highest(levels),
        recovery=recovery.fraction if recovery else None,
        recovery_tokens=recovery.tokens if recovery else None,
        residual_bits=worst.value if worst else None,
        residual_low=worst.low if worst else None,
        residual_high=worst.high if worst else None,
        null=null,
        reasons=tuple(dict.fromkeys(reasons)),
    )


def _power_reasons(case: Case) -> list[str]:
    """Say which attacks, or which arms of them, have no power."""
    void = [f"The attack {name} is void: {why}." for name, why in case.powerless.items()]
    return void + [
        f"Of the attack {name}, {' and '.join(arms)} was not controlled: no planted model came "
        "back under it, so that finding nothing with it shows nothing."
        for name, arms in uncontrolled(case).items()
    ]


def _early_reasons(case: Case) -> list[str]:
    """Say that a relearning attack was further from the oracle before its end than at it."""
    top = case.start(ORIGINAL)
    if not case.oracles or not top:
        return []
    found = []
    for attack in case.attacks():
        arms = case.chosen(attack, case.arm)
        if case.level(attack) != "D4" or not arms:
            continue
        gaps = [_gap_at(case, attack, i, top) for i in range(1, len(arms[0].unit_scores))]
        known = [(gap, i + 1) for i, gap in enumerate(gaps) if gap is not None]
        if not known or gaps[-1] is None:
            continue
        largest, at = max(known)
        if largest > case.budget.margin and largest > gaps[-1] + case.budget.margin:
            found.append(
                f"Under {attack} the gap to the oracle was {largest:.2f} after "
                f"{arms[0].entry.curve[at].tokens:,} tokens and {gaps[-1]:.2f} at the end of the "
                "budget, which decides."
            )
    return found


def _gap_at(case: Case, attack: str, at: int, top: Mapping[str, float]) -> float | None:
    """Return the depth gap at one checkpoint, without an interval; None where it is not known."""
    ours = averaged(case.end(attack, case.arm, at))
    rails = [averaged(case.end(attack, name, at)) for name in case.oracles]
    starts = [case.start(name) for name in case.oracles]
    if not ours or not all(rails) or not all(starts):
        return None
    lower = sum(map(mean, rails)) / len(rails)
    distance = mean(top) - sum(map(mean, starts)) / len(starts)
    return (mean(ours) - lower) / distance if distance else None


def _other_reasons(case: Case, domain: Domain, recovery: Recovery | None) -> list[str]:
    """Say what else a reader should know before quoting the verdict."""
    found = []
    if recovery is not None and recovery.fraction is not None and recovery.fraction < 0:
        found.append(
            f"The published recovery fraction is {recovery.fraction:.2f}: the attack left less "
            "than there was before it."
        )
    if not case.oracles:
        found.append(
            "There is no oracle: what relearning teaches any model is part of the recovery, and "
            f"'{WORDS['D4']}' (D4) and '{WORDS['D5']}' (D5) cannot be passed."
        )
    elif len(case.oracles) < 3:
        found.append(
            f"The oracle rail comes from {len(case.oracles)} of the three seeds it should have; "
            "its spread is not in the intervals."
        )
    sum_of_code = prequential(case, recovery.attack) if recovery and case.oracles else None
    if sum_of_code is not None:
        found.append(
            f"Secondary, confounded by unlearning noise: reading T for the first time costs it "
            f"{abs(sum_of_code):.2f} bits per token {'less' if sum_of_code > 0 else 'more'} than "
            "the oracle, summed over all batches."
        )
    if domain.exposure == "unknown":
        found.append("Exposure is unknown: whether V was shown to the method is not recorded.")
    if case.budget.name != "smoke":
        lacking = "; ".join(f"{WORDS[level]} ({level}): {words}" for level, words in BEYOND.items())
        found.append(
            f"The attacks required were {', '.join(case.budget.attacks) or 'none'}; a full "
            f"{case.budget.name} audit also asks for {lacking}."
        )
    return found
