"""What the recipes on SmolLM2-135M share: the model, and an audit that two cores can afford."""

from __future__ import annotations

from excise.models.spec import ModelSpec
from excise.requests.recipe import AuditSpec

MODEL = ModelSpec(path="smollm2-135m")
"""What `excise fetch smollm2-135m` gets."""


def smollm_audit(
    *, test_rows: int, other_rows: int, steps: int = 8, benign_rate: float = 1e-4
) -> AuditSpec:
    """Return an audit at *smoke* in which trainings take turns, of a few steps on 8 rows.

    Args:
        test_rows: Rows of V scored at most.
        other_rows: Rows of every other set.
        steps: Steps of a training.
        benign_rate: Learning rate of benign fine-tuning.
    """
    return AuditSpec(
        budget="smoke",
        change={
            "steps": steps,
            "checkpoints": (0, steps),
            "batch_size": 8,
            "rates": (1e-4, 3e-4),
            "benign_rates": (benign_rate,),
            "fresh": 1,
            "together": 1,
            "bits": 0,
            "max_test_rows": test_rows,
            "max_other_rows": other_rows,
            "max_length": 64,
            "shots": (2,),
            "random_directions": 1,
        },
    )
