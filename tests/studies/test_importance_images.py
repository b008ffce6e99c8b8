"""SSD and Potion forget one class of the digits that ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from excise.core.context import Context
from excise.methods.importance import SortedRatios, Sums, accumulate, dampen_model
from excise.methods.posthoc.potion import Potion, search
from excise.train.fit import FitConfig
from excise_studies.vision.classifier import (
    SplitClassifier,
    SplitClassifierConfig,
    features,
    train_classifier,
)
from excise_studies.vision.halves import ImageBatch, as_batch
from excise_studies.vision.images import ImageSets, ImageSpec

FORGOTTEN = 3
SIZE = 64
CONFIG = SplitClassifierConfig(
    stem=8, widths=(16, 32), routed="none", l1=0.0, balance="images",
    fit=FitConfig(steps=120, lr=5e-3, batch_size=SIZE, schedule="cosine"),
)  # fmt: skip


def cross_entropy(model: torch.nn.Module, batch: ImageBatch) -> Tensor:
    """Return the mean loss of images."""
    assert isinstance(model, SplitClassifier)
    logits = model.decode(model.encode(batch.x_BHW))
    return torch.nn.functional.cross_entropy(logits, batch.label_B)


def lengths(model: torch.nn.Module, batch: ImageBatch) -> Tensor:
    """Return the mean length of the logits."""
    assert isinstance(model, SplitClassifier)
    logits = model.decode(model.encode(batch.x_BHW))
    mean: Tensor = logits.square().sum(1).sqrt().mean()
    return mean


@torch.no_grad()
def accuracy(model: SplitClassifier, data: ImageBatch) -> Tensor:
    """Return the share of each class that is told right."""
    right = model.head(features(model, data)).argmax(1) == data.label_B
    return torch.stack([right[data.label_B == k].float().mean() for k in range(10)])


@pytest.fixture(scope="module")
def digits() -> ImageSets:
    """Return a split of the digits."""
    return ImageSpec(train=2000, dev=100, test=1000, shrink=2).split(0)


@pytest.fixture
def model(digits: ImageSets, tmp_path: Path) -> SplitClassifier:
    """Return a classifier of digits."""
    return train_classifier(digits.train, CONFIG, Context(tmp_path))


def measured(
    model: SplitClassifier, digits: ImageSets, folder: Path, *, squares: bool
) -> tuple[Sums, Sums]:
    """Return the sums over the forgotten class and over the others."""
    loss = cross_entropy if squares else lengths
    parts = []
    for name, wanted in (("forget", True), ("retain", False)):
        index = np.flatnonzero((digits.train.labels_N == FORGOTTEN) == wanted)
        data = as_batch(digits.train.take(index), ())
        batches = [data.take(part) for part in torch.arange(len(data)).split(SIZE)]
        to = folder / f"{name}.safetensors"
        parts.append(accumulate(model, batches, loss, to, fold="square" if squares else "abs"))
    return parts[0], parts[1]


def test_ssd_lowers_one_class_more_than_the_others(
    model: SplitClassifier, digits: ImageSets, tmp_path: Path
) -> None:
    test = as_batch(digits.test, ())
    before = accuracy(model, test)
    forget, retain = measured(model, digits, tmp_path, squares=True)
    tally = dampen_model(model, forget, forget + retain, alpha=7.75)
    after = accuracy(model, test)
    others = [k for k in range(10) if k != FORGOTTEN]
    assert float(before.min()) > 0.7
    assert float(before[FORGOTTEN] - after[FORGOTTEN]) > 0.5
    assert float(before[FORGOTTEN] - after[FORGOTTEN]) > float((before - after)[others].max()) + 0.3
    assert 0 < tally.dampened < tally.entries / 5


def test_potion_ends_where_a_class_is_forgotten(
    model: SplitClassifier, digits: ImageSets, tmp_path: Path
) -> None:
    test, train = as_batch(digits.test, ()), as_batch(digits.train, ())
    asked = train.take((train.label_B == FORGOTTEN).nonzero().flatten())
    before = accuracy(model, test)
    forget, retain = measured(model, digits, tmp_path, squares=False)
    ratios = SortedRatios(forget, retain, tmp_path / "ratios")
    turns = list(
        search(
            Potion(rho=0.2), model, ratios, lambda: float(accuracy(model, asked)[FORGOTTEN]), 0.1
        )
    )
    fall = before - accuracy(model, test)
    assert turns[-1].known <= 0.2 * turns[0].known
    assert float(fall[FORGOTTEN]) > 0.5
    assert (
        float(fall[FORGOTTEN]) > float(fall[[k for k in range(10) if k != FORGOTTEN]].mean()) + 0.3
    )
