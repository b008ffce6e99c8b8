"""The part of the record that a study writes. Read it through `excise.record`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Entry(BaseModel):
    """As the entries of `excise.schema`."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class StudyRow(_Entry):
    """One number of a study."""

    arm: str
    """What was done."""
    seed: int | None = None
    """Draw it comes from; empty for all reported draws together."""
    metric: str
    """What the number is."""
    value: float | None = None
    """The number; empty where it is not defined."""
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None
    """Upper end of its 95 % interval."""
    n: int = 0
    """Number of independent units it rests on."""


class StudyTable(_Entry):
    """Numbers that are read together."""

    title: str
    """What the table shows."""
    note: str = ""
    """How to read it."""
    rows: tuple[StudyRow, ...] = ()
    """Its numbers."""


class Study(_Entry):
    """What a study asked, what was said beforehand, and what came out."""

    name: str
    """Name of the study."""
    question: str
    """What it asks."""
    statistic: str
    """What decides, as stated before the study ran."""
    margin: float
    """Margin of the statistic, as stated before the study ran."""
    tuned_on: tuple[int, ...] = ()
    """Draws on which settings were chosen; no number is reported from them."""
    decision: str = ""
    """What the statistic says under the margin."""
    paragraph: str = ""
    """The result in words, made of the numbers in the tables."""
    tables: tuple[StudyTable, ...] = ()
    """All numbers."""
