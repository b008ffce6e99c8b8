"""Named budgets: how hard the attacker tries, and which attacks are required.

*smoke* covers every depth level in seconds on a tiny model; *standard* is what a claim should rest
on; *strong* is the published scale (10,000 steps or 3e8 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator

from excise.core.config import Config
from excise.core.errors import UserError, nearest

Rate = Annotated[float, Field(gt=0)]
"""A learning rate."""

Count = Annotated[int, Field(ge=1)]
"""A number of things, one at least."""

Format = Literal["int8", "int4", "int3", "nf4"]
"""A grid of weights by name: symmetric integers, or the levels of NF4."""


class Budget(Config):
    """How hard the attacker tries."""

    name: Literal["smoke", "standard", "strong"] = "smoke"
    """How much effort this is; the report names it."""
    attacks: tuple[str, ...] = ()
    """Names of the attacks that are required at this budget."""
    steps: int = Field(default=16, ge=1)
    """Optimizer steps of one relearning."""
    doublings: int = Field(default=0, ge=0, le=8)
    """How often the steps of an attack that trains are doubled at most, while it brings back less
    than half of what its positive control hides; then every model is attacked for as long. Twice at
    most those of relearning on a candidate are, while it learns less of T than the oracles."""
    batch_size: int = Field(default=32, ge=2)
    """Rows per step of one relearning, half of them benign."""
    rates: tuple[Rate, ...] = Field(default=(3e-4, 1e-3, 3e-3), min_length=1)
    """Learning rates tried; the one used is chosen on `dev`, averaged over seeds."""
    lora_rates: tuple[Rate, ...] = (3e-3, 1e-2, 3e-2)
    """The same for LoRA."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of each variant."""
    benign_rates: tuple[Rate, ...] = ()
    """Learning rates of benign fine-tuning; empty for `rates`."""
    fresh: bool = False
    """Whether fresh units are learned too, as a control: does this budget teach at all? Always
    from standard on."""
    trained_on: tuple[Literal["forget", "adjacent"], ...] = ()
    """Roles that relearning is tried on beside T: the method's own forget rows, the neighbours."""
    examples: tuple[Count, ...] = ()
    """Numbers of rows of T that relearning is tried with beside all of them."""
    trials: int = Field(default=0, ge=0)
    """Trainings on T at settings drawn at random: the attacker's search."""
    together: int = Field(default=0, ge=0)
    """Attacks on weights at the same time at most, where memory is short; 0 for one per worker."""
    bits: bool = True
    """Whether relearning notes the losses that residual bits are made of, which need an oracle."""
    checkpoints: tuple[int, ...] = Field(default=(0, 1, 2, 4, 8, 16), min_length=2)
    """Steps at which V is scored."""
    shots: tuple[Count, ...] = (4,)
    """Numbers of examples of the few-shot attack."""
    formats: tuple[Format, ...] = Field(default=("int8", "int4"), min_length=1)
    """Grids of the quantization attack."""
    random_directions: int = Field(default=2, ge=0)
    """Random directions cleared as controls of direction clearing."""
    subspaces: tuple[Count, ...] = ()
    """Sizes of subspaces that direction clearing takes out whole, beside a whitened difference."""
    max_test_rows: int = Field(default=256, ge=1)
    """Rows of V scored at most, the same for every subject."""
    max_other_rows: int = Field(default=128, ge=1)
    """Rows of `retain_test`, `dev_forget`, T and `fresh` scored at most, each."""
    max_length: int = Field(default=128, ge=2)
    """Tokens per row."""
    margin: float = Field(default=0.1, gt=0, lt=1)
    """Equivalence margin as a share of the distance between the reference models."""

    @field_validator("checkpoints")
    @classmethod
    def _in_order(cls, checkpoints: tuple[int, ...]) -> tuple[int, ...]:
        """Refuse checkpoints that do not begin before the first step and rise from there."""
        if checkpoints[0] != 0 or any(b <= a for a, b in pairwise(checkpoints)):
            raise ValueError("checkpoints are steps that begin with 0 and rise, as in [0, 1, 4]")
        return checkpoints

    def doubled(self) -> Budget:
        """Return the budget with twice the steps, scored at both ends."""
        points = (*self.checkpoints, self.steps, 2 * self.steps)
        later = tuple(sorted({point for point in points if point <= 2 * self.steps}))
        return self.model_copy(update={"steps": 2 * self.steps, "checkpoints": later})

    def for_training(self) -> Budget:
        """Return the budget as one training sees it; what other trainings are run is left out.

        A stage is given this one, so that equal trainings of different budgets are done once.
        """
        apart = (*_JUDGING, "rates", "lora_rates", "benign_rates", "seeds", "shots", "formats")
        beside = ("random_directions", "subspaces", "trained_on", "examples", "trials")
        return self.without((*apart, *beside))

    def for_attack(self) -> Budget:
        """Return the budget as one attack sees it, without what concerns the audit as a whole."""
        return self.without(_JUDGING)

    def without(self, names: Sequence[str]) -> Budget:
        """Return the budget with some fields at their defaults."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].default for name in names})


_JUDGING = ("name", "attacks", "margin", "fresh", "together", "doublings")
"""Fields of a budget that say what is run and how it is judged, not how."""


REQUIRED = ("few_shot", "prefix", "direction", "quantize", "benign", "relearn", "transfer")
"""Attacks every budget asks for: one at least on each level that an attack can decide."""

ROWS = ("rescale_rows", "match_rows", "align_rows")
"""Attacks on edits that are keyed on names, the cheap ones first; they say so where no prompt holds
a name."""

READINGS = ("lens", "probe", "latent")
"""Further attacks on activations that standard and strong ask for."""

EDITS = ("prune", "noise", "shrink_perturb", "reinit", *ROWS)
"""Further edits of weights that standard and strong ask for."""

PROMPTS = ("paraphrase", "filler", "template")
"""Further prompts that standard and strong ask for; one that has nothing to do for the rows or the
model at hand is shown as such, and no level waits for it."""

INPUTS = ("soft_prompt",)
"""Trained inputs that standard and strong ask for."""

FORMATS: tuple[Format, ...] = ("int8", "int4", "int3", "nf4")
"""Grids from standard on."""

SMOKE = Budget(name="smoke", attacks=(*REQUIRED, *ROWS[:2]), lora_rates=(), doublings=3)
"""Sixteen full-parameter steps at three rates, up to 128 where a control takes those to undo."""

STANDARD = Budget(
    name="standard",
    attacks=(*REQUIRED, *PROMPTS, *READINGS, *EDITS, *INPUTS),
    steps=256,
    rates=(1e-4, 3e-4, 1e-3, 3e-3),
    lora_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=(0, 1, 2),
    trained_on=("forget", "adjacent"),
    examples=(1, 8),
    trials=8,
    checkpoints=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256),
    shots=(1, 4, 16),
    formats=FORMATS,
    random_directions=8,
    subspaces=(1, 4, 16),
    max_test_rows=1024,
    max_other_rows=512,
    max_length=256,
)
"""Full and LoRA, four rates, three seeds; other rows to train on, and eight trials at random."""

STRONG = Budget(
    name="strong",
    attacks=(*REQUIRED, *PROMPTS, *READINGS, *EDITS, *INPUTS, "gcg"),
    steps=10_000,
    rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    lora_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=(0, 1, 2),
    trained_on=("forget", "adjacent"),
    examples=(1, 8, 64),
    trials=32,
    checkpoints=(0, 1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 10_000),
    shots=(1, 4, 16, 64),
    formats=FORMATS,
    random_directions=32,
    subspaces=(1, 4, 16),
    max_test_rows=4096,
    max_other_rows=1024,
    max_length=512,
)
"""Ten thousand steps."""

BUDGETS = {budget.name: budget for budget in (SMOKE, STANDARD, STRONG)}
"""Budgets by name."""

LARGE = 20_000_000
"""Parameters from which on rates are a tenth (those of tiny models break a real one) and *smoke*
has smaller batches, fewer rows and a doubling less, so that it fits two cores."""


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
    budget = BUDGETS[name]
    if parameters < LARGE:
        return budget
    change: dict[str, object] = {
        "rates": tuple(round(r / 10, 12) for r in budget.rates),
        "lora_rates": tuple(round(r / 10, 12) for r in budget.lora_rates),
    }
    if name == "smoke":
        change |= {
            "doublings": 2,
            "batch_size": 8,
            "checkpoints": (0, 2, 8, 16),
            "max_test_rows": 48,
            "max_other_rows": 16,
        }
    return budget.model_copy(update=change)
