"""What a release must meet, read from the record alone: `D3, recovery<=0.2@1M-tokens`.

A requirement is a list of conditions, separated by commas. Each ends as met, missed or
inconclusive:

- `D3`: the depth levels D0 to D3 all passed. Without an oracle these are read against chance,
  matched fresh text or the attacks' controls, and count; D4 and D5 cannot be passed.
- `recovery<=0.2@1M-tokens`: no attack at any of its rates brought back more than 0.2 of what was
  removed (published fraction, held-out test set) at any point of its curve up to a million tokens,
  and relearning went on for that many.
- `gap<=0.1`: no depth gap to the oracle on D0 to D4 exceeds 0.1, upper end of its interval.
- `bits<=0.5`: the weights save an attacker at most 0.5 bits per unit, upper end of the interval.
- `retain>=-0.01`: the retain score fell by at most 0.01 against the original, lower end of its
  interval, positive is better whatever the score's direction; `retain[text_loss]` names another
  metric than the headline.
- `adjacent>=-0.05`: the same on the adjacent set.

This module imports neither torch nor numpy.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from excise.core.errors import UserError, nearest
from excise.record.entry import LEVELS, Estimate, Level
from excise.record.measured import (
    Recovered,
    Scored,
    attacks_on,
    bits_of,
    change_of,
    differences,
    estimate_of,
    failed_attacks,
    is_relearning,
    model_names,
    on_held_out,
    score_of,
    verdict_on,
    was_removed,
    worst_recovery,
)
from excise.record.schema import LevelResult, Record, Verdict

MET, MISSED, INCONCLUSIVE, FAILED = 0, 3, 4, 1
"""Exit codes: all met; some missed; none missed and some undecided; an attack ended in an error."""

Status = Literal["met", "missed", "inconclusive"]

SETS: dict[str, Scored] = {"retain": "retain_test", "adjacent": "adjacent_test"}
UNDECIDED = "the interval holds both sides of the bound; more test units would decide"
FORMS = "D0 to D5, recovery<=X@N-tokens, gap<=X, bits<=X, retain>=X, adjacent>=X"

_CONDITION = re.compile(
    r"(?P<name>[a-z]+)(?:\[(?P<metric>[\w.-]+)\])?\s*(?P<sign><=|>=|==|<|>|=)\s*(?P<bound>[^@\s]+)"
    r"(?:\s*@\s*(?P<tokens>\S.*))?"
)
_TOKENS = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGbB]?)[\s-]*tokens?")
_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


@dataclass(frozen=True)
class Condition:
    """One condition of a requirement.

    Attributes:
        text: As the user wrote it.
        kind: `level`, `recovery`, `gap`, `bits`, `retain` or `adjacent`.
        bound: The number it is held to; 0 for a level.
        level: The depth level.
        tokens: Tokens of the attacker up to which recovery counts.
        metric: Metric of a retain or adjacent score; empty for the headline.
    """

    text: str
    kind: str
    bound: float = 0.0
    level: Level = "D0"
    tokens: int = 0
    metric: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one condition came to for one model, with one sentence that says why."""

    model: str
    condition: str
    status: Status
    reason: str


def parse_requirement(text: str) -> tuple[Condition, ...]:
    """Read a requirement.

    Args:
        text: Conditions separated by commas.

    Raises:
        UserError: If there is no condition in it, or one that is not known.
    """
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise UserError(f"the requirement is empty; write conditions such as {FORMS}")
    return tuple(_condition(part) for part in parts if part)


def _condition(text: str) -> Condition:
    """Read one condition."""
    level = text.upper()
    if level in LEVELS:
        return Condition(text, "level", level=level)
    match = _CONDITION.fullmatch(text)
    signs = {"recovery": "<=", "gap": "<=", "bits": "<=", "retain": ">=", "adjacent": ">="}
    if match is None or match["name"] not in signs:
        word = re.split(r"\W", text)[0]
        known = nearest(word or text, [*LEVELS, *signs])
        raise UserError(f"'{text}' is no condition; {known} (write {FORMS})")
    name, metric, tokens = match["name"], match["metric"] or "", match["tokens"]
    if match["sign"] != signs[name]:
        raise UserError(f"'{text}': {name} is bounded by {signs[name]}; write {name}{signs[name]}X")
    if metric and name not in SETS:
        raise UserError(f"'{text}': only retain and adjacent take a metric in brackets")
    try:
        bound = float(match["bound"])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise UserError(f"'{text}': '{match['bound']}' is no number; write one such as 0.2")
    if name == "recovery":
        return Condition(text, name, bound, tokens=_tokens(text, tokens))
    if tokens:
        raise UserError(f"'{text}': only recovery takes a number of tokens behind '@'")
    return Condition(text, name, bound, metric=metric)


def _tokens(text: str, written: str | None) -> int:
    """Read how many tokens an attacker has."""
    match = _TOKENS.fullmatch(written or "")
    count = round(float(match[1]) * _SCALE[match[2].lower()]) if match else 0
    if count < 1:
        raise UserError(
            f"'{text}': say up to how many tokens of the attacker, as in recovery<=0.2@1M-tokens"
        )
    return count


def needs_attack(conditions: Sequence[Condition]) -> str:
    """Return the first condition that nothing but an audit can meet, or nothing."""
    return next((c.text for c in conditions if c.kind not in SETS), "")


def of_record(record: Record) -> str:
    """Return the requirement that a run was given, or nothing."""
    audit = record.config.get("audit")
    asked = audit.get("require") if isinstance(audit, dict) else ""
    return asked if isinstance(asked, str) else ""


def models_of(record: Record, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the edited models that are held to a requirement: those asked for, else every one.

    A model made by data filtering, which a run takes as its measured null, is one of them: it lies
    beside the others and may ship as they may.

    Raises:
        UserError: If the record holds no edited model, or none of a name that is asked for.
    """
    names = model_names(record)
    if not names:
        raise UserError("the record holds no edited model; name the folder of a removal or audit")
    for name in asked:
        if name not in names:
            raise UserError(f"the record has no model '{name}'; {nearest(name, names)}")
    return tuple(asked) or names


def check(
    record: Record, conditions: Sequence[Condition], models: Sequence[str]
) -> tuple[Outcome, ...]:
    """Hold models to a requirement.

    Args:
        record: The record.
        conditions: The requirement.
        models: Names of edited models.

    Returns:
        One outcome per model and condition.

    Raises:
        UserError: If a condition names a metric that the record does not know.
    """
    judges: dict[str, Callable[[Record, str, Condition], tuple[Status, str]]] = {
        "level": _level,
        "recovery": _recovery,
        "gap": _gap,
        "bits": _bits,
        "retain": _change,
        "adjacent": _change,
    }
    return tuple(
        Outcome(model, condition.text, *judges[condition.kind](record, model, condition))
        for model in models
        for condition in conditions
    )


def exit_code(record: Record, outcomes: Sequence[Outcome], models: Sequence[str] = ()) -> int:
    """Return the exit code of a release: a missed condition first, then an attack that failed.

    Args:
        record: The record.
        outcomes: What its conditions came to; none where none were asked.
        models: The models that were asked about; all when empty.
    """
    statuses = {outcome.status for outcome in outcomes}
    if "missed" in statuses:
        return MISSED
    if failed_attacks(record, models):
        return FAILED
    return INCONCLUSIVE if "inconclusive" in statuses else MET


def told(record: Record, outcomes: Sequence[Outcome], models: Sequence[str] = ()) -> str:
    """Return what conditions came to, as text of 80 columns for any terminal.

    Args:
        record: The record.
        outcomes: What its conditions came to.
        models: The models that were asked about; all when empty.

    Returns:
        A line each, under the model's name; empty where nothing was asked and nothing failed.
    """
    lines: list[str] = []
    for model in dict.fromkeys(outcome.model for outcome in outcomes):
        lines.append(model)
        for outcome in outcomes:
            if outcome.model == model:
                text = f"{outcome.condition}: {outcome.reason}"
                head, more = f"  {outcome.status:<13} ", " " * 16
                lines += textwrap.wrap(text, 80, initial_indent=head, subsequent_indent=more)
    for reason in failed_attacks(record, models):
        lines += textwrap.wrap(f"failed: {reason}", 80, subsequent_indent="  ")
    if outcomes:
        met = sum(outcome.status == "met" for outcome in outcomes)
        lines.append(f"{met} of {len(outcomes)} conditions met")
    return "\n".join(lines)


def _named(code: Level) -> str:
    """Return a level by its words and code."""
    return f"{LEVELS[code]} ({code})"


def _levels(verdict: Verdict | None) -> dict[Level, LevelResult]:
    return {result.level: result for result in verdict.levels} if verdict else {}


def _level(record: Record, model: str, condition: Condition) -> tuple[Status, str]:
    """Hold a model to a depth level and all lower ones."""
    results = _levels(verdict_on(record, model))
    if not results:
        return "inconclusive", "Nobody judged this model; run excise audit on it."
    codes = list(LEVELS)[: list(LEVELS).index(condition.level) + 1]
    words = {"fail": "failed", "below": "below the oracle", "underpowered": "underpowered"}
    for status, word in words.items():
        for code in codes:
            if code in results and results[code].status == status:
                ending: Status = "inconclusive" if status == "underpowered" else "missed"
                return ending, f"{_named(code)}: {word}. {results[code].reason}".rstrip()
    for code in codes:
        if code not in results or results[code].status != "pass":
            why = results[code].reason if code in results else ""
            return "inconclusive", f"{_named(code)}: not tested. {why}".rstrip()
    against = sorted({results[code].against for code in codes} - {"oracle", "nothing"})
    beside = f", compared with {' and '.join(against)}" if against else ""
    return "met", f"All levels up to {_named(condition.level)} passed{beside}."


def _recovery(record: Record, model: str, condition: Condition) -> tuple[Status, str]:
    """Hold a model to how much comes back up to a number of tokens."""
    variants = [a for a in attacks_on(record, model) if on_held_out(a)]
    if not variants:
        return "inconclusive", "No attack on this model was scored on the held-out test set."
    if not was_removed(record, model):
        return _nothing_removed(record)
    worst = worst_recovery(record, model, condition.tokens, chosen=False)
    if worst is not None and worst.fraction.value > condition.bound:
        return "missed", _came_back(worst)
    relearning = [a for a in variants if is_relearning(a)]
    by_name = {a.name: [b for b in relearning if b.name == a.name] for a in relearning}
    for name, attacks in by_name.items():
        if all(a.status == "invalid" for a in attacks):
            return "inconclusive", f"The attack {name} is invalid: {attacks[0].reason}."
    reached = max((a.curve[-1].tokens for a in relearning if a.status == "ok"), default=0)
    if worst is None or not relearning:
        return "inconclusive", "No relearning attack that counts ran on this model to its end."
    if reached < condition.tokens:
        return "inconclusive", (
            f"No relearning went on to {condition.tokens:,} tokens: the largest used {reached:,}. "
            f"{_came_back(worst)} Audit it at a larger budget."
        )
    return "met", _came_back(worst)


def _came_back(back: Recovered) -> str:
    amount = f"{back.fraction.value:.3g} of what was removed"
    return f"At most {amount} was back, after {back.tokens:,} tokens under {back.attack}."


def _nothing_removed(record: Record) -> tuple[Status, str]:
    """Say that a candidate knows what the original does: missed, unless there was nothing."""
    top = score_of(record, "original", "test")
    if top is not None and top.chance is not None:
        above = top.low > top.chance if top.direction == "higher" else top.high < top.chance
        if not above:
            return "inconclusive", "The original is at chance: there was nothing to remove."
    return "missed", (
        "Before any attack it knows the held-out test set as well as the original does, to within "
        "the interval: nothing was removed."
    )


def _bounded(
    value: float, low: float | None, high: float | None, bound: float
) -> tuple[Status, str]:
    """Hold a number with its interval to an upper bound; return the status and how it stands."""
    low, high = (value if end is None or not math.isfinite(end) else end for end in (low, high))
    shown = f"{value:.3g} [{low:.3g}, {high:.3g}]"
    if high <= bound:
        return "met", shown
    return ("missed", shown) if low > bound else ("inconclusive", f"{shown}: {UNDECIDED}")


def _gap(record: Record, model: str, condition: Condition) -> tuple[Status, str]:
    """Hold a model to its largest depth gap to the oracle on D0 to D4."""
    results = _levels(verdict_on(record, model))
    outcomes: list[tuple[float, Status, str]] = []
    lacking: list[str] = []
    for code in list(LEVELS)[:-1]:
        result = results.get(code)
        if result is None or result.gap is None or result.against != "oracle":
            lacking.append(_named(code))
            continue
        status, shown = _bounded(result.gap, result.low, result.high, condition.bound)
        outcomes.append((result.gap, status, f"{_named(code)}: depth gap {shown}."))
        invalid = [
            a.name
            for a in attacks_on(record, model)
            if a.level == code and a.decisive and a.status == "invalid"
        ]
        if invalid and status != "missed":
            why = f"{_named(code)}: the attack {invalid[0]} is invalid."
            outcomes[-1] = (result.gap, "inconclusive", why)
    for wanted in ("missed", "inconclusive"):
        worst = max((o for o in outcomes if o[1] == wanted), default=None)
        if worst is not None:
            return worst[1], worst[2]
    if lacking:
        return "inconclusive", f"No depth gap to an oracle was measured for {lacking[0]}."
    return max(outcomes)[1:]


def _bits(record: Record, model: str, condition: Condition) -> tuple[Status, str]:
    """Hold a model to its residual bits."""
    verdict = verdict_on(record, model)
    if verdict is None or verdict.residual_bits is None:
        return "inconclusive", "Residual bits were not measured; they need an oracle."
    status, shown = _bounded(
        verdict.residual_bits, verdict.residual_low, verdict.residual_high, condition.bound
    )
    return status, f"Residual bits per unit, minus the oracle's: {shown}."


def _change(record: Record, model: str, condition: Condition) -> tuple[Status, str]:
    """Hold a model to how a score that was to stay changed, by its interval."""
    where = SETS[condition.kind]
    metrics = list(dict.fromkeys(s.metric for s in record.scores if s.set.startswith(where)))
    if condition.metric and metrics and condition.metric not in metrics:
        known = nearest(condition.metric, metrics)
        raise UserError(f"'{condition.text}': no {condition.kind} score of that name; {known}")
    change = change_of(record, model, where, condition.metric)
    if change is None:
        return "inconclusive", f"The {condition.kind} score of this model was not measured."
    score = score_of(record, model, where, condition.metric)
    metric = score.metric.replace("_", " ") if score else ""
    status, shown = _bounded(-change.value, -change.high, -change.low, -condition.bound)
    ends = f"{change.value:+.3g} [{change.low:+.3g}, {change.high:+.3g}]"
    undecided = f" {UNDECIDED.capitalize()}." if UNDECIDED in shown else ""
    return status, (
        f"On the {condition.kind} set {metric} changed by {ends} against the original over "
        f"{change.n} units, positive is better.{undecided}"
    )


def regressions(old: Record, new: Record, models: Sequence[str]) -> tuple[Outcome, ...]:
    """Say whether models are worse than an older record says of them, beyond the intervals.

    Args:
        old: The older record.
        new: The record of the release.
        models: Its models; one alone is held against the only one of the older record.

    Returns:
        One outcome per model and measurement that the older record holds.

    Raises:
        UserError: If the two cannot be read against each other, or the older one lacks a model.
    """
    apart = differences(old, new)
    if apart:
        raise UserError(
            f"the baseline cannot be compared: it differs in {'; '.join(apart)}; make it again "
            "with the same data, budget and version"
        )
    known = model_names(old)
    outcomes = []
    for model in models:
        before = known[0] if len(known) == len(models) == 1 else model
        if before not in known:
            raise UserError(f"the baseline has no model '{model}'; {nearest(model, known)}")
        outcomes += [
            Outcome(model, f"no worse: {what}", status, reason)
            for what, status, reason in _regressed(old, before, new, model)
        ]
    return tuple(outcomes)


def _regressed(
    old: Record, before: str, new: Record, model: str
) -> Iterator[tuple[str, Status, str]]:
    """Yield every measurement of the older record, with what became of it."""
    levels, then = _levels(verdict_on(new, model)), _levels(verdict_on(old, before))
    for code, result in then.items():
        if result.status == "pass":
            now = levels[code].status if code in levels else "untested"
            status = {"pass": "met", "fail": "missed"}.get(now, "inconclusive")
            word = {"pass": "passes now too", "fail": "fails now"}.get(now, f"is {now} now")
            yield _named(code), cast(Status, status), f"It passed in the baseline and {word}."
    a, b = worst_recovery(old, before), worst_recovery(new, model)
    if was_removed(old, before) and not was_removed(new, model):
        yield "recovery", *_nothing_removed(new)
    elif a is not None:
        yield "recovery", *_compared(a.fraction, b.fraction if b else None, 1)
    yield from _numbers(old, before, new, model)


def _numbers(
    old: Record, before: str, new: Record, model: str
) -> Iterator[tuple[str, Status, str]]:
    """Yield bits and scores."""
    a, b = bits_of(verdict_on(old, before)), bits_of(verdict_on(new, model))
    if a is not None:
        yield "residual bits", *_compared(a, b, 1)
    for where in ("test", "retain_test", "adjacent_test"):
        score = score_of(old, before, where)
        first = estimate_of(score)
        if score is None or first is None:
            continue
        second = estimate_of(score_of(new, model, where, score.metric))
        better = 1 if score.direction == "lower" else -1
        way = -better if where == "test" else better
        name = f"{where.replace('_', ' ')} {score.metric}"
        yield name, *_compared(first, second, way)


def _compared(old: Estimate, new: Estimate | None, worse: int) -> tuple[Status, str]:
    """Hold a number to an older one; `worse` is 1 where more is worse, -1 where less is."""
    if new is None:
        return "inconclusive", "It was measured in the baseline and is not here."
    beyond = new.low > old.high if worse == 1 else new.high < old.low
    shown = [f"{e.value:.3g} [{e.low:.3g}, {e.high:.3g}]" for e in (old, new)]
    return "missed" if beyond else "met", f"{shown[0]} in the baseline, {shown[1]} now."
