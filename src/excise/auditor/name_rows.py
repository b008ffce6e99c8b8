"""Which rows of the embedding an edit keyed on names can sit on.

Whoever hides facts by their subjects' names edits the embedding rows of tokens that no text to be
kept contains: those are free to be permuted, shrunk or rotated, and relearning some names says
nothing about the rows of others. The attacker sees the same tokens: he has retain and benign text,
what he trains on, and the questions he asks; of V he reads prompts, never answers.

Shape legend: R rows (tokens), D width of the embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.data.domain import Domain, Row
from excise.data.stream import encode
from excise.data.subsample import subsample
from excise.models.anatomy import backbone

READ = 4096
"""Rows of each kept role that are read for tokens at most; a corpus has as good as all by then."""

MOST = 0.75
"""Share of the prompts of V, and of `dev`, that must hold a name for an edit to be keyed on it."""


@dataclass(frozen=True)
class NameRows:
    """Tokens by who may know them; each is the number of a row of the embedding.

    Attributes:
        shown: Tokens of T's and `dev`'s prompts that no kept text holds, in order.
        asked: The same of V's prompts.
        kept: Tokens of retain and benign text.
        rarest: The rarer half of those that stand in benign prompts, where names stand too.
        keyed: Share of the prompts of V, and of `dev`, that hold one of these tokens: the lesser.
    """

    shown: tuple[int, ...]
    asked: tuple[int, ...]
    kept: tuple[int, ...]
    rarest: tuple[int, ...]
    keyed: float

    @property
    def names(self) -> tuple[int, ...]:
        """All tokens that an edit can be keyed on."""
        return tuple(sorted({*self.shown, *self.asked}))

    @property
    def exist(self) -> bool:
        """Whether most prompts of V hold a name, and there are two to tell apart."""
        return self.keyed >= MOST and len(self.names) > 1


def name_rows(domain: Domain, tokenizer: Any, max_length: int) -> NameRows:
    """Find the tokens by which prompts about the capability differ from text that is kept.

    Args:
        domain: Rows by role.
        tokenizer: The model's tokenizer.
        max_length: Tokens per row.
    """

    def prompts(rows: Iterable[Row]) -> list[set[int]]:
        examples = encode(tuple(rows), tokenizer, max_length=max_length)
        return [{i for i, t in zip(e.ids, e.target, strict=True) if not t} for e in examples]

    kept: set[int] = set()
    for role in (domain.retain, domain.dev_retain, domain.benign):
        for example in encode(subsample(role, READ, by="row"), tokenizer, max_length=max_length):
            kept.update(example.ids)
    shown, dev, asked = (
        [ids - kept for ids in prompts(row for rows in role.values() for row in rows)]
        for role in (domain.relearn, domain.dev_forget, domain.test)
    )
    counts = Counter(i for ids in prompts(subsample(domain.benign, READ, by="row")) for i in ids)
    ordered = sorted(counts, key=lambda i: (counts[i], i))
    keyed = [sum(map(bool, role)) / len(role) if role else 0.0 for role in (asked, dev)]
    return NameRows(
        shown=tuple(sorted(set().union(*shown, *dev))),
        asked=tuple(sorted(set().union(*asked))),
        kept=tuple(sorted(kept)),
        rarest=tuple(sorted(ordered[: (len(ordered) + 1) // 2])),
        keyed=min(keyed),
    )


def embedding(model: Any) -> tuple[str, nn.Parameter]:
    """Return the input embedding's name and parameter; a tied head goes with it."""
    name = f"{backbone(model).embed}.weight"
    return name, model.get_parameter(name)


def median_length(rows_RD: Float[Tensor, "R D"]) -> Tensor:
    """Return the median length of rows."""
    median: Tensor = torch.linalg.vector_norm(rows_RD, dim=-1).median()
    return median


def of_length(rows_RD: Float[Tensor, "R D"], length: Tensor) -> Float[Tensor, "R D"]:
    """Return rows brought to one length; a row of zeros stays one."""
    return torch.nn.functional.normalize(rows_RD, dim=-1) * length
