"""What a verdict says: does it come back, after how much work, at what cost to the rest.

The sentence answers these three first; the reasons say what else a reader should know before
quoting it. Broken is not ignorant: suppression and damage are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from excise.auditor.base import ORIGINAL
from excise.auditor.budget import ROWS
from excise.auditor.evaluation_set import UnitScores
from excise.auditor.name_rows import words_shared
from excise.auditor.verdict.capabilities import by_capability
from excise.auditor.verdict.levels import BEYOND, highest, metric_words
from excise.auditor.verdict.power import uncontrolled
from excise.auditor.verdict.reference import (
    VerdictCase,
    averaged,
    depth_gap,
    knows_more,
    mean,
)
from excise.auditor.verdict.residual_bits import LN2, all_bits, prequential
from excise.core.errors import UserError
from excise.data.domain import Domain
from excise.evals.score import chance_of, direction_of
from excise.evals.stats import bootstrap_difference, bootstrap_mean
from excise.record import LEVELS, Estimate, LevelResult, Score, Verdict
from excise.record.measured import attacks_listed

WHOLE = 0.9
"""Share of the distance between original and oracle that counts as all of it."""

SHARED = 0.5
"""Share of V's names that must occur in T for relearning to reach what is hidden behind names."""

NEAR = 0.9
"""Share of a uniform guess's loss from which on a token loss is said to be near it."""


def verdict_of(
    case: VerdictCase,
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
        levels: What its depth levels came to.
        domain: For the claim, and what kind of thing a unit is.
        scores: Scores without an attack.
        vocabulary: Number of tokens of the model; 0 for unknown.
        null: The audit's measured null.
    """
    recovery = recovery_of(case)
    bits = [each for _, _, each, _ in all_bits(case)] if case.oracles else []
    worst = max(bits, key=lambda each: abs(each.value), default=None)
    change = retain_change(case, domain)
    damaged = change is not None and change.high < 0
    broken = suppression_notes(case, scores, vocabulary, damaged=damaged)
    reasons = [
        *broken,
        *_power_reasons(case),
        *(score.no_power for score in case.free if score.no_power),
        *_other_reasons(case, domain, recovery),
        *by_capability(case, domain, recovery.attack if recovery else ""),
        *_in_paraphrases(case, scores),
    ]
    return Verdict(
        model=case.model,
        sentence=" ".join(
            [
                opening(case, levels, recovery, domain, damaged=damaged),
                *broken,
                cost(change, domain.retain_metrics[0]),
            ]
        ),
        budget=case.budget.name,
        levels=levels,
        highest=highest(levels),
        recovery=recovery.fraction if recovery else None,
        recovery_gap=recovery.gap if recovery and recovery.fraction is not None else None,
        recovery_tokens=recovery.tokens if recovery else None,
        residual_bits=worst.value if worst else None,
        residual_low=worst.low if worst else None,
        residual_high=worst.high if worst else None,
        retain_change=change.value if change else None,
        retain_low=change.low if change else None,
        retain_high=change.high if change else None,
        null=null,
        reasons=tuple(dict.fromkeys(reasons)),
    )


@dataclass(frozen=True)
class Recovery:
    """How much came back.

    Attributes:
        fraction: Published fraction (attacked - unlearned) / (original - unlearned); None where
            the candidate does not differ from the original.
        gap: Depth gap after the attack: what came back beyond the oracles under the same one; None
            without one, or between reference models that cannot be told apart.
        examples: Rows the attacker used.
        tokens: Tokens the attacker used.
        before: Candidate's score on the held-out test set before the attack.
        after: After it.
        original: The original's before any attack.
        oracle: The oracles' mean after the same attack; None without one.
        attack: Name of the attack.
    """

    fraction: float | None
    gap: float | None
    examples: int
    tokens: int
    before: float
    after: float
    original: float
    oracle: float | None
    attack: str


def recovery_of(case: VerdictCase) -> Recovery | None:
    """Return how much relearning brought back; None where it did not run.

    The attack is the deciding one of relearning that brought back most, at the checkpoint where it
    had, averaged over attacker seeds; never a maximum over seeds. Most is beyond what it teaches
    oracles, where there are some: text teaches its like to any model.
    """
    removed = _removed(case)
    recoveries = [
        _recovery(case, attack, at, removed=removed)
        for attack in case.attacks()
        if case.level(attack) == "D4" and case.end(attack, case.model)
        for at in range(len(case.chosen(attack, case.model)[0].unit_scores) - 1, 0, -1)
    ]

    def back(one: Recovery) -> float:
        amount = one.fraction if one.gap is None else one.gap
        return -math.inf if amount is None else amount

    return max(recoveries, key=back, default=None)


def _recovery(case: VerdictCase, attack: str, at: int, *, removed: bool) -> Recovery:
    """Return the recovery under one attack at one checkpoint, a share where there was a removal."""
    top, before = case.start(ORIGINAL), case.start(case.model)
    after = averaged(case.end(attack, case.model, at))
    runs = case.chosen(attack, case.model)
    points = [run.entry.curve[at] for run in runs if at < len(run.entry.curve)]
    common = [u for u in after if u in before and u in top]
    a, b, o = (mean({u: units[u] for u in common}) for units in (after, before, top))
    oracles = [averaged(case.end(attack, name, at)) for name in case.oracles]
    starts = [case.start(name) for name in case.oracles]
    gap = None
    if oracles and all(oracles) and all(starts):
        found = depth_gap(
            after, oracles, top, oracles_start=starts, groups=case.groups, seed=case.seed
        )
        gap = None if found.invalid else found.value
    return Recovery(
        fraction=(a - b) / (o - b) if removed else None,
        gap=gap,
        examples=max((p.examples for p in points), default=0),
        tokens=max((p.tokens for p in points), default=0),
        before=b,
        after=a,
        original=o,
        oracle=sum(map(mean, oracles)) / len(oracles) if oracles and all(oracles) else None,
        attack=attack,
    )


def _removed(case: VerdictCase) -> bool:
    """Return whether the candidate scores less than the original, beyond the 95 % interval."""
    top, before = case.start(ORIGINAL), case.start(case.model)
    if not top or not before or not any(u in before for u in top):
        return False
    return knows_more(top, before, case.direction, groups=case.groups, seed=case.seed)


def removed_share(case: VerdictCase) -> float | None:
    """Return which share of the distance from original to oracle was removed before any attack.

    Args:
        case: The candidate.

    Returns:
        1 for the oracle, 0 for the original: what the depth gap leaves; None without an oracle or
        between reference models that cannot be told apart.
    """
    top, before = case.start(ORIGINAL), case.start(case.model)
    oracles = [start for name in case.oracles if (start := case.start(name))]
    if not top or not before or not oracles:
        return None
    gap = depth_gap(before, oracles, top, groups=case.groups, seed=case.seed)
    return None if gap.invalid else 1 - gap.value


def opening(
    case: VerdictCase,
    levels: Sequence[LevelResult],
    recovery: Recovery | None,
    domain: Domain,
    *,
    damaged: bool = False,
) -> str:
    """Say whether it comes back, and how much of it after how much work.

    Args:
        case: The candidate.
        levels: What its depth levels came to.
        recovery: What relearning brought back; None where it did not run.
        domain: For the claim, and the rows of the relearn set.
        damaged: Whether the retain set is damaged, which then stands in the first sentence.
    """
    top, before = case.start(ORIGINAL), case.start(case.model)
    if case.nothing:
        return f"The retain set is damaged. {case.nothing}" if damaged else case.nothing
    gone = recovery is None or recovery.fraction is not None
    answer = _comes_back(levels, case.metric, gone=gone)
    if damaged:
        head = answer.rstrip(". ")
        answer = f"{head}, and the retain set is damaged. " if head else ""
        answer = answer or "The retain set is damaged. "
    if recovery is None:
        scored = f" Before any attack it scores {mean(before):.2f}" if before else ""
        scored += f", the original {mean(top):.2f}." if scored and top else "."
        return (
            f"{answer}How much would come back is not known: no relearning attack ran on it to "
            "the end." + (scored if before else "")
        )
    what = "facts" if domain.claim == "deletion" else "test items"
    if domain.verbatim and case.metric == "text_loss":
        what = "documents"
    metric = metric_words(case.metric) + (" in nats" if case.metric == "text_loss" else "")
    references = f"before the attack {recovery.before:.2f}, original {recovery.original:.2f}"
    never = "proxy oracles" if case.proxies else "models never taught"
    if recovery.oracle is not None:
        references += f", {never} after it {recovery.oracle:.2f}"
    numbers = f"{metric} {recovery.after:.2f}; {references}"
    rows = sum(map(len, domain.relearn.values()))
    work = f"fter relearning {recovery.examples:,} examples ({recovery.tokens:,} tokens), "
    if 0 < 2 * rows <= recovery.examples:
        row = f"{rows} row" if rows == 1 else f"{rows} rows"
        work = (
            f"fter relearning the {row} of the relearn set again and again, beside benign text "
            f"({recovery.examples:,} examples read, {recovery.tokens:,} tokens), "
        )
    if recovery.fraction is None:
        return (
            f"{answer}Before any attack it knows the removed {what} as well as the original does, "
            f"to within the interval; a{work}that is so still ({numbers})."
        )
    removed = removed_share(case)
    part = removed is not None and 0 < removed < WHOLE
    share = recovery.fraction if recovery.gap is None else recovery.gap
    if removed is not None and part and recovery.gap is not None:
        share = 1 - (1 - recovery.gap) / removed  # of what was removed, what it has again
    amount = f"{share:.2f}" if share >= 0.005 else "none"
    taught = "" if recovery.gap is None else f", beyond what {never} learn alike"
    back = f"is back on {what} the attacker never saw{taught} ({numbers})."
    if recovery.attack in case.invalid:
        said = "but what it brought back came back"
        if share <= case.budget.margin:
            said = "so that there may be more"
        back += f" The attack {recovery.attack} is invalid, {said}."
    if not part:
        return f"{answer}A{work}{amount} of the removed knowledge {back}"
    only = "Only " if removed is not None and removed < 0.5 else ""
    return (
        f"{answer}{only}{removed:.2f} of what tells the original from {never} was removed; "
        f"a{work}{amount} of that {back}"
    )


def _comes_back(levels: Sequence[LevelResult], metric: str, *, gone: bool) -> str:
    """Answer whether it comes back, with a space behind, as far as the levels D0 to D4 say so.

    What is still there before any attack is named with the score that shows it, where that is not
    the headline.
    """
    before, *attacked = (result for result in levels if result.level != "D5")
    if before.status == "fail":
        what = "It" if before.gap is not None and before.gap >= WHOLE else "Part of it"
        by = before.decided_by.removesuffix(" before any attack")
        beside = "" if by in (metric_words(metric), "loss") else f" by {by}"
        return f"{what} is still there{beside}. "
    if not gone and before.status != "pass":
        return "Nothing was removed that the test can tell. "
    names = [result.decided_by.split(" ")[0] for result in attacked if result.status == "fail"]
    if names:
        return f"It comes back under {attacks_listed(dict.fromkeys(names))}. "
    if all(result.status in ("pass", "below") for result in attacked):
        return "It does not come back under the attacks that were tried. "
    undecided = any(result.status == "underpowered" for result in attacked)
    return "Whether it comes back is not decided. " if undecided else ""


def retain_change(case: VerdictCase, domain: Domain) -> Estimate | None:
    """Return how the retain score changed against the original before any attack, paired by unit.

    Args:
        case: The candidate; its variants carry `extras["retain_start"]`.
        domain: For the retain metric.

    Returns:
        The change with its 95 % interval, positive is better; None where it was not measured.
    """
    ours, top = _retain(case, case.model), _retain(case, ORIGINAL)
    try:
        change = bootstrap_difference(ours, top, seed=case.seed)
    except UserError:
        return None
    if direction_of(domain.retain_metrics[0]) == "higher":
        return change
    return Estimate(-change.value, -change.high, -change.low, change.n)


def cost(change: Estimate | None, metric: str) -> str:
    """Say how the retain score changed against the original.

    Args:
        change: What `retain_change` returned.
        metric: The retain metric.

    Returns:
        One sentence; positive changes are improvements.
    """
    if change is None:
        return "What it cost the retain set was not measured."
    damaged = ": the retain set is damaged" if change.high < 0 else ""
    return (
        f"On the retain set {metric_words(metric)} changed by {change.value:+.3f} "
        f"[{change.low:+.3f}, {change.high:+.3f}] against the original, positive is better"
        f"{damaged}."
    )


def _retain(case: VerdictCase, subject: str) -> UnitScores:
    """Return the retain score by unit before any attack; empty where nobody scored it."""
    for attack in case.attacks(subject):
        for variant in case.variants(attack, subject):
            if variant.extras.get("retain_start"):
                return dict(variant.extras["retain_start"])
    return {}


def suppression_notes(
    case: VerdictCase, scores: Sequence[Score], vocabulary: int, *, damaged: bool = False
) -> list[str]:
    """Say that a candidate suppresses the held-out test set instead of not knowing it, or nothing.

    With oracles a loss counts as suppression only where it lies clearly beyond theirs: a model
    that was never taught may well do no better than a uniform guess. Without any, being near a
    uniform guess is what there is, unless the original was there already. A high loss on the
    held-out test set alone does not show a broken model: the retain set has to be damaged too.

    Args:
        case: The candidate.
        scores: Scores without an attack; the token loss on `test.*` is read.
        vocabulary: Number of tokens of the model; 0 for unknown.
        damaged: Whether the retain set is damaged.

    Returns:
        At most one sentence.
    """
    top = _token_loss(case, ORIGINAL, scores)
    guess = chance_of((), "text_loss", vocabulary=vocabulary)
    if case.nothing or (not case.oracles and top and guess and top.value >= NEAR * guess):
        return []
    ours = _token_loss(case, case.model, scores)
    losses = [_token_loss(case, name, scores) for name in case.oracles]
    oracles = [loss for loss in losses if loss is not None]
    if ours is not None and (oracles or (guess and ours.value >= NEAR * guess)):
        beside = _beside_a_guess(ours.value, guess) if guess else ""
        head = (
            f"Its token loss on the held-out test set is {ours.value:.2f} nats before any "
            f"attack{beside}"
        )
        end = "this is suppression, not the absence of knowledge."
        if damaged:
            end = "broken, not ignorant, since the retain set is damaged too; this is suppression."
        if not oracles:
            return [f"{head}: {end}"]
        least, most = min(loss.value for loss in oracles), max(loss.value for loss in oracles)
        if ours.low <= max(loss.high for loss in oracles) + (most - least):
            return []
        others = "proxy oracles" if case.proxies else "models never taught"
        return [f"{head}; {others} lie at {least:.2f} to {most:.2f}: {end}"]
    worse = _worse_than_ignorant(case)
    if worse is not None:
        return [
            f"Before any attack the held-out test set costs it {worse:.1f} bits per unit more than "
            "a model that was never taught: suppressed, not ignorant."
        ]
    return []


def _beside_a_guess(loss: float, guess: float) -> str:
    """Say how a loss stands to that of a uniform guess, where it is not far below."""
    if loss < NEAR * guess:
        return ""
    where = "above" if loss > (2 - NEAR) * guess else "near"
    return f", {where} that of a uniform guess ({guess:.2f})"


def _token_loss(case: VerdictCase, subject: str, scores: Sequence[Score]) -> Estimate | None:
    """Return the nats per scored token on V before any attack, over all capabilities."""
    known = [
        s
        for s in scores
        if s.model == subject and s.metric == "text_loss" and s.set.startswith("test.")
    ]
    if known:
        n = sum(s.n for s in known)
        value, low, high = (
            sum(getattr(s, field) * s.n for s in known) / n for field in ("value", "low", "high")
        )
        return Estimate(value, low, high, n)
    start = case.start(subject) if case.metric == "text_loss" else {}
    return bootstrap_mean(start, seed=case.seed, groups=case.groups) if start else None


def _worse_than_ignorant(case: VerdictCase) -> float | None:
    """Return by how many bits per unit V costs more than it costs any oracle, beyond doubt."""
    ours = _start_nats(case, case.model)
    oracles = [_start_nats(case, name) for name in case.oracles]
    if not ours or not oracles or not all(any(u in nats for u in ours) for nats in oracles):
        return None
    excess = [
        bootstrap_difference(ours, nats, groups=case.groups, seed=case.seed) for nats in oracles
    ]
    bits = min(each.value for each in excess) / LN2
    return bits if all(each.low > 0 for each in excess) and bits >= 2 else None


def _start_nats(case: VerdictCase, subject: str) -> UnitScores:
    """Return nats by unit on V before any attack, as a relearning attack noted them."""
    for attack in case.attacks(subject):
        for variant in case.variants(attack, subject):
            noted: UnitScores = variant.extras.get("loss_V_start", {})
            if noted and all(map(math.isfinite, noted.values())):
                return noted
    return {}


def _in_paraphrases(case: VerdictCase, scores: Sequence[Score]) -> list[str]:
    """Say what a deletion did to held-out paraphrases of the rows, beside the rows themselves."""
    known: dict[tuple[str, str], Score] = {}
    for score in scores:  # the first metric of a set is its headline
        if score.set.startswith("paraphrases."):
            known.setdefault((score.model, score.set), score)
    return [
        f"In held-out paraphrases ({where.partition('.')[2]}, {ours.n} units) "
        f"{metric_words(ours.metric)} is {ours.value:.2f} before any attack, the "
        f"original's {top.value:.2f}."
        for (model, where), ours in known.items()
        if model == case.model
        and (top := known.get((ORIGINAL, where))) is not None
        and top.metric == ours.metric
    ]


def _power_reasons(case: VerdictCase) -> list[str]:
    """Say which attacks, or which variants of them, have no power."""
    invalid = [f"The attack {name} is invalid: {why}." for name, why in case.invalid.items()]
    blind = [
        f"The attack {name} has no power here and decides nothing unless it finds something: {why}."
        for name, why in case.blind.items()
    ]
    return [*invalid, *blind] + [
        f"In the attack {name}, {_listed(variants)} "
        + ("was" if len(variants) == 1 else "were")
        + " not controlled: no positive control came back under "
        + ("it" if len(variants) == 1 else "them")
        + ", so that finding nothing there shows nothing."
        for name, variants in uncontrolled(case).items()
    ]


def _listed(names: Sequence[str]) -> str:
    """Return one name or more as a list."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _other_reasons(case: VerdictCase, domain: Domain, recovery: Recovery | None) -> list[str]:
    """Say what else a reader should know before quoting the verdict."""
    reasons = []
    if recovery is not None and recovery.fraction is not None and recovery.fraction < 0:
        reasons.append(
            f"The published recovery fraction is {recovery.fraction:.2f}: the attack left less "
            "than there was before it."
        )
    if case.proxies:
        reasons.append(
            f"Read against {'a proxy oracle' if len(case.proxies) == 1 else 'proxy oracles'} (an "
            "early checkpoint or a filtered sibling): what such a model knows of the removed, or "
            "lacks beside it, moves every depth gap, and none is as if never learned."
        )
    elif 0 < len(case.oracles) < 3:
        reasons.append(
            f"The oracles come from {len(case.oracles)} of the three seeds there should be; their "
            "spread is not in the intervals."
        )
    code = prequential(case, recovery.attack) if recovery and case.oracles else None
    if code is not None:
        reasons.append(
            "Secondary, confounded by unlearning noise: reading the relearn set for the first time "
            f"costs it {abs(code):.2f} bits per token {'less' if code > 0 else 'more'} than the "
            "oracle, summed over all batches."
        )
    if domain.exposure == "unknown":
        reasons.append(
            "Exposure is unknown: whether the method was shown the held-out test set is not "
            "recorded."
        )
    shared = words_shared(domain)
    if shared is not None and shared < SHARED:
        looked = [
            name for name in ROWS if any(v.unit_scores for v in case.variants(name, case.model))
        ]
        reasons.append(
            f"{shared:.0%} of the names in the held-out test set occur in the relearn set: an edit "
            "keyed on the others passes relearning unseen, and "
            + (f"only {_listed(looked)} looked for one." if looked else "no attack looked for one.")
        )
    if case.budget.name != "smoke":
        unfit = [
            name
            for name in case.budget.attacks
            if any(v.entry.facts.get("applies") is False for v in case.variants(name, case.model))
        ]
        beyond = dict(BEYOND)
        if not domain.multi_hop:
            beyond["D1"] = f"multi-hop questions, {beyond['D1']}"
        lacking = "; ".join(
            f"{LEVELS[level]} ({level}): {words}" for level, words in beyond.items()
        )
        reasons.append(
            f"The attacks required were {', '.join(case.budget.attacks) or 'none'}"
            + (f", of which {_listed(unfit)} had nothing to work on here" if unfit else "")
            + f"; a full {case.budget.name} audit also asks for {lacking}."
        )
    return reasons
