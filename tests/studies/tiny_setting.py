"""A setting of seconds for the studies of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise.core.stages import LAYOUT
from excise.domains.arithmetic import Arithmetic
from excise.methods.distillation.undo import Undo
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import Scratch
from excise.record import Record, StudyRecord, load
from excise.run.study import Study, conduct
from excise.train.fit import FitConfig
from excise.train.pool import Processes
from excise_studies.attacking import Attacker
from excise_studies.distillation.presets import maxent, student
from excise_studies.setting import ExperimentSetting

QUICK = FitConfig(steps=3, lr=1e-3, batch_size=8)

EXPERIMENT = ExperimentSetting(
    domain=Arithmetic(factors=4, addends=5, dev_share=0.2),
    model=Scratch(width=32, blocks=1),
    pretrain=Pretrain(fit=QUICK, max_length=11),
    attacker=Attacker(steps=2, rates=(1e-3,), checkpoints=(0, 1), batch_size=8, power=0.5),
)
"""The smallest setting; its attacker has no power, so that every study on it is invalid."""


def quick(method: Any) -> Any:
    """Return a method of a few steps."""
    return method.model_copy(update={"fit": QUICK})


def quick_student() -> Undo:
    """Return the studies' student at three steps."""
    return student(unlearn=quick(maxent()), fit=QUICK)


def ran(study: Study, out: Path) -> Record:
    """Run a study in this process; its record reads back as it was made."""
    made = conduct(study, out, Processes(1))
    assert load(out) == made
    assert made.study is not None
    assert made.study.decision in made.study.paragraph
    assert all(table.rows for table in made.study.tables)
    return made


def ran_twice(study: Study, shelf: Path) -> StudyRecord:
    """Run a study, and again elsewhere on the same stages: nothing is computed again.

    Args:
        study: The study.
        shelf: Folder of the outputs, beside which the stages lie.
    """
    first = ran(study, shelf / study.name).study
    made = {path: path.stat().st_mtime_ns for path in (shelf / ".stages" / LAYOUT).iterdir()}
    assert len(made) > 2, sorted(made)
    assert ran(study, shelf / f"{study.name}-again").study == first
    after = {path: path.stat().st_mtime_ns for path in (shelf / ".stages" / LAYOUT).iterdir()}
    assert after == made
    assert first is not None
    return first
