"""What a verdict over several capabilities comes to for each of them.

The levels are decided over all test units together; a capability that came back whole can hide
behind others that did not. Shown beside them, deciding nothing: each has a part of the units.
"""

from __future__ import annotations

from excise.auditor.base import ORIGINAL
from excise.auditor.evaluation_set import UnitScores
from excise.auditor.verdict.reference import VerdictCase, averaged, depth_gap, mean
from excise.data.domain import Domain


def by_capability(case: VerdictCase, domain: Domain, attack: str) -> list[str]:
    """Return one sentence with the scores of every capability; nothing where there is one.

    Args:
        case: The candidate with all results.
        domain: Its test units by capability.
        attack: The attack whose end is shown; empty for the scores before any alone.
    """
    if len(domain.test) < 2:
        return []
    parts = []
    for name, rows in domain.test.items():
        units = {row.unit for row in rows}

        def mine(scores: UnitScores, units: set[str] = units) -> UnitScores:
            return {unit: value for unit, value in scores.items() if unit in units}

        top, before = mine(case.start(ORIGINAL)), mine(case.start(case.model))
        if not top or not before:
            continue
        words = f"{name} {mean(top):.2f} -> {mean(before):.2f}"
        ours = [mine(end) for end in case.end(attack, case.model)] or [before]
        if ours != [before]:
            words += f", {mean(averaged(ours)):.2f} after {attack}"
        ends = [mine(averaged(case.end(attack, oracle))) for oracle in case.oracles]
        starts = [mine(case.start(oracle)) for oracle in case.oracles]
        ends = ends if all(ends) else starts
        if ends and all(ends):
            gap = depth_gap(
                ours, ends, top, oracles_start=starts, groups=case.groups, seed=case.seed
            )
            share = f"depth gap {gap.value:.2f} [{gap.low:.2f}, {gap.high:.2f}]"
            share = "not told apart from the original" if gap.invalid else share
            whose = "proxy oracle" if case.proxies else "never taught"
            words += f" ({whose} {mean(averaged(ends)):.2f}; {share})"
        parts.append(f"{words}, {len(before)} units")
    metric = case.metric.replace("_", " ")
    return [f"By capability, {metric} before and after the removal: {'; '.join(parts)}."]
