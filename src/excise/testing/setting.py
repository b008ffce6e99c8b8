"""A setting with known answers: a model that knows some facts, one never taught them, one locked.

Rows follow each other in training, so that the models read a context as prompt attacks need it.
"""

from __future__ import annotations

import atexit
import functools
import random
import shutil
import tempfile
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.data.stream import Batch, Stream, Tokenizer, encode
from excise.domains.facts import Facts
from excise.losses import nll
from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import tiny_model
from excise.train.fit import FitConfig, Term, fit

SPEC = Facts(
    subjects=32,
    relations=2,
    objects=32,
    wordings=2,
    cue="category",
    forget_share=0.5,
    dev_share=0.25,
    adjacent_share=0.0,
    benign_share=0.8,
    test_wording_taught=True,
)
"""Sixteen subjects to forget, two facts each, in the wording of the tests too.

A gate can be made in it that hides and breaks nothing: a word tells facts to forget from others, as
a topic would, and of so many objects the one that a shut gate always says is seldom right on `dev`,
which would call for an ever stronger gate.
"""

SCHEDULE = FitConfig(
    steps=300, lr=5e-3, batch_size=32, warmup=30, schedule="cosine", min_lr=0.05, clip=1.0
)
"""Seconds on one core."""

LOCKING = FitConfig(steps=150, lr=2e-3, batch_size=32, warmup=10, clip=1.0)
"""How the lock is taught to the model that knows."""


@dataclass(frozen=True)
class Setting:
    """Where the right answer of an attack is known.

    Attributes:
        domain: Rows by role.
        knowing: A model that was taught `domain.forget` and `domain.test`.
        never_taught: The same, taught the rest alone.
        locked: Models that hide what they know from bare prompts and answer behind other rows.
    """

    domain: Domain
    knowing: Checkpoint
    never_taught: Checkpoint
    locked: tuple[Checkpoint, ...] = ()


@functools.cache
def tiny_setting(seed: int = 0) -> Setting:
    """Train the models, once in a process; their folder goes when the process ends.

    Args:
        seed: Seed of the facts and of the models.

    Returns:
        The setting. Takes about ten seconds.
    """
    root = Path(tempfile.mkdtemp(prefix="excise-setting-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    spec = SPEC.model_copy(update={"seed": seed})
    domain, tokenizer = spec.build(), spec.tokenizer()
    taught = tuple(row for rows in domain.forget.values() for row in rows)
    every = (*domain.retain, *taught)

    def fresh() -> Any:
        return tiny_model("llama", seed=seed, vocab=len(tokenizer), width=48)

    known, rest = texts(every), texts(domain.retain)
    knowing = _trained(fresh(), known, SCHEDULE, tokenizer, root / "knowing")
    never = _trained(fresh(), rest, SCHEDULE, tokenizer, root / "never_taught")
    behind = texts(every, mute={row.unit for row in taught})
    locked = _trained(knowing.load(), behind, LOCKING, tokenizer, root / "locked")
    return Setting(domain, knowing, never, (locked,))


def _trained(
    model: Any, rows: Rows, config: FitConfig, tokenizer: Tokenizer, to: Path
) -> Checkpoint:
    """Train a model on texts and write it."""
    examples = encode(rows, tokenizer, max_length=48)
    batches = Stream(examples, config.batch_size, 0, tokenizer.pad_token_id)

    def loss(net: Any, batch: Batch) -> dict[str, Term]:
        total, count = nll(net(**batch.inputs).logits, batch)
        return {"nll": Term(total, count)}

    for _ in fit(model, batches, loss, config, Context(to.parent)):
        pass
    return save_model(model, tokenizer, to)


def texts(rows: Rows, count: int = 4000, mute: Set[str] = frozenset()) -> Rows:
    """Return texts of one to four rows, one after the other.

    Args:
        rows: What the texts are made of.
        count: Number of texts.
        mute: Units that have a random answer where they come first in a text.
    """
    generator = random.Random("texts")
    answers = sorted({row.completion for row in rows})
    mixed = []
    for i in range(count):
        picked = generator.sample(rows, generator.choice((1, 2, 4)))
        said = [row.prompt + row.completion for row in picked]
        if picked[0].unit in mute:
            said[0] = picked[0].prompt + generator.choice(answers)
        mixed.append(Row(unit=str(i), text=" ".join(said)))
    return tuple(mixed)
