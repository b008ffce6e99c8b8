"""Which rows of the embedding an edit keyed on names can sit on.

Whoever hides facts by their subjects' names edits the embedding rows of tokens that no text to be
kept contains: those are free to be permuted, shrunk or rotated, and relearning some names says
nothing about the rows of others. The attacker sees the same tokens: he has retain and benign text,
what he trains on, and the questions he asks; of V he reads prompts, never answers. A token that T
holds as well is no such place: relearning T trains its row.

Shape legend: R rows (tokens), K rows that a map was fitted on, D width of the embedding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from excise.data.domain import Domain, Rows, all_rows
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
        trained: Tokens of T's prompts and texts that no kept text holds, in order.
        dev: The same of `dev`'s.
        asked: The same of V's prompts; its texts are what is scored.
        kept: Tokens of retain and benign text.
        rarest: The rarer half of those in benign prompts and texts, where names stand too.
        keyed: Share of the prompts of V, and of `dev`, that hold one of these tokens which T does
            not: the lesser.
    """

    trained: tuple[int, ...]
    dev: tuple[int, ...]
    asked: tuple[int, ...]
    kept: tuple[int, ...]
    rarest: tuple[int, ...]
    keyed: float

    @property
    def names(self) -> tuple[int, ...]:
        """All tokens that an edit can be keyed on."""
        return tuple(sorted({*self.trained, *self.dev, *self.asked}))

    @property
    def guides(self) -> tuple[int, ...]:
        """Tokens of T and `dev` that V does not share."""
        return tuple(sorted({*self.trained, *self.dev}.difference(self.asked)))

    @property
    def exist(self) -> bool:
        """Whether most prompts of V hold a name of their own, and T holds some."""
        return self.keyed >= MOST and bool(self.trained)


def name_rows(domain: Domain, tokenizer: Any, max_length: int) -> NameRows:
    """Find the tokens by which prompts about the capability differ from text that is kept.

    Args:
        domain: Rows by role.
        tokenizer: The model's tokenizer.
        max_length: Tokens per row.
    """

    def prompts(rows: Rows, *, texts: bool = False) -> list[set[int]]:
        return [
            {i for i, t in zip(e.ids, e.target, strict=True) if not t or (texts and row.text)}
            for row, e in zip(rows, encode(rows, tokenizer, max_length=max_length), strict=True)
        ]

    kept: set[int] = set()
    for role in (domain.retain, domain.dev_retain, domain.benign):
        for example in encode(subsample(role, READ, by="row"), tokenizer, max_length=max_length):
            kept.update(example.ids)
    trained, dev, asked = (
        [ids - kept for ids in prompts(all_rows(role), texts=read)]
        for role, read in ((domain.relearn, True), (domain.dev_forget, True), (domain.test, False))
    )
    benign = prompts(subsample(domain.benign, READ, by="row"), texts=True)
    counts = Counter(i for ids in benign for i in ids)
    ordered = sorted(counts, key=lambda i: (counts[i], i))
    seen = set[int]().union(*trained)
    keyed = [
        sum(bool(i - seen) for i in role) / len(role) if role else 0.0 for role in (asked, dev)
    ]
    return NameRows(
        trained=tuple(sorted(seen)),
        dev=tuple(sorted(set().union(*dev))),
        asked=tuple(sorted(set().union(*asked))),
        kept=tuple(sorted(kept)),
        rarest=tuple(sorted(ordered[: (len(ordered) + 1) // 2])),
        keyed=min(keyed),
    )


def words_shared(domain: Domain) -> float | None:
    """Return which share of the words that mark V's prompts stands in T's prompts too.

    Words and not tokens, so that a verdict can say it of any model. An edit keyed on a word that T
    never holds is out of the reach of relearning.

    Args:
        domain: Rows by role.

    Returns:
        None where T is empty, or where too few prompts of V hold a word that retain text does not.
    """

    def words(rows: Rows) -> list[set[str]]:
        return [set(row.prompt.lower().split()) for row in rows]

    asked, shown = (words(all_rows(role)) for role in (domain.test, domain.relearn))
    known = set[str]().union(*words((*domain.retain, *domain.dev_retain, *domain.benign)))
    marks = [words - known for words in asked]
    if not shown or not marks or sum(map(bool, marks)) < MOST * len(marks):
        return None
    names = set[str]().union(*marks)
    return len(names & set[str]().union(*shown)) / len(names)


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


def within(rows_RD: Float[Tensor, "R D"], known_KD: Float[Tensor, "K D"]) -> Float[Tensor, "R D"]:
    """Return rows without what lies outside the span of others.

    A map that was fitted on some rows says nothing about the directions that none of them has: what
    it makes of those is noise. On rows that span all directions this changes nothing.

    Args:
        rows_RD: Rows to keep within.
        known_KD: Rows that span it.
    """
    _, values_K, basis_KD = torch.linalg.svd(known_KD, full_matrices=False)
    basis_KD = basis_KD[values_K > 1e-5 * values_K.amax()]
    kept_RD: Tensor = rows_RD @ basis_KD.T @ basis_KD
    return kept_RD
