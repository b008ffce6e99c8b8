"""excise run smollm-glosses: one WordNet topic out of SmolLM2-135M; multiple choice decides.

First: excise fetch smollm2-135m.
"""

from __future__ import annotations

from excise.domains.glosses import Glosses
from excise.methods import RMU
from excise.models.spec import ModelSpec
from excise.recipes.base import AuditSpec, EvalSpec, Recipe
from excise.train.fit import FitConfig


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="smollm-glosses",
        title="Words for the body removed from SmolLM2-135M; multiple choice before and after",
        takes="25 minutes, 4 GiB, after fetching smollm2-135m",
        domain=Glosses(),
        model=ModelSpec(path="smollm2-135m"),
        arms={
            "rmu": RMU(
                layer=7,
                steering=40.0,
                alpha=10.0,
                fit=FitConfig(steps=150, lr=1e-3, batch_size=8, optimizer="adamw"),
                max_length=48,
            )
        },
        audit=AuditSpec(
            budget="smoke",
            change={
                "steps": 8,
                "checkpoints": (0, 8),
                "batch_size": 8,
                "rates": (1e-4, 3e-4),
                "benign_rates": (1e-4,),
                "fresh": 1,
                "together": 1,
                "bits": 0,
                "max_test_rows": 48,
                "max_other_rows": 16,
                "max_length": 64,
                "shots": (2,),
                "random_directions": 1,
            },
        ),
        evaluate=EvalSpec(max_rows=120, max_length=96),
        dtype="bfloat16",
    )
