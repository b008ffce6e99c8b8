"""What a teacher cache keeps of each prediction, and how it is made from hidden states.

Shape legend: L tokens of a document, n predictions of a chunk, D hidden size, V vocabulary,
K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from excise.core.config import Config
from excise.models.head import Head

ABSENT, SKIP, STORED, UNIFORM = 0, 1, 2, 3
"""Types of a position, one byte each: never asked for, left out by label, kept, or uniform."""
CHUNK = 1 << 24
"""Probabilities of a teacher held at once at most."""


class HiddenStates(Config):
    """The teacher's last hidden states; its head is put on them again: exact."""

    name: Literal["hidden"] = "hidden"
    dtype: Literal["model", "float32", "bfloat16"] = "model"
    """What they are kept in; `model` is what the teacher runs in and loses nothing."""
    skip_labels: tuple[int, ...] = ()
    """Capability labels of tokens whose prediction is left out."""


class TopTokens(Config):
    """The likeliest tokens, and the rest of the probability spread evenly over all others."""

    name: Literal["topk"] = "topk"
    k: int = Field(default=64, ge=1)
    """Tokens kept for each prediction; the whole vocabulary where it is smaller."""
    uniform_below: float = Field(default=0.0, ge=0)
    """Predictions whose KL to uniform (nats) is below this are kept as the word `uniform`."""
    temperature: float = Field(default=1.0, gt=0)
    """By which the teacher's logits are divided."""
    skip_labels: tuple[int, ...] = ()
    """Capability labels of tokens whose prediction is left out."""


class SampledTokens(Config):
    """Tokens sampled from the teacher: on average the gradient of the forward KL."""

    name: Literal["sampled"] = "sampled"
    draws: int = Field(default=50, ge=1, le=32767)
    """Samples for each prediction, with replacement."""
    seed: int = 0
    """Seed of the samples; each document has its own, whatever comes before it."""
    temperature: float = Field(default=1.0, gt=0)
    """By which the teacher's logits are divided."""
    skip_labels: tuple[int, ...] = ()
    """Capability labels of tokens whose prediction is left out."""


CacheKind = Annotated[HiddenStates | TopTokens | SampledTokens, Field(discriminator="name")]
"""What is kept of each prediction."""


@dataclass
class CacheStats:
    """What was measured while predictions were kept; sums over predictions.

    Attributes:
        stored: Predictions kept.
        uniform: Predictions kept as the word `uniform`.
        skipped: Predictions left out by label.
        gap_sum: KL(teacher || what is kept), nats, measured.
        gap_max: The largest.
        bound_sum: Upper bound of that KL, from what is kept alone.
        bound_max: The largest.
    """

    stored: int = 0
    uniform: int = 0
    skipped: int = 0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    bound_sum: float = 0.0
    bound_max: float = 0.0

    def add(self, gap_n: Tensor, bound_n: Tensor) -> None:
        """Note measured divergences and their bounds."""
        if len(gap_n):
            self.gap_sum += float(gap_n.sum())
            self.gap_max = max(self.gap_max, float(gap_n.max()))
            self.bound_sum += float(bound_n.sum())
            self.bound_max = max(self.bound_max, float(bound_n.max()))

    def merge(self, other: CacheStats) -> None:
        """Add what was measured elsewhere."""
        for name in ("stored", "uniform", "skipped", "gap_sum", "bound_sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.gap_max = max(self.gap_max, other.gap_max)
        self.bound_max = max(self.bound_max, other.bound_max)


@dataclass
class KeptDocument:
    """What is kept of one document.

    Attributes:
        types_L: Type of each of its positions.
        tensors: Tensors with one entry per position of type `STORED`, in order.
        stats: What was measured.
    """

    types_L: Int[Tensor, " L"]
    tensors: dict[str, Tensor]
    stats: CacheStats = field(default_factory=CacheStats)


def keep(
    kind: CacheKind,
    hidden_LD: Float[Tensor, "L D"],
    types_L: Int[Tensor, " L"],
    head: Head,
    seed: int,
) -> KeptDocument:
    """Return what is kept of a document's predictions.

    Args:
        kind: What to keep.
        hidden_LD: The teacher's hidden states.
        types_L: `STORED` where a prediction is wanted, `SKIP` or `ABSENT` elsewhere.
        head: The teacher's head.
        seed: Of the document's samples.

    Returns:
        Tensors on the CPU; some types may have become `UNIFORM`.

    Raises:
        FloatingPointError: If a prediction is not finite; its argument is the position.
    """
    types_L = types_L.clone()
    at_n = (types_L == STORED).nonzero()[:, 0]
    hidden_nD = hidden_LD[at_n.to(hidden_LD.device)]
    _finite(hidden_nD, at_n)
    stats = CacheStats(skipped=int((types_L == SKIP).sum()))
    if isinstance(kind, HiddenStates):
        dtype = hidden_nD.dtype if kind.dtype == "model" else getattr(torch, kind.dtype)
        stats.stored = len(at_n)
        return KeptDocument(types_L, {"hidden": hidden_nD.to(dtype).cpu().contiguous()}, stats)
    chunks = _log_probs(hidden_nD, head, kind.temperature, at_n)
    if isinstance(kind, SampledTokens):
        tensors = _sampled(kind, chunks, seed)
    else:
        tensors, uniform_n = _top(kind, chunks, stats)
        types_L[at_n[uniform_n]] = UNIFORM
    stats.uniform = int((types_L == UNIFORM).sum())
    stats.stored = int((types_L == STORED).sum())
    return KeptDocument(types_L, tensors, stats)


def _finite(values_nX: Tensor, at_n: Tensor) -> None:
    """Refuse rows that are not finite, by the position of the first."""
    bad_n = ~values_nX.isfinite().all(-1)
    if bool(bad_n.any()):
        raise FloatingPointError(int(at_n[bad_n.cpu()][0]))


def _log_probs(
    hidden_nD: Tensor, head: Head, temperature: float, at_n: Tensor
) -> Iterator[Float[Tensor, "n V"]]:
    """Yield the teacher's log-probabilities, a few predictions at a time."""
    rows = max(1, CHUNK // head.vocab)
    for part_nD, part_n in zip(hidden_nD.split(rows), at_n.split(rows), strict=True):
        logp_nV = (head.logits(part_nD).float() / temperature).log_softmax(-1)
        _finite(logp_nV, part_n)
        yield logp_nV


def _top(
    kind: TopTokens, chunks: Iterator[Tensor], stats: CacheStats
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the likeliest tokens of what is not uniform, and a mask of what is.

    With the tail's mass t spread evenly over the m tokens not kept, KL(p || kept) is
    t log(m / t) + sum over the tail of p log p; as no token of the tail is likelier than the last
    one kept, it is at most t log(m p_k / t).
    """
    ids: list[Tensor] = []
    logps: list[Tensor] = []
    tails: list[Tensor] = []
    masks: list[Tensor] = []
    for logp_nV in chunks:
        vocab = logp_nV.shape[1]
        top = logp_nV.topk(min(kind.k, vocab))
        wide_nV = logp_nV.double()
        to_uniform_n = math.log(vocab) + (wide_nV.exp() * wide_nV).sum(-1)
        uniform_n = to_uniform_n < kind.uniform_below
        rest_nV = wide_nV.exp().scatter_(1, top.indices, 0.0)
        tail_n, others = rest_nV.sum(-1), max(1, vocab - top.indices.shape[1])
        even_n = torch.where(tail_n > 0, tail_n / others, 1.0)
        gap_n = torch.xlogy(rest_nV, rest_nV / even_n[:, None]).sum(-1).clamp(min=0)
        last_n = top.values[:, -1].double().exp()
        bound_n = (tail_n * (last_n / even_n).log()).clamp(min=0)
        stats.add(
            torch.where(uniform_n, to_uniform_n.clamp(min=0), gap_n),
            torch.where(uniform_n, kind.uniform_below, bound_n),
        )
        ids.append(top.indices[~uniform_n].int().cpu())
        logps.append(top.values[~uniform_n].cpu())
        tails.append(tail_n[~uniform_n].float().cpu())
        masks.append(uniform_n.cpu())
    if not masks:
        empty = {"ids": torch.zeros(0, 0).int(), "logp": torch.zeros(0, 0), "tail": torch.zeros(0)}
        return empty, torch.zeros(0).bool()
    tensors = {"ids": torch.cat(ids), "logp": torch.cat(logps), "tail": torch.cat(tails)}
    return tensors, torch.cat(masks)


def _sampled(kind: SampledTokens, chunks: Iterator[Tensor], seed: int) -> dict[str, Tensor]:
    """Return sampled tokens, each once for a prediction, and how often each was sampled."""
    ids: list[Tensor] = []
    counts: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for logp_nV in chunks:
        # As `torch.multinomial` on the CPU, to the bit; other devices' own would draw other tokens.
        below_nV = logp_nV.double().exp().cumsum(-1)
        below_nV = below_nV / below_nV[:, -1:]
        below_nV[:, -1] = 1
        shape = (len(logp_nV), kind.draws)
        draw_nK = torch.rand(shape, generator=generator, dtype=torch.float64).to(logp_nV.device)
        sample_nK = torch.searchsorted(below_nV, draw_nK).sort(-1).values.cpu()
        first_nK = torch.ones_like(sample_nK, dtype=torch.bool)
        first_nK[:, 1:] = sample_nK[:, 1:] != sample_nK[:, :-1]
        place_nK = first_nK.cumsum(-1) - 1
        once_nK = torch.zeros_like(sample_nK).scatter_(1, place_nK, sample_nK)
        ones_nK = torch.ones_like(sample_nK)
        ids.append(once_nK.int())
        counts.append(torch.zeros_like(sample_nK).scatter_add_(1, place_nK, ones_nK).short())
    if not ids:
        return {"ids": torch.zeros(0, 0).int(), "counts": torch.zeros(0, 0).short()}
    count_nK = torch.cat(counts)
    width = int((count_nK > 0).sum(-1).max())
    return {"ids": torch.cat(ids)[:, :width], "counts": count_nK[:, :width]}


def bytes_each(kind: CacheKind, width: int, vocab: int, itemsize: int) -> int:
    """Return about how many bytes one prediction takes.

    Args:
        kind: What is kept.
        width: Hidden size.
        vocab: Size of the vocabulary.
        itemsize: Bytes of a number of the teacher.
    """
    if isinstance(kind, HiddenStates):
        sizes = {"model": itemsize, "float32": 4, "bfloat16": 2}
        return width * sizes[kind.dtype]
    return 8 * min(kind.k, vocab) if isinstance(kind, TopTokens) else 6 * kind.draws


def joined(parts: list[Tensor]) -> Tensor:
    """Return tensors one behind the other, narrower ones filled up with zeros on the right."""
    if parts[0].ndim == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
