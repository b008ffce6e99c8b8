"""The split classifier: a small ResNet whose last channels serve one group of classes each.

The encoder is all of transformers' ResNet before its pooling; the decoder is pooling and one
linear layer over all channels. Certificates are linear layers over one half each, trained
afterwards on the frozen encoder with all training images: what they cannot tell, the half does
not hold in a form that one layer reads.

Source: Cloud et al. (2024), arXiv 2410.04332, appendix B.1: labels 0-49 of CIFAR-100 to the top
half of a ResNet-34, the others to the bottom half, L1 on the encoding. Here: ten classes.

Shape legend: B images, C channels of the encoding, H and W their sides, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
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
    learned,
    routed,
)
from excise_studies.vision.images import Images


class SplitClassifierConfig(Config):
    """A split classifier and how it is trained."""

    first: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Classes of the first group, whose gradient passes the top half."""
    stem: int = Field(default=16, ge=1)
    """Channels of the stem."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the stages; the last is C."""
    depths: tuple[int, ...] = (1, 1)
    """Layers of the stages."""
    routed: Routed = "both"
    """Which group's gradient is routed."""
    l1: float = Field(default=3e-2, ge=0)
    """Weight of the sum over channels of absolute values, averaged over positions and images."""
    share: float | None = Field(default=None, ge=0, le=0.9)
    """Share of the first group among what the classifier learns from; empty keeps what there is.
    Certificates learn from all images."""
    balance: Literal["groups", "images"] = "groups"
    """`groups`: the loss is averaged within each group, then added; `images`: every image weighs
    the same."""
    fit: FitConfig = FitConfig(
        steps=800, lr=3e-3, batch_size=64, weight_decay=1e-4, schedule="cosine"
    )
    """How it is trained."""
    certificate: FitConfig = FitConfig(steps=300, lr=2e-2, batch_size=512, schedule="cosine")
    """How the certificates are trained."""


class SplitClassifier(nn.Module):
    """Encoder and decoder.

    Attributes:
        encoder: A ResNet of transformers.
        halves: Its last channels; gradients are routed at its output.
        head: One linear layer over all channels.
    """

    def __init__(self, config: SplitClassifierConfig, classes: int, seed: int) -> None:
        """Make a random model.

        Args:
            config: Widths.
            classes: K.
            seed: Seed of the weights.
        """
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        shape: Any = ResNetConfig(
            num_channels=1,
            embedding_size=config.stem,
            hidden_sizes=list(config.widths),
            depths=list(config.depths),
            layer_type="basic",
        )
        with seeded(seed):
            self.halves = Halves(config.widths[-1])
            self.encoder: Any = ResNetModel(shape)
            self.head = nn.Linear(config.widths[-1], classes)

    def encode(self, x_BHW: Float[Tensor, "B H W"]) -> Float[Tensor, "B C h w"]:
        """Return the last channels before routing."""
        code: Tensor = self.encoder(pixel_values=x_BHW[:, None]).last_hidden_state
        return code

    def decode(self, code_BChw: Tensor) -> Float[Tensor, "B K"]:
        """Return the logits of an encoding."""
        logits: Tensor = self.head(self.halves(code_BChw).mean((2, 3)))
        return logits


def class_terms(
    logits_BK: Tensor, batch: ImageBatch, balance: Literal["groups", "images"]
) -> dict[str, Term]:
    """Return the cross-entropy of the images that the model learns from, by group or of all.

    Args:
        logits_BK: Logits of the classes.
        batch: Images, their labels and groups, and which of them are learned from.
        balance: `groups`: each group is averaged apart, then added; `images`: one average, which
            weighs as much as two.
    """
    loss_B = nn.functional.cross_entropy(logits_BK, batch.label_B, reduction="none")
    if balance == "images":
        groups = {"all": (batch.seen_B, 2.0)}
    else:
        groups = {
            "first": (batch.seen_B & batch.first_B, 1.0),
            "second": (batch.seen_B & ~batch.first_B, 1.0),
        }
    terms = {}
    for name, (chosen_B, weight) in groups.items():
        weights = chosen_B.to(loss_B.dtype)
        terms[f"loss {name}"] = Term(loss_B @ weights, float(weights.sum()), weight)
    return terms


def train_classifier(
    images: Images, config: SplitClassifierConfig, ctx: Context, *, state_dir: Path | None = None
) -> SplitClassifier:
    """Train a split classifier.

    Args:
        images: Training images; what the model does not learn from never passes it.
        config: Model, penalty, schedule.
        ctx: Seed, device.
        state_dir: Where an interrupted run resumes.

    Returns:
        The model, in evaluation mode.

    Raises:
        Diverged: If the loss is no longer finite.
    """
    data = learned(images, config.first, config.share, ctx.seed_for("rare"))
    data = data.take(data.seen_B.nonzero().flatten()).to(ctx.device)
    model = SplitClassifier(config, len(images.classes), ctx.seed_for("init")).to(ctx.device)
    model.train()
    with routed(model, config.widths[-1], config.routed) as tell:

        def loss(_: nn.Module, batch: ImageBatch) -> Mapping[str, Term]:
            tell(batch)
            code = model.encode(batch.x_BHW)
            terms = class_terms(model.decode(code), batch, config.balance)
            if config.l1:
                size = code.abs().sum(1).mean((1, 2)).sum()
                terms["l1"] = Term(size, len(batch), config.l1)
            return terms

        stream = batches(data, config.fit.batch_size, ctx)
        for _ in fit(model, stream, loss, config.fit, ctx, state_dir=state_dir):
            pass
    return model.eval()


@torch.no_grad()
def features(model: SplitClassifier, data: ImageBatch) -> Float[Tensor, "B C"]:
    """Return the pooled channels of every image."""
    parts = [model.encode(x).mean((2, 3)) for x in data.x_BHW.split(500)]
    return torch.cat(parts)


def certificate(
    code_NC: Float[Tensor, "N C"], data: ImageBatch, classes: int, config: FitConfig, ctx: Context
) -> nn.Linear:
    """Train one linear layer from some channels to the classes.

    Args:
        code_NC: Pooled channels of the training images.
        data: Their labels.
        classes: K.
        config: Schedule.
        ctx: Seed of weights and order.
    """
    with seeded(ctx.seed_for("certificate")):
        layer = nn.Linear(code_NC.shape[1], classes).to(code_NC.device)
    scale_C = code_NC.std(0).clamp(min=1e-6)
    mean_C = code_NC.mean(0)
    seen_N = torch.ones_like(data.seen_B)
    rows = ImageBatch((code_NC - mean_C) / scale_C, data.label_B, data.first_B, seen_N)

    def loss(model: nn.Module, batch: ImageBatch) -> Mapping[str, Term]:
        return class_terms(model(batch.x_BHW), batch, "groups")

    for _ in fit(layer, batches(rows, config.batch_size, ctx), loss, config, ctx):
        pass
    with torch.no_grad():  # standard scores are part of the layer
        layer.weight.div_(scale_C)
        layer.bias.sub_(layer.weight @ mean_C)
    return layer


def accuracies(
    model: SplitClassifier,
    train: Images,
    test: Images,
    config: SplitClassifierConfig,
    ctx: Context,
) -> dict[str, Float[Tensor, " B"]]:
    """Train the certificates and return which test images are told right, 0 or 1.

    Args:
        model: A trained model.
        train: All training images, also those it did not learn from.
        test: Images it has not seen.
        config: Its configuration.
        ctx: Seed of the certificates.

    Returns:
        By `decoder`, `top` and `bottom`; and the mean absolute value of each half, `size top`
        and `size bottom`.
    """
    seen = as_batch(train, config.first).to(ctx.device)
    new = as_batch(test, config.first).to(ctx.device)
    code_NC, code_BC = features(model, seen), features(model, new)
    right: dict[str, Tensor] = {}
    with torch.no_grad():
        right["decoder"] = model.head(code_BC).argmax(1) == new.label_B
    for i, name in enumerate(("top", "bottom")):
        half, other = code_NC.chunk(2, dim=1)[i], code_BC.chunk(2, dim=1)[i]
        layer = certificate(half, seen, len(train.classes), config.certificate, ctx)
        with torch.no_grad():
            right[name] = layer(other).argmax(1) == new.label_B
        right[f"size {name}"] = other.abs().mean(1)
    return {name: values.float().cpu() for name, values in right.items()}
