"""Teachers and the student of the studies of distillation: one place for what was tuned."""

from __future__ import annotations

from typing import Any

from excise.domains.arithmetic import ARITHMETIC_MAX_LENGTH
from excise.methods.base import Method
from excise.methods.distillation.undo import Undo
from excise.methods.posthoc.grad_diff import GradDiff
from excise.methods.posthoc.maxent import MaxEnt
from excise.methods.posthoc.npo import NPO
from excise.methods.posthoc.rmu import RMU
from excise.methods.posthoc.tar import TAR, RandomMapping
from excise.train.fit import FitConfig

LENGTH = ARITHMETIC_MAX_LENGTH

BARE = "rmu, forget term alone"
"""RMU as the released configuration of UNDO trained it."""


def maxent(**changes: Any) -> MaxEnt:
    """Return the teacher of the studies: MaxEnt, sized on dev of seeds 0, 11, 12."""
    fit = FitConfig(steps=160, lr=5e-4, batch_size=48, clip=1.0)
    return MaxEnt(**{"alpha": 1.0, "fit": fit, "max_length": LENGTH, **changes})


def graddiff(**changes: Any) -> GradDiff:
    """Return GradDiff, sized for tiny models."""
    fit = FitConfig(steps=80, lr=6e-4, batch_size=48, clip=1.0)
    return GradDiff(**{"alpha": 15.0, "fit": fit, "max_length": LENGTH, **changes})


def rmu(**changes: Any) -> RMU:
    """Return RMU with its retain term, sized for tiny models; `alpha=0` leaves the term out."""
    fit = FitConfig(steps=160, lr=1e-2, batch_size=48)
    sized = {"layer": 1, "blocks": (0, 1), "steering": 50.0, "alpha": 20.0}
    return RMU(**{**sized, "fit": fit, "max_length": LENGTH, **changes})


def npo(**changes: Any) -> NPO:
    """Return NPO at a rate for tiny models, untuned."""
    fit = FitConfig(steps=80, lr=1e-3, batch_size=48, clip=1.0)
    return NPO(**{"fit": fit, "max_length": LENGTH, **changes})


def tar(**changes: Any) -> TAR:
    """Return TAR with short attacks, at rates for models of this size."""
    fit = FitConfig(steps=40, lr=2e-3, batch_size=48, warmup=4, optimizer="schedule_free")
    sized = {"inner_steps": 16, "inner_lr": (1e-3, 3e-3), "inner_batch": 32}
    mapping = RandomMapping(fit=fit)
    return TAR(**{**sized, "mapping": mapping, "fit": fit, "max_length": LENGTH, **changes})


def teachers() -> dict[str, Method]:
    """Return the teachers at their middle strength, RMU first."""
    return {
        "rmu": rmu(),
        BARE: with_fit(rmu(alpha=0.0), lr=1e-3, steps=40),
        "maxent": maxent(),
        "grad_diff": graddiff(),
        "npo": npo(),
    }


def with_fit(method: Method, **changes: Any) -> Method:
    """Return a method with other settings of its schedule."""
    fit: FitConfig = method.fit  # type: ignore[attr-defined]
    return method.model_copy(update={"fit": fit.model_copy(update=changes)})


def student(**changes: Any) -> Undo:
    """Return the student of the studies: from random weights, all steps, sized for tiny models.

    With alpha and beta 1 nothing of any model is left and the noise is a whole initialisation.
    """
    fit = FitConfig(
        steps=500, lr=4e-3, batch_size=96, warmup=30, schedule="cosine", min_lr=0.05,
        betas=(0.9, 0.99), clip=1.0,
    )  # fmt: skip
    chosen = {"unlearn": maxent(), "alpha": 1.0, "beta": 1.0, "fit": fit, "max_length": LENGTH}
    return Undo(**{**chosen, **changes})
