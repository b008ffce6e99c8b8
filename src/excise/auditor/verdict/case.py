"""One candidate among all results of an audit, and how scores are read out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from excise.auditor.base import AttackResult, Budget, VariantResult
from excise.auditor.verdict.rails import Units
from excise.record import Direction

Results = Mapping[tuple[str, str], AttackResult]
"""Results by attack and subject."""


@dataclass(frozen=True)
class Case:
    """What a verdict about one candidate reads.

    Attributes:
        arm: Name of the candidate among the subjects.
        results: Results by attack and subject.
        budget: How hard the attacker tried.
        oracles: Names of the oracles among the subjects.
        metric: Metric of V.
        direction: Which way is more knowledge.
        chance: Score of a model that knows nothing; None where unknown.
        groups: Group of each unit that has one.
        powerless: Why an attack has no power, by attack; those with power are missing.
        seed: Seed of all bootstraps.
    """

    arm: str
    results: Results
    budget: Budget
    oracles: tuple[str, ...] = ()
    metric: str = "exact_match"
    direction: Direction = "higher"
    chance: float | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    powerless: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def result(self, attack: str, subject: str) -> AttackResult | None:
        """Return what an attack did to a subject; None where it did not run."""
        return self.results.get((attack, subject))

    def attacks(self, subject: str | None = None) -> tuple[str, ...]:
        """Return the names of the attacks on a subject, by default the candidate, in order."""
        wanted = subject or self.arm
        return tuple(attack for attack, name in self.results if name == wanted)

    def level(self, attack: str) -> str:
        """Return the level an attack belongs to, as its arms say."""
        found = next((r for (a, _), r in self.results.items() if a == attack and r.variants), None)
        return found.variants[0].entry.level if found else ""

    def chosen(self, attack: str, subject: str) -> tuple[VariantResult, ...]:
        """Return the arms of an attack that decide on a subject: one per attacker seed."""
        result = self.result(attack, subject)
        if result is None:
            return ()
        arms = [result.variants[i] for i in result.chosen]
        return tuple(a for a in arms if a.unit_scores and a.entry.status in ("ok", "invalid"))

    def end(self, attack: str, subject: str, at: int = -1) -> list[Units]:
        """Return V by unit at the end of an attack (or at checkpoint `at`), by attacker seed."""
        chosen = self.chosen(attack, subject)
        return [a.unit_scores[at] for a in chosen if -len(a.unit_scores) <= at < len(a.unit_scores)]

    def start(self, subject: str) -> Units:
        """Return V by unit before any attack; empty where nobody scored it.

        Of all first checkpoints the one with most units is taken.
        """
        best: Units = {}
        for (_, name), result in self.results.items():
            if name != subject:
                continue
            for arm in result.variants:
                scored = arm.entry.scored_on == "test" and arm.unit_scores
                if scored and len(arm.unit_scores[0]) > len(best):
                    best = arm.unit_scores[0]
        return best


def averaged(units: Sequence[Units]) -> Units:
    """Return the mean by unit over mappings, of their common units."""
    if not units:
        return {}
    common = [u for u in units[0] if all(u in m for m in units[1:])]
    return {u: sum(m[u] for m in units) / len(units) for u in common}


def mean(units: Units) -> float:
    """Return the mean over units, NaN for none."""
    return sum(units.values()) / len(units) if units else float("nan")
