"""How sure an imperfect labeller says it is, calibrated or not.

A calibrated labeller is right about a share c of the rows to which it gives confidence c. Let the
confidences of all rows with the same told label follow Beta(a, b). By Bayes those of the right
labels then follow Beta(a + 1, b) and those of the wrong ones Beta(a, b + 1), and the share of
right labels is a / (a + b): given that share, one number is left, the concentration a + b.
Calibration and sharpness: Gneiting, Balabdaoui and Raftery 2007, "Probabilistic forecasts,
calibration and sharpness", doi:10.1111/j.1467-9868.2007.00587.x.

This module imports no torch.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field

from excise.core.config import Config
from excise.data.domain import UNLABELED, Row


class Confidence(Config):
    """How a labeller's confidences relate to how often it is right."""

    concentration: float = Field(default=1.0, gt=0, le=1e6)
    """Small: near 0 and 1, telling right labels from wrong. Large: all near the share of right."""
    overconfidence: float = Field(default=1.0, gt=0, le=100)
    """Factor of the log-odds: 1 for calibrated, above for surer than right, below for too shy."""


def confidences(
    labels: Sequence[int],
    right: Sequence[bool],
    keys: Sequence[str],
    config: Confidence,
    *,
    seed: int,
) -> list[float]:
    """Return how sure the labeller is of each label.

    The draw of a row depends on its key, the seed and how often its label is right, never on the
    order of rows. Where no row of a label is wrong (or right), all get 1 (or 0).

    Args:
        labels: What was told.
        right: Whether it is the truth.
        keys: A key per row that depends on its content.
        config: Concentration and overconfidence.
        seed: Seed of the draw.

    Returns:
        One number in [0, 1] per row; 1 for rows that nobody has looked at.
    """
    hits: dict[int, list[bool]] = defaultdict(list)
    for label, good in zip(labels, right, strict=True):
        hits[label].append(good)
    share = {label: sum(goods) / len(goods) for label, goods in hits.items()}
    out = []
    for label, good, key in zip(labels, right, keys, strict=True):
        p = share[label]
        if label == UNLABELED or p in (0.0, 1.0):
            out.append(1.0 if label == UNLABELED else p)
            continue
        a, b = p * config.concentration, (1 - p) * config.concentration
        draw = random.Random(f"{seed}:confidence:{key}")
        c = draw.betavariate(a + good, b + (not good))
        out.append(_sharpened(c, config.overconfidence))
    return out


def _sharpened(c: float, factor: float) -> float:
    """Multiply the log-odds of a probability."""
    if factor == 1.0 or c in (0.0, 1.0):
        return c
    logit = factor * (math.log(c) - math.log1p(-c))
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


def miscalibration(rows: Sequence[Row], bins: int = 10) -> float:
    """Return the expected calibration error of told labels against the true ones.

    Source: Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599, eq. 3.

    Args:
        rows: Rows with `capability` (truth), `label` and `confidence` (told); a label is right
            here if it says core of a core row, or some capability of a row of one. Rows that
            nobody has looked at are left out.
        bins: Bins of equal width.

    Returns:
        Mean over rows of |share right - mean confidence| of the row's bin; NaN without rows.
    """
    told = [row for row in rows if row.label != UNLABELED]
    found: dict[int, list[float]] = defaultdict(list)
    for row in told:
        right = (row.label > 0) == bool(row.capability)
        found[min(bins - 1, int(row.confidence * bins))].append(right - row.confidence)
    return sum(abs(math.fsum(gaps)) for gaps in found.values()) / len(told) if told else math.nan
