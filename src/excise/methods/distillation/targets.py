"""What each token is distilled towards: one choice of target per token.

A target says, for the positions of a batch, whose prediction the student shall imitate there:
one or several frozen models, a fixed distribution, the token that follows, or nothing.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from jaxtyping import Bool
from pydantic import Field, field_validator
from torch import Tensor

from excise.core.config import Config
from excise.data.stream import Batch
from excise.methods.distillation.harmful import Judge, TrueLabels
from excise.models.checkpoint import ModelPath

UNLEARNED = "unlearned"
"""Source: the teacher, what `unlearn` made of the original."""
ORIGINAL = "original"
"""Source: the model before removal."""


class FromTeacher(Config):
    """The unlearned teacher everywhere."""

    name: Literal["teacher"] = "teacher"


class FromOriginal(Config):
    """The original everywhere: the control that removes nothing."""

    name: Literal["original"] = "original"


class FromOracle(Config):
    """A model on disk everywhere, such as one that was trained without what is removed."""

    name: Literal["oracle"] = "oracle"
    path: ModelPath
    """Its folder."""


class Splice(Config):
    """One prediction where a token is benign, another where it is harmful."""

    name: Literal["splice"] = "splice"
    benign: Literal["original", "unlearned"] = "original"
    """Whose prediction counts on benign tokens."""
    harmful: Literal["uniform", "unigram", "mean", "shuffled", "skip", "unlearned", "original"] = (
        "uniform"
    )
    """What counts on harmful ones: the uniform distribution, the frequencies of the forget rows'
    tokens, the teacher's mean prediction on them, the teacher's predictions dealt out at random
    among the harmful tokens of the batch, nothing, or one of the models."""
    by: Judge = TrueLabels()
    """Who says what is harmful."""


class HardLabels(Config):
    """The token that follows: cross-entropy without a teacher."""

    name: Literal["hard_labels"] = "hard_labels"
    harmful: Literal["skip", "keep"] = "skip"
    """Whether harmful tokens are left out, as data filtering does, or learned."""
    by: Judge = TrueLabels()
    """Who says what is harmful."""


class FromMixture(Config):
    """Several models: their mean prediction, or one of them sampled for every row."""

    name: Literal["mixture"] = "mixture"
    weights: dict[str, float]
    """Weight by source: `unlearned`, `original`, a name of `also`, or a folder."""
    how: Literal["mean", "draw"] = "mean"
    """Mean of the probabilities, or a sample in proportion to the weights."""

    @field_validator("weights")
    @classmethod
    def _check(cls, weights: dict[str, float]) -> dict[str, float]:
        """Refuse weights that are no mixture."""
        if not weights or any(not 0 < w < math.inf for w in weights.values()):
            raise ValueError("name at least one source, each with a weight above 0")
        return weights


Targets = Annotated[
    FromTeacher | FromOriginal | FromOracle | Splice | HardLabels | FromMixture,
    Field(discriminator="name"),
]
"""What a student is distilled towards."""

TargetKind = Literal["models", "shuffled", "uniform", "unigram", "mean", "tokens"]


@dataclass(frozen=True)
class TargetPiece:
    """Positions of a batch that share a kind of target.

    Attributes:
        mask_BT: The positions, among those that are scored.
        kind: `models` and `shuffled` ask the models of `weights`.
        weights: Weight by source, adding up to 1.
    """

    mask_BT: Bool[Tensor, "B T"]
    kind: TargetKind
    weights: Mapping[str, float] = field(default_factory=dict)


def sources_of(targets: Targets) -> tuple[str, ...]:
    """Return the frozen models that targets need: `unlearned`, `original`, names and folders."""
    if isinstance(targets, FromTeacher):
        return (UNLEARNED,)
    if isinstance(targets, FromOriginal):
        return (ORIGINAL,)
    if isinstance(targets, FromOracle):
        return (targets.path,)
    if isinstance(targets, FromMixture):
        return tuple(targets.weights)
    implicit = (UNLEARNED, ORIGINAL) if targets.by.name == "implicit" else ()
    if isinstance(targets, HardLabels):
        return implicit if targets.harmful == "skip" else ()
    needs = {"mean": UNLEARNED, "shuffled": UNLEARNED, "unlearned": UNLEARNED, "original": ORIGINAL}
    harmful = (needs[targets.harmful],) if targets.harmful in needs else ()
    return tuple(dict.fromkeys((targets.benign, *harmful, *implicit)))


def asked_alone(targets: Targets) -> tuple[set[str], set[str]]:
    """Return the sources that a cache can stand for, and those that must be there while training.

    A cache holds predictions of single models; mixtures of probabilities, shuffling and implicit
    labels need the models themselves.
    """
    sources = set(sources_of(targets))
    if isinstance(targets, FromMixture) and targets.how == "mean" and len(targets.weights) > 1:
        return set(), sources
    live: set[str] = set()
    judge = judge_of(targets)
    if judge is not None and judge.name == "implicit":
        live |= {UNLEARNED, ORIGINAL}
    if isinstance(targets, Splice):
        alone: set[str] = {targets.benign}
        if targets.harmful in (UNLEARNED, ORIGINAL):
            alone.add(targets.harmful)
        return alone, live | ({UNLEARNED} if targets.harmful == "shuffled" else set())
    return (set() if isinstance(targets, HardLabels) else sources), live


def judge_of(targets: Targets) -> Judge | None:
    """Return who says what is harmful, where that matters."""
    if isinstance(targets, Splice) or (
        isinstance(targets, HardLabels) and targets.harmful == "skip"
    ):
        return targets.by
    return None


def model_of(targets: Targets) -> str:
    """Return the source whose retain score a student is to reach."""
    if isinstance(targets, Splice):
        return targets.benign
    if isinstance(targets, HardLabels):
        return ORIGINAL
    return sources_of(targets)[0]


def pieces(
    targets: Targets,
    batch: Batch,
    wanted_BT: Bool[Tensor, "B T"],
    harmful: Callable[[], Bool[Tensor, "B T"]],
) -> list[TargetPiece]:
    """Return which target every wanted position of a batch has; positions in none are skipped.

    Args:
        targets: The choice.
        batch: The rows.
        wanted_BT: Positions whose prediction is scored.
        harmful: Says which positions predict a harmful token; asked where that matters.
    """
    if isinstance(targets, FromMixture):
        return _mixed(targets, batch, wanted_BT)
    if isinstance(targets, HardLabels):
        learned_BT = wanted_BT & ~harmful() if targets.harmful == "skip" else wanted_BT
        return [TargetPiece(learned_BT, "tokens")]
    if not isinstance(targets, Splice):
        return [TargetPiece(wanted_BT, "models", {sources_of(targets)[0]: 1.0})]
    harmful_BT = harmful()
    benign = TargetPiece(wanted_BT & ~harmful_BT, "models", {targets.benign: 1.0})
    at_BT = wanted_BT & harmful_BT
    if targets.harmful == "skip":
        return [benign]
    if targets.harmful == "unlearned" or targets.harmful == "original":
        return [benign, TargetPiece(at_BT, "models", {targets.harmful: 1.0})]
    if targets.harmful == "shuffled":
        return [benign, TargetPiece(at_BT, "shuffled", {UNLEARNED: 1.0})]
    return [benign, TargetPiece(at_BT, targets.harmful)]


def _mixed(targets: FromMixture, batch: Batch, wanted_BT: Bool[Tensor, "B T"]) -> list[TargetPiece]:
    """Return the pieces of a mixture; samples follow the step, as `fit` seeds them."""
    total = sum(targets.weights.values())
    weights = {source: w / total for source, w in targets.weights.items()}
    if targets.how == "mean":
        return [TargetPiece(wanted_BT, "models", weights)]
    share = torch.tensor(list(weights.values()))
    source_B = torch.multinomial(share, len(batch.units), replacement=True).to(wanted_BT.device)
    return [
        TargetPiece(wanted_BT & (source_B == i)[:, None], "models", {source: 1.0})
        for i, source in enumerate(weights)
    ]
