"""A linear probe that learns from the given labels and labels the rest.

Every row is scored by a probe that never saw its label (folds), so that a missed row cannot teach
the probe that it is core. Labelled rows are held out in the same way: on them the threshold is
chosen.

Shape legend: N rows, F features, K classes (core and every capability), V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Row, text_of
from excise.labelling.head import fit_logistic, logits

ThresholdRule = Literal["lift", "pu", "f1", "fixed"]
"""How a threshold is chosen on held-out labelled rows."""

LEAST = 1.25
"""Least lift of a probe that is believed; to flag everything has a lift of 1."""


@dataclass(frozen=True)
class Judgement:
    """What the probe says of every row.

    Attributes:
        chance_N: Probability of being of some capability, out of fold.
        label_N: The capability that is most likely, from 1.
        threshold: Probability above which a row is taken for forget.
        held_out: Precision, recall and F1 of the probe on labelled rows, judged by their labels.
    """

    chance_N: Tensor
    label_N: Tensor
    threshold: float
    held_out: dict[str, float]


def bag_of_tokens(ids: Sequence[Sequence[int]]) -> Tensor:
    """Return which tokens each row has, as a sparse [N, F] matrix of ones in float64.

    Args:
        ids: Token ids of each row.
    """
    names = {token: i for i, token in enumerate(sorted({t for row in ids for t in row}))}
    pairs = [(n, names[t]) for n, row in enumerate(ids) for t in sorted(set(row))]
    index = torch.tensor(pairs, dtype=torch.long).T
    values = torch.ones(len(pairs), dtype=torch.float64)
    shape = (len(ids), len(names))
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True, is_coalesced=True)


def standardised(x_NF: Tensor) -> Float[Tensor, "N F"]:
    """Return features of mean 0 and deviation 1 in float64; constant ones become 0.

    Args:
        x_NF: Features.
    """
    x_NF = x_NF.double()
    spread = x_NF.std(dim=0, correction=0)
    return (x_NF - x_NF.mean(dim=0)) / spread.clamp(min=1e-12)


def fold_of(
    rows: Sequence[Row], folds: int, by: Literal["row", "unit", "group"], seed: int
) -> Tensor:
    """Return the fold of each row; what shares a unit (or group) shares a fold.

    Args:
        rows: The rows.
        folds: How many.
        by: What must not be on both sides.
        seed: Seed of the draw, which depends on content and not on order.
    """
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        key = {"unit": row.unit, "group": row.group or row.unit}.get(by, "")
        if by == "row":
            text = f"{row.unit}\x1f{row.wording}\x1f{text_of(row)}"
            key = f"{text}\x1f{seen[text]}"
            seen[text] += 1
        keys.append(key)
    ranked = sorted(set(keys), key=lambda k: hashlib.sha256(f"{seed}:fold:{k}".encode()).digest())
    number = {key: i % folds for i, key in enumerate(ranked)}
    return torch.tensor([number[key] for key in keys])


def judge(
    rows: Sequence[Row],
    x_NF: Tensor,
    *,
    folds: int,
    by: Literal["row", "unit", "group"],
    rule: ThresholdRule,
    fixed: float,
    l2: float,
    seed: int,
) -> Judgement:
    """Score every row by a probe that never saw its label, and choose the threshold.

    Rules: `lift` maximises the squared recall on held-out labelled forget rows over the share of
    rows that are flagged, which ranks thresholds as F1 would if no label were missed (Lee and Liu
    2003, "Learning with positive and unlabeled examples using weighted logistic regression",
    section 4). Where the best is hardly better than flagging everything, nothing is flagged.
    `pu` takes labels of forget rows as missed at random among them: P(labelled) is then c
    P(forget), with c the mean score of held-out labelled forget rows, and the threshold is c / 2
    (Elkan and Noto 2008, "Learning classifiers from only positive and unlabeled data",
    doi:10.1145/1401890.1401920, section 2); a probe that cannot tell then flags too much. `f1`
    maximises F1 on held-out labelled rows; `fixed` takes the number given.

    Args:
        rows: All rows with the given labels; those nobody has looked at are scored only.
        x_NF: Their features.
        folds: Number of folds.
        by: What must not be on both sides of a fold.
        rule: How the threshold is chosen.
        fixed: The threshold of `fixed`.
        l2: Strength of the penalty.
        seed: Seed of the folds.

    Raises:
        UserError: If there are too few labelled rows for the folds.
    """
    given_N = torch.tensor([_given(row) for row in rows])
    classes = max(2, int(given_N.max()) + 1)
    fold_N = fold_of(rows, folds, by, seed)
    chance_NK = torch.zeros(len(rows), classes, dtype=torch.float64)
    for fold in range(folds):
        train_N = (fold_N != fold) & (given_N != UNLABELED)
        y_N = given_N[train_N]
        if not bool((y_N > CORE).any()) or not bool((y_N == CORE).any()):
            raise UserError(
                f"relabel finds no labelled {'core' if bool((y_N > CORE).any()) else 'forget'} row "
                f"outside fold {fold} of {folds}; lower 'folds' or label more rows"
            )
        weights = fit_logistic(_rows_of(x_NF, train_N), y_N, classes, l2=l2)
        here_N = fold_N == fold
        if bool(here_N.any()):
            chance_NK[here_N] = logits(_rows_of(x_NF, here_N), weights).softmax(dim=1)
    chance_N = 1.0 - chance_NK[:, CORE]
    label_N = chance_NK[:, 1:].argmax(dim=1) + 1
    known_N = given_N != UNLABELED
    threshold = choose_threshold(chance_N, given_N > CORE, known_N, rule, fixed)
    held_out = agreement(chance_N[known_N] > threshold, given_N[known_N] > CORE)
    return Judgement(chance_N, label_N, threshold, held_out)


def _given(row: Row) -> int:
    """Return the class a row teaches the probe; one that is more likely wrong teaches nothing."""
    if row.label == UNLABELED or row.confidence < 0.5:
        return UNLABELED
    return row.label


def _rows_of(x_NF: Tensor, mask_N: Tensor) -> Tensor:
    """Return the chosen rows of a dense or sparse matrix."""
    return x_NF.index_select(0, mask_N.nonzero().flatten())


def choose_threshold(
    chance_N: Tensor,
    forget_N: Tensor,
    known_N: Tensor,
    rule: ThresholdRule,
    fixed: float,
) -> float:
    """Return the probability above which a row counts as forget."""
    if rule == "fixed":
        return fixed
    if rule == "pu":
        return float(chance_N[forget_N].mean()) / 2
    value, order = chance_N[known_N].sort(descending=True, stable=True)
    hits = forget_N[known_N][order].double().cumsum(0)
    flagged = torch.arange(1, len(value) + 1)
    positives = float(forget_N.sum())
    if rule == "f1":
        worth = 2 * hits / (flagged + positives)
    else:
        worth = (hits / positives).square() / (flagged / len(value))
    worth[:-1][value[:-1] == value[1:]] = -1.0  # equal scores stand on one side
    best = int(worth.argmax())
    if rule == "lift" and float(worth[best]) < LEAST:
        return 1.0
    below = float(value[best + 1]) if best + 1 < len(value) else 0.0
    return (float(value[best]) + below) / 2


def agreement(flagged_N: Tensor, given_N: Tensor) -> dict[str, float]:
    """Return precision, recall and F1 of what was flagged against the given labels."""
    both = float((flagged_N & given_N).sum())
    precision = both / max(1.0, float(flagged_N.sum()))
    recall = both / max(1.0, float(given_N.sum()))
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}
