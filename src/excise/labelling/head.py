"""The linear head, its calibration, and how good it is at each threshold.

Shape legend: N words or rows, F features, K classes (core and every capability).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from excise.data.domain import CORE

THRESHOLDS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Thresholds at which precision and recall are reported."""

LEAST: Final = 0.01
"""Share of held-out words of capabilities below which nothing is found, or of those of core words
that are left below which everything is."""


def fit_logistic(
    x_NF: Tensor, y_N: Int[Tensor, " N"], classes: int, *, l2: float, iterations: int = 200
) -> Float[Tensor, "F1 K"]:
    """Return the weights of a multinomial logistic regression, the biases in the last row.

    Minimises the sum of the losses plus l2 / 2 times the squared weights (biases are free) with
    L-BFGS from zero, so that the answer is unique and needs no seed.

    Args:
        x_NF: Features, dense or sparse, float64.
        y_N: Class of every row, from 0.
        classes: Number of classes.
        l2: Strength of the penalty.
        iterations: Iterations of L-BFGS at most.
    """
    return fit_head(x_NF, y_N, classes, l2=l2, iterations=iterations)[0]


def fit_head(
    x_NF: Tensor, y_N: Int[Tensor, " N"], classes: int, *, l2: float, iterations: int = 200
) -> tuple[Float[Tensor, "F1 K"], int]:
    """Return the weights of `fit_logistic`, and how often all rows were read for them."""
    weights = torch.zeros(x_NF.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        solver.zero_grad()
        scores = logits(x_NF, weights)
        loss = torch.nn.functional.cross_entropy(scores, y_N)
        loss = loss + l2 / (2 * len(y_N)) * weights[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weights.detach(), passes


def logits(x_NF: Tensor, weights_FK: Tensor) -> Float[Tensor, "N K"]:
    """Return the scores of every class; `weights_FK` has the biases in its last row."""
    product: Tensor = x_NF @ weights_FK[:-1]
    return product + weights_FK[-1]


def margins(scores_NK: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Return the log-odds of being of any capability."""
    return scores_NK[:, CORE + 1 :].logsumexp(dim=1) - scores_NK[:, CORE]


def platt(margin_N: Float[Tensor, " N"], forget_N: Bool[Tensor, " N"]) -> tuple[float, float]:
    """Return slope and shift by which log-odds become calibrated ones.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", section 2.2: a logistic
    regression whose targets are (n+ + 1) / (n+ + 2) and 1 / (n- + 2), by Newton's method.

    Args:
        margin_N: Log-odds of held-out words.
        forget_N: Whether each is of a capability.

    Returns:
        (slope, shift); a slope below 0 means that the log-odds point the wrong way.
    """
    x_N = margin_N.double()
    positive = float(forget_N.sum())
    negative = len(x_N) - positive
    y_N = torch.where(forget_N, (positive + 1) / (positive + 2), 1 / (negative + 2)).double()
    scale = max(1e-9, float(x_N.std(correction=0)))
    z_N2 = torch.stack([(x_N - x_N.mean()) / scale, torch.ones_like(x_N)], dim=1)
    w_2 = torch.tensor([0.0, math.log((positive + 1) / (negative + 1))], dtype=torch.float64)
    ridge = 1e-9 * torch.eye(2, dtype=torch.float64)

    def loss(w_2: Tensor) -> float:
        return float(
            torch.nn.functional.binary_cross_entropy_with_logits(z_N2 @ w_2, y_N, reduction="sum")
        )

    for _ in range(100):
        p_N = torch.sigmoid(z_N2 @ w_2)
        slope_2 = z_N2.T @ (p_N - y_N)
        curve_22 = z_N2.T @ (z_N2 * (p_N * (1 - p_N))[:, None]) + ridge
        step_2 = torch.linalg.solve(curve_22, slope_2)
        share, before = 1.0, loss(w_2)
        while share > 1e-6 and loss(w_2 - share * step_2) > before:
            share /= 2
        w_2 = w_2 - share * step_2
        if float(slope_2.abs().max()) < 1e-9 * len(x_N):
            break
    a = float(w_2[0]) / scale
    return a, float(w_2[1]) - a * float(x_N.mean())


def probabilities(
    scores_NK: Float[Tensor, "N K"], calibration: tuple[float, float]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """Return the calibrated probability of any capability, and the most likely capability.

    Args:
        scores_NK: Scores of every class.
        calibration: Slope and shift.
    """
    slope, shift = calibration
    chance_N = torch.sigmoid(slope * margins(scores_NK).double() + shift)
    return chance_N, scores_NK[:, CORE + 1 :].argmax(dim=1) + 1


def table(
    chance_N: Float[Tensor, " N"], forget_N: Bool[Tensor, " N"]
) -> list[dict[str, float | None]]:
    """Return precision and recall at each of `THRESHOLDS`, and the share of words flagged.

    Args:
        chance_N: Probability of any capability.
        forget_N: Whether each word is of one.
    """
    out: list[dict[str, float | None]] = []
    for threshold in THRESHOLDS:
        flagged_N = chance_N >= threshold
        right, flagged = float((flagged_N & forget_N).sum()), float(flagged_N.sum())
        out.append({
            "threshold": threshold,
            "precision": right / flagged if flagged else None,
            "recall": right / max(1.0, float(forget_N.sum())),
            "flagged": flagged / len(chance_N),
        })  # fmt: skip
    return out


def calibration_error(
    chance_N: Float[Tensor, " N"], forget_N: Bool[Tensor, " N"], bins: int = 10
) -> float:
    """Return the expected calibration error of probabilities.

    Source: Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599, eq. 3.
    """
    bin_N = (chance_N * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(
        0, bin_N, forget_N.double() - chance_N.double()
    )
    return float(gap.abs().sum()) / max(1, len(chance_N))


def verdict(
    chance_N: Float[Tensor, " N"], forget_N: Bool[Tensor, " N"], threshold: float = 0.5
) -> str:
    """Return a sentence where a labeller finds nothing or everything; empty elsewhere.

    It finds nothing where fewer than `LEAST` of the held-out words of capabilities lie above the
    threshold, and everything where fewer than `LEAST` of the core words lie below it.

    Args:
        chance_N: Probability of any capability of held-out words.
        forget_N: Whether each word is of one.
        threshold: Probability above which a word is labelled.
    """
    found = share_of(chance_N[forget_N] > threshold)
    left = share_of(chance_N[~forget_N] <= threshold)
    if found < LEAST:
        return (
            f"the labeller finds nothing: it gives more than {threshold:.3g} to {found:.1%} of the "
            "held-out words of capabilities; label more documents, or use other features"
        )
    if left < LEAST:
        return (
            f"the labeller finds everything: it gives no more than {threshold:.3g} to {left:.1%} "
            "of the held-out core words; label more core documents, or use other features"
        )
    return ""


def share_of(flags_N: Bool[Tensor, " N"]) -> float:
    """Return the share that is true; 0 of none."""
    return float(flags_N.double().mean()) if len(flags_N) else 0.0


def concatenated(parts: Sequence[Tensor], width: int) -> Tensor:
    """Return parts one below the other; of none, an empty tensor of that width."""
    return torch.cat([*parts]) if parts else torch.zeros(0, width)
