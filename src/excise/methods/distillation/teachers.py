"""Frozen models that say what a student shall say, and the fixed distributions made of them.

Hidden states are read, never logits: the losses of `excise.train.vocab` put the head on a few
tokens at a time.

Shape legend: B rows, T tokens, N wanted positions of a batch, M rows of the batch that are read,
n positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from excise.core.errors import UserError
from excise.data.stream import Batch, Example, collate
from excise.losses import predicting
from excise.methods.distillation.targets import TargetPiece
from excise.methods.distillation.teacher_cache import TeacherCache
from excise.models.head import Head, final_hidden, head_of
from excise.train.vocab import Fixed, HiddenTarget, Label, MixtureTarget, Target, Uniform
from excise.train.vocab.targets import log_probs

CHUNK = 1 << 24
"""Probabilities held at once at most."""


@dataclass(frozen=True)
class Frozen:
    """A teacher.

    Attributes:
        name: Source, as targets name it.
        model: The model, in evaluation mode.
        head: Its head.
    """

    name: str
    model: nn.Module
    head: Head

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """Return what goes into the head.

        Raises:
            UserError: If it is not finite.
        """
        hidden_BTD = final_hidden(self.model, batch.inputs)
        if not bool(hidden_BTD[batch.attention_BT].isfinite().all()):
            raise refused(self.name, hidden_BTD)
        return hidden_BTD

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Read a few rows before anything is trained.

        Raises:
            UserError: If the teacher emits NaN there.
        """
        hidden_ND = self.hidden(batch)[batch.attention_BT]
        said = HiddenTarget(hidden_ND, self.head)
        for logp_nV, _, _ in _in_chunks(said, said):
            if not bool(logp_nV.isfinite().all()):
                raise refused(self.name, logp_nV)


def cached_source(piece: TargetPiece) -> str:
    """Return the source of a piece that a cache can stand for; empty where none can."""
    return next(iter(piece.weights)) if piece.kind == "models" and len(piece.weights) == 1 else ""


def refused(name: str, what: Tensor) -> UserError:
    """Return the sentence about a teacher whose numbers are no numbers."""
    dtype = str(what.dtype).removeprefix("torch.")
    return UserError(
        f"teacher '{name}' emits NaN or infinity in {dtype}, so that nothing can be distilled from "
        "it; unlearn with a lower learning rate, or run it in float32"
    )


def frozen(name: str, model: Any, vocab: int) -> Frozen:
    """Take a model as a teacher.

    Args:
        name: Source, as targets name it.
        model: The model; it is put into evaluation mode and needs no gradients any more.
        vocab: Size of the student's vocabulary.

    Raises:
        UserError: If its vocabulary has another size.
    """
    model.requires_grad_(False).eval()
    head = head_of(model).detach()
    if head.vocab != vocab:
        raise UserError(
            f"teacher '{name}' has a vocabulary of {head.vocab} tokens and the student one of "
            f"{vocab}; take a teacher with the student's tokenizer"
        )
    return Frozen(name, model, head)


@dataclass
class Reads:
    """What teachers say about one batch, each row read once by each at most.

    Attributes:
        teachers: Teachers by source.
        fixed: Probabilities by name: `unigram` and `mean`.
        batch: The rows.
        wanted_BT: Positions whose prediction is scored, N in all.
        caches: What teachers said before, by source; they are not asked again.
        bos_id: Id that joined rows have once, for the caches.
        tokens: Tokens read so far, over all teachers.
    """

    teachers: Mapping[str, Frozen]
    fixed: Mapping[str, Float[Tensor, " V"]]
    batch: Batch
    wanted_BT: Bool[Tensor, "B T"]
    caches: Mapping[str, TeacherCache] = field(default_factory=dict)
    bos_id: int | None = None
    tokens: int = 0
    _states: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def hidden(self, source: str, mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "N D"]:
        """Return a teacher's hidden states, 0 in rows of the batch that the mask does not need.

        Args:
            source: The teacher.
            mask_BT: Positions that are asked for.
        """
        teacher = self.teachers[source]
        need_B = mask_BT.any(1)
        if source not in self._states:
            shape = (int(self.wanted_BT.sum()), teacher.head.weight_VD.shape[1])
            hidden_ND = teacher.head.weight_VD.new_zeros(shape)
            self._states[source] = hidden_ND, torch.zeros_like(need_B)
        hidden_ND, read_B = self._states[source]
        need_B = need_B & ~read_B
        if bool(need_B.any()):
            batch = rows_of(self.batch, need_B)
            wanted_MT = self.wanted_BT[need_B]
            row_N = need_B[:, None].expand_as(self.wanted_BT)[self.wanted_BT]
            hidden_ND[row_N] = teacher.hidden(batch)[wanted_MT].to(hidden_ND.dtype)
            self.tokens += batch.num_tokens
            self._states[source] = hidden_ND, read_B | need_B
        return hidden_ND

    def taught(self, pieces: Sequence[TargetPiece]) -> list[tuple[Bool[Tensor, " N"], Target]]:
        """Return which positions are taught what, each target for all N positions."""
        out: list[tuple[Tensor, Target]] = []
        for piece in pieces:
            mask_N = piece.mask_BT[self.wanted_BT]
            source = cached_source(piece)
            if source in self.caches:
                cached = self.caches[source].lookup(
                    self.batch, self.wanted_BT, packed=True, bos_id=self.bos_id
                )
                out += [
                    (mask_N & (cached.kinds_N == i), target)
                    for i, target in enumerate(cached.targets)
                ]
            else:
                out.append((mask_N, self.target(piece)))
        return out

    def target(self, piece: TargetPiece) -> Target:
        """Return the target of a piece, for all N positions."""
        match piece.kind:
            case "uniform":
                return Uniform()
            case "unigram" | "mean":
                return Fixed(self.fixed[piece.kind])
            case "tokens":
                return Label(self.batch.ids_BT.roll(-1, dims=1)[self.wanted_BT])
            case "shuffled":
                return self._shuffled(piece)
        parts = tuple(self._said_by(source, piece.mask_BT) for source in piece.weights)
        if len(parts) == 1:
            return parts[0]
        share_M = torch.tensor(list(piece.weights.values()), device=self.wanted_BT.device)
        return MixtureTarget(parts, share_M.expand(int(self.wanted_BT.sum()), -1))

    def _said_by(self, source: str, mask_BT: Tensor) -> HiddenTarget:
        return HiddenTarget(self.hidden(source, mask_BT), self.teachers[source].head)

    def _shuffled(self, piece: TargetPiece) -> HiddenTarget:
        """Deal the predictions at the piece's positions out among them; `fit` seeds the order."""
        (source,) = piece.weights
        target = self._said_by(source, piece.mask_BT)
        at_M = piece.mask_BT[self.wanted_BT].nonzero()[:, 0]
        dealt_ND = target.hidden_ND.clone()
        dealt_ND[at_M] = target.hidden_ND[at_M[torch.randperm(len(at_M)).to(at_M.device)]]
        return replace(target, hidden_ND=dealt_ND)

    @torch.no_grad()
    def moved(self, source: str, other: str, tau: float) -> Bool[Tensor, "B T"]:
        """Return where KL(source || other) exceeds `tau` nats.

        Args:
            source: A teacher.
            other: Another one.
            tau: Bound, in nats per prediction.
        """
        ends = [self._said_by(name, self.wanted_BT) for name in (source, other)]
        kl_N = torch.cat([(p * (u - b)).sum(-1) for u, b, p in _in_chunks(ends[0], ends[1])])
        out_BT = torch.zeros_like(self.wanted_BT)
        out_BT[self.wanted_BT] = kl_N > tau
        return out_BT


def _in_chunks(first: HiddenTarget, second: HiddenTarget) -> Any:
    """Yield log-probabilities of both and probabilities of the first, a few positions at a time."""
    vocab = first.head.vocab
    at_N = torch.arange(len(first.hidden_ND), device=first.hidden_ND.device)
    for at_n in at_N.split(max(1, CHUNK // vocab)):
        like_nV = first.hidden_ND.new_empty((len(at_n), vocab), dtype=torch.float32)
        u_nV, b_nV = (log_probs(t, at_n, like_nV, 1.0) for t in (first, second))
        yield u_nV, b_nV, u_nV.exp()


def rows_of(batch: Batch, chosen_B: Bool[Tensor, " B"]) -> Batch:
    """Return some rows of a batch."""
    if bool(chosen_B.all()):
        return batch
    units = tuple(u for u, c in zip(batch.units, chosen_B.tolist(), strict=True) if c)
    return Batch(
        batch.ids_BT[chosen_B],
        batch.attention_BT[chosen_B],
        batch.target_BT[chosen_B],
        batch.label_BT[chosen_B],
        units,
    )


def unigram(examples: Sequence[Example], vocab: int) -> Float[Tensor, " V"]:
    """Return frequencies of the scored tokens of examples, with one added to each.

    Args:
        examples: Rows to forget.
        vocab: Size of the vocabulary.
    """
    ids = [i for e in examples for i, scored in zip(e.ids, e.target, strict=True) if scored]
    count_V = torch.bincount(torch.tensor(ids), minlength=vocab) + 1
    return count_V.float() / count_V.sum()


@torch.no_grad()
def mean_prediction(
    teacher: Frozen, examples: Sequence[Example], pad_id: int, device: torch.device
) -> Float[Tensor, " V"]:
    """Return the mean of what a teacher predicts at the scored tokens of examples.

    Args:
        teacher: The teacher.
        examples: Rows to forget.
        pad_id: Padding id.
        device: Where it runs.
    """
    total_V = torch.zeros(teacher.head.vocab, dtype=torch.float64, device=device)
    count = 0
    for at in range(0, len(examples), 64):
        batch = collate(examples[at : at + 64], pad_id=pad_id).to(device)
        hidden_ND = teacher.hidden(batch)[predicting(batch.target_BT)]
        said = HiddenTarget(hidden_ND, teacher.head)
        for _, _, p_nV in _in_chunks(said, said):
            total_V += p_nV.double().sum(0)
        count += len(hidden_ND)
    return (total_V / max(1, count)).float()
