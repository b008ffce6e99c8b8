"""excise run smollm-cyber: attacks and weaknesses (ATT&CK, CWE) out of SmolLM2-135M by RMU.

First: excise fetch smollm2-135m; excise fetch cyber.
"""

from __future__ import annotations

from excise.domains.cyber import Cyber
from excise.methods import RMU
from excise.recipes.smollm import MODEL, smollm_audit
from excise.requests.recipe import EvalSpec, Recipe
from excise.train.fit import FitConfig


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="smollm-cyber",
        title="Attack techniques and software weaknesses removed from SmolLM2-135M by RMU",
        takes="12 minutes, 5 GiB, after fetching smollm2-135m and cyber",
        domain=Cyber(),
        model=MODEL,
        arms={
            "rmu": RMU(
                layer=7,
                steering=60.0,
                alpha=30.0,
                fit=FitConfig(steps=100, lr=1e-3, batch_size=4, optimizer="adamw"),
                max_length=128,
            )
        },
        audit=smollm_audit(test_rows=24, other_rows=12),
        evaluate=EvalSpec(max_rows=96, max_length=128),
        dtype="bfloat16",
    )
