"""Planted hiding models: positive controls, built from the original without training it long.

An attack counts only with power. Each plant hides what it knows in the way one family of attacks
should undo: behind a detector (`gate`: directions), behind a detector or lock that contexts open
(`gate_prompt`, `lock`: prompts), by less than a quantization bucket (`bucket`: int8, int4), by a
small edit that any training repairs (`gain`, `jolt`: benign fine-tuning), by a short way up the
forget loss (`shallow`: relearning). A plant that does not hide is no control, and the attack that
needed it has none: it is underpowered, and says why.

Plants never read V: they are fitted on forget, `dev_forget`, T and retain rows, and V only says
whether they hide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from excise.auditor.base import Budget
from excise.auditor.controls.hide import BUILDERS, Goal, PlantKind, chance, known, score
from excise.auditor.scoring import evaluation_set
from excise.core.context import Context
from excise.data.domain import Domain
from excise.models.checkpoint import Checkpoint, save_model

PLANT_FOR: Mapping[str, tuple[PlantKind, ...]] = {
    "few_shot": ("gate_prompt", "lock"),
    "prefix": ("gate_prompt", "lock"),
    "direction": ("gate",),
    "quantize": ("bucket",),
    "benign": ("gain", "jolt"),
    "relearn": ("shallow", "gate"),
    "transfer": ("shallow", "gate"),
}
"""Which plants are controls of which attack: the first that hides is used."""


def plants_for(attack: str, *, higher: bool, large: bool = False) -> tuple[PlantKind, ...]:
    """Return which plants are controls of an attack, the best first.

    Args:
        attack: Name of the attack.
        higher: Whether a higher score means more knowledge; a flat output hides ranks for a few
            steps, but a loss for many, so that it comes last where the score is a loss.
        large: Whether the model is large: a deep one reads past its contexts, and a gate for
            prompts, which costs minutes and gigabytes there, finds nothing to tell them by.
    """
    kinds: list[PlantKind] = [
        kind for kind in PLANT_FOR.get(attack, ()) if not (large and kind == "gate_prompt")
    ]
    if not higher and "gain" in kinds:
        kinds.remove("gain")
        kinds.append("gain")
    return tuple(kinds)


VERSION = 2
"""Version of the plants' definitions."""


@dataclass(frozen=True)
class Plant:
    """A positive control.

    Attributes:
        kind: How it hides.
        checkpoint: The model, or None where the plant could not be built.
        before: The original's score on V.
        after: The plant's score on V.
        retain_before: The original's retain score.
        retain_after: The plant's.
        reason: Why it is no control; empty for one that hides.
    """

    kind: PlantKind
    checkpoint: Checkpoint | None
    before: float
    after: float = math.nan
    retain_before: float = math.nan
    retain_after: float = math.nan
    reason: str = ""

    @property
    def hides(self) -> bool:
        """Whether the plant can serve as a control."""
        return self.checkpoint is not None and not self.reason


def make_plant(
    kind: PlantKind, original: Checkpoint, domain: Domain, budget: Budget, ctx: Context, to: Path
) -> Plant:
    """Build one plant and check that it hides.

    Args:
        kind: How to hide.
        original: The model that knows.
        domain: Rows by role.
        budget: Which rows are scored.
        ctx: Seed, device.
        to: Folder of the model; it must be free.

    Returns:
        The plant, or the reason why there is none.
    """
    # Moves inside buckets need float32 whatever the audit computes in: an int8 bucket is as fine
    # as bfloat16's own steps. The others take what the attack will compute in.
    dtype = torch.float32 if kind == "bucket" else ctx.dtype
    model = original.load(dtype=dtype, device=ctx.device)
    evaluation = evaluation_set(domain, budget, original.tokenizer())
    before = score(model, evaluation, evaluation.all_test)
    retain_before = known(evaluation.retained(model))
    goal = Goal(before, chance(model, evaluation), evaluation.higher)
    if not goal.reachable:
        return Plant(kind, None, before, reason="the original knows nothing that could be hidden")
    dev_goal = Goal(score(model, evaluation, evaluation.all_dev), goal.chance, goal.higher)
    reason = BUILDERS[kind](model, evaluation, dev_goal, ctx)
    if reason:
        return Plant(kind, None, before, retain_before=retain_before, reason=reason)
    checkpoint = save_model(model, None, to, source=original)
    after = score(model, evaluation, evaluation.all_test)
    if not goal.met(after):
        reason = f"the plant does not hide: V scores {after:.3g}, the original {before:.3g}"
    retain_after = known(evaluation.retained(model))
    return Plant(kind, checkpoint, before, after, retain_before, retain_after, reason)
