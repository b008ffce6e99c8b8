"""From the KLs of `splice` to tables and words."""

from __future__ import annotations

from collections.abc import Mapping

from excise.evals.stats import Estimate
from excise.record import StudyRow, StudyTable
from excise_studies.base import row
from excise_studies.distillation.distil_tables import said

Shares = Mapping[str, tuple[str, Estimate]]
"""Noise and share explained, by teacher."""


def shares_table(shares: Shares, areas: Mapping[str, float]) -> StudyTable:
    """Return how much of each teacher the splice explains, and the AUC of its implicit label."""
    rows: list[StudyRow] = []
    for name, (noise, share) in shares.items():
        rows.append(row(name, f"share explained, noise {noise}", share))
        rows.append(
            StudyRow(
                condition=name, metric="AUC of KL(U || B), V against retain", value=areas[name]
            )
        )
    return StudyTable(
        title="Is the teacher the splice?",
        note="1 is noise where harmful and the original elsewhere; noise chosen on dev.",
        rows=tuple(rows),
    )


def leak_table(leak: Mapping[str, Estimate]) -> StudyTable:
    """Return what the student knows beyond the oracle, where its teacher missed and caught."""
    return StudyTable(
        title="Do missed units leak?",
        note="Student of the teacher with a part of the labels, minus the oracle, on V.",
        rows=tuple(row(name, "exact match beyond the oracle", e) for name, e in leak.items()),
    )


def words(shares: Shares, areas: Mapping[str, float], leak: Mapping[str, Estimate]) -> list[str]:
    """Return the sentences between the rails and the decision."""
    parts = [
        f"{name} {said(share)} (noise {noise}, AUC {areas[name]:.2f})"
        for name, (noise, share) in shares.items()
    ]
    found = [f"Share of the change that the splice explains: {', '.join(parts)}."]
    if leak:
        told = [f"{name} {said(e)} ({e.n} units)" for name, e in leak.items()]
        found.append(f"Beyond the oracle the student knew of V: {', '.join(told)}.")
    return found
