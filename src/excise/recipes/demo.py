"""excise demo: under two minutes on two cores, no network.

Expected: filtering holds; GradDiff, MaxEnt and RMU look clean and come back within 16 steps.
"""

from __future__ import annotations

from excise.domains.facts import FACTS_FIT, FACTS_MAX_LENGTH, FACTS_MODEL, Facts
from excise.methods import RMU, Filtering, GradDiff, MaxEnt
from excise.methods.pretraining.pretrain import Pretrain
from excise.models.spec import ModelSpec, Scratch
from excise.requests.recipe import AuditSpec, EvalSpec, Recipe
from excise.train.fit import FitConfig


def recipe() -> Recipe:
    """Return the recipe."""
    length = FACTS_MAX_LENGTH
    return Recipe(
        name="demo",
        title="Made-up facts removed from a small Llama in four ways",
        takes="under 2 minutes, 1 GiB",
        domain=Facts(subjects=84, objects=32, forget_share=0.34),
        model=ModelSpec(scratch=Scratch(**FACTS_MODEL)),
        pretrain=Pretrain(
            fit=FitConfig(**{**FACTS_FIT, "steps": 350, "batch_size": 96, "micro_size": 24}),
            max_length=length,
            pack=(1, 1, 2, 4),
        ),
        arms={
            "filtering": Filtering(),
            "grad_diff": GradDiff(
                alpha=4.0,
                fit=FitConfig(steps=80, lr=4e-4, batch_size=64, clip=1.0),
                max_length=length,
            ),
            "maxent": MaxEnt(
                alpha=0.5,
                fit=FitConfig(steps=100, lr=2e-3, batch_size=64, clip=1.0),
                max_length=length,
            ),
            "rmu": RMU(
                layer=1,
                blocks=(0, 1),
                steering=50.0,
                alpha=20.0,
                fit=FitConfig(steps=100, lr=1e-2, batch_size=64),
                max_length=length,
            ),
        },
        audit=AuditSpec(budget="smoke"),
        evaluate=EvalSpec(max_length=length),
    )
