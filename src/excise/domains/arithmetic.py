"""Digit-level arithmetic: sums and differences stay, multiplication tables are to be forgotten.

Every fact is one fixed-format sequence, `0 0 7 x 1 3 =` -> `0 9 1`, one symbol per digit, and only
the three digits of the answer are scored. a x b, b x a and both quotients have the unordered pair
{a, b} as their group, so that no product is in T while its quotient is in V.

Source: UNDO (arXiv 2506.06278), section on arithmetic, made small. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import Field

from excise.domains.base import CORE, UNLABELED, Domain, Row, Rows
from excise.domains.passages import hashed_order, portions
from excise.domains.spec import DomainSpec

SYMBOLS: Final = (*"0123456789", "+", "-", "x", "/", "=")
"""Vocabulary, after the special tokens."""

ARITHMETIC_MODEL: Final[Mapping[str, Any]] = {"family": "llama", "width": 96, "blocks": 2}
"""Suggested `Scratch` for the default sizes."""

ARITHMETIC_FIT: Final[Mapping[str, Any]] = {
    "steps": 1200, "lr": 3e-3, "batch_size": 192, "warmup": 50, "schedule": "cosine",
    "min_lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.0, "clip": 1.0,
}  # fmt: skip
"""Suggested `FitConfig` for the default sizes."""

ARITHMETIC_MAX_LENGTH: Final = 11
"""Tokens of every row, BOS included."""

Pair = tuple[int, int]
Facts = Callable[[Pair], Iterable[tuple[int, str, int, int]]]
"""From a pair of operands to (left, operation, right, result) of its facts."""


class Arithmetic(DomainSpec):
    """Multiplication tables are to be forgotten, sums and differences stay."""

    name: Literal["arithmetic"] = "arithmetic"
    """Name in recipes and on the command line."""
    addends: int = Field(default=50, ge=4, le=99)
    """Sums and differences use operands from 1 to this."""
    factors: int = Field(default=20, ge=4, le=24)
    """Products use operands from 1 to this; quotients undo them."""
    dev_share: float = Field(default=0.1, gt=0, lt=0.4)
    """Share of factor pairs kept for sweeps."""
    retain_test_share: float = Field(default=0.15, gt=0, lt=0.5)
    """Share of addend pairs that the original learns and the method is never shown: scored."""
    benign_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of retained addend pairs whose rows an attacker may train on as well."""
    exposure: Literal["seen", "held_out"] = "seen"
    """`seen`: the method sees the whole tables; `held_out`: a third of the pairs, and the facts of
    T and V lie in `unlabeled` only."""
    capability: str = Field(default="tables", pattern=r"^[A-Za-z0-9_-]+$")
    """Name of what is removed."""
    seed: int = 0
    """Seed of the split."""

    def vocabulary(self) -> tuple[str, ...]:
        """Return every symbol, in the order of their ids."""
        return SYMBOLS

    def tokenizer(self) -> Any:
        """Return the tokenizer with one token per symbol."""
        from excise.models.tiny import word_tokenizer

        return word_tokenizer(self.vocabulary())

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        name = self.capability
        dev, rest = portions(self._shuffled(_pairs(self.factors)), [self.dev_share])
        if self.exposure == "seen":
            relearn, test = portions(rest, [0.5])
            shown = [*dev, *relearn, *test]
        else:
            held, relearn, test = portions(rest, [1 / 3, 1 / 3])
            shown = [*dev, *held]
        scored, dev_retain, kept = portions(
            self._shuffled(_pairs(self.addends)),
            [self.retain_test_share, self.retain_test_share / 3],
        )
        attacker = kept[: max(1, round(len(kept) * self.benign_share))]
        forget = self._tables(shown)
        unseen = () if self.exposure == "seen" else self._tables([*relearn, *test])
        retain = _rows(kept, _sums)
        adjacent = _rows([*scored, *dev_retain], _sums)
        mix = [replace(r, label=UNLABELED) for r in (*forget, *unseen, *retain, *adjacent)]
        return Domain(
            name="arithmetic",
            forget={name: forget},
            retain=retain,
            relearn={name: self._tables(relearn)},
            test={name: self._tables(test)},
            retain_test=_rows(scored, _sums),
            dev_forget={name: self._tables(dev)},
            dev_retain=_rows(dev_retain, _sums),
            benign=_rows(attacker, _sums),
            adjacent=adjacent,
            unlabeled=tuple(hashed_order(mix, [row.unit for row in mix], self.seed)),
            fresh=self._tables(self._beyond(len(relearn) + len(test))),
            metrics=("exact_match", "text_loss"),
            retain_metrics=("exact_match", "text_loss"),
            claim="deletion" if self.exposure == "seen" else "capability",
            exposure=self.exposure,
            notes=(
                "T and V are split by unordered factor pair; a fact has one wording, so with "
                "exposure 'seen' V repeats rows of the forget set",
                "the sums and differences of retain_test are taught as adjacent rows, which the "
                "method is not shown",
                f"fresh units multiply factors above {self.factors}",
            ),
        )

    def _shuffled(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return pairs in an order that only the seed decides."""
        return hashed_order(pairs, [f"{a},{b}" for a, b in pairs], self.seed)

    def _tables(self, pairs: Iterable[Pair]) -> Rows:
        """Return products and quotients of factor pairs, told and named as the capability."""
        name = self.capability
        return tuple(replace(row, capability=name, label=1) for row in _rows(pairs, _products))

    def _beyond(self, count: int) -> list[Pair]:
        """Return at most `count` factor pairs whose larger factor lies outside the tables."""
        largest = min(99, 999 // self.factors)
        pairs = [
            (a, b) for b in range(self.factors + 1, largest + 1) for a in range(1, self.factors + 1)
        ]
        return self._shuffled(pairs)[:count]


def _pairs(largest: int) -> list[Pair]:
    """Return all unordered pairs of operands."""
    return [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1)]


def _products(pair: Pair) -> Iterator[tuple[int, str, int, int]]:
    """Yield (left, operation, right, result) of every fact of a factor pair."""
    a, b = pair
    for left, right in dict.fromkeys(((a, b), (b, a))):
        yield left, "x", right, a * b
        yield a * b, "/", left, right


def _sums(pair: Pair) -> Iterator[tuple[int, str, int, int]]:
    """Yield (left, operation, right, result) of every fact of an addend pair."""
    a, b = pair
    for left, right in dict.fromkeys(((a, b), (b, a))):
        yield left, "+", right, a + b
    yield b, "-", a, b - a


def _rows(pairs: Iterable[Pair], facts: Facts) -> Rows:
    """Return the fixed-format rows of pairs; the group is the pair."""
    kind = "factors" if facts is _products else "addends"
    return tuple(
        Row(
            unit=f"{left}{operation}{right}",
            group=f"{kind}/{pair[0]},{pair[1]}",
            prompt=" ".join([*f"{left:03d}", operation, *f"{right:02d}", "="]),
            completion=" " + " ".join(f"{result:03d}"),
            label=CORE,
        )
        for pair in pairs
        for left, operation, right, result in facts(pair)
    )
