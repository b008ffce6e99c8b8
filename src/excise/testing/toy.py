"""A domain of random words and tiny random models: enough to run a method, nothing to learn."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import BYTE_VOCAB, tiny_model, train_bpe

WORDS = tuple(f"w{i}" for i in range(40))
"""Words of the toy domain."""


def _sentences(prefix: str, count: int, *, capability: str = "") -> Rows:
    """Return rows of four to nine random words, every third one split into prompt and answer."""
    generator = random.Random(prefix)
    rows = []
    for i in range(count):
        words = generator.choices(WORDS, k=generator.randint(4, 9))
        cut = len(words) // 2 if i % 3 == 0 else 0
        rows.append(
            Row(
                unit=f"{prefix}{i}",
                text="" if cut else " ".join(words),
                prompt=" ".join(words[:cut]),
                completion=" " + " ".join(words[cut:]) if cut else "",
                capability=capability,
                label=1 if capability else CORE,
            )
        )
    return tuple(rows)


def toy_domain() -> Domain:
    """Return a domain with one capability, every role filled, rows of different lengths."""
    forget = _sentences("f", 12, capability="toy")
    retain, adjacent = _sentences("r", 16), _sentences("a", 4)
    return Domain(
        name="toy",
        forget={"toy": forget},
        retain=retain,
        relearn={"toy": _sentences("t", 4, capability="toy")},
        test={"toy": _sentences("v", 4, capability="toy")},
        retain_test=_sentences("q", 4),
        dev_forget={"toy": _sentences("x", 4, capability="toy")},
        dev_retain=_sentences("y", 4),
        benign=_sentences("b", 4),
        adjacent=adjacent,
        adjacent_test=_sentences("z", 4),
        unlabeled=tuple(replace(r, label=UNLABELED) for r in (*forget, *retain, *adjacent)),
        fresh=_sentences("n", 8, capability="toy"),
    )


def toy_start(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Checkpoint:
    """Write a random model of three blocks and width 32 with a tokenizer of byte pairs.

    Args:
        folder: Where; it must be free.
        family: One of `excise.models.tiny.FAMILIES`.
        dtype: Dtype it is stored in.
        **overrides: Fields of the family's own configuration.

    Returns:
        The checkpoint.
    """
    # Byte pairs and not words: transformers gives some families a tokenizer class of their own,
    # which reads only those.
    tokenizer = train_bpe([" ".join(("", *WORDS))], BYTE_VOCAB + 2 * len(WORDS))
    model = tiny_model(family, seed=3, vocab=len(tokenizer), width=32, blocks=3, **overrides)
    return save_model(model.to(dtype), tokenizer, folder)
