"""excise run undo-arithmetic: suppress, damage, distil, and what happens if one part is left out.

Expected: MaxEnt alone comes back within a few steps on facts the attacker never showed; the larger
alpha, the less does, down to what the oracle learns. Without noise, without a teacher, or with the
original as the teacher, removal fails.
"""

from __future__ import annotations

from typing import Any

from excise.domains.arithmetic import ARITHMETIC_FIT, ARITHMETIC_MAX_LENGTH, Arithmetic
from excise.methods import MaxEnt, Undo
from excise.methods.base import Method
from excise.methods.distillation.targets import FromOriginal, HardLabels
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import ModelSpec, Scratch
from excise.recipes.undo import strengths, student
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe
from excise.train.fit import FitConfig

LENGTH = ARITHMETIC_MAX_LENGTH
"""Tokens of every row."""
PRETRAIN = FitConfig(**{**ARITHMETIC_FIT, "steps": 1000, "lr": 4e-3, "batch_size": 96})
"""Original and oracles."""
DISTIL = FitConfig(
    steps=500, lr=4e-3, batch_size=96, warmup=30, schedule="cosine", min_lr=0.05,
    betas=(0.9, 0.99), clip=1.0,
)  # fmt: skip
"""Every student, half of what the original took."""


def teacher() -> MaxEnt:
    """Return what suppresses the tables."""
    return MaxEnt(fit=FitConfig(steps=80, lr=1e-3, batch_size=48, clip=1.0), max_length=LENGTH)


def arms() -> dict[str, Method]:
    """Return the teacher, four strengths of damage, and the controls."""

    def changed(**changes: Any) -> Undo:
        return student(teacher(), DISTIL, LENGTH, **{"alpha": 0.6, **changes})

    return strengths(teacher(), DISTIL, LENGTH) | {
        "undo_06_stop": changed(stop_tolerance=0.05, stop_every=25),
        "no_noise": changed(alpha=0.0),
        "noise_only": changed().model_copy(update={"fit": DISTIL.model_copy(update={"steps": 0})}),
        "no_teacher": changed(targets=HardLabels(harmful="keep")),
        "no_teacher_filtered": changed(targets=HardLabels(harmful="skip")),
        "original_as_teacher": changed(targets=FromOriginal()),
    }


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="undo-arithmetic",
        title="Multiplication tables unlearned, damaged, distilled: four strengths, six controls",
        takes="4 minutes, 1 GiB",
        domain=Arithmetic(factors=12, addends=20, dev_share=0.2),
        model=ModelSpec(scratch=Scratch(width=64, blocks=2)),
        pretrain=Pretrain(fit=PRETRAIN, max_length=LENGTH),
        arms=arms(),
        audit=AuditSpec(
            budget="smoke",
            change={"steps": 64, "checkpoints": (0, 4, 16, 64), "batch_size": 64},
        ),
        evaluate=EvalSpec(max_length=LENGTH),
        oracles=2,
    )
