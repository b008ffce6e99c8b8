"""Images: what ships, how it is split, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from excise.core.errors import UserError
from excise_studies.vision import images as module
from excise_studies.vision.images import (
    ImageSpec,
    generated,
    load_digits,
    load_fashion,
    rarer,
    read_idx,
    stratified,
    write_idx,
)

TINY = ImageSpec(source="generated", train=60, dev=20, test=40)


def test_the_digits_that_ship_are_those_of_mnist() -> None:
    digits = load_digits()
    assert digits.pixels_NHW.shape == (10000, 28, 28)
    assert list(digits.counts().values()) == [
        1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978,
    ]  # fmt: skip
    assert digits.pixels_NHW.mean() / 255 == pytest.approx(0.1311, abs=1e-4)
    assert len(np.unique(digits.pixels_NHW)) == 256


def test_a_draw_is_stratified_disjoint_and_a_function_of_its_seed() -> None:
    spec = ImageSpec()
    one, again, other = spec.split(0), spec.split(0), spec.split(1)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert (len(one.train), len(one.dev), len(one.test)) == (7000, 1000, 2000)
    keys = np.concatenate([one.train.keys_N, one.dev.keys_N, one.test.keys_N])
    assert len(np.unique(keys)) == 10000
    whole = np.array(list(load_digits().counts().values()))
    assert np.abs(np.array(list(one.test.counts().values())) - whole / 5).max() < 1
    assert one.describe()["rows"] == {"train": 7000, "dev": 1000, "test": 2000}


def test_shrinking_averages_squares() -> None:
    digits = load_digits().take(np.arange(3))
    small = digits.shrunk(2)
    assert small.pixels_NHW.shape == (3, 14, 14)
    mean = digits.pixels_NHW[1, 10:12, 12:14].mean()
    assert abs(small.pixels_NHW[1, 5, 6] - mean) <= 0.5
    with pytest.raises(UserError, match="cannot be shrunk by 3"):
        digits.shrunk(3)


def test_classes_can_be_made_rare() -> None:
    drawn = generated(200, 0)
    rare = rarer(drawn, range(5), 0.1, 3)
    low = int((rare.labels_N < 5).sum())
    assert (low, len(rare) - low) == (11, 100)
    assert len(rarer(drawn, range(5), 0.0, 3)) == 100
    assert len(rarer(drawn, range(5), 0.5, 3)) == 200
    with pytest.raises(UserError, match="give a smaller share"):
        rarer(drawn, range(5), 0.8, 3)


def test_idx_files_are_read_and_broken_ones_refused() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    data = write_idx(array)
    assert np.array_equal(read_idx(data, "x"), array)
    with pytest.raises(UserError, match="holds other than"):
        read_idx(data[:-1], "x")
    with pytest.raises(UserError, match="not an IDX file"):
        read_idx(b"PK\x03\x04", "x")


def test_too_many_images_are_refused() -> None:
    with pytest.raises(UserError, match="30 images are asked for and 20"):
        stratified(generated(20, 0), 30, np.random.default_rng(0))


def test_fashion_is_read_from_what_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path))
    load_fashion.cache_clear()
    with pytest.raises(UserError, match="run excise fetch fashion"):
        ImageSpec(source="fashion").split(0)
    made = generated(400, 1, side=28)
    for part in ("train", "test"):
        pairs = (("images", made.pixels_NHW), ("labels", made.labels_N.astype(np.uint8)))
        for kind, values in pairs:
            file = tmp_path / f"{part}-{kind}.idx.gz"
            file.write_bytes(gzip.compress(write_idx(values)))
    monkeypatch.setattr(module, "require", lambda name: tmp_path)
    drawn = ImageSpec(source="fashion", train=100, dev=50, test=100).split(0)
    load_fashion.cache_clear()
    assert drawn.train.counts()["sneaker"] == 10
    assert drawn.test.pixels_NHW.shape == (100, 28, 28)


def test_generated_images_differ_by_seed_but_not_in_what_their_classes_are() -> None:
    one, two = TINY.split(0).train, TINY.split(1).train
    assert one.fingerprint != two.fingerprint
    for label in range(10):
        mean = [x.pixels_NHW[x.labels_N == label].mean(0) for x in (one, two)]
        assert np.corrcoef(mean[0].ravel(), mean[1].ravel())[0, 1] > 0.9
