"""Studies of distillation at a size of seconds run through, side by side on shared stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.studies.tiny_setting import EXPERIMENT, QUICK, quick, quick_student, ran_twice

from excise.methods.distillation.corpora import FullMix, OnPolicy, RefusingSamples
from excise.run.study import study_named
from excise_studies.distillation.presets import graddiff, maxent, rmu, tar

PUPIL = quick_student()
TAR = quick(tar(mapping=None, inner_steps=2, inner_batch=4, every=1))
MAXENT, GRADDIFF, RMU = quick(maxent()), quick(graddiff()), quick(rmu(layer=0, blocks=(0,)))

QUICKLY: dict[str, dict[str, Any]] = {
    "splice-factorial": {
        "student": PUPIL,
        "teachers": {"rmu": RMU, "maxent": MAXENT},
        "against": ("maxent",),
        "sweep": (1.0,),
        "tuned_on": (11,),
        "others": False,
    },
    "dark-knowledge": {"teachers": {"maxent": MAXENT}},
    "reversal-cost": {
        "methods": {"rmu": RMU, "tar": TAR, "grad_diff": GRADDIFF},
        "search": {"tries": 2},
    },
    "pretrain-loss": {"pushes": ("uniform",)},
}
"""Studies that every run of the tests tries, and what makes them small."""

MORE: dict[str, dict[str, Any]] = {
    "undo-levels": {"student": PUPIL, "alphas": (0.6, 1.0), "stop_every": 2},
    "splice": {"student": PUPIL, "teachers": {"maxent": MAXENT}},
    "distil-corpus": {
        "student": PUPIL,
        "corpora": {
            "the mix": FullMix(),
            "a refuser": RefusingSamples(rows=32, new_tokens=3, refusal=" = = =", fit=QUICK),
            "the student": OnPolicy(new_tokens=3),
        },
    },
    "undo-pilot": {
        "large": PUPIL,
        "pilots": {"small": PUPIL.model_copy(update={"alpha": 0.3})},
        "teachers": {"maxent": MAXENT, "grad_diff": GRADDIFF, "rmu": RMU},
    },
    "init-leak": {"student": PUPIL, "inits": ("random", "original", "permuted")},
    "noise-where": {"student": PUPIL.model_copy(update={"alpha": 0.6}), "groups": ("mlp",)},
    "undo-teachers": {
        "student": PUPIL, "search": {"tries": 2}, "teachers": {"maxent": MAXENT, "rmu": RMU},
    },
}  # fmt: skip
"""The others."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose studies share stages."""
    return tmp_path_factory.mktemp("studies")


def check(name: str, changes: dict[str, Any], shelf: Path) -> None:
    """Run a study twice: its record says what decides, and nothing is computed again."""
    settings: dict[str, Any] = {"seeds": (1,), "experiment": EXPERIMENT, **changes}
    made = ran_twice(study_named(name)(**settings), shelf)
    if name != "dark-knowledge":
        assert made.decision.startswith("invalid")
        titles = [table.title for table in made.tables]
        assert titles[-2:] == [
            "Recovery on the held-out test set after relearning",
            "Curves of the attack",
        ]
        conditions = {row.condition for row in made.tables[-2].rows}
        assert {"original", "oracle"} < conditions


@pytest.mark.parametrize("name", QUICKLY)
def test_a_study_runs_through(name: str, shelf: Path) -> None:
    check(name, QUICKLY[name], shelf)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_studies_run_through(name: str, shelf: Path) -> None:
    check(name, MORE[name], shelf)
