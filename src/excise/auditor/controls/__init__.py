"""Positive controls: models that hide what they know, each a way that some attack should undo."""

from excise.auditor.controls.control import PositiveControl
from excise.auditor.controls.gated import GatedEdit, PromptGatedEdit
from excise.auditor.controls.lock import PasswordLock
from excise.auditor.controls.perturb import (
    LogitScaling,
    ShortFineTuning,
    SmallWeights,
    WeightPerturbation,
    WithinBuckets,
)
from excise.auditor.controls.renamed import PermutedRows, RotatedRows, ShrunkRows

__all__ = [
    "GatedEdit",
    "LogitScaling",
    "PasswordLock",
    "PermutedRows",
    "PositiveControl",
    "PromptGatedEdit",
    "RotatedRows",
    "ShortFineTuning",
    "ShrunkRows",
    "SmallWeights",
    "WeightPerturbation",
    "WithinBuckets",
]
