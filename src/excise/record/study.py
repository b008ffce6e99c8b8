"""The part of the record that a study writes. Read it through `excise.record`."""

from __future__ import annotations

from excise.record.entry import RecordEntry


class StudyRow(RecordEntry):
    """One number of a study."""

    condition: str
    """What was done."""
    seed: int | None = None
    """Seed of the replicate it comes from; empty for all reported seeds together."""
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


class StudyTable(RecordEntry):
    """Numbers that are read together."""

    title: str
    """What the table shows."""
    note: str = ""
    """How to read it."""
    rows: tuple[StudyRow, ...] = ()
    """Its numbers."""


class StudyContrast(RecordEntry):
    """One comparison that the decision rests on."""

    name: str
    """What is compared."""
    value: float | None = None
    """The estimate; empty where it is not defined."""
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None
    """Upper end of its 95 % interval."""
    n: int = 0
    """Number of independent units it rests on."""
    thresholds: tuple[float, ...] = ()
    """Values that the deciding interval must not hold, ascending."""
    error: float = 0.05
    """Two-sided error rate that was its share: the deciding interval has coverage one minus it."""
    verdict: str = ""
    """Where that interval lies: above, below, equal, floor, ceiling or undecided."""
    needed: int | None = None
    """Of an undecided one, how many seeds would decide it if value and spread stayed as they are;
    empty where none would."""


class StudyPictureRow(RecordEntry):
    """One line of small grey images."""

    name: str
    """What the line shows."""
    images: tuple[str, ...] = ()
    """One per column: ink of each pixel from `0` to `9`, line by line."""
    values: tuple[float, ...] = ()
    """A number for each image, where there is one."""


class StudyPicture(RecordEntry):
    """Small grey images that are looked at together, one line under the other."""

    title: str
    """What is shown."""
    note: str = ""
    """How to read it, and what the numbers are."""
    width: int = 1
    """Pixels in a line of an image."""
    columns: tuple[str, ...] = ()
    """What each column shows."""
    rows: tuple[StudyPictureRow, ...] = ()
    """The lines."""


class StudyLine(RecordEntry):
    """One line of a plot."""

    name: str
    """What it shows."""
    points: tuple[tuple[float, float], ...] = ()
    """Its points, x and y, in the order in which they are joined."""


class StudyPlot(RecordEntry):
    """Lines over one pair of axes."""

    title: str
    """What is shown."""
    note: str = ""
    """How to read it."""
    x: str
    """What the horizontal axis is, with its unit."""
    y: str
    """What the vertical axis is."""
    lines: tuple[StudyLine, ...] = ()
    """The lines."""


class StudyRecord(RecordEntry):
    """What a study asked, what was said beforehand, and what came out."""

    name: str
    """Name of the study."""
    question: str
    """What it asks."""
    statistic: str
    """What decides, as stated before the study ran."""
    margin: float
    """Margin of the statistic, as stated before the study ran."""
    tuned_on: tuple[int, ...] | None = ()
    """Seeds on which settings were chosen, and no number is reported from them; empty for the
    `dev` rows of the reported seeds, None where none was chosen."""
    decision: str = ""
    """What the statistic says under the margin."""
    paragraph: str = ""
    """The result in words, made of the numbers in the tables."""
    contrasts: tuple[StudyContrast, ...] = ()
    """What the decision rests on; empty where no interval decides."""
    tables: tuple[StudyTable, ...] = ()
    """All numbers."""
    pictures: tuple[StudyPicture, ...] = ()
    """Small images, where the data are images."""
    plots: tuple[StudyPlot, ...] = ()
    """Lines, where the numbers lie along some."""
