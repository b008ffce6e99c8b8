"""Labellers: which features, how they are trained, calibrated and measured.

Held-out documents share no unit, group or text with those that a labeller learns from. They are cut
in two: each half is calibrated by the other, which is how calibration error, precision and recall
are measured; the labeller that is handed on is calibrated by both.

Shape legend: N words, F features, K classes (core and every capability).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.core.config import Config
from excise.core.context import Context
from excise.core.disk import new_file, write_text
from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Row, Rows, labelled_text
from excise.labelling import encoder, ngrams, states
from excise.labelling.head import (
    calibration_error,
    fit_head,
    logits,
    margins,
    platt,
    probabilities,
    share_of,
    table,
    verdict,
)
from excise.labelling.words import (
    LEVELS,
    Document,
    SplitBy,
    documents_of,
    labelled,
    ranked,
    split_keys,
)
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig

FACTS, WEIGHTS = "labeller.json", "labeller.safetensors"
"""Files of a labeller: what it is and how good, and its weights."""

_BETWEEN = torch.tensor([(a + b) / 2 for a, b in pairwise(LEVELS)], dtype=torch.float64)
PARTS = ("train", "first half", "second half")
"""What labelled documents are cut into."""


class Labeller(Config):
    """What every labeller has."""

    held_out: float = Field(default=0.3, gt=0, le=0.8)
    """Share of the labelled documents that calibrate and measure it."""
    split_by: SplitBy = "group"
    """What is never on both sides: rows of one group (or unit), or equal texts alone."""


class NgramLabeller(Labeller):
    """Hashed character and word n-grams around a word."""

    name: Literal["ngrams"] = "ngrams"
    """Kind of features."""
    buckets: int = Field(default=1 << 16, ge=16, le=1 << 24)
    """Weights that n-grams share by their hash."""
    longest: int = Field(default=5, ge=3, le=12)
    """Characters of the longest n-gram."""
    window: int = Field(default=2, ge=0, le=16)
    """Words on either side that are read."""
    l2: float = Field(default=1.0, gt=0)
    """Penalty of the squared weights."""


class EncoderLabeller(Labeller):
    """A small transformer that reads both ways, trained here."""

    name: Literal["encoder"] = "encoder"
    """Kind of features."""
    width: int = Field(default=96, ge=8)
    """Size of its residual stream."""
    blocks: int = Field(default=2, ge=1)
    """Number of blocks."""
    heads: int = Field(default=4, ge=1)
    """Heads of attention; the width is a multiple of them."""
    buckets: int = Field(default=1 << 13, ge=16, le=1 << 24)
    """Vectors that n-grams share by their hash."""
    longest: int = Field(default=5, ge=3, le=12)
    """Characters of the longest n-gram."""
    window: int = Field(default=128, ge=2)
    """Words that are read at once."""
    hide: float = Field(default=0.15, ge=0, lt=1)
    """Share of the words that are hidden in each step."""
    vocabulary: int = Field(default=2048, ge=2)
    """Frequent words that are guessed where they are hidden."""
    masked_weight: float = Field(default=0.3, ge=0)
    """Weight of guessing hidden words, in unlabelled documents too; 0 for none."""
    fit: FitConfig = FitConfig(
        steps=300, lr=2e-3, batch_size=16, warmup=20, schedule="cosine", min_lr=0.05,
        betas=(0.9, 0.98), weight_decay=0.05, clip=1.0,
    )  # fmt: skip
    """Steps, windows per step, rates."""

    @model_validator(mode="after")
    def _check(self) -> EncoderLabeller:
        """Refuse a width that heads, or waves of positions, cannot be cut from."""
        if self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width: {self.width} must be even and a multiple of 'heads' ({self.heads})"
            )
        return self

    @property
    def size(self) -> encoder.Size:
        """Its shape."""
        return encoder.Size(
            self.width, self.blocks, self.heads, self.buckets, self.longest, self.window
        )


class StatesLabeller(Labeller):
    """Hidden states of the model that is labelled for."""

    name: Literal["states"] = "states"
    """Kind of features."""
    block: int | None = None
    """Block whose output is read, from 0; missing for a sixth of the way."""
    max_length: int = Field(default=512, ge=2)
    """Tokens that are read at once."""
    words: int = Field(default=20_000, ge=100)
    """Labelled words that the head is fitted to at most."""
    l2: float = Field(default=1.0, gt=0)
    """Penalty of the squared weights of standardised states."""


AnyLabeller = NgramLabeller | EncoderLabeller | StatesLabeller


@dataclass(frozen=True)
class Trained:
    """A labeller before its calibration.

    Attributes:
        weights: Its tensors by name.
        flops: Floating-point operations of its training.
    """

    weights: Mapping[str, Tensor]
    flops: float


@dataclass(frozen=True)
class Fitted:
    """A calibrated labeller.

    Attributes:
        config: What it is.
        names: Capabilities, in the order that numbers them.
        weights: Its tensors by name.
        calibration: Slope and shift of its log-odds.
        facts: What is known of how good it is and what it costs, for `labeller.json`.
    """

    config: AnyLabeller
    names: tuple[str, ...]
    weights: Mapping[str, Tensor]
    calibration: tuple[float, float]
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_inputs(
    config: AnyLabeller, documents: Sequence[Document], reader: states.Reader | None
) -> tuple[list[Tensor] | None, int]:
    """Return what the model itself says of documents, where a labeller reads that, and the tokens.

    Args:
        config: The labeller.
        documents: What it reads.
        reader: The model up to its block.
    """
    if not isinstance(config, StatesLabeller):
        return None, 0
    assert reader is not None
    return states.states(documents, reader)


def open_reader(
    config: AnyLabeller, model: Checkpoint | None, ctx: Context
) -> states.Reader | None:
    """Return the model up to the block that a labeller reads; None where it reads none.

    Raises:
        UserError: If it needs a model and there is none.
    """
    if not isinstance(config, StatesLabeller):
        return None
    if model is None:
        raise UserError("labeller 'states' reads hidden states of a model; name one with --model")
    return states.reader(model, config.block, config.max_length, ctx)


def train(
    config: AnyLabeller,
    teaching: Sequence[Document],
    others: Sequence[Document],
    classes: int,
    ctx: Context,
    inputs: Sequence[Tensor] | None = None,
) -> Trained:
    """Train a labeller on the words that have a label.

    Args:
        config: The labeller.
        teaching: Documents with labelled words.
        others: Documents without, which an encoder reads too.
        classes: Core and every capability.
        ctx: Seed, device and folder.
        inputs: States of the words of `teaching`.
    """
    masks = [[n != UNLABELED for n in document.labels] for document in teaching]
    y_N = torch.tensor([n for document in teaching for n in document.labels if n != UNLABELED])
    match config:
        case NgramLabeller():
            x_NF, used = ngrams.sparse_features(
                teaching, masks, config.buckets, config.longest, config.window
            )
            head, passes = fit_head(x_NF, y_N, classes, l2=config.l2)
            full = torch.zeros(config.buckets + 1, classes)
            full[used] = head[:-1].float()
            full[-1] = head[-1].float()
            return Trained({"head": full}, 4.0 * passes * x_NF._nnz() * classes)
        case EncoderLabeller():
            weights, read = encoder.train_encoder(
                teaching, others, config.size, classes, config.fit, ctx,
                vocabulary=config.vocabulary, hide=config.hide,
                masked_weight=config.masked_weight,
            )  # fmt: skip
            guessing = 2.0 * config.width * config.vocabulary * config.hide
            each = encoder.flops_per_word(config.size, classes)
            each += guessing if config.masked_weight else 0.0
            return Trained(weights, 3.0 * read * each)
        case StatesLabeller():
            assert inputs is not None
            x_NF = torch.cat([x[torch.tensor(m, dtype=torch.bool)] for x, m in zip(inputs, masks)])
            if len(x_NF) > config.words:
                draw = ctx.generator("words of the head")
                chosen = torch.randperm(len(x_NF), generator=draw)[: config.words].sort().values
                x_NF, y_N = x_NF[chosen], y_N[chosen]
            mean, scale = x_NF.mean(dim=0), x_NF.std(dim=0, correction=0).clamp(min=1e-6)
            head, passes = fit_head(((x_NF - mean) / scale).double(), y_N, classes, l2=config.l2)
            weights = {"mean": mean, "scale": scale, "head": head.float()}
            return Trained(weights, 4.0 * passes * x_NF.numel() * classes)


def scores_of(
    config: AnyLabeller,
    weights: Mapping[str, Tensor],
    documents: Sequence[Document],
    ctx: Context,
    inputs: Sequence[Tensor] | None = None,
) -> list[Float[Tensor, "N K"]]:
    """Return the scores of every class of every word of some documents.

    Args:
        config: The labeller.
        weights: Its tensors.
        documents: What is labelled.
        ctx: Device.
        inputs: States of their words.
    """
    match config:
        case NgramLabeller():
            return ngrams.scores(documents, weights["head"], config.longest, config.window)
        case EncoderLabeller():
            model = encoder.loaded(weights, config.size)
            return encoder.scores(documents, model, ctx.device)
        case StatesLabeller():
            assert inputs is not None
            return [
                logits((x - weights["mean"]) / weights["scale"], weights["head"]) for x in inputs
            ]


def split_documents(documents: Sequence[Document], config: Labeller, seed: int) -> list[str]:
    """Return in which of `PARTS` each labelled document lies.

    Documents that hold a capability and those that hold none are cut apart, by hashes of what
    `split_by` names, so that each part has some of both; there is one draw a seed.

    Args:
        documents: Labelled documents.
        config: The share held out, and by what.
        seed: Seed of the cut.

    Raises:
        UserError: If they are too few.
    """
    keys = split_keys([document.row for document in documents], config.split_by)
    holds = {k for k, d in zip(keys, documents, strict=True) if any(n > CORE for n in d.labels)}
    part: dict[str, str] = {}
    for wanted in (True, False):
        order = ranked((k for k in keys if (k in holds) == wanted), seed, "held-out documents")
        held = max(2, round(config.held_out * len(order))) if order else 0
        if wanted and len(order) < 3:
            raise UserError(
                f"a labeller needs labelled documents of a capability from 3 "
                f"{'texts' if config.split_by == 'row' else 'units'} at least, one to learn from "
                f"and two to be measured on, and there {_are(len(order))}; label more"
            )
        held = min(held, len(order) - 1) if order else 0
        for i, key in enumerate(order):
            part[key] = PARTS[1 + i % 2] if i < held else PARTS[0]
    out = [part[key] for key in keys]
    for name in PARTS:
        chosen = [d for d, where in zip(documents, out, strict=True) if where == name]
        if not any(n == CORE for d in chosen for n in d.labels):
            raise UserError(
                "a labeller needs core words to learn from and in both halves of what is held out, "
                f"and the {name} of the labelled documents has none; label more core documents"
            )
    return out


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count or 'none'}"


def fit_labeller(
    config: AnyLabeller,
    rows: Rows,
    names: Sequence[str],
    ctx: Context,
    model: Checkpoint | None = None,
) -> Fitted:
    """Train, calibrate and measure a labeller.

    Args:
        config: The labeller.
        rows: Rows with the given labels (`CORE`, capability number, `UNLABELED`), of whole
            documents or of spans.
        names: Capabilities, in the order that numbers them.
        ctx: Seed, device, dtype and folder; a killed training resumes in it.
        model: What `states` reads.

    Returns:
        The labeller; `facts` are those of `labeller.json`.

    Raises:
        UserError: If too few documents are labelled, or a model is missing.
    """
    began = time.perf_counter()
    reader = open_reader(config, model, ctx)
    documents = documents_of(dict.fromkeys(rows))
    known = [d for d in documents if any(n != UNLABELED for n in d.labels)]
    others = [d for d in documents if all(n == UNLABELED for n in d.labels)]
    part = split_documents(known, config, ctx.seed_for("held-out documents"))
    teaching, *halves = ([d for d, p in zip(known, part, strict=True) if p == n] for n in PARTS)
    # A text that is held out is no text to guess words of either.
    held = {labelled_text(d.row) for half in halves for d in half}
    others = [d for d in others if labelled_text(d.row) not in held]
    inputs, read = read_inputs(config, teaching, reader)
    trained = train(config, teaching, others, len(names) + 1, ctx, inputs)
    flops = trained.flops + read * (reader.flops_per_token if reader else 0.0)
    trained_in = time.perf_counter() - began
    began = time.perf_counter()
    parts: list[tuple[Tensor, Tensor]] = []
    read = 0
    for half in halves:
        inputs, tokens = read_inputs(config, half, reader)
        read += tokens
        scores_NK = torch.cat(scores_of(config, trained.weights, half, ctx, inputs))
        y_N = torch.tensor([n for document in half for n in document.labels])
        parts.append((scores_NK[y_N != UNLABELED], y_N[y_N != UNLABELED]))
    seconds = time.perf_counter() - began
    words = sum(len(document.words) for half in halves for document in half)
    characters = sum(b - a for half in halves for d in half for a, b in d.offsets)
    chance_N, forget_N, label_N, y_N = _cross_calibrated(parts)
    both_NK, both_N = torch.cat([s for s, _ in parts]), torch.cat([y for _, y in parts])
    calibration = platt_of(both_NK, both_N)
    sentence = verdict(chance_N, forget_N)
    if sentence:
        ctx.emit("note", {"text": sentence})
    every = [document for half in halves for document in half]
    each = reading_flops(config, len(names) + 1, every, reader.width if reader else 0)
    each += read * reader.flops_per_token / max(1, words) if reader else 0.0
    facts = {
        "labeller": config.model_dump(mode="json"),
        "capabilities": [*names],
        "documents": {
            "learned_from": len(teaching),
            "held_out": sum(map(len, halves)),
            "unlabelled": len(others),
        },
        "held_out_words": {"core": int((~forget_N).sum()), "capability": int(forget_N.sum())},
        "verdict": sentence,
        "calibration": {
            "slope": calibration[0],
            "shift": calibration[1],
            "error": calibration_error(chance_N, forget_N),
        },
        "thresholds": table(chance_N, forget_N),
        "by_capability": _by_capability(chance_N, label_N, y_N, names),
        "cost": {
            "training_seconds": round(trained_in, 3),
            "training_flops": flops,
            "seconds_per_word": seconds / max(1, words),
            "flops_per_word": each,
            "characters_per_word": characters / max(1, words),
        },
    }
    return Fitted(config, tuple(names), trained.weights, calibration, facts)


def platt_of(scores_NK: Tensor, y_N: Tensor) -> tuple[float, float]:
    """Return the calibration of scores whose classes are known."""
    return platt(margins(scores_NK), y_N > CORE)


def _cross_calibrated(
    parts: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return probability, truth, most likely capability and class of held-out words.

    Args:
        parts: Scores and classes of either half; each is calibrated by the other.
    """
    chances, forgets, labels, classes = [], [], [], []
    for (scores_NK, y_N), (other_NK, other_N) in zip(parts, reversed(parts), strict=True):
        chance_N, label_N = probabilities(scores_NK, platt_of(other_NK, other_N))
        chances.append(chance_N)
        labels.append(label_N)
        forgets.append(y_N > CORE)
        classes.append(y_N)
    return torch.cat(chances), torch.cat(forgets), torch.cat(labels), torch.cat(classes)


def _by_capability(
    chance_N: Tensor, label_N: Tensor, y_N: Tensor, names: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Return precision and recall of each capability at 0.5."""
    out: dict[str, dict[str, float | None]] = {}
    for number, name in enumerate(names, start=1):
        flagged_N, true_N = (chance_N >= 0.5) & (label_N == number), y_N == number
        out[name] = {
            "precision": share_of(true_N[flagged_N]) if bool(flagged_N.any()) else None,
            "recall": share_of(flagged_N[true_N]) if bool(true_N.any()) else None,
        }
    return out


def reading_flops(
    config: AnyLabeller, classes: int, documents: Sequence[Document], width: int = 0
) -> float:
    """Return the floating-point operations of labelling a word, reading of the model aside.

    Args:
        config: The labeller.
        classes: Core and every capability.
        documents: Documents whose words say how many n-grams a word has.
        width: Width of the model's states.
    """
    match config:
        case NgramLabeller():
            each = [
                len(ngrams.subwords(word, config.buckets, config.longest))
                for document in documents for word in document.words
            ]  # fmt: skip
            near = 2 * config.window + 2 * bool(config.window)
            return 2.0 * classes * (sum(each) / max(1, len(each)) + near)
        case EncoderLabeller():
            return encoder.flops_per_word(config.size, classes)
        case StatesLabeller():
            return 4.0 * width * classes


def label_documents(
    fitted: Fitted,
    documents: Sequence[Document],
    ctx: Context,
    reader: states.Reader | None = None,
) -> list[Row]:
    """Return rows whose words all have a label; those that they have already stay.

    A word is labelled as the most likely capability where the calibrated probability of any is
    above one half, else as core, with the confidence that this is right, rounded to one of
    `LEVELS`.

    Args:
        fitted: The labeller.
        documents: Rows as words.
        ctx: Device.
        reader: What `states` reads with.
    """
    inputs, _ = read_inputs(fitted.config, documents, reader)
    out = []
    every = scores_of(fitted.config, fitted.weights, documents, ctx, inputs)
    for document, scores_NK in zip(documents, every, strict=True):
        if UNLABELED not in document.labels:
            out.append(document.row)
            continue
        chance_N, label_N = probabilities(scores_NK, fitted.calibration)
        labels: list[int | None] = [None] * len(document.words)
        confidences = [*document.confidences]
        near_N = torch.bucketize(chance_N, _BETWEEN).tolist()
        for i, (near, label) in enumerate(zip(near_N, label_N.tolist(), strict=True)):
            if document.labels[i] == UNLABELED:
                level = LEVELS[near]
                labels[i] = label if level > 0.5 else CORE
                confidences[i] = level if level > 0.5 else round(1.0 - level, 2)
        out.append(labelled(document, labels, confidences))
    return out


def save_labeller(fitted: Fitted, folder: Path) -> None:
    """Write a labeller as `labeller.json` and `labeller.safetensors`."""
    with new_file(folder / WEIGHTS) as part:
        save_file({k: v.contiguous() for k, v in fitted.weights.items()}, part)
    write_text(folder / FACTS, json.dumps(fitted.facts, indent=1, ensure_ascii=False) + "\n")


def load_labeller(config: AnyLabeller, folder: Path) -> Fitted:
    """Read a labeller that `save_labeller` wrote."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    calibration = facts["calibration"]["slope"], facts["calibration"]["shift"]
    weights = load_file(folder / WEIGHTS)
    return Fitted(config, tuple(facts["capabilities"]), weights, calibration, facts)
