"""excise run undo-languages: Spanish out of a model of two languages, by the loss on verses.

Expected: MaxEnt alone is relearned within a few steps; the larger alpha, the nearer is what comes
back to what the oracle learns in as many steps.
"""

from __future__ import annotations

from excise.domains.languages import LANGUAGES_FIT, Languages
from excise.methods import MaxEnt
from excise.methods.base import Method
from excise.methods.distillation.targets import HardLabels
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import ModelSpec, Scratch
from excise.recipes.undo import strengths, student
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe
from excise.train.fit import FitConfig

LENGTH = 48
"""Tokens per row."""
PRETRAIN = FitConfig(**{**LANGUAGES_FIT, "steps": 500, "lr": 4e-3, "batch_size": 32})
"""Original and oracles."""
DISTIL = PRETRAIN.model_copy(update={"steps": 250, "warmup": 20, "weight_decay": 0.0})
"""Every student, half of what the original took."""


def teacher() -> MaxEnt:
    """Return what suppresses the language."""
    return MaxEnt(fit=FitConfig(steps=60, lr=1e-3, batch_size=16, clip=1.0), max_length=LENGTH)


def arms() -> dict[str, Method]:
    """Return the teacher, four strengths of damage, and a student of the text itself."""
    text = student(teacher(), DISTIL, LENGTH, alpha=0.6, targets=HardLabels(harmful="keep"))
    return strengths(teacher(), DISTIL, LENGTH) | {"no_teacher": text}


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="undo-languages",
        title="Spanish removed from a small model of two languages by unlearning and distillation",
        takes="5 to 8 minutes, 1 GiB",
        domain=Languages(verses=2000, vocabulary=512),
        model=ModelSpec(scratch=Scratch(width=64, blocks=2)),
        pretrain=Pretrain(fit=PRETRAIN, max_length=LENGTH),
        arms=arms(),
        audit=AuditSpec(budget="smoke", change={"steps": 32, "checkpoints": (0, 4, 16, 32)}),
        evaluate=EvalSpec(max_length=LENGTH),
        oracles=1,
    )
