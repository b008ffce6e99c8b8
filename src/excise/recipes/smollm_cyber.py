"""excise run smollm-cyber: attacks and weaknesses (ATT&CK, CWE) out of SmolLM2-135M by RMU.

First: excise fetch smollm2-135m; excise fetch cyber.
"""

from __future__ import annotations

from excise.domains.cyber import Cyber
from excise.methods import RMU
from excise.models.spec import ModelSpec
from excise.recipes.base import AuditSpec, EvalSpec, Recipe
from excise.train.fit import FitConfig


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="smollm-cyber",
        title="Attack techniques and software weaknesses removed from SmolLM2-135M by RMU",
        takes="15 minutes, 4 GiB, after fetching smollm2-135m and cyber",
        domain=Cyber(),
        model=ModelSpec(path="smollm2-135m"),
        arms={
            "rmu": RMU(
                layer=7,
                steering=60.0,
                alpha=30.0,
                fit=FitConfig(steps=100, lr=1e-3, batch_size=4, optimizer="adamw"),
                max_length=128,
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
                "max_test_rows": 24,
                "max_other_rows": 12,
                "max_length": 64,
                "shots": (2,),
                "random_directions": 1,
            },
        ),
        evaluate=EvalSpec(max_rows=96, max_length=128),
        dtype="bfloat16",
    )
