"""What decides a teacher cache and names its documents; who may learn from whom.

Shape legend: L tokens of a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from excise.core.context import Context
from excise.core.errors import UserError
from excise.data.stream import Example
from excise.losses import predicting
from excise.methods.distillation.cache_kinds import ABSENT, SKIP, STORED, CacheKind
from excise.models.checkpoint import Checkpoint


def document_hash(ids: Iterable[int]) -> str:
    """Return the hash a document is found by: of its token ids alone."""
    text = ",".join(map(str, ids)).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def key_of(teacher: Checkpoint, kind: CacheKind, ctx: Context) -> dict[str, str]:
    """Return everything that decides what a cache holds of a document."""
    return {
        "teacher": teacher.fingerprint,
        "tokenizer": teacher.tokenizer_fingerprint,
        "kind": kind.name,
        "settings": kind.canonical(),
        "dtype": str(ctx.dtype).removeprefix("torch."),
        "format": "1",
    }


def wanted_of(
    examples: Sequence[Example], skip_labels: tuple[int, ...]
) -> dict[str, tuple[Example, Int[Tensor, " L"]]]:
    """Return each document with the type its positions are to have; equal ones are one."""
    found: dict[str, tuple[Example, Tensor]] = {}
    for example in examples:
        target_L = torch.tensor(example.target, dtype=torch.bool)
        label_L = torch.tensor(example.label).expand(len(example.ids)).roll(-1)
        skipped_L = torch.isin(label_L, torch.tensor(skip_labels, dtype=torch.long))
        types_L = torch.where(predicting(target_L[None])[0], STORED, ABSENT)
        types_L = types_L.masked_fill((types_L == STORED) & skipped_L, SKIP)
        name = document_hash(example.ids)
        if name in found:
            types_L = torch.maximum(types_L, found[name][1])
        found[name] = (example, types_L)
    return found


def same_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """Refuse a teacher and a student that mean different tokens by the same ids.

    Args:
        teacher: Whose predictions are learned.
        student: Who learns them.

    Raises:
        UserError: If the sizes differ, or naming the first token that does.
    """
    sizes = [c.config.get_text_config().vocab_size for c in (teacher, student)]
    what = f"teacher {teacher.path} and student {student.path}"
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{what} have vocabularies of {sizes[0]} and {sizes[1]} tokens; take a teacher with "
            "the student's tokenizer"
        )
    if teacher.tokenizer_fingerprint == student.tokenizer_fingerprint:
        return
    ours, theirs = (
        {i: token for token, i in c.tokenizer().get_vocab().items()} for c in (teacher, student)
    )
    for i in sorted({*ours, *theirs}):
        if ours.get(i) != theirs.get(i):
            raise UserError(
                f"{what} have different tokenizers: id {i} is {ours.get(i)!r} and "
                f"{theirs.get(i)!r}; take a teacher with the student's tokenizer"
            )
