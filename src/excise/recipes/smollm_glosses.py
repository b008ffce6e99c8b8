"""excise run smollm-glosses: one WordNet topic out of SmolLM2-135M; multiple choice decides.

First: excise fetch smollm2-135m.
"""

from __future__ import annotations

from excise.domains.glosses import Glosses
from excise.methods import RMU
from excise.recipes.smollm import MODEL, smollm_audit
from excise.requests.recipe import EvalSpec, Recipe
from excise.train.fit import FitConfig


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="smollm-glosses",
        title="Words for the body removed from SmolLM2-135M; multiple choice before and after",
        takes="20 minutes, 6 GiB, after fetching smollm2-135m",
        domain=Glosses(),
        model=MODEL,
        arms={
            "rmu": RMU(
                layer=7,
                steering=40.0,
                alpha=10.0,
                fit=FitConfig(steps=150, lr=1e-3, batch_size=8, optimizer="adamw"),
                max_length=48,
            )
        },
        audit=smollm_audit(test_rows=48, other_rows=16, steps=16, benign_rate=3e-4),
        evaluate=EvalSpec(max_rows=120, max_length=96),
        dtype="bfloat16",
    )
