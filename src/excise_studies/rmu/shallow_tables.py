"""From the scores of `rmu-is-shallow` to its tables, its decision and its paragraph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from excise.evals.stats import (
    Estimate,
    bootstrap_difference,
    bootstrap_mean,
    holm,
    mcnemar,
    resampled_means,
)
from excise.record import StudyRow, StudyTable
from excise_studies.base import Units, pooled, row, share
from excise_studies.rmu.clear_stage import BARE

if TYPE_CHECKING:
    from excise_studies.rmu.rmu_is_shallow import RMUIsShallow

Scores = Mapping[int, Mapping[str, Any]]
"""By draw: `{arms, residual}`."""


@dataclass(frozen=True)
class Summary:
    """What goes into the result."""

    tables: tuple[StudyTable, ...]
    decision: str
    paragraph: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """Scores of all reported draws together."""

    scores: Scores

    @property
    def arms(self) -> list[str]:
        """Names of the arms, the bare one first."""
        return list(dict.fromkeys(n for s in self.scores.values() for n in s["arms"]))

    def units(self, arm: str, side: str, metric: str) -> Units:
        """Return one score by draw and unit."""
        return pooled({s: v["arms"][arm][side][metric] for s, v in self.scores.items()})

    def has(self, metric: str) -> bool:
        """Return whether the rows allowed a score."""
        return all(metric in v["arms"][BARE]["edited"] for v in self.scores.values())

    def back(self, arm: str, metric: str) -> Estimate:
        """Return the share of a score that clearing brings back; see the study's statistic."""
        bare = self.units(BARE, "edited", metric)
        sides = [self.units(arm, side, metric) for side in ("edited", "original")]
        if metric in ("coherence", "text_loss"):
            return share((bare, sides[0]), (bare, sides[1]))
        return share((sides[0], bare), (sides[1], bare))

    def control(self, arm: str) -> bool:
        """Return whether an arm is a control."""
        return bool(next(iter(self.scores.values()))["arms"][arm]["facts"]["control"])


def summarise(
    study: RMUIsShallow, scores: Scores, chosen: str, relearned: Mapping[str, Any]
) -> Summary:
    """Return tables, decision and paragraph.

    Args:
        study: Margins.
        scores: What clearing gave, by reported draw.
        chosen: The arm chosen on `dev`.
        relearned: What relearning gave, by treatment and draw.
    """
    reader = Reader(scores)
    key = "exact_match" if reader.has("exact_match") else "text_loss"
    p = tests(reader, key)
    back = reader.back(chosen, key)
    parts = split(relearned, back, text=key == "text_loss")
    controls = {arm: reader.back(arm, key) for arm in reader.arms if reader.control(arm)}
    tables = (
        _residual(scores),
        _arms(reader, key, p),
        _by_draw(reader, chosen, key),
        _relearned(relearned),
        StudyTable(
            title="What the rest is",
            note="Shares of the original's knowledge under the same treatment, over the oracle's.",
            rows=tuple(row(chosen, name, value) for name, value in parts.items()),
        ),
    )
    decision = decide(study, back, parts)
    return Summary(
        tables,
        decision,
        _paragraph(reader, chosen, key, p, back, parts, controls, decision),
        (f"clearing chosen on dev: {chosen}",),
    )


def tests(reader: Reader, key: str) -> dict[str, float]:
    """Return by arm the p-value of clearing against not clearing, corrected after Holm.

    Right and wrong answers by McNemar's exact test, losses by the sign of paired differences.
    """
    bare = reader.units(BARE, "edited", key)
    arms = [arm for arm in reader.arms if arm != BARE]
    raw = []
    for arm in arms:
        after = reader.units(arm, "edited", key)
        if key == "text_loss":
            after = {unit: float(after[unit] < bare[unit]) for unit in bare}
            raw.append(mcnemar(after, {unit: 1 - value for unit, value in after.items()}))
        else:
            raw.append(mcnemar(after, bare))
    return dict(zip(arms, holm(raw), strict=True))


def split(
    relearned: Mapping[str, Mapping[int, Mapping[str, Any]]], back: Estimate, *, text: bool
) -> dict[str, Estimate]:
    """Split what clearing does not bring back into what relearning reaches and what is gone.

    Args:
        relearned: By treatment and draw.
        back: Share that clearing alone brings back.
        text: Whether V is scored by loss, lower being better.

    Returns:
        Shares by name; those that need the oracle only where there is one.
    """

    def after(treatment: str) -> Units:
        return pooled({seed: found["V"][1] for seed, found in relearned[treatment].items()})

    def reached(kind: str) -> Estimate:
        low = after(f"oracle{kind}") if f"oracle{kind}" in relearned else None
        top, bottom = after(f"edited{kind}"), after(f"original{kind}")
        if low is None:
            before = pooled({s: f["V"][0] for s, f in relearned["edited"].items()})
            low = before
        pairs = ((low, top), (low, bottom)) if text else ((top, low), (bottom, low))
        return share(*pairs)

    bare, cleared = reached(""), reached(", cleared")
    out = {
        "back by clearing alone": back,
        "back by relearning alone": bare,
        "back by clearing and relearning": cleared,
        "cleared incompletely": _minus(cleared, back),
        "gone": Estimate(1 - cleared.value, 1 - cleared.high, 1 - cleared.low, cleared.n),
    }
    return out


def _minus(one: Estimate, two: Estimate) -> Estimate:
    """Return a difference of shares of other treatments, with independent intervals."""
    value = one.value - two.value
    half = math.hypot(one.half, two.half)
    return Estimate(value, value - half, value + half, one.n)


def decide(study: RMUIsShallow, back: Estimate, parts: Mapping[str, Estimate]) -> str:
    """Return what the statistic says under the margins."""
    if math.isnan(back.value):
        return "void: the removal left nothing to bring back"
    if back.low > study.margin:
        first = f"shallow: R is above {study.margin:g}"
    elif back.high < study.margin:
        first = f"not shallow: R is below {study.margin:g}"
    else:
        first = f"undecided: the interval of R holds {study.margin:g}"
    gone = parts["gone"]
    if math.isnan(gone.value):
        return first
    if gone.low > study.gone_margin:
        return f"{first}; some knowledge is gone: G is above {study.gone_margin:g}"
    if gone.high < study.gone_margin:
        return f"{first}; the rest was cleared incompletely: G is below {study.gone_margin:g}"
    return f"{first}; whether the rest is gone is undecided: G's interval holds " + (
        f"{study.gone_margin:g}"
    )


def _residual(scores: Scores) -> StudyTable:
    """Return norms and the likeness of changes by block, averaged over draws."""
    blocks = len(next(iter(scores.values()))["residual"])
    rows = []
    for i in range(blocks):
        found = [s["residual"][i] for s in scores.values()]
        rows += [
            StudyRow(
                condition=f"block {i}",
                metric=m,
                value=sum(f[m] for f in found) / len(found),
                n=len(found),
            )
            for m in found[0]
        ]
    return StudyTable(
        title="The residual stream on dev rows",
        note="Means over tokens but the first of each row, then over draws.",
        rows=tuple(rows),
    )


METRICS = {
    "coherence": "coherence, nats",
    "text_loss": "text loss",
    "exact_match": "exact match",
    "multiple_choice": "multiple choice",
    "retain_loss": "retain loss",
    "retain_exact_match": "retain exact match",
}
"""Scores of the table of arms, and how they are called."""


def _arms(reader: Reader, key: str, p: Mapping[str, float]) -> StudyTable:
    """Return every arm: scores, the original's under the same clearing, shares, p-values."""
    rows: list[StudyRow] = []
    metrics = [m for m in METRICS if reader.has(m)]
    original = {m: reader.units(BARE, "original", m) for m in metrics}
    rows += [row("original", METRICS[m], bootstrap_mean(v)) for m, v in original.items()]
    for arm in reader.arms:
        for m in metrics:
            rows.append(row(arm, METRICS[m], bootstrap_mean(reader.units(arm, "edited", m))))
        if arm == BARE:
            continue
        paired = reader.units(arm, "original", key)
        rows.append(row(arm, f"original alike, {METRICS[key]}", bootstrap_mean(paired)))
        rows.append(row(arm, "coherence back", reader.back(arm, "coherence")))
        rows.append(row(arm, "knowledge back", reader.back(arm, key)))
        rows.append(StudyRow(condition=arm, metric="p after Holm", value=p[arm], n=len(paired)))
    return StudyTable(
        title="Clearing, all reported draws",
        note=(
            "On V unless retain is named. 'Back' is read against the original cleared alike; "
            "controls are called split halves and random. p: McNemar (losses: sign test) "
            "against not clearing, Holm over all arms."
        ),
        rows=tuple(rows),
    )


def _by_draw(reader: Reader, chosen: str, key: str) -> StudyTable:
    """Return the chosen arm, draw by draw."""
    rows: list[StudyRow] = []
    for seed, found in reader.scores.items():
        one = Reader({seed: found})
        rows += [
            row(chosen, "coherence back", one.back(chosen, "coherence"), seed),
            row(chosen, "knowledge back", one.back(chosen, key), seed),
        ]
        for m in ("retain_loss", "retain_exact_match"):
            if one.has(m):
                sides = [one.units(arm, "edited", m) for arm in (chosen, BARE)]
                name = f"{METRICS[m]}, change"
                rows.append(row(chosen, name, bootstrap_difference(*sides), seed))
    return StudyTable(title="The chosen clearing, draw by draw", rows=tuple(rows))


def _relearned(relearned: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> StudyTable:
    """Return V and retain before and after relearning T."""
    rows = []
    for treatment, by_seed in relearned.items():
        for what in ("V", "retain"):
            for i, when in enumerate(("before", "after")):
                units = pooled({seed: found[what][i] for seed, found in by_seed.items()})
                rows.append(row(treatment, f"{what}, {when}", bootstrap_mean(units)))
        rates = [found["lr"] for found in by_seed.values()]
        rows.append(StudyRow(condition=treatment, metric="rate", value=rates[0], n=len(rates)))
    return StudyTable(
        title="Relearning T, cleared or not",
        note="The headline score of V and of retain; the rate was chosen on dev.",
        rows=tuple(rows),
    )


def said(value: Estimate) -> str:
    """Return an estimate in words."""
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _paragraph(
    reader: Reader,
    chosen: str,
    key: str,
    p: Mapping[str, float],
    back: Estimate,
    parts: Mapping[str, Estimate],
    controls: Mapping[str, Estimate],
    decision: str,
) -> str:
    """Return the result in words."""

    def mean(arm: str, side: str, metric: str) -> float:
        return float(resampled_means([reader.units(arm, side, metric)], samples=1)[0][0])

    name = METRICS[key]
    best = max(controls, key=lambda arm: controls[arm].value) if controls else ""
    draws = "1 draw" if len(reader.scores) == 1 else f"{len(reader.scores)} draws"
    words = [
        f"Over {draws} the {name} on V was {mean(BARE, 'original', key):.2f} in "
        f"the original, {mean(BARE, 'edited', key):.2f} after RMU and "
        f"{mean(chosen, 'edited', key):.2f} after clearing ({chosen}; the original cleared alike: "
        f"{mean(chosen, 'original', key):.2f}; p after Holm {p[chosen]:.2g}).",
        f"R = {said(back)} of the loss came back; plain text has coherence and knowledge in one."
        if key == "text_loss"
        else f"Of coherence {said(reader.back(chosen, 'coherence'))} came back, of knowledge "
        f"R = {said(back)}.",
    ]
    if best:
        words.append(f"The best of {len(controls)} controls ({best}) gave {said(controls[best])}.")
    cost = [mean(arm, "edited", "retain_loss") for arm in (BARE, chosen)]
    words.append(f"The loss on retain went from {cost[0]:.2f} to {cost[1]:.2f}.")
    words.append(
        f"Relearning T brought back {said(parts['back by relearning alone'])} without clearing and "
        f"{said(parts['back by clearing and relearning'])} with it, so that "
        f"{said(parts['cleared incompletely'])} had been cleared incompletely and "
        f"G = {said(parts['gone'])} is gone."
    )
    return " ".join([*words, f"Decision: {decision}."])
