"""What the split models share: batches of images, and the routing of an encoding's two halves.

Classes form two groups. The gradient of an image of the first group leaves the encoding through
its top half alone, that of the second through the bottom half: edges that leave an activation.

Shape legend: B images, N images, H and W their sides, C channels of the encoding, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.stream import Batch
from excise.routing import Groups, Part, Policy, Rule, compile, route
from excise_studies.vision.images import Images, rarer

Routed = Literal["both", "second", "none"]
"""Which group of classes is routed; the gradient of one that is not passes both halves."""


class Halves(nn.Module):
    """The encoding as a module of its own: what is routed acts on its output channels.

    Everything that shall feel the routing reads its output; penalties read its input, so that
    they pull on both halves whatever the label.

    Attributes:
        out_features: C.
    """

    def __init__(self, channels: int) -> None:
        """Split `channels` in two.

        Raises:
            UserError: If their number is odd.
        """
        super().__init__()
        if channels % 2 or channels < 2:
            raise UserError(
                f"an encoding of {channels} channels has no halves; give an even number"
            )
        self.out_features = channels

    def forward(self, code: Tensor) -> Tensor:
        """Return the encoding as it is."""
        return code


@dataclass(frozen=True)
class ImageBatch:
    """Images of one step.

    Attributes:
        x_BHW: Pixels from -1 to 1.
        label_B: Classes.
        first_B: True for the classes of the first group.
        seen_B: True for images that the model learns from; certificates learn from all.
    """

    x_BHW: Float[Tensor, "B H W"]
    label_B: Tensor
    first_B: Bool[Tensor, " B"]
    seen_B: Bool[Tensor, " B"]

    def to(self, device: torch.device) -> ImageBatch:
        """Return the batch on a device."""
        names = ("x_BHW", "label_B", "first_B", "seen_B")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def take(self, index: Tensor) -> ImageBatch:
        """Return some of the images."""
        return ImageBatch(
            self.x_BHW[index], self.label_B[index], self.first_B[index], self.seen_B[index]
        )

    def __len__(self) -> int:
        """Return B."""
        return len(self.label_B)


def as_batch(images: Images, first: Sequence[int], seen: Images | None = None) -> ImageBatch:
    """Return images as one batch of tensors.

    Args:
        images: The images.
        first: Classes of the first group.
        seen: Those that the model learns from; None for all.
    """
    labels = torch.from_numpy(images.labels_N)
    chosen = np.ones(len(images), bool) if seen is None else np.isin(images.keys_N, seen.keys_N)
    return ImageBatch(
        torch.from_numpy(images.pixels_NHW).float() / 127.5 - 1,
        labels,
        torch.isin(labels, torch.tensor(list(first))),
        torch.from_numpy(chosen),
    )


def learned(images: Images, first: Sequence[int], share: float | None, seed: int) -> ImageBatch:
    """Return the training images, the first group's made as rare as asked.

    Args:
        images: The images.
        first: Classes of the first group.
        share: Their share of what the model learns from: 0 leaves them out (filtering); None keeps
            what there is. Certificates still see all of them.
        seed: Draws which are left out.
    """
    images_learned = images if share is None else rarer(images, first, share, seed)
    return as_batch(images, first, images_learned)


def batches(data: ImageBatch, size: int, ctx: Context) -> Callable[[int], Sequence[ImageBatch]]:
    """Return the micro-batch of a step as a function of the step alone: shuffled epochs.

    Args:
        data: All images.
        size: Images per step; the rest of an epoch that fills no batch is dropped.
        ctx: Seed of the order.
    """
    size = min(size, len(data))
    per_epoch = len(data) // size
    permutations: dict[int, Tensor] = {}

    def order(epoch: int) -> Tensor:
        if epoch not in permutations:
            permutations.clear()
            permutations[epoch] = torch.randperm(
                len(data), generator=ctx.generator(f"images/{epoch}")
            )
        return permutations[epoch]

    def at(step: int) -> Sequence[ImageBatch]:
        epoch, i = divmod(step, per_epoch)
        return [data.take(order(epoch)[i * size : (i + 1) * size])]

    return at


def policy(channels: int, which: Routed, module: str = "halves") -> Policy:
    """Return the rules: label 1 is the first group, label 2 the second.

    Args:
        channels: C.
        which: The group that is routed.
        module: Name of the `Halves` in the model.
    """
    half = channels // 2
    parts: dict[str, tuple[Part, ...]] = {
        "top": (Part(at="outputs", names=(module,), units=(0, half)),),
        "bottom": (Part(at="outputs", names=(module,), units=(half, channels)),),
    }
    first = Rule(edges={"bottom": 0.0}) if which == "both" else Rule()
    second = Rule(edges={"top": 0.0}) if which in ("both", "second") else Rule()
    return Policy(
        groups=Groups(parts=parts),
        rules={"first": (first,), "second": (second,)},
        capabilities=("first", "second"),
        modules={"first": "top", "second": "bottom"},
        at="token",
    )


@contextmanager
def routed(
    model: nn.Module, channels: int, which: Routed
) -> Iterator[Callable[[ImageBatch], None]]:
    """Route a model's encoding while the block runs.

    Args:
        model: A model with a `Halves` called `halves`.
        channels: C.
        which: The group that is routed.

    Yields:
        What says which images come next.
    """
    if which == "none":
        yield lambda batch: None
        return
    with route(model, policy(channels, which), labels=(1, 2)) as routing:
        both = torch.tensor([[2], [1]])  # row 0: the second group, row 1: the first
        ones = torch.ones_like(both)
        assert routing.policy is not None
        known = compile(
            routing.policy, routing.map, Batch(both, ones.bool(), ones.bool(), both, ("", ""))
        )
        table_2G = known.edge_NG
        assert table_2G is not None

        def tell(batch: ImageBatch) -> None:
            table = table_2G.to(batch.first_B.device)
            routing.set(replace(known, edge_NG=table[batch.first_B.long()], loss_BT=None))

        yield tell


def correlation(top_BC: Float[Tensor, "B C"], bottom_BC: Float[Tensor, "B C"]) -> Tensor:
    """Return C, the mean over channel pairs of the absolute correlation over a batch.

    Source: Cloud et al. (2024), arXiv 2410.04332, appendix B, as released: the absolute value is
    taken of the correlation, not inside its sum as printed.

    Args:
        top_BC: One half of the encodings.
        bottom_BC: The other half.
    """

    def standard(x_BC: Tensor) -> Tensor:
        centred = x_BC - x_BC.mean(0)
        return centred / (centred.square().sum(0) + 1e-8).sqrt()

    return (standard(top_BC).T @ standard(bottom_BC)).abs().mean()
