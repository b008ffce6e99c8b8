"""From rows to batches: tokens, scored targets and one capability label per token.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from excise.core.errors import UserError
from excise.data.chat import render_chat, rendered_spans
from excise.data.domain import CORE, UNLABELED, Row, labelled_text
from excise.data.encoding import Pair, T, cut_head, encode_pair, with_specials
from excise.data.spans import label_tokens, outside, tokens_of

Tokenizer = Any
"""A `transformers` tokenizer; typed loosely because its stubs are."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as token ids.

    Attributes:
        ids: Token ids, BOS included where the tokenizer wants one.
        target: Whether the token at that position is scored (never the first).
        label: Capability label of the whole row, or of each token where the row has spans or rows
            were joined.
        unit: Unit id of the row; of the first where rows were joined.
        confidence: Confidence in the label, of the whole row or of each token.
        cut: Tokens that a span covers in part; they are labelled whole.
    """

    ids: tuple[int, ...]
    target: tuple[bool, ...]
    label: int | tuple[int, ...]
    unit: str
    confidence: float | tuple[float, ...] = 1.0
    cut: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length.

    Attributes:
        ids_BT: Token ids.
        attention_BT: True where a token is real.
        target_BT: True where the token is scored; position t is predicted from t - 1.
        label_BT: Capability label per token (`CORE`, 1.., `UNLABELED`).
        units: Unit id of each row.
        confidence_BT: Confidence in each label; None where all are certain.
    """

    ids_BT: Int[Tensor, "B T"]
    attention_BT: Bool[Tensor, "B T"]
    target_BT: Bool[Tensor, "B T"]
    label_BT: Int[Tensor, "B T"]
    units: tuple[str, ...]
    confidence_BT: Float[Tensor, "B T"] | None = None

    @cached_property
    def num_targets(self) -> int:
        """Number of scored tokens."""
        return int(self.target_BT.sum())

    @cached_property
    def num_predicted(self) -> int:
        """Number of scored tokens that another comes before."""
        return int(self.target_BT[:, 1:].sum())

    @cached_property
    def num_tokens(self) -> int:
        """Number of real tokens."""
        return int(self.attention_BT.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; its numbers are counted where it is, and go along.

        Asked of an accelerator, they would wait for all that it has still to do.
        """
        confidence_BT = self.confidence_BT
        moved = replace(
            self,
            ids_BT=self.ids_BT.to(device),
            attention_BT=self.attention_BT.to(device),
            target_BT=self.target_BT.to(device),
            label_BT=self.label_BT.to(device),
            confidence_BT=None if confidence_BT is None else confidence_BT.to(device),
        )
        for name in ("num_targets", "num_predicted", "num_tokens"):
            moved.__dict__[name] = getattr(self, name)
        return moved

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a causal model's forward.

        Positions count real tokens, so that left and right padding give the same numbers.
        """
        position_BT = (self.attention_BT.long().cumsum(1) - 1).clamp(min=0)
        return {
            "input_ids": self.ids_BT,
            "attention_mask": self.attention_BT.long(),
            "position_ids": position_BT,
        }


def encode_row(
    row: Row, tokenizer: Tokenizer, *, max_length: int, only_spans: bool = False
) -> Example:
    """Turn one row into token ids and scored positions.

    Text: every token after the first is scored. Completion: `prompt` and `completion` are one text
    to the tokenizer and only the tokens of the completion are scored (`encode_pair`). A question is
    the completion of its right answer. A conversation is rendered by the tokenizer's own chat
    template and only assistant turns are scored. Where the row has spans, every token has a label
    of its own.

    Args:
        row: The row.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept at most; text is cut on the right, a prompt on the left.
        only_spans: Whether of a row with spans only the tokens of capabilities are scored: those
            that a test is about, and a method on a trained model is to forget.

    Returns:
        The example.

    Raises:
        UserError: If the row is empty after rendering or no scored token is left, or its spans
            cannot be brought to tokens.
    """
    if row.kind == "chat":
        ids, target = render_chat(row, tokenizer)
    elif row.kind == "text":
        ids = with_specials(tokenizer(row.text, add_special_tokens=False)["input_ids"], tokenizer)
        target = [i > 0 for i in range(len(ids))]
        if row.targets:
            target = _answers(row, len(ids), tokenizer)
    else:
        pair = pair_of(row, tokenizer)
        ids = [*pair.head, *pair.tail]
        target = [i >= max(1, len(pair.head)) for i in range(len(ids))]

    def shortened(values: Sequence[T]) -> tuple[T, ...]:
        """Cut what there is for each token as the tokens are cut."""
        if row.kind in ("chat", "text"):
            return tuple(values[:max_length])
        border = len(pair.head)
        tail = values[border:][: max_length - bool(border)]  # a token to predict it from
        return (*cut_head(values[:border], max_length - len(tail), tokenizer), *tail)

    label: int | tuple[int, ...] = row.label
    confidence: float | tuple[float, ...] = row.confidence
    cut = 0
    if row.spans:
        labels, confidences, cut = _token_labels(row, len(ids), tokenizer)
        label, confidence = shortened(labels), shortened(confidences)
        confidence = 1.0 if all(c == 1.0 for c in confidence) else confidence
        if only_spans:
            target = [scored and n > CORE for scored, n in zip(target, labels, strict=True)]
    scored = shortened(target)
    if row.targets and len(scored) < len(target):
        parts = len(row.targets)
        raise UserError(
            f"unit '{row.unit}' is a text of {parts} rows and {len(target)} tokens, cut at "
            f"{max_length}; set 'pretrain.max_length' to {parts} times what one row takes"
        )
    if not any(scored):
        if only_spans and row.spans and any(target):
            raise UserError(
                f"unit '{row.unit}' has no token of a capability within {max_length} tokens, its "
                f"first is number {target.index(True) + 1}; raise the maximal length, or cut the "
                "text into shorter rows"
            )
        if only_spans and row.spans:
            raise UserError(
                f"unit '{row.unit}' has no token of a capability among those that are scored; put "
                "its spans where the answer is"
            )
        raise UserError(f"unit '{row.unit}' has no token to score; give it a longer text")
    return Example(shortened(ids), scored, label, row.unit, confidence, cut)


def _token_labels(row: Row, count: int, tokenizer: Tokenizer) -> tuple[list[int], list[float], int]:
    """Return label and confidence of each token of a row with spans, and the number cut.

    Args:
        row: The row.
        count: Its tokens, with the marks that begin every text.
        tokenizer: The model's tokenizer.

    Raises:
        UserError: If the tokenizer has no offsets or its template changes the text.
    """
    text, spans = labelled_text(row), row.spans
    if row.kind == "chat":
        text, spans = rendered_spans(row, tokenizer)
    rest = outside(row)
    offsets = _offsets(row, text, tokenizer)
    labels, confidences, cut = label_tokens(text, offsets, spans, rest)
    marks = count - len(labels)  # added at the beginning; below 0 where a doubled one was dropped
    labels = [rest] * marks + labels[max(0, -marks) :]
    return labels, [1.0] * marks + confidences[max(0, -marks) :], cut


def _offsets(row: Row, text: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Return the first character of each token of a row's text, and the one behind its last."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"unit '{row.unit}' has spans, and this tokenizer does not say which characters a "
            "token stands for; use the model's fast tokenizer (tokenizer.json)"
        )
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [*out["offset_mapping"]]


def _answers(row: Row, count: int, tokenizer: Tokenizer) -> list[bool]:
    """Return which tokens of a text with `targets` are scored.

    Args:
        row: The row.
        count: Its tokens, with the marks that begin every text.
        tokenizer: The model's tokenizer.
    """
    scored = tokens_of(row.text, _offsets(row, row.text, tokenizer), row.targets)
    marks = count - len(scored)
    return [i > 0 and hit for i, hit in enumerate([*([False] * marks), *scored[max(0, -marks) :]])]


def pair_of(row: Row, tokenizer: Tokenizer, choice: int | None = None) -> Pair:
    """Return the tokens of a row's prompt and answer.

    Args:
        row: A completion or a question. An option stands behind one space, as in `lm-eval`, and a
            question without a prompt behind BOS, or EOS where there is none.
        tokenizer: The model's tokenizer.
        choice: Which option of a question; None for the right one.
    """
    if row.kind == "completion":
        return encode_pair(row.prompt, row.completion, tokenizer)
    option = row.choices[row.answer if choice is None else choice]
    pair = encode_pair(row.prompt, f" {option}", tokenizer)
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = next((mark for mark in marks if mark is not None), None)
    return pair if pair.head or first is None else replace(pair, head=(first,))


def encode(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, only_spans: bool = False
) -> list[Example]:
    """Encode every row; see `encode_row`. Rows that are read several times are encoded once."""
    encoded: dict[Row, Example] = {}
    for row in rows:
        if row not in encoded:
            encoded[row] = encode_row(row, tokenizer, max_length=max_length, only_spans=only_spans)
    return [encoded[row] for row in rows]


def show(
    row: Row, tokenizer: Tokenizer, *, max_length: int = 1 << 20, only_spans: bool = False
) -> str:
    """Return a row as the model reads it, with what is scored between `>>` and `<<`.

    Args:
        row: A row of any shape.
        tokenizer: The model's tokenizer.
        max_length: Tokens kept at most.
        only_spans: As `encode_row`.

    Returns:
        A line with the numbers of tokens, then the text.

    Raises:
        UserError: If the row cannot be rendered.
    """
    example = encode_row(row, tokenizer, max_length=max_length, only_spans=only_spans)
    pieces: list[str] = []
    start = 0
    while start < len(example.ids):
        scored = example.target[start]
        end = start
        while end < len(example.ids) and example.target[end] == scored:
            end += 1
        words = tokenizer.decode(list(example.ids[start:end]), skip_special_tokens=False)
        pieces.append(f">>{words}<<" if scored else words)
        start = end
    head = f"{len(example.ids)} tokens, {sum(example.target)} scored (between >> and <<)"
    return head + "\n" + "".join(pieces)


def collate(
    examples: Sequence[Example], *, pad_id: int, padding_side: str = "right", length: int = 0
) -> Batch:
    """Pad examples to one length.

    Args:
        examples: At least one.
        pad_id: Id put where there is no token.
        padding_side: `right` or `left`.
        length: Common length; 0 takes the longest example's.

    Returns:
        The batch, on the CPU.
    """
    width = length or max(len(e.ids) for e in examples)
    shape = (len(examples), width)
    ids_BT = torch.full(shape, pad_id, dtype=torch.long)
    attention_BT = torch.zeros(shape, dtype=torch.bool)
    target_BT = torch.zeros(shape, dtype=torch.bool)
    label_BT = torch.full(shape, UNLABELED, dtype=torch.long)
    for i, e in enumerate(examples):
        at = slice(width - len(e.ids), width) if padding_side == "left" else slice(0, len(e.ids))
        ids_BT[i, at] = torch.tensor(e.ids)
        attention_BT[i, at] = True
        target_BT[i, at] = torch.tensor(e.target)
        label_BT[i, at] = torch.tensor(e.label)
    units = tuple(e.unit for e in examples)
    if all(e.confidence == 1.0 for e in examples):
        return Batch(ids_BT, attention_BT, target_BT, label_BT, units)
    confidence_BT = torch.ones(shape)
    for i, e in enumerate(examples):
        at = slice(width - len(e.ids), width) if padding_side == "left" else slice(0, len(e.ids))
        confidence_BT[i, at] = torch.tensor(e.confidence)
    return Batch(ids_BT, attention_BT, target_BT, label_BT, units, confidence_BT)


def join(examples: Sequence[Example], *, bos_id: int | None) -> Example:
    """Put examples one behind the other, so that a model learns to read what comes after others.

    Args:
        examples: At least one.
        bos_id: Id that begins a text; it is kept at the very beginning only.
    """
    if len(examples) == 1:
        return examples[0]
    ids: list[int] = []
    target: list[bool] = []
    label: list[int] = []
    confidences: list[float] = []
    for i, e in enumerate(examples):
        skip = 1 if i and e.ids[0] == bos_id else 0
        ids += e.ids[skip:]
        target += e.target[skip:]
        labels = e.label if isinstance(e.label, tuple) else (e.label,) * len(e.ids)
        label += labels[skip:]
        each = e.confidence if isinstance(e.confidence, tuple) else (e.confidence,) * len(e.ids)
        confidences += each[skip:]
    confidence = 1.0 if all(c == 1.0 for c in confidences) else tuple(confidences)
    return Example(tuple(ids), tuple(target), tuple(label), examples[0].unit, confidence)


@dataclass(frozen=True)
class Stream:
    """An endless, shuffled, rank-aware reading of examples, a pure function of the step.

    Nothing is kept between steps, so an interrupted run resumes by asking for its next step, and
    the processes of one run see different rows whose union is what one process would see.

    Attributes:
        examples: What is read.
        batch_size: Rows per step over all processes.
        seed: Seed of the order; every epoch has an order of its own.
        pad_id: Padding id.
        rank: Number of this process.
        world: Number of processes.
        micro_size: Texts per micro-batch of one process at most, put together by length; 0 for one
            micro-batch.
        shuffle: Whether to shuffle, or to read in file order.
        padding_side: `right` or `left`.
        pack: Rows per text, in turn: (1, 1, 3) makes two texts of one row, then one of three.
        bos_id: Id that begins a text; kept once where rows are joined.
    """

    examples: Sequence[Example]
    batch_size: int
    seed: int
    pad_id: int
    rank: int = 0
    world: int = 1
    micro_size: int = 0
    shuffle: bool = True
    padding_side: str = "right"
    pack: tuple[int, ...] = (1,)
    bos_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        if not self.examples:
            raise UserError("there is no row to train on in one of the roles; check the split")
        if self.batch_size < 1:
            raise UserError(f"a batch of {self.batch_size} rows is empty; use at least one row")
        if self.batch_size % self.world:
            raise UserError(
                f"a batch of {self.batch_size} rows cannot be divided over {self.world} processes"
            )

    def indices(self, step: int) -> list[int]:
        """Return the indices of this process's examples at `step`, in order."""
        return [i for text in self.texts(step) for i in text]

    def texts(self, step: int) -> list[list[int]]:
        """Return the indices of the examples of each of this process's texts at `step`."""
        count = len(self.examples)
        order: dict[int, list[int]] = {}
        texts: list[list[int]] = []
        room = 0
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, at = divmod(i, count)
            if epoch not in order:
                order[epoch] = self._order(epoch)
            if not room:
                room = self.pack[len(texts) % len(self.pack)]
                texts.append([])
            texts[-1].append(order[epoch][at])
            room -= 1
        return texts[self.rank :: self.world]

    def _order(self, epoch: int) -> list[int]:
        count = len(self.examples)
        if not self.shuffle:
            return list(range(count))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(count, generator=generator).tolist()

    def __call__(self, step: int) -> list[Batch]:
        """Return the micro-batches of this process at `step`."""
        picked = [
            join([self.examples[i] for i in text], bos_id=self.bos_id) for text in self.texts(step)
        ]
        size = self.micro_size or len(picked)
        if size < len(picked):  # texts of like length share a micro-batch: less padding
            picked.sort(key=lambda e: len(e.ids))
        return [
            collate(picked[i : i + size], pad_id=self.pad_id, padding_side=self.padding_side)
            for i in range(0, len(picked), size)
        ]


def zip_streams(
    streams: Mapping[str, Callable[[int], Sequence[Batch]]],
) -> Callable[[int], list[dict[str, Batch]]]:
    """Read several roles in step: one mapping of batches per micro-batch.

    Args:
        streams: A stream by role. All must give the same number of micro-batches per step.

    Returns:
        A function of the step, as `excise.train.fit.fit` takes it.

    Raises:
        UserError: At the first step whose streams disagree about the number of micro-batches.
    """

    def read(step: int) -> list[dict[str, Batch]]:
        parts = {role: stream(step) for role, stream in streams.items()}
        sizes = {role: len(batches) for role, batches in parts.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(
                "roles must be cut into equally many micro-batches, not "
                + ", ".join(f"{n} of '{role}'" for role, n in sizes.items())
                + "; give them batch and micro sizes of one ratio"
            )
        count = next(iter(sizes.values()), 0)
        return [{role: batches[i] for role, batches in parts.items()} for i in range(count)]

    return read
