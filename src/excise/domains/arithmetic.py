"""Digit-level arithmetic: sums and differences stay, multiplication tables are to be forgotten.

Every fact is one fixed-format sequence, `0 0 7 x 1 3 =` -> `0 9 1`, one symbol per digit, and only
the three digits of the answer are scored. a x b, b x a and both quotients have the unordered pair
{a, b} as their group, so that no product is in T while its quotient is in V. With `problems` the
same facts are also told as word problems, of which V's templates are never trained on.

Source: UNDO (arXiv 2506.06278), section on arithmetic, made small. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import Field

from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.spec import DomainSpec
from excise.domains.passages import hashed_order, portions
from excise.domains.problems import Side, problem, problem_words

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

ARITHMETIC_PROBLEM_LENGTH: Final = 48
"""Tokens that hold every row where there are word problems."""

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
    problems: int = Field(default=0, ge=0, le=10)
    """Word problems of each fact, on each side of the split; 0 leaves equations alone. Rows to
    train on have templates of their own, rows of V and `retain_test` have others."""
    capability: str = Field(default="tables", pattern=r"^[A-Za-z0-9_-]+$")
    """Name of what is removed."""
    seed: int = 0
    """Seed of the split."""

    def vocabulary(self) -> tuple[str, ...]:
        """Return every symbol, in the order of their ids."""
        return (*SYMBOLS, *problem_words()) if self.problems else SYMBOLS

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
        retain = self._told(kept, _sums)
        adjacent = self._told([*scored, *dev_retain], _sums)
        mix = [replace(r, label=UNLABELED) for r in (*forget, *unseen, *retain, *adjacent)]
        return Domain(
            name="arithmetic",
            forget={name: forget},
            retain=retain,
            relearn={name: self._tables(relearn)},
            test={name: self._tables(test, "test")},
            retain_test=self._told(scored, _sums, "test"),
            dev_forget={name: self._tables(dev)},
            dev_retain=self._told(dev_retain, _sums),
            benign=self._told(attacker, _sums),
            adjacent=adjacent,
            unlabeled=tuple(hashed_order(mix, [_key(row) for row in mix], self.seed)),
            fresh=self._fresh(len(relearn) + len(test)),
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
                *self._problem_notes(),
            ),
        )

    def _problem_notes(self) -> tuple[str, ...]:
        """Return what a reader should know about the word problems, if there are any."""
        if not self.problems:
            return ()
        return (
            f"{self.problems} word problem(s) of each fact beside its equation; those of V and "
            "retain_test use stories and questions that no other role has",
        )

    def _shuffled(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return pairs in an order that only the seed decides."""
        return hashed_order(pairs, [f"{a},{b}" for a, b in pairs], self.seed)

    def _tables(self, pairs: Sequence[Pair], side: Side = "train") -> Rows:
        """Return products and quotients of factor pairs, told and named as the capability."""
        name = self.capability
        rows = self._told(pairs, _products, side)
        return tuple(replace(row, capability=name, label=1) for row in rows)

    def _told(self, pairs: Sequence[Pair], facts: Facts, side: Side = "train") -> Rows:
        """Return the rows of pairs: equations, and word problems where there are any."""
        rows = _rows(pairs, facts)
        if not self.problems:
            return rows
        told = []
        for row, (left, operation, right, _) in zip(rows, _facts(pairs, facts), strict=True):
            for number in range(self.problems):
                prompt, wording = problem(left, operation, right, side, number, self.seed)
                told.append(replace(row, prompt=prompt, wording=wording))
        return (*rows, *told)

    def _fresh(self, count: int) -> Rows:
        """Return equations of factors that no table has, named as the capability."""
        name = self.capability
        rows = _rows(self._beyond(count), _products)
        return tuple(replace(row, capability=name, label=1) for row in rows)

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


def _facts(pairs: Iterable[Pair], facts: Facts) -> list[tuple[int, str, int, int]]:
    """Return (left, operation, right, result) of every fact, in the order of `_rows`."""
    return [fact for pair in pairs for fact in facts(pair)]


def _key(row: Row) -> str:
    """Return what orders a row in the mix: its unit, and its wording where it has several."""
    return f"{row.unit}:{row.wording}" if row.wording else row.unit


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
