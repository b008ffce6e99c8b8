"""Pairs of real texts from far apart to alike, and how far apart they are by their words.

What ships: verses in two languages, two novels, definitions by topic. What every Python brings:
docstrings. What is fetched: security texts and gene functions. General text beside them are public
addresses. This module imports no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from pydantic import Field

from excise.core.config import Config
from excise.core.errors import UserError
from excise.data.domain import CORE, Domain, Row, Rows, Span
from excise.data.split import hashed_order
from excise.domains.biology import read_functions
from excise.domains.corpus import Document
from excise.domains.cyber import Cyber
from excise.domains.glosses import Topic, load_glosses
from excise.domains.languages import shipped_verses
from excise.domains.prose import ProsePart, documents, load_prose, passages
from excise.domains.pydocs import stdlib_docstrings
from excise.fetch import require
from excise.models.tiny import train_bpe

Both = tuple[list[Document], list[Document]]
"""Documents of the domain that is routed away, and of the one beside it."""

_DISEASE: Final = re.compile(
    r"\b(virus|viral|viruses|bacteri\w*|infect\w*|microb\w*|pathogen\w*)\b"
)
NOVELS: Final = ("pride-and-prejudice", "persuasion")
"""Shipped novels, both by one author; the rest of the prose are addresses."""

_LIVING: Final[tuple[Topic, ...]] = ("animal", "body", "plant", "state", "substance")


class Sizes(Config):
    """How much text a pair has."""

    units: int = Field(default=600, ge=20)
    """Passages of either domain at most; a fifth of them is scored."""
    prose: int = Field(default=600, ge=20)
    """Passages of general text beside them."""
    words: int = Field(default=30, ge=10, le=500)
    """Words per passage, about."""


def _topic(name: Topic) -> list[Document]:
    return [
        Document(f"{name}/{g.number}", f"{g.term[:1].upper()}{g.term[1:]}: {g.gloss}.")
        for g in load_glosses()
        if g.topic == name
    ]


def _novels(*names: str) -> list[Document]:
    """Return the chapters of shipped novels."""
    return [Document(key, text) for key, text in documents() if key.split("/")[0] in names]


def _verses(column: int) -> list[Document]:
    return [Document(f"{column}/{verse[0]}", verse[column]) for verse in shipped_verses()]


def _docstrings() -> list[Document]:
    return [Document(key, text) for key, text in stdlib_docstrings()]


def _infectious() -> Both:
    """Return definitions that speak of infections, and the others of living things."""
    living = [d for topic in _LIVING for d in _topic(topic)]
    chosen = [d for d in living if _DISEASE.search(d.text.lower())]
    taken = {d.key for d in chosen}
    return chosen, [d for d in living if d.key not in taken]


def _halves() -> Both:
    """Return two halves of one topic, drawn by hash: nothing tells them apart."""
    documents = _topic("animal")
    every = hashed_order(documents, [d.key for d in documents])
    return every[::2], every[1::2]


def _virus_functions() -> Both:
    """Return gene functions that name viruses, and all others (fetched)."""
    functions = read_functions(require("biology") / "go.sqlite")
    chosen = [d for d in functions if "virus" in d.text.lower() or "viral" in d.text.lower()]
    groups = {d.group for d in chosen}
    return chosen, [d for d in functions if d.group not in groups]


def _security() -> Both:
    """Return security texts, and docstrings (fetched)."""
    domain = Cyber().build(None)
    rows = [row for rows in (*domain.forget.values(), *domain.relearn.values()) for row in rows]
    texts = {row.unit: "" for row in rows}
    for row in rows:
        texts[row.unit] += f" {row.text}"
    return [Document(key, text) for key, text in texts.items()], _docstrings()


PAIRS: Final[Mapping[str, Callable[[], Both]]] = {
    "Spanish / English": lambda: (_verses(2), _verses(1)),
    "software / fiction": lambda: (_docstrings(), _novels(*NOVELS)),
    "biology / fiction": lambda: (_topic("animal"), _novels(*NOVELS)),
    "animals / artefacts": lambda: (_topic("animal"), _topic("artifact")),
    "animals / plants": lambda: (_topic("animal"), _topic("plant")),
    "one novel / another": lambda: (_novels(NOVELS[0]), _novels(NOVELS[1])),
    "infections / living things": _infectious,
    "one topic, halves": _halves,
}
"""Shipped pairs, the domain that is routed away first."""

FETCHED: Final[Mapping[str, Callable[[], Both]]] = {
    "security / software": _security,
    "virus functions / other functions": _virus_functions,
}
"""Pairs that need `excise fetch cyber` and `excise fetch biology`."""


@dataclass(frozen=True)
class DomainPair:
    """A pair of domains at one seed.

    Attributes:
        domain: `forget` and `test` are the domain that is routed away, `adjacent` the one beside
            it, `retain` general text.
        nats: Held-out divergence of the two, nats per word.
        accuracy: Held-out balanced accuracy of naive Bayes between the two.
    """

    domain: Domain
    nats: float
    accuracy: float


def make_pair(name: str, sizes: Sizes, seed: int, *, together: bool = False) -> DomainPair:
    """Build a pair at one seed.

    Args:
        name: One of `PAIRS` or `FETCHED`.
        sizes: How much text.
        seed: Which documents are used, and which of them are scored.
        together: Whether passages of the two that are trained on stand in one text, that of the
            domain that is routed away as a span.

    Raises:
        UserError: If a domain has too few passages.
    """
    sides = ({**PAIRS, **FETCHED})[name]()
    rows: list[Rows] = []
    for side, side_documents in zip(("forget", "beside"), sides, strict=True):
        rows.append(_passages(side_documents, sizes, seed))
        if len(rows[-1]) < 20:
            raise UserError(
                f"pair '{name}': {len(rows[-1])} passages of '{side}', too few to score; lower "
                "'sizes.words' or choose another pair"
            )
    size = min(len(r) for r in rows)
    away = tuple(replace(row, capability="away", label=1) for row in rows[0][:size])
    beside = rows[1][:size]
    general = _addresses("retain", sizes.words)[: sizes.prose]
    away_split, beside_split = _cut(away), _cut(beside)
    scored = _addresses("test", sizes.words)[: max(4, sizes.prose // 5)]
    domain = Domain(
        name="pair",
        forget={"away": away_split[1]},
        retain=general,
        relearn={"away": away_split[0]},
        test={"away": away_split[0]},
        retain_test=scored,
        dev_forget={"away": away_split[0]},
        dev_retain=scored,
        benign=general,
        adjacent=beside_split[1],
        adjacent_test=beside_split[0],
        metrics=("text_loss",),
        retain_metrics=("text_loss",),
        notes=(
            f"{name}: {size} passages of either; adjacent is the domain beside the one cut off",
        ),
    )
    if together:
        mixed, alone = _side_by_side(away_split[1], beside_split[1])
        domain = replace(domain, forget={"away": mixed}, adjacent=alone)
    model = _Words(away_split[1], beside_split[1])
    return DomainPair(domain, *model.apart(away_split[0], beside_split[0]))


def pair_tokenizer(pair: DomainPair, vocabulary: int) -> Any:
    """Return a byte-level BPE of what is read in training."""
    domain = pair.domain
    rows = (*domain.forget["away"], *domain.adjacent, *domain.retain)
    return train_bpe([row.text for row in rows], vocabulary)


def pair_groups(pair: DomainPair) -> dict[str, str]:
    """Return the document of every scored unit of a pair."""
    domain = pair.domain
    sets = (*domain.test.values(), domain.retain_test, domain.adjacent_test)
    return {row.unit: row.group for rows in sets for row in rows if row.group}


@cache
def _addresses(part: ProsePart, words: int) -> Rows:
    """Return passages of the shipped public addresses, which no pair is made of."""
    every = load_prose(part, words=words)
    return tuple(row for row in every if row.group.split("/")[1] not in NOVELS)


def _cut(rows: Rows) -> tuple[Rows, Rows]:
    """Return the scored fifth, and the rest; rows of one document stay together."""
    groups = list(dict.fromkeys(row.group for row in rows))
    few = set(groups[: max(2, len(groups) // 5)])
    scored = tuple(row for row in rows if row.group in few)
    return scored[: max(4, len(rows) // 5)], tuple(row for row in rows if row.group not in few)


def _side_by_side(away: Rows, beside: Rows) -> tuple[Rows, Rows]:
    """Return texts of a passage of each side, by turns the first, and passages left over.

    Those of the side that is routed away stay alone where the other has too few.
    """
    texts = list(away)
    for i, (a, b) in enumerate(zip(away, beside, strict=False)):
        before = "" if i % 2 else f"{b.text} "
        after = f" {b.text}" if i % 2 else ""
        span = Span(len(before), len(before) + len(a.text), a.capability, a.label)
        texts[i] = replace(a, text=f"{before}{a.text}{after}", spans=(span,))
    return tuple(texts), beside[len(away) :]


def _passages(documents: Sequence[Document], sizes: Sizes, seed: int) -> Rows:
    """Return passages of documents in hashed order, no more than fit."""
    rows: list[Row] = []
    each = max(1, 3 * sizes.units // max(1, len(documents)))
    for document in hashed_order(documents, [d.key for d in documents], seed):
        if len(rows) >= sizes.units:
            break
        # Every document gives a few passages only, so that no long one is the whole domain.
        every = list(passages(document.text, sizes.words))
        texts = hashed_order(every, every, seed)[:each]
        rows += [
            Row(unit=f"{document.key}#{i}", group=document.key, text=text, label=CORE)
            for i, text in enumerate(texts)
            if len(text.split()) > 3
        ]
    return tuple(rows[: sizes.units])


class _Words:
    """Two bags of words, smoothed: the whole measure of separability."""

    def __init__(self, first: Rows, second: Rows) -> None:
        """Count the words of both."""
        self.counts = [
            Counter(w for row in rows for w in words_of(row)) for rows in (first, second)
        ]
        self.size = len(self.counts[0] | self.counts[1]) + 1
        self.totals = [sum(c.values()) for c in self.counts]

    def ratio(self, word: str) -> float:
        """Return the log odds that a word is of the first, in nats."""
        each = [
            math.log((c[word] + 0.5) / (total + 0.5 * self.size))
            for c, total in zip(self.counts, self.totals, strict=True)
        ]
        return each[0] - each[1]

    def apart(self, first: Rows, second: Rows) -> tuple[float, float]:
        """Return held-out divergence in nats per word, and balanced accuracy.

        The divergence is the mean log odds per word of the side the word comes from: the
        symmetric Kullback-Leibler divergence of unigrams as far as held-out words bear it out.

        Args:
            first: Held-out rows of the first side.
            second: Held-out rows of the second.
        """
        nats, right = [], []
        for sign, rows in ((1.0, first), (-1.0, second)):
            sums = [sign * sum(self.ratio(w) for w in words_of(row)) for row in rows]
            count = sum(len(words_of(row)) for row in rows)
            nats.append(sum(sums) / max(1, count))
            right.append(sum(1.0 if s > 0 else 0.5 if s == 0 else 0.0 for s in sums) / len(sums))
        return sum(nats) / 2, sum(right) / 2


def words_of(row: Row) -> list[str]:
    """Return the words of a row, lower case."""
    return re.findall(r"[^\W\d_]+", row.text.lower())
