"""What a study is, what it hands back, and how it becomes a record."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from excise import output, record
from excise.config import Config
from excise.domains.base import Domain
from excise.environment import device_of, environment
from excise.errors import UserError
from excise.evals.stats import Estimate, quantiles, resampled_means
from excise.events import Emit
from excise.jobs import InitJob, RemovalJob, Setting, make_init, make_removal
from excise.methods.base import Method
from excise.methods.pretraining.filtering import Filtering
from excise.methods.pretraining.plain import Plain
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.checkpoint import Checkpoint
from excise.models.spec import Scratch
from excise.record import ModelRef, Record, StudyPicture, StudyRow, StudyTable
from excise.recording import describe, model_ref, timed
from excise.report.page import write_report
from excise.train.grid import Pool

Units = Mapping[str, float]
"""Score by unit."""

APART = 1000
"""The oracle of a draw starts from the draw's seed plus this."""


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
    """Draws that are reported: data, models and removal all change with them."""
    tuned_on: tuple[int, ...] = (0,)
    """Draws on which settings are chosen, on `dev`; no number is reported from them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """`auto` takes an accelerator where there is one."""

    @model_validator(mode="after")
    def _draws(self) -> Self:
        """Refuse draws that are named twice."""
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: names a draw twice; give different ones")
        return self

    @classmethod
    def full(cls) -> Self:
        """Return the settings for a real model.

        Raises:
            UserError: If the study has none.
        """
        raise UserError(f"study '{cls.model_fields['name'].default}' has no --full; leave it out")

    @abstractmethod
    def run(self, setting: Setting, pool: Pool) -> StudyResult:
        """Answer the question.

        Args:
            setting: Store, dtype, device. What is computed is a stage: run again, it goes on.
            pool: Worker processes.
        """


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        tables: All numbers.
        decision: What the statistic says under the margin.
        paragraph: The result in words, made of the numbers.
        domain: The data of the first reported draw; None for data without text.
        models: The models the numbers are about.
        notes: What a reader should know.
        data: What the record says of data without text: name, fingerprint, counts.
        pictures: Small images, where the data are images.
    """

    tables: tuple[StudyTable, ...]
    decision: str
    paragraph: str
    domain: Domain | None = None
    models: tuple[ModelRef, ...] = ()
    notes: tuple[str, ...] = field(default=())
    data: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[StudyPicture, ...] = ()


def conduct(study: Study, out: Path, *, workers: int, emit: Emit, command: str = "") -> Record:
    """Run a study and write its record and report.

    Args:
        study: Everything there is to choose.
        out: Output folder; an interrupted study of the same settings goes on there.
        workers: Worker processes, one thread each; 0 takes one for each core.
        emit: Sink of progress events.
        command: The command that makes this again, for the record.

    Returns:
        The record, as written to `out/run.json`.
    """
    began = time.monotonic()
    setting = Setting(output.store_of(out), study.dtype, device_of(study.device))
    with output.claim(out, study), Pool(workers or None, emit=emit) as pool:
        result = study.run(setting, pool)
        made = Record(
            kind="study",
            title=study.name,
            command=command,
            config=study.model_dump(mode="json"),
            environment=environment(study.dtype, setting.device),
            seeds=study.seeds,
            data=dict(result.data) | (describe(result.domain) if result.domain else {}),
            models=result.models,
            study=record.Study(
                name=study.name,
                question=study.question,
                statistic=study.statistic,
                margin=study.margin,
                tuned_on=study.tuned_on,
                decision=result.decision,
                paragraph=result.paragraph,
                tables=result.tables,
                pictures=result.pictures,
            ),
            sensitive=result.domain is not None and result.domain.sensitive,
            notes=result.notes,
        )
        made = timed(made, began)
        record.save(made, out)
        write_report(out)
    emit("done", {"out": str(out)})
    return made


@dataclass(frozen=True)
class Draw:
    """One draw: data and the models before any removal.

    Attributes:
        seed: Its seed.
        domain: Its data.
        original: A model that learned all of it.
        oracle: One that never saw the forget units, from another initialisation; None where the
            original was not trained here.
    """

    seed: int
    domain: Domain
    original: Checkpoint
    oracle: Checkpoint | None = None

    def refs(self) -> tuple[ModelRef, ...]:
        """Return the models for the record."""
        named = {f"original, draw {self.seed}": self.original}
        if self.oracle is not None:
            named[f"oracle, draw {self.seed}"] = self.oracle
        return tuple(model_ref(name, model) for name, model in named.items())


def train_draws(
    domains: Mapping[int, tuple[Domain, Any]],
    scratch: Scratch,
    schedule: Pretrain,
    setting: Setting,
    pool: Pool,
) -> dict[int, Draw]:
    """Train the original and the oracle of every draw.

    Args:
        domains: Domain and tokenizer by seed.
        scratch: Architecture.
        schedule: How they are trained.
        setting: Store, dtype, device.
        pool: Worker processes.
    """
    jobs = [
        InitJob(setting, scratch, tokenizer, seed + apart)
        for seed, (_, tokenizer) in domains.items()
        for apart in (0, APART)
    ]
    inits = pool.map(make_init, jobs)
    methods: tuple[Method, ...] = (Plain(pretrain=schedule), Filtering(pretrain=schedule))
    removals = [
        RemovalJob(setting, methods[i % 2], init, domains[job.seed - APART * (i % 2)][0], job.seed)
        for i, (job, init) in enumerate(zip(jobs, inits, strict=True))
    ]
    made = [removal.checkpoint for removal in pool.map(make_removal, removals)]
    return {
        seed: Draw(seed, domain, made[2 * i], made[2 * i + 1])
        for i, (seed, (domain, _)) in enumerate(domains.items())
    }


def pooled(by_seed: Mapping[int, Units]) -> dict[str, float]:
    """Return the units of several draws in one mapping, named after their draw."""
    return {f"{seed}:{unit}": v for seed, units in by_seed.items() for unit, v in units.items()}


def row(arm: str, metric: str, found: Estimate, seed: int | None = None) -> StudyRow:
    """Return an estimate as a row of a table; what is NaN stays empty."""
    value, low, high = (None if math.isnan(x) else x for x in (found.value, found.low, found.high))
    return StudyRow(arm=arm, seed=seed, metric=metric, value=value, low=low, high=high, n=found.n)


def share(top: Sequence[Units], bottom: Sequence[Units], *, seed: int = 0) -> Estimate:
    """Return (top 0 - top 1) / (bottom 0 - bottom 1), resampled by unit, jointly.

    Args:
        top: Two mappings whose means are subtracted.
        bottom: Two more.
        seed: Seed of the bootstrap.

    Returns:
        The ratio; NaN where the bottom is not above zero.
    """
    means, draws = resampled_means([*top, *bottom], seed=seed)
    below = means[2] - means[3]
    if below <= 0:
        return Estimate(float("nan"), float("nan"), float("nan"), len(top[0]))
    kept = draws[draws[:, 2] - draws[:, 3] > below / 10]
    ratios = (kept[:, 0] - kept[:, 1]) / (kept[:, 2] - kept[:, 3])
    low, high = quantiles(ratios, 0.95)
    return Estimate(float((means[0] - means[1]) / below), low, high, len(top[0]))
