"""The verdict: first how much came back after how many tokens, then the ladder.

`judge_all` is what a run calls: it finds which attacks have power, climbs the ladder of every
candidate, measures the null, marks void arms, and writes the sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from excise.audit.base import AttackResult, Budget
from excise.audit.depth.bits import prequential
from excise.audit.depth.case import ORIGINAL, PLANTED, Case, Results, averaged, mean
from excise.audit.depth.ladder import BEYOND, WORDS, climb, highest
from excise.audit.depth.power import powerless, voided
from excise.audit.depth.rails import nothing_to_remove, refuse_equal
from excise.audit.depth.readings import bits_arms
from excise.audit.depth.suppression import retain_note, suppression_notes
from excise.domains.base import Domain
from excise.evals.score import chance_of, direction_of
from excise.evals.stats import bootstrap_difference
from excise.record import RungResult, Score, Verdict

METRIC_WORDS = {
    "exact_match": "exact match",
    "multiple_choice": "multiple-choice accuracy",
    "text_loss": "token loss in nats",
}


@dataclass(frozen=True)
class Recovery:
    """How much came back.

    Attributes:
        fraction: Published fraction (attacked - unlearned) / (original - unlearned); None where
            the candidate does not differ from the original.
        examples: Rows the attacker used.
        tokens: Tokens the attacker used.
        before: Candidate's score on V before the attack.
        after: After it.
        original: The original's before any attack.
        oracle: The oracles' mean after the same attack; None without one.
        attack: Name of the attack.
    """

    fraction: float | None
    examples: int
    tokens: int
    before: float
    after: float
    original: float
    oracle: float | None
    attack: str


def judge_all(
    arms: Sequence[str],
    results: Results,
    domain: Domain,
    budget: Budget,
    *,
    fingerprints: Mapping[str, str] | None = None,
    scores: Sequence[Score] = (),
    vocabulary: int = 0,
    null_arm: str = "",
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
        null_arm: The arm whose method is data filtering: its gap is the audit's measured null.
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
    null = null_of(ladders[null_arm]) if null_arm in ladders else None
    verdicts = tuple(
        verdict(cases[arm], ladders[arm], domain, scores=scores, vocabulary=vocabulary, null=null)
        for arm in arms
    )
    reasons = _void_reasons(cases, ladders, results)
    return voided(results, reasons), verdicts


def _void_reasons(
    cases: Mapping[str, Case], ladders: Mapping[str, Sequence[RungResult]], results: Results
) -> dict[tuple[str, str], str]:
    """Return why arms are void, by attack and subject.

    An arm that fails a rung shows recovery, which needs no positive control: it stays. On the
    rails an attack is void where it is for every candidate; the control itself is left as it was.
    """
    failed = {
        (rung.decided_by.split(" ")[0], arm)
        for arm, rungs in ladders.items()
        for rung in rungs
        if rung.status == "fail"
    }
    reasons = {
        (attack, arm): f"no power: {why}"
        for arm, case in cases.items()
        for attack, why in case.powerless.items()
        if (attack, arm) not in failed
    }
    for attack, subject in results:
        if subject in cases or subject == PLANTED:
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


def null_of(rungs: Sequence[RungResult]) -> float | None:
    """Return the gap of the filtering arm at relearning, else before any attack."""
    for wanted in ("D4", "D0"):
        for rung in rungs:
            if rung.rung == wanted and rung.gap is not None:
                return rung.gap
    return None


def verdict(
    case: Case,
    rungs: tuple[RungResult, ...],
    domain: Domain,
    *,
    scores: Sequence[Score] = (),
    vocabulary: int = 0,
    null: float | None = None,
) -> Verdict:
    """Write the verdict of one candidate.

    Args:
        case: The candidate with all results.
        rungs: Its ladder.
        domain: For the claim and what kind of thing a unit is.
        scores: Scores without an attack.
        vocabulary: Number of tokens of the model; 0 for unknown.
        null: The audit's measured null.

    Returns:
        The verdict; its sentence begins with how much came back after how many tokens.
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
        *_other_reasons(case, domain, recovery),
    ]
    return Verdict(
        arm=case.arm,
        sentence=" ".join([lead, *broken[:1]]),
        budget=case.budget.name,
        rungs=rungs,
        highest=highest(rungs),
        recovery=recovery.fraction if recovery else None,
        recovery_tokens=recovery.tokens if recovery else None,
        residual_bits=worst.value if worst else None,
        residual_low=worst.low if worst else None,
        residual_high=worst.high if worst else None,
        null=null,
        reasons=tuple(dict.fromkeys(reasons)),
    )


def recovery_of(case: Case) -> Recovery | None:
    """Return how much relearning brought back on V; None where it did not run.

    The attack is the deciding one of relearning that brought back most, at the end of its budget,
    averaged over attacker seeds; never a maximum over seeds.
    """
    top, before = case.start(ORIGINAL), case.start(case.arm)
    found = [
        _recovery(case, attack, top, before)
        for attack in case.attacks()
        if case.rung(attack) == "D4" and case.end(attack, case.arm)
    ]
    return max(found, key=lambda r: -math.inf if r.fraction is None else r.fraction, default=None)


def _recovery(
    case: Case, attack: str, top: Mapping[str, float], before: Mapping[str, float]
) -> Recovery:
    """Return the recovery under one attack."""
    after = averaged(case.end(attack, case.arm))
    chosen = case.chosen(attack, case.arm)
    points = [a.arm.curve[-1] for a in chosen if a.arm.curve]
    common = [u for u in after if u in before and u in top]
    a, b, o = (mean({u: m[u] for u in common}) for m in (after, before, top))
    rails = [averaged(case.end(attack, name)) for name in case.oracles]
    return Recovery(
        fraction=(a - b) / (o - b) if _removed(case) else None,
        examples=max((p.examples for p in points), default=0),
        tokens=max((p.tokens for p in points), default=0),
        before=b,
        after=a,
        original=o,
        oracle=sum(mean(r) for r in rails) / len(rails) if rails and all(rails) else None,
        attack=attack,
    )


def _removed(case: Case) -> bool:
    """Return whether the candidate scores less than the original, beyond the 95 % interval."""
    top, before = case.start(ORIGINAL), case.start(case.arm)
    if not top or not before or not any(u in before for u in top):
        return False
    found = bootstrap_difference(top, before, groups=case.groups, seed=case.seed)
    return found.low > 0 if case.direction == "higher" else found.high < 0


def sentence_of(case: Case, recovery: Recovery | None, domain: Domain) -> str:
    """Say how much came back after how many tokens, in plain words.

    Args:
        case: The candidate.
        recovery: What relearning brought back; None where it did not run.
        domain: For the claim.
    """
    top, before = case.start(ORIGINAL), case.start(case.arm)
    if top:
        nothing = nothing_to_remove(
            top, case.chance, case.direction, groups=case.groups, seed=case.seed
        )
        if nothing:
            return nothing
    if recovery is None:
        scored = f" Before any attack it scores {mean(before):.2f}" if before else ""
        scored += f", the original {mean(top):.2f}." if scored and top else "."
        return (
            "How much would come back is not known: no relearning attack ran on it to the end."
            + (scored if before else "")
        )
    what = "facts" if domain.claim == "deletion" else "test items"
    metric = METRIC_WORDS.get(case.metric, case.metric.replace("_", " "))
    after = f"After relearning {recovery.examples:,} examples ({recovery.tokens:,} tokens), "
    rails = f"before the attack {recovery.before:.2f}, original {recovery.original:.2f}"
    if recovery.oracle is not None:
        rails += f", never taught and attacked alike {recovery.oracle:.2f}"
    numbers = f"{metric} {recovery.after:.2f}; {rails}"
    if recovery.fraction is None:
        return (
            f"{after}there is nothing to bring back: already before the attack it knows the "
            f"removed {what} as well as the original does, to within the interval ({numbers})."
        )
    share = max(recovery.fraction, 0.0)
    amount = f"{share:.2f}" if share >= 0.005 else "none"
    return (
        f"{after}{amount} of the removed knowledge is back on {what} the attacker never saw "
        f"({numbers})."
    )


def _power_reasons(case: Case) -> list[str]:
    """Say which attacks have no power."""
    return [f"The attack {name} is void: {why}." for name, why in case.powerless.items()]


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
        lacking = "; ".join(f"{WORDS[rung]} ({rung}): {words}" for rung, words in BEYOND.items())
        found.append(
            f"The attacks required were {', '.join(case.budget.attacks) or 'none'}; a full "
            f"{case.budget.name} audit also asks for {lacking}."
        )
    return found
