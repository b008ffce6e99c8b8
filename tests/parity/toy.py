"""A domain of made-up sentences and a tiny model, for tests that compare methods with plain loops.

Shape legend: B rows, T tokens, V vocabulary, D residual width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import tiny_model, word_tokenizer

WORDS = [f"w{i}" for i in range(40)]


def sentences(prefix: str, count: int, *, capability: str = "", seed: int = 0) -> Rows:
    """Return rows of random words, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        ids = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        rows.append(
            Row(
                unit=f"{prefix}{i}",
                text=" ".join(WORDS[j] for j in ids),
                capability=capability,
                label=1 if capability else 0,
            )
        )
    return tuple(rows)


def toy_domain() -> Domain:
    """Return a domain with one capability."""
    return Domain(
        name="toy",
        forget={"a": sentences("f", 12, capability="a", seed=1)},
        retain=sentences("r", 16, seed=2),
        relearn={"a": sentences("t", 4, capability="a", seed=3)},
        test={"a": sentences("v", 4, capability="a", seed=4)},
        retain_test=sentences("q", 4, seed=5),
        dev_forget={"a": sentences("df", 4, capability="a", seed=6)},
        dev_retain=sentences("dr", 4, seed=7),
        benign=sentences("b", 4, seed=8),
    )


def toy_checkpoint(folder: Path, family: str = "llama", **overrides: Any) -> Checkpoint:
    """Write a tiny random model with a word tokenizer and return it."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model(family, seed=3, vocab=len(tokenizer), width=32, blocks=3, **overrides)
    return save_model(model, tokenizer, folder / f"{family}-start")


def context(folder: Path, seed: int = 0) -> Context:
    """Return a context that works in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Context(work=folder, seed=seed)


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by parameter name."""
    return {n: p.detach().clone() for n, p in checkpoint.load().named_parameters()}
