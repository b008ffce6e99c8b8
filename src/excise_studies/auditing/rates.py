"""From the record of `auditor-roc` to the error rates that reports quote, and to their table.

`excise_studies.publish` writes the rates of the budget that was measured into
`excise/record/auditor_error_rates.json`; nothing else writes that file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from excise.auditor.budget import budget_of as named_budget
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.record import Record, StudyRow
from excise.record.error_rates import FILE, CallCounts, ErrorRates, rates_by_budget
from excise_studies.auditing.auditor_roc import CALLS
from excise_studies.auditing.counting import READINGS

GROUPS = {"hides": "hides what it knows", "never taught": "was never taught it"}
"""Truths that rates are published of, in words."""

COUNTS = {
    "called guilty": "guilty",
    "called clean": "clean",
    "below": "below",
    "undecided": "undecided",
}
"""Fields of `CallCounts` by the metric of the study's table."""


def budget_of(record: Record) -> str:
    """Return the named budget that a study measured.

    Args:
        record: What `excise study auditor-roc` wrote.

    Raises:
        UserError: If it is another record, or the budget was changed.
    """
    if record.study is None or record.study.name != "auditor-roc":
        raise UserError("this is no record of 'auditor-roc'; name the output folder of that study")
    audit = record.config["audit"]
    if audit["change"] or audit["attacks"]:
        raise UserError(
            f"the budget '{audit['budget']}' was changed in this run, so its rates are those of no "
            "named budget; run the study without audit.change and audit.attacks"
        )
    return str(audit["budget"])


def rates_of(record: Record) -> ErrorRates:
    """Return the error rates on held-out families and base seeds.

    Args:
        record: What `excise study auditor-roc` wrote.

    Raises:
        UserError: If it has no held-out model of one of the truths.
    """
    assert record.study is not None
    rows = [row for table in record.study.tables if table.title == CALLS for row in table.rows]
    counts = {}
    for group in GROUPS:
        condition = f"{group}, held-out, {READINGS['D4']}"
        mine = {row.metric: row for row in rows if row.condition == condition}
        if not mine:
            raise UserError(
                f"no held-out model that '{group}' was audited; run the study with all its seeds"
            )
        counts[group] = _counts(mine)
    return ErrorRates(
        commit=record.environment.git,
        settings=named_budget(budget_of(record)).model_dump(mode="json"),
        hides=counts["hides"],
        never_taught=counts["never taught"],
    )


def _counts(rows: Mapping[str, StudyRow]) -> CallCounts:
    """Return the counts of one condition, given its rows by metric."""
    share = rows["share called rightly"]
    numbers = {field: round(rows[metric].value or 0) for metric, field in COUNTS.items()}
    right = round((share.value or 0) * share.n)
    low, high = share.low or 0.0, 1.0 if share.high is None else share.high
    return CallCounts(models=share.n, right=right, low=low, high=high, **numbers)


def markdown(rates: ErrorRates, budget: str) -> str:
    """Return the rates as a table in Markdown.

    Args:
        rates: What was measured.
        budget: The budget it was measured at.
    """
    head = ("the model", "models", *COUNTS, "called rightly")
    lines = [head, ("---",) * len(head)]
    for words, counts in zip(GROUPS.values(), (rates.hides, rates.never_taught), strict=True):
        share = f"{counts.right / counts.models:.2f} [{counts.low:.2f}, {counts.high:.2f}]"
        cells = (getattr(counts, field) for field in COUNTS.values())
        lines.append((words, str(counts.models), *map(str, cells), share))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    measured = ", ".join(filter(None, (f"Budget {budget}", rates.since)))
    return f"{table}\n\n{measured}, commit {rates.commit or 'unknown'}.\n"


def keep(record: Record, file: Path = FILE) -> None:
    """Write what a study measured beside the code that quotes it.

    Args:
        record: What `excise study auditor-roc` wrote.
        file: Where rates are kept by budget; those of other budgets stay.
    """
    known = {**rates_by_budget(file), budget_of(record): rates_of(record)}
    data = {name: each.model_dump(mode="json") for name, each in sorted(known.items())}
    write_text(file, json.dumps(data, indent=1) + "\n")
