"""What models predict at the scored tokens of rows, and two measurements that need no training.

Shape legend: N scored tokens, V vocabulary, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from excise.auditor.batching import batches
from excise.data.domain import Row
from excise.data.stream import encode
from excise.losses import predicting

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Weights of the penalty of a readout, relative to the number of tokens."""


@dataclass(frozen=True)
class Predictions:
    """What one model predicts at the scored tokens of some rows.

    Attributes:
        log_NV: Log-probabilities.
        next_N: The tokens that follow.
        place_N: Which scored token of its row each is, from 0.
        units: Unit of each.
    """

    log_NV: Float[Tensor, "N V"]
    next_N: Int[Tensor, " N"]
    place_N: Int[Tensor, " N"]
    units: tuple[str, ...]


@torch.no_grad()
def predictions(model: Any, rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> Predictions:
    """Read rows; equal rows give equal order, whatever the model.

    Args:
        model: A causal model.
        rows: What is read.
        tokenizer: Its tokenizer.
        max_length: Tokens per row.
    """
    logs, nexts, places, units = [], [], [], []
    for batch in batches(encode(rows, tokenizer, max_length=max_length), model, tokenizer):
        log_BTV = torch.log_softmax(model(**batch.inputs, use_cache=False).logits.float(), -1)
        at_BT = predicting(batch.target_BT.bool())
        logs.append(log_BTV[at_BT].cpu())
        nexts.append(batch.ids_BT.roll(-1, 1)[at_BT].cpu())
        places.append((at_BT.long().cumsum(1) - 1)[at_BT].cpu())
        counts = at_BT.sum(1).tolist()
        units += [u for u, n in zip(batch.units, counts, strict=True) for _ in range(n)]
    return Predictions(torch.cat(logs), torch.cat(nexts), torch.cat(places), tuple(units))


def by_unit(values_N: Iterable[float], units: Sequence[str]) -> dict[str, float]:
    """Return the mean of a value over the tokens of each unit.

    Args:
        values_N: One value a token.
        units: Unit of each token.
    """
    by_name: dict[str, list[float]] = {}
    for value, unit in zip(values_N, units, strict=True):
        by_name.setdefault(unit, []).append(float(value))
    return {unit: sum(v) / len(v) for unit, v in by_name.items()}


def kl(one_NV: Float[Tensor, "N V"], other_NV: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Return KL(one || other) = sum_v p_one(v) (log p_one(v) - log p_other(v)), in nats.

    Args:
        one_NV: Log-probabilities of the distribution that is averaged over.
        other_NV: Log-probabilities of the other.

    Returns:
        [N] divergences; rounding below zero is cut off.
    """
    kl_N: Tensor = (one_NV.exp() * (one_NV - other_NV)).sum(-1)
    return kl_N.clamp(min=0)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the chance that a positive value is above a negative one; ties count half.

    That is the area under the ROC curve (Mann and Whitney 1947: U over the number of pairs).

    Args:
        positive: Values of the side that should lie higher.
        negative: Values of the other side.
    """
    p, n = torch.tensor(positive)[:, None], torch.tensor(negative)[None]
    return float(((p > n).double() + 0.5 * (p == n).double()).mean())


def threshold(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the value that tells the sides apart best: the largest of Youden's J.

    J(c) = P(positive > c) + P(negative <= c) - 1, so that both sides weigh the same; candidates
    are the midpoints of neighbouring values.

    Args:
        positive: Values of the side that should lie higher.
        negative: Values of the other side.
    """
    values = sorted({*positive, *negative})
    cuts = [(a + b) / 2 for a, b in pairwise(values)] or values

    def right(cut: float) -> float:
        hits = sum(x > cut for x in positive) / len(positive)
        return hits + sum(x <= cut for x in negative) / len(negative)

    return max(cuts, key=right)


def shuffled(predicted: Predictions, seed: int) -> Predictions:
    """Return predictions dealt out at random among the tokens: equal marginals, no content."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(predicted.log_NV), generator=generator)
    return Predictions(
        predicted.log_NV[order], predicted.next_N, predicted.place_N, predicted.units
    )


# -- readouts --------------------------------------------------------------------------------------


def readout_bits(
    fitted: Predictions, dev: Predictions, scored: Predictions
) -> tuple[dict[str, float], float]:
    """Fit an affine readout of log-probabilities and return what it pays for each unit.

    Args:
        fitted: Tokens that the readout is fitted on, of the relearn set.
        dev: Tokens on which the penalty is chosen.
        scored: Tokens that are paid for, of the held-out test set.

    Returns:
        Bits per token by unit, and the chosen penalty.
    """
    classes = torch.cat([fitted.next_N, dev.next_N, scored.next_N]).unique()
    places = int(torch.cat([p.place_N for p in (fitted, dev, scored)]).max()) + 1
    mean_V = fitted.log_NV.mean(0)
    scale_V = fitted.log_NV.std(0).clamp(min=1e-3)

    def features(predicted: Predictions) -> tuple[Tensor, Tensor]:
        x_NV = ((predicted.log_NV - mean_V) / scale_V).double()
        where_NP = F.one_hot(predicted.place_N, places).double()
        return torch.cat([x_NV, where_NP], 1), torch.searchsorted(classes, predicted.next_N)

    fitting, best = features(fitted), (float("inf"), 0.0, torch.zeros(0))
    for ridge in RIDGES:
        weight_FC = _fit(*fitting, len(classes), ridge)
        x_NF, y_N = features(dev)
        loss = float(F.cross_entropy(x_NF @ weight_FC, y_N))
        best = min(best, (loss, ridge, weight_FC), key=lambda candidate: candidate[0])
    x_NF, y_N = features(scored)
    nats_N = F.cross_entropy(x_NF @ best[2], y_N, reduction="none")
    return by_unit((nats_N / torch.log(torch.tensor(2.0))).tolist(), scored.units), best[1]


def _fit(
    x_NF: Float[Tensor, "N F"], y_N: Int[Tensor, " N"], classes: int, ridge: float
) -> Float[Tensor, "F C"]:
    """Return the weights of a multinomial logistic regression with a penalty."""
    weight_FC = torch.zeros(x_NF.shape[1], classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_FC], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x_NF @ weight_FC, y_N) + 0.5 * ridge * weight_FC.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight_FC.detach()


def noises(dev_NV: Float[Tensor, "N V"], next_N: Int[Tensor, " N"]) -> Mapping[str, Tensor]:
    """Return log-probabilities of three kinds of noise, fitted on dev forget tokens.

    Args:
        dev_NV: Log-probabilities of the edited model there.
        next_N: The tokens that follow.

    Returns:
        `uniform`; `unigram`, with one added to each count; `mean`, the mean prediction.
    """
    size = dev_NV.shape[-1]
    counts_V = torch.bincount(next_N, minlength=size).to(dev_NV) + 1
    return {
        "uniform": torch.full_like(counts_V, 1 / size).log(),
        "unigram": (counts_V / counts_V.sum()).log(),
        "mean": dev_NV.exp().mean(0).clamp(min=1e-12).log(),
    }
