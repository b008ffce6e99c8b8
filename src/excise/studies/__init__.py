"""Studies: a question, a statistic and a margin stated beforehand, and the run that answers it.

This module imports no torch and no study.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from excise.errors import UserError, nearest

if TYPE_CHECKING:
    from excise.studies.base import Study

STUDIES = {
    "rmu-is-shallow": "excise.studies.rmu_is_shallow:RMUIsShallow",
    "messy-forget-set": "excise.studies.messy_forget_set:MessyForgetSet",
}
"""Studies by name: module and class. Packages add theirs by entry points `excise.studies`."""


def study_named(name: str) -> type[Study]:
    """Return the class of a study.

    Raises:
        UserError: If there is no such study.
    """
    from importlib.metadata import entry_points

    known = {**STUDIES, **{p.name: p.value for p in entry_points(group="excise.studies")}}
    if name not in known:
        raise UserError(f"no study is called '{name}'; {nearest(name, known)}")
    module, _, cls = known[name].partition(":")
    found: type[Study] = getattr(importlib.import_module(module), cls)
    return found
