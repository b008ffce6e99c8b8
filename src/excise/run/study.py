"""What a study is: a question whose statistic and margin are stated before it runs.

Packages add studies by entry points of the group `excise.studies`, as `excise_studies` does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from excise.core.config import Config
from excise.core.errors import UserError, nearest
from excise.core.events import Emit
from excise.core.plugins import offered
from excise.core.stages import Runtime
from excise.data.domain import Domain
from excise.record import ModelRef, Record, StudyPicture, StudyPlot, StudyRecord, StudyTable, save
from excise.report.page import write_report
from excise.run import output
from excise.run.environment import environment, now
from excise.run.results import describe, timed
from excise.train.pool import Pool


class Study(Config, ABC):
    """A question that models made here answer, with what decides stated beforehand.

    Attributes:
        question: What is asked.
        statistic: What decides, and how it is computed.
        takes: Expected time and memory on two cores.
    """

    kind: ClassVar[str] = "study"
    question: ClassVar[str]
    statistic: ClassVar[str]
    takes: ClassVar[str] = ""

    name: str
    """Name on the command line."""
    margin: float
    """What the statistic is held against."""
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    """Seeds that are reported: data, models and removal all change with them."""
    tuned_on: tuple[int, ...] | None = None
    """Seeds on which settings are chosen, on `dev`, and no number is reported from them; empty for
    the `dev` rows of the reported seeds. A study that chooses none leaves it at None."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """`auto` takes an accelerator where there is one."""

    @model_validator(mode="after")
    def _seeds(self) -> Self:
        """Refuse seeds that are named twice."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: names a seed twice; give different ones")
        return self

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


def conduct(study: Study, out: Path, *, workers: int, emit: Emit, command: str = "") -> Record:
    """Run a study and write its record and report.

    Args:
        study: Everything there is to choose.
        out: Output folder; an interrupted study of the same settings resumes there.
        workers: Worker processes, one thread each; 0 takes one for each core.
        emit: Sink of progress events.
        command: The command that makes this again, for the record.

    Returns:
        The record, as written to `out/run.json`.
    """
    began, started = time.monotonic(), now()
    with output.claim(out, study), Pool(workers or None, emit=emit) as pool:
        runtime = output.runtime(out, study.dtype, study.device, emit)
        result = study.run(runtime, pool)
        outcome = Record(
            kind="study",
            title=study.name,
            command=command,
            config=study.model_dump(mode="json"),
            environment=environment(study.dtype, runtime.device, started),
            seeds=study.seeds,
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
