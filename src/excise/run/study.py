"""What a study is: a question whose statistic and margin are stated before it runs.

Packages add studies by entry points of the group `excise.studies`, as `excise_studies` does.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from excise.core.config import Config
from excise.core.errors import UserError, nearest
from excise.core.events import Emit
from excise.core.plugins import offered
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.evals.replicates import ERROR, Contrast, looks, spending
from excise.evals.stats import Estimate
from excise.record import (
    ModelRef,
    Record,
    StudyContrast,
    StudyPicture,
    StudyPlot,
    StudyRecord,
    StudyRow,
    StudyTable,
    save,
)
from excise.report.page import write_report
from excise.run import output
from excise.run.environment import environment, now
from excise.run.results import describe, timed
from excise.train.pool import Pool

FIRST = 3
"""Seeds of the first look of a study that runs until it is decided."""

MANY = 1000
"""Seeds that a number may ask for."""

CHOSEN_ON = (0, 11, 12)
"""Seeds on which settings of the studies here were chosen; a number of seeds takes none of them."""


class Study(Config, ABC):
    """A question that models made here answer, with what decides stated beforehand.

    Attributes:
        question: What is asked.
        statistic: What decides, and how it is computed.
        takes: Expected time and memory on two cores.
        quoted: Titles of the tables that are published with its decision; empty for the first.
        pictured: Beginning of the name of the score, in those tables, that a published picture
            shows by condition; empty for the contrasts.
    """

    kind: ClassVar[str] = "study"
    question: ClassVar[str]
    statistic: ClassVar[str]
    takes: ClassVar[str] = ""
    quoted: ClassVar[tuple[str, ...]] = ()
    pictured: ClassVar[str] = ""

    name: str
    """Name on the command line."""
    margin: float
    """What the statistic is held against."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Seeds that are reported: data, models and removal all change with them. A number takes so
    many: the study's own first, then the smallest positive ones on which nothing was chosen."""
    until: Literal["", "decided"] = ""
    """`decided`: start with the first three seeds and add more of `seeds`, in their order, until
    the interval decides; every look spends its share of `error`."""
    error: float = Field(default=ERROR, gt=0, lt=1)
    """Two-sided error rate of the decision, over all its comparisons and looks."""
    tuned_on: tuple[int, ...] | None = None
    """Seeds on which settings are chosen, on `dev`, and no number is reported from them; empty for
    the `dev` rows of the reported seeds. A study that chooses none leaves it at None."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """`auto` takes an accelerator where there is one."""

    @model_validator(mode="before")
    @classmethod
    def _counted(cls, data: Any) -> Any:
        """Read a number of seeds as so many of them."""
        if isinstance(data, Mapping) and type(data.get("seeds")) is int:
            tuned = data.get("tuned_on", cls.model_fields["tuned_on"].default)
            return {**data, "seeds": cls._so_many(data["seeds"], tuned or ())}
        return data

    @model_validator(mode="after")
    def _seeds(self) -> Self:
        """Refuse seeds that are named twice or settings are chosen on, and too few to add any."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: names a seed twice; give different ones")
        if both := sorted(set(self.seeds) & set(self.tuned_on or ())):
            raise ValueError(
                f"seeds: settings are chosen on seed {both[0]} (tuned_on), of which no number is "
                "reported; name others"
            )
        if self.until and len(self.seeds) <= FIRST:
            raise ValueError(
                f"seeds: until=decided starts with {FIRST} and needs more to add; give the largest "
                "number, such as --seeds 12"
            )
        return self

    @classmethod
    def _so_many(cls, count: int, tuned_on: Iterable[int]) -> tuple[int, ...]:
        """Return so many seeds: the default ones, then positive ones that nothing was chosen on.

        Raises:
            ValueError: If the number is no number of seeds.
        """
        if not 0 < count <= MANY:
            raise ValueError(f"seeds: takes a number from 1 to {MANY}, or a list such as [1, 2, 3]")
        avoided = {*tuned_on, *CHOSEN_ON}
        first = [s for s in cls.model_fields["seeds"].default if s not in tuned_on]
        more = (s for s in range(1, MANY * 2) if s not in avoided and s not in first)
        return tuple(first[:count]) + tuple(islice(more, max(0, count - len(first))))

    @classmethod
    def full(cls) -> Self:
        """Return the settings for a real model.

        Raises:
            UserError: If the study has none.
        """
        raise UserError(f"study '{cls.model_fields['name'].default}' has no --full; leave it out")

    @abstractmethod
    def run(self, runtime: Runtime, pool: Pool) -> StudyResult:
        """Answer the question.

        Args:
            runtime: What is computed is a stage kept there: run again, the study resumes.
            pool: Worker processes.
        """


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        tables: All numbers.
        decision: What the statistic says under the margin.
        paragraph: The result in words, made of the numbers.
        domain: The data of the first reported seed; None for data without text.
        models: The models the numbers are about.
        notes: What a reader should know.
        data: What the record says of data without text: name, fingerprint, counts.
        pictures: Small images, where the data are images.
        plots: Lines, where the numbers lie along some.
        contrasts: What the decision rests on; empty where no interval decides.
    """

    tables: tuple[StudyTable, ...]
    decision: str
    paragraph: str
    domain: Domain | None = None
    models: tuple[ModelRef, ...] = ()
    notes: tuple[str, ...] = field(default=())
    data: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[StudyPicture, ...] = ()
    plots: tuple[StudyPlot, ...] = ()
    contrasts: tuple[Contrast, ...] = ()

    @property
    def open(self) -> bool:
        """Return whether more seeds could decide it."""
        return any(contrast.open for contrast in self.contrasts)


def conduct(study: Study, out: Path, pool: Pool, *, command: str = "") -> Record:
    """Run a study and write its record and report.

    Args:
        study: Everything there is to choose.
        out: Output folder; an interrupted study of the same settings resumes there.
        pool: Who does the jobs, and where events go; opened here. One process makes each model.
        command: The command that makes this again, for the record.

    Returns:
        The record, as written to `out/run.json`.
    """
    began, started, emit = time.monotonic(), now(), pool.emit
    with output.claim(out, study), pool:
        runtime = output.runtime(out, study.dtype, study.device, emit)
        result, seeds = answered(study, runtime, pool, emit)
        outcome = Record(
            kind="study",
            title=study.name,
            command=command,
            config=study.model_dump(mode="json"),
            environment=environment(study.dtype, runtime.device, started, pool.world),
            seeds=seeds,
            data=dict(result.data) | (describe(result.domain) if result.domain else {}),
            models=result.models,
            study=StudyRecord(
                name=study.name,
                question=study.question,
                statistic=study.statistic,
                margin=study.margin,
                tuned_on=study.tuned_on,
                decision=result.decision,
                paragraph=result.paragraph,
                contrasts=tuple(recorded(contrast) for contrast in result.contrasts),
                tables=result.tables,
                pictures=result.pictures,
                plots=result.plots,
            ),
            sensitive=result.domain is not None and result.domain.sensitive,
            notes=result.notes,
        )
        outcome = timed(outcome, began, pool.peak_bytes)
        save(outcome, out)
        write_report(out)
    emit("done", {"out": str(out)})
    return outcome


def answered(
    study: Study, runtime: Runtime, pool: Pool, emit: Emit
) -> tuple[StudyResult, tuple[int, ...]]:
    """Return what a study found and on which seeds, with what is missing where it is undecided.

    With `until` it looks at the first seeds, and at more until nothing is open or none are left.
    What earlier looks computed are stages, which later ones and a resumed run take from the store.

    Args:
        study: Everything there is to choose.
        runtime: Where stages are kept.
        pool: Worker processes.
        emit: Gets a note of every look.
    """
    counts = looks(len(study.seeds), first=FIRST) if study.until else (len(study.seeds),)
    shares = spending(counts, study.error)
    rows: list[StudyRow] = []
    for count, share in zip(counts, shares, strict=True):
        seeds = study.seeds[:count]
        result = study.model_copy(update={"seeds": seeds, "until": "", "error": share}).run(
            runtime, pool
        )
        if study.until and not result.contrasts:
            raise UserError(
                f"study {study.name} names no interval that more seeds could decide; leave out "
                "--until"
            )
        rows += [_look(contrast, count) for contrast in result.contrasts]
        if study.until:
            emit("note", {"text": f"{count} seeds: {result.decision}"})
        if not result.open:
            break
    missing = [contrast.missing() for contrast in result.contrasts if contrast.open]
    tables, words = result.tables, [result.paragraph]
    if study.until:
        tables = (*tables, _looks_table(rows, counts, study.error))
        words.append(
            f"Seeds were added until it was decided or {counts[-1]} were reached: {count} were "
            f"needed, in {counts.index(count) + 1} look(s)."
        )
    return replace(result, tables=tables, paragraph=" ".join([*words, *missing])), seeds


def _look(contrast: Contrast, count: int) -> StudyRow:
    """Return a contrast at one look, with the interval that decides."""
    value, low, high = _numbers(contrast.deciding)
    return StudyRow(
        condition=f"{count} seeds",
        metric=contrast.name,
        value=value,
        low=low,
        high=high,
        n=count,
    )


def _numbers(value: Estimate) -> tuple[float | None, ...]:
    """Return value and ends of an estimate; what is NaN stays empty."""
    return tuple(None if math.isnan(x) else x for x in (value.value, value.low, value.high))


def recorded(contrast: Contrast) -> StudyContrast:
    """Return a contrast as the record holds it."""
    value, low, high = _numbers(contrast.value)
    return StudyContrast(
        name=contrast.name,
        value=value,
        low=low,
        high=high,
        n=contrast.value.n,
        thresholds=contrast.thresholds,
        error=contrast.error,
        verdict=contrast.verdict,
        needed=contrast.needed() if contrast.open else None,
    )


def _looks_table(rows: Iterable[StudyRow], counts: tuple[int, ...], error: float) -> StudyTable:
    """Return what was seen at every look."""
    return StudyTable(
        title="Looks",
        note=(
            f"Looks were planned at {', '.join(map(str, counts))} seeds. Each spends the seeds "
            f"new to it over {counts[-1]} of an error rate of {error:g}, shared by its "
            "comparisons; intervals have the coverage that leaves. n counts seeds."
        ),
        rows=tuple(rows),
    )


def study_points() -> dict[str, EntryPoint]:
    """Return what installed packages offer as studies, by name."""
    return offered("studies")


def study_named(name: str) -> type[Study]:
    """Return the class of a study.

    Raises:
        UserError: If no installed package offers a study of that name.
    """
    known = study_points()
    if name not in known:
        raise UserError(f"no study is called '{name}'; {nearest(name, known)}")
    study: type[Study] = known[name].load()
    return study
