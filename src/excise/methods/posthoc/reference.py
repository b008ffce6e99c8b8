"""What the model before the edit says of rows, computed once: no second model stays in memory.

`reference_of` keeps one number a sequence, `frozen_states` the last hidden states.

    for each different sequence (token ids, scored positions) of the rows
        s0 <- sum over scored t of -log p(y_t), adapter-free, before anything is trained

Sequences are found by a hash of ids and scored positions, so that neither their order, nor padding,
nor how they are put into batches matters. The file says which model, tokenizer, dtype and
sequences it was computed on; one that was kept is refused where any of them differs.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from excise.core.context import Context, Stage
from excise.core.disk import write_text
from excise.core.errors import UserError
from excise.data.stream import Batch, Example, Stream, collate
from excise.losses import sequence_nll
from excise.methods.base import Cost
from excise.methods.distillation.cache_kinds import HiddenStates
from excise.methods.distillation.teacher_cache import TeacherCache, build_cache
from excise.methods.tuning import examples_read, logits_of
from excise.models.checkpoint import Checkpoint
from excise.train.distributed import barrier, gather

FILE = "reference.json"
"""Name of the file in its stage's folder and in that of the method."""
BATCH_TOKENS = 4096
"""Tokens the model reads at once."""


def sequence_hash(ids: Iterable[int], target: Iterable[bool]) -> str:
    """Return the hash that a sequence is found by."""
    text = ",".join(f"{i}*" if scored else f"{i}" for i, scored in zip(ids, target, strict=True))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sequences_of(examples: Iterable[Example]) -> dict[str, Example]:
    """Return each different sequence by its hash."""
    return {sequence_hash(e.ids, e.target): e for e in examples}


def data_fingerprint(examples: Iterable[Example]) -> str:
    """Return the SHA-256 over the different sequences, whatever their order."""
    return hashlib.sha256("".join(sorted(sequences_of(examples))).encode()).hexdigest()


@dataclass(frozen=True)
class Reference:
    """What sequences cost the model before the edit.

    Attributes:
        nll: Nats by hash of the sequence.
        cost: What computing them took; nothing where they were read from a kept file.
    """

    nll: Mapping[str, float]
    cost: Cost = field(default_factory=Cost)

    def __call__(self, batch: Batch) -> Float[Tensor, " B"]:
        """Return s0 of each row of a batch, on its device."""
        ids_BT, seen_BT, target_BT = (
            x.cpu() for x in (batch.ids_BT, batch.attention_BT, batch.target_BT)
        )
        values = [
            self.nll[sequence_hash(ids_T[seen_T].tolist(), target_T[seen_T].tolist())]
            for ids_T, seen_T, target_T in zip(ids_BT, seen_BT, target_BT, strict=True)
        ]
        return torch.tensor(values, device=batch.ids_BT.device)

    @property
    def facts(self) -> dict[str, Any]:
        """What the record says of it, with the file that may be kept."""
        return {"reference_sequences": len(self.nll), "files": {"reference": FILE}}


@dataclass(frozen=True)
class ComputeReference(Stage[Path]):
    """The costs of sequences under a model that nothing has been trained on.

    Attributes:
        model: The model, loaded without an adapter and let go of again.
        examples: Encoded rows (`excise.data.stream.encode`), in any order.
    """

    data_parallel: ClassVar[bool] = True

    model: Checkpoint
    examples: tuple[Example, ...] = field(metadata={"identity": data_fingerprint})

    @property
    def name(self) -> str:
        """What a reader of the store sees."""
        return "reference"

    @torch.no_grad()
    def make(self, ctx: Context) -> None:
        """Read every sequence once, each process its share, the longest first.

        Raises:
            UserError: If the model gives no number for one.
        """
        model: Any = self.model.load(dtype=ctx.dtype, device=ctx.device)
        todo = sorted(sequences_of(self.examples).items(), key=lambda x: (-len(x[1].ids), x[0]))
        mine = todo[ctx.rank :: ctx.world]
        nll: dict[str, float] = {}
        while len(nll) < len(mine):
            size = max(1, BATCH_TOKENS // len(mine[len(nll)][1].ids))
            part = mine[len(nll) : len(nll) + size]
            batch = collate([example for _, example in part], pad_id=0).to(ctx.device)
            values = sequence_nll(logits_of(model, batch), batch)[0].tolist()
            for (name, example), value in zip(part, values, strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"model {self.model.path} gives NaN or infinity for unit "
                        f"'{example.unit}', so that it cannot be a reference; run it in float32"
                    )
                nll[name] = value
            facts = {"stage": self.name, "step": len(nll), "steps": len(mine)}
            ctx.emit("step", facts)
        whole = {name: value for share in gather(nll, ctx) for name, value in share.items()}
        if ctx.rank == 0:
            data = {**_made_of(self.model, self.examples, ctx), "nll": whole}
            write_text(ctx.work / FILE, json.dumps(data))
        barrier(ctx)

    def read(self, folder: Path) -> Path:
        """Return the file."""
        return folder / FILE


def reference_of(
    start: Checkpoint, examples: Sequence[Example], ctx: Context, *, kept: str = ""
) -> Reference:
    """Return what sequences cost a model, computed once for all who ask the same.

    Args:
        start: The model before the edit.
        examples: Encoded rows.
        ctx: Runs the stage; its folder gets the file.
        kept: A file of an earlier run in place of computing it.

    Raises:
        UserError: If a kept file is none, or of another model, tokenizer, dtype or other rows.
    """
    began = time.monotonic()
    file = Path(kept) if kept else ctx.run(ComputeReference(start, tuple(examples)))
    nll = _read(file, _made_of(start, examples, ctx))
    if ctx.rank == 0:
        shutil.copyfile(file, ctx.work / FILE)
    if kept:
        return Reference(nll)
    tokens = sum(len(e.ids) for e in sequences_of(examples).values())
    return Reference(nll, _read_once(start, tokens, began))


def frozen_states(
    start: Checkpoint, stream: Stream, steps: int, ctx: Context
) -> tuple[TeacherCache, Cost]:
    """Return a model's last hidden states and head for what a stream gives, and what they took.

    Args:
        start: The model before the edit.
        stream: A stream over one role.
        steps: Steps in which it is read.
        ctx: Runs the stage.
    """
    began = time.monotonic()
    cache = build_cache(start, examples_read(stream, steps), HiddenStates(), ctx)
    tokens = sum(doc.length for doc in cache.docs.values())
    return cache, _read_once(start, tokens, began)


def _read_once(model: Checkpoint, tokens: int, began: float) -> Cost:
    """Return the cost of reading tokens without gradients."""
    flops = 2.0 * model.num_parameters * tokens
    return Cost(tokens=tokens, flops=flops, seconds=time.monotonic() - began)


def _made_of(model: Checkpoint, examples: Iterable[Example], ctx: Context) -> dict[str, str]:
    """Return what decides the numbers of a reference."""
    return {
        "tokenizer": model.tokenizer_fingerprint,
        "model": model.fingerprint,
        "dtype": str(ctx.dtype),
        "forget set": data_fingerprint(examples),
    }


def _read(file: Path, wanted: Mapping[str, str]) -> dict[str, float]:
    """Return the numbers of a file that was computed on what is wanted."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        stale = [what for what, value in wanted.items() if data[what] != value]
        nll: dict[str, float] = data["nll"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"reference: {file} is no file of log-likelihoods; leave 'reference' out to compute it"
        ) from None
    if stale:
        raise UserError(
            f"reference: {file} was computed on another {' and another '.join(stale)}; leave "
            "'reference' out to compute it again"
        )
    return nll
