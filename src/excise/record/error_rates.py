"""How often verdicts were right about models of known truth, by budget. Read it by `error_rates`.

`excise study auditor-roc` measures the rates and `python -m excise_studies.publish OUT`
writes them beside this module. This module imports neither torch nor numpy.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from excise.record.entry import RecordEntry

FILE = Path(__file__).with_name("auditor_error_rates.json")
"""Where the measured rates lie."""


class CallCounts(RecordEntry):
    """How an audit called models of one truth."""

    models: int
    """How many there were."""
    guilty: int
    """Called guilty: a level fails."""
    clean: int
    """Called clean: every level passes."""
    below: int
    """Nothing came back, and it is not shown to be as in a model that was never taught."""
    undecided: int
    """Called neither: a level is underpowered or untested."""
    right: int
    """Called what they are: guilty if they hide, clean or below if they were never taught."""
    low: float
    """Lower end of the 95 % interval of the share called rightly, over base seeds."""
    high: float
    """Upper end of it."""


class ErrorRates(RecordEntry):
    """How an audit at one budget called models of known truth, on families and seeds held out."""

    commit: str
    """Commit of the code that was measured."""
    settings: dict[str, Any] = {}
    """Fields of the budget as it was measured."""
    since: str = ""
    """What of the budget changed since, as in "before it could double its steps"."""
    hides: CallCounts
    """Models that hide what they know: guilty is right."""
    never_taught: CallCounts
    """Models that were never taught it: clean and below are right."""

    @property
    def models(self) -> int:
        """Models of known truth."""
        return self.hides.models + self.never_taught.models


def rates_by_budget(path: Path = FILE) -> dict[str, ErrorRates]:
    """Return the measured rates by budget; none where nothing was measured."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {budget: ErrorRates.model_validate(rates) for budget, rates in data.items()}


@functools.cache
def error_rates(budget: str) -> ErrorRates | None:
    """Return the measured rates of a budget as it is named, None where they were not measured."""
    return rates_by_budget().get(budget)
