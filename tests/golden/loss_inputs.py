"""Model, rows and settings on which the released losses were recorded; see `record_losses.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.core.context import Context
from excise.data.domain import Domain, Row, Rows
from excise.data.stream import Example, encode
from excise.methods import DPO, NPO, UNDIAL, GradDiff, GradientAscent, SimNPO
from excise.methods.tuning import role_streams
from excise.models.checkpoint import Checkpoint
from excise.train.fit import FitConfig
from tests.parity.toy import WORDS, toy_checkpoint

# A larger epsilon than usual: where a gradient is rounding alone, Adam makes a step of it.
FIT = FitConfig(steps=4, lr=1e-3, batch_size=4, eps=1e-4)
PAD = 0
"""Padding id; what lies there decides nothing."""


def _words(count: int, seed: int) -> list[list[str]]:
    """Return lists of random words, of four to eight."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 9, (count,), generator=draw).tolist()
    return [[WORDS[j] for j in torch.randint(0, 40, (n,), generator=draw)] for n in lengths]


def _domain(forget: Rows, retain: Rows) -> Domain:
    """Return a domain of which a method reads nothing but these."""
    one = {"a": forget[:1]}
    return Domain(
        "golden", {"a": forget}, retain, one, one, retain[:1], one, retain[:1], retain[:1]
    )


def answers() -> Domain:
    """Return prompts and answers of different lengths; those to forget are questions."""
    forget = tuple(
        Row(
            f"f{i}", prompt=" ".join(words[:-2]), choices=(words[-1], " ".join(words[-2:])),
            answer=i % 2, capability="a", label=1,
        )
        for i, words in enumerate(_words(12, 1))
    )  # fmt: skip
    retain = tuple(
        Row(f"r{i}", prompt=" ".join(words[:2]), completion=" " + " ".join(words[2:]))
        for i, words in enumerate(_words(16, 2))
    )
    return _domain(forget, retain)


def texts() -> Domain:
    """Return plain texts of seven words, on which no position is masked or padded."""
    rows = [
        tuple(Row(f"{p}{i}", text=" ".join((w * 2)[:7])) for i, w in enumerate(_words(n, seed)))
        for p, n, seed in (("f", 12, 3), ("r", 16, 4))
    ]
    return _domain(tuple(replace(r, capability="a", label=1) for r in rows[0]), rows[1])


@dataclass(frozen=True)
class Case:
    """One method.

    Attributes:
        method: Ours.
        trainer: The released class.
        released: Its attributes.
        plain: Whether the rows are texts of one length.
        cut_retain: Whether the released retain loss is to read one token less.
        as_lists: Whether it takes lists and not mappings.
    """

    method: Any
    trainer: str
    released: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False
    cut_retain: bool = False
    as_lists: bool = False

    @property
    def domain(self) -> Domain:
        """Its rows."""
        return texts() if self.plain else answers()


NLL = {"retain_loss_type": "NLL"}
CASES: Mapping[str, Case] = {
    "gradient_ascent": Case(GradientAscent(fit=FIT), "GradAscent"),
    "grad_diff": Case(
        GradDiff(fit=FIT, alpha=2.0), "GradDiff", {"gamma": 1.0, "alpha": 2.0, **NLL}
    ),
    "grad_diff_kl": Case(
        GradDiff(fit=FIT, alpha=2.0, retain_loss="kl"), "GradDiff",
        {"gamma": 1.0, "alpha": 2.0, "retain_loss_type": "KL"}, plain=True, cut_retain=True,
    ),
    "npo": Case(
        NPO(fit=FIT, beta=0.3, gamma=0.5, alpha=2.0), "NPO",
        {"beta": 0.3, "gamma": 0.5, "alpha": 2.0, **NLL},
    ),
    "npo_batch_mean": Case(
        NPO(fit=FIT, beta=3.0, alpha=2.0, reduction="batch_mean"), "NPO_FT",
        {"beta": 3.0, "gamma": 2.0}, as_lists=True,
    ),
    "simnpo": Case(
        SimNPO(fit=FIT, beta=0.5, gamma=1.0, delta=0.5), "SimNPO",
        {"beta": 0.5, "delta": 0.5, "gamma": 1.0, "alpha": 1.0, **NLL},
    ),
    "dpo": Case(
        DPO(fit=FIT, beta=0.3, alpha=2.0), "DPO",
        {"beta": 0.3, "gamma": 1.0, "alpha": 2.0, **NLL},
    ),
    "undial": Case(
        UNDIAL(fit=FIT, beta=3.0, alpha=0.5), "UNDIAL",
        {"beta": 3.0, "gamma": 1.0, "alpha": 0.5, **NLL}, plain=True,
    ),
}  # fmt: skip
"""What was recorded, by name."""


def start(folder: Path) -> Checkpoint:
    """Write the model that every run starts from."""
    return toy_checkpoint(folder)


def rows_of(case: Case, start: Checkpoint, folder: Path, step: int) -> dict[str, list[Example]]:
    """Return the rows of a step by role, with `preferred` beside `forget` for pairs."""
    tokenizer, ctx, length = start.tokenizer(), Context(folder), case.method.max_length
    domain = case.domain
    streams = role_streams(domain, ("forget", "retain"), tokenizer, FIT, ctx, max_length=length)
    rows = {role: [s.examples[i] for i in s.indices(step)] for role, s in streams.items()}
    if isinstance(case.method, DPO):  # two options, so one pair a question
        other = [replace(row, answer=1 - row.answer) for row in domain.forget["a"]]
        preferred = encode(other, tokenizer, max_length=length)
        rows["preferred"] = [preferred[i] for i in streams["forget"].indices(step)]
    return rows


def checksums(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return how each tensor moved: along a fixed random direction, and how far."""
    found = {}
    for name in sorted(now):
        moved = now[name].detach().double() - before[name].double()
        draw = torch.Generator().manual_seed(len(name))
        direction = torch.randn(moved.shape, generator=draw, dtype=torch.float64)
        values = (float((moved * direction).sum()), float(moved.norm()))
        found[name] = [float(f"{value:.8g}") for value in values]
    return found
