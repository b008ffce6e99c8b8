"""Named budgets: how hard the attacker tries, and which attacks are required.

*smoke* covers every depth level in seconds on a tiny model; *standard* is what a claim should rest
on; *strong* is the published scale (10,000 steps or 3e8 tokens).
"""

from __future__ import annotations

from excise.auditor.base import Budget
from excise.core.errors import UserError, nearest

REQUIRED = ("few_shot", "prefix", "direction", "quantize", "benign", "relearn", "transfer")
"""Attacks every budget asks for: one at least on each level that an attack can decide."""

SMOKE = Budget(name="smoke", attacks=REQUIRED, lora_rates=())
"""At most 16 full-parameter steps at three rates."""

STANDARD = Budget(
    name="standard",
    attacks=REQUIRED,
    steps=256,
    rates=(1e-4, 3e-4, 1e-3, 3e-3),
    lora_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=(0, 1, 2),
    checkpoints=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256),
    shots=(1, 4, 16),
    random_directions=8,
    max_test_rows=1024,
    max_other_rows=512,
    max_length=256,
)
"""Full and LoRA, four rates, three seeds."""

STRONG = Budget(
    name="strong",
    attacks=REQUIRED,
    steps=10_000,
    rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    lora_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=(0, 1, 2),
    checkpoints=(0, 1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 10_000),
    shots=(1, 4, 16, 64),
    random_directions=32,
    max_test_rows=4096,
    max_other_rows=1024,
    max_length=512,
)
"""Ten thousand steps."""

BUDGETS = {budget.name: budget for budget in (SMOKE, STANDARD, STRONG)}
"""Budgets by name."""

LARGE = 20_000_000
"""Parameters from which on rates are a tenth (those of tiny models break a real one) and *smoke*
has smaller batches and fewer rows, so that it fits two cores."""


def budget_of(name: str, parameters: int = 0) -> Budget:
    """Return a named budget, scaled to the model.

    Args:
        name: `smoke`, `standard` or `strong`.
        parameters: Size of the model; see `LARGE`.

    Returns:
        The budget.

    Raises:
        UserError: If no budget has that name.
    """
    if name not in BUDGETS:
        raise UserError(f"no budget is called '{name}'; {nearest(name, BUDGETS)}")
    found = BUDGETS[name]
    if parameters < LARGE:
        return found
    change: dict[str, object] = {
        "rates": tuple(round(r / 10, 12) for r in found.rates),
        "lora_rates": tuple(round(r / 10, 12) for r in found.lora_rates),
    }
    if name == "smoke":
        change |= {
            "batch_size": 8,
            "checkpoints": (0, 2, 8, 16),
            "max_test_rows": 48,
            "max_other_rows": 16,
        }
    return found.model_copy(update=change)
