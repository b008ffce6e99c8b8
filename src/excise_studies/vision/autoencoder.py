"""The split autoencoder: the top half of the encoding for some classes, the bottom for others.

Encoder, decoder, and two certificates: decoders of their own, trained on one half each, whose
gradient never reaches the encoder. What a certificate cannot reconstruct is not in its half.

Source: Cloud et al. (2024), "Gradient Routing", arXiv 2410.04332, section 4.1 and appendix B.
The mean absolute error is absolute everywhere here; penalties are not routed.

Shape legend: B images, P pixels, C channels of the encoding, H and W sides of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from excise.core.config import Config
from excise.core.context import Context
from excise.core.random_state import seeded
from excise.train.fit import FitConfig, Term, fit
from excise_studies.vision.halves import (
    Halves,
    ImageBatch,
    Routed,
    as_batch,
    batches,
    correlation,
    learned,
    routed,
)
from excise_studies.vision.images import Images


class SplitAutoencoderConfig(Config):
    """A split autoencoder and how it is trained."""

    first: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Classes of the first group, whose gradient passes the top half."""
    hidden: tuple[int, ...] = (256,)
    """Widths of the encoder's layers; decoders mirror them (published: 2048, 512)."""
    code: int = Field(default=32, ge=2)
    """C: channels of the encoding, half of them for each group."""
    routed: Routed = "both"
    """Which group's gradient is routed. With `second` an image of the first group is decoded once
    for each half and both errors count, as released: they train the decoder twice."""
    separate_decoders: bool = False
    """Whether each group has a decoder of its own, each reading the whole encoding."""
    l1: tuple[float, float] = (1e-2, 1e-2)
    """Weights of the sum of absolute values in the top and in the bottom half."""
    correlation: float = Field(default=0.1, ge=0)
    """Weight of the mean absolute correlation between channels of the two halves."""
    penalised: Literal["seen", "all"] = "seen"
    """Whose encodings the penalties pull on: of images that the autoencoder learns from, or also
    of those that `share` keeps from it."""
    share: float | None = Field(default=None, ge=0, le=0.9)
    """Share of the first group among what the autoencoder learns from; 0 leaves it out, empty
    keeps what there is. Certificates learn from all images."""
    balance: Literal["groups", "images"] = "groups"
    """`groups`: errors are averaged within each group, then added, so that a rare group weighs as
    much as a common one; `images`: every image weighs the same."""
    fit: FitConfig = FitConfig(
        steps=1500, lr=4e-3, batch_size=64, weight_decay=5e-5, schedule="cosine"
    )
    """How it is trained; certificates are trained in the same steps."""

    @model_validator(mode="after")
    def _one_decoder(self) -> SplitAutoencoderConfig:
        """Refuse to train the first group's two errors with decoders that each group has apart."""
        if self.routed == "second" and self.separate_decoders:
            raise ValueError("routed: with 'second' both groups share a decoder; set another")
        return self


def layers(widths: Sequence[int], *, bias: bool = True) -> nn.Sequential:
    """Return linear layers with ReLU between; `bias` is that of the last."""
    parts: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        parts.append(nn.Linear(wide, narrow, bias=bias or not last))
        parts += [] if last else [nn.ReLU()]
    return nn.Sequential(*parts)


class SplitAutoencoder(nn.Module):
    """Encoder, decoders and certificates.

    Attributes:
        encoder: Pixels to encoding.
        halves: The encoding; gradients are routed at its output.
        decoders: One, or one per group (second group, first group).
        certificates: A decoder of the top half and one of the bottom half.
    """

    def __init__(self, config: SplitAutoencoderConfig, pixels: int, seed: int) -> None:
        """Make a random model.

        Args:
            config: Widths.
            pixels: P.
            seed: Seed of the weights.
        """
        super().__init__()
        wide, code = config.hidden, config.code
        back = (*reversed(wide), pixels)
        with seeded(seed):
            self.halves = Halves(code)
            self.encoder = layers((pixels, *wide, code), bias=False)
            count = 2 if config.separate_decoders else 1
            self.decoders = nn.ModuleList(layers((code, *back)) for _ in range(count))
            self.certificates = nn.ModuleList(layers((code // 2, *back)) for _ in range(2))

    def encode(self, x_BHW: Float[Tensor, "B H W"]) -> Float[Tensor, "B C"]:
        """Return the encoding before routing."""
        code: Tensor = self.encoder(x_BHW.flatten(1))
        return code

    def decode(self, code_BC: Tensor, first_B: Tensor) -> Float[Tensor, "B P"]:
        """Return pixels rendered from a whole encoding, by the decoder of each image's group."""
        code_BC = self.halves(code_BC)
        if len(self.decoders) == 1:
            decoded: Tensor = self.decoders[0](code_BC)
            return decoded
        by_group = [self.decoders[i](code_BC) for i in (0, 1)]
        return torch.where(first_B[:, None], by_group[1], by_group[0])

    def certify(self, code_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels rendered from the top half and from the bottom half, gradients cut off."""
        top_BC, bottom_BC = code_BC.detach().chunk(2, dim=1)
        return self.certificates[0](top_BC), self.certificates[1](bottom_BC)


def absolute_error(decoded_BP: Float[Tensor, "B P"], x_BHW: Tensor) -> Float[Tensor, " B"]:
    """Return the mean absolute error of each image, pixels from -1 to 1.

    Args:
        decoded_BP: Rendered pixels.
        x_BHW: The images.
    """
    return (decoded_BP - x_BHW.flatten(1)).abs().mean(1)


def terms_of(
    config: SplitAutoencoderConfig, model: SplitAutoencoder, batch: ImageBatch
) -> Mapping[str, Term]:
    """Return the loss of one batch: errors of decoder and certificates, and two penalties.

    MAE + l1 * mean_i ||z_i||_1 + correlation * C, with the MAE averaged over each group of classes
    apart and added (`balance="groups"`), z the encoding before it is routed and C as in
    `correlation`.

    Source: Cloud et al. (2024), arXiv 2410.04332, section 4.1, as its released code
    (kxcloud/gradient-routing@896dba3, declared MIT) averages it.

    Args:
        config: Weights of the penalties, and whether groups or images weigh alike.
        model: The autoencoder.
        batch: Images, their groups, and which of them the decoder learns from.

    Returns:
        Terms by name; certificates learn from all images.
    """
    code_BC = model.encode(batch.x_BHW)
    decoded = {"decoder": model.decode(code_BC, batch.first_B)}
    decoded["top"], decoded["bottom"] = model.certify(code_BC)
    terms: dict[str, Term] = {}
    for name, decoded_BP in decoded.items():
        error_B = absolute_error(decoded_BP, batch.x_BHW)
        used_B = batch.seen_B if name == "decoder" else torch.ones_like(batch.seen_B)
        if config.balance == "images":
            groups = {"all": (used_B, 2.0)}  # as heavy in all as two averages that are added
        else:
            groups = {
                "first": (used_B & batch.first_B, 1.0),
                "second": (used_B & ~batch.first_B, 1.0),
            }
        for group, (chosen_B, weight) in groups.items():
            weights = chosen_B.to(error_B.dtype)
            terms[f"{name} {group}"] = Term(error_B @ weights, float(weights.sum()), weight)
    if config.routed == "second":
        # The two decodings of an image give each half its gradient once, but the decoder both.
        again_B = absolute_error(model.decode(code_BC.detach(), batch.first_B), batch.x_BHW)
        again = terms["decoder all" if config.balance == "images" else "decoder first"]
        chosen_B = (batch.seen_B & batch.first_B).to(again_B.dtype)
        terms["decoder first again"] = Term(again_B @ chosen_B, again.count, again.weight)
    pulled_BC = code_BC if config.penalised == "all" else code_BC[batch.seen_B]
    for i, half in enumerate(("top", "bottom")):
        if config.l1[i]:
            total = pulled_BC.chunk(2, dim=1)[i].abs().sum()
            terms[f"l1 {half}"] = Term(total, len(pulled_BC), config.l1[i])
    if config.correlation and len(pulled_BC) > 1:
        both = correlation(*pulled_BC.chunk(2, dim=1))
        terms["correlation"] = Term(both, 1, config.correlation)
    return terms


def train_autoencoder(
    images: Images, config: SplitAutoencoderConfig, ctx: Context, *, state_dir: Path | None = None
) -> SplitAutoencoder:
    """Train a split autoencoder.

    Args:
        images: Training images.
        config: Model, penalties, schedule.
        ctx: Seed, device.
        state_dir: Where an interrupted run resumes.

    Returns:
        The model, in evaluation mode.

    Raises:
        Diverged: If the loss is no longer finite.
    """
    data = learned(images, config.first, config.share, ctx.seed_for("rare")).to(ctx.device)
    pixels = int(data.x_BHW[0].numel())
    model = SplitAutoencoder(config, pixels, ctx.seed_for("init")).to(ctx.device)
    with routed(model, config.code, config.routed) as tell:

        def loss(_: nn.Module, batch: ImageBatch) -> Mapping[str, Term]:
            tell(batch)
            return terms_of(config, model, batch)

        stream = batches(data, config.fit.batch_size, ctx)
        for _ in fit(model, stream, loss, config.fit, ctx, state_dir=state_dir):
            pass
    return model.eval()


@torch.no_grad()
def errors(
    model: SplitAutoencoder, images: Images, first: Sequence[int]
) -> dict[str, Float[Tensor, " B"]]:
    """Return how far each image's drawings are off, pixels from -1 to 1.

    Args:
        model: A trained model.
        images: Images it has not seen.
        first: Classes of the first group.

    Returns:
        Mean absolute error by `decoder`, `top` and `bottom`, mean squared error by `decoder,
        squared` and so on, and the sum of absolute values of each half of the encoding, `size
        top` and `size bottom`. `blank` is the error of a page without ink.
    """
    data = as_batch(images, first).to(next(model.parameters()).device)
    code_BC = model.encode(data.x_BHW)
    decoded = {"decoder": model.decode(code_BC, data.first_B)}
    decoded["top"], decoded["bottom"] = model.certify(code_BC)
    pixels_BP = data.x_BHW.flatten(1)
    off = {name: absolute_error(x_BP, data.x_BHW) for name, x_BP in decoded.items()}
    for name, x_BP in decoded.items():
        off[f"{name}, squared"] = (x_BP - pixels_BP).square().mean(1)
    for name, half in zip(("top", "bottom"), code_BC.chunk(2, dim=1), strict=True):
        off[f"size {name}"] = half.abs().sum(1)
    off["blank"] = (pixels_BP + 1).abs().mean(1)
    return {name: values.cpu() for name, values in off.items()}
