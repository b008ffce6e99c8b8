"""Digit-level arithmetic: sums and differences stay, multiplication tables are to be forgotten.

Every fact is one fixed-format sequence, `0 0 7 x 1 3 =` -> `0 9 1`, one symbol per digit, and only
the three digits of the answer are scored. a x b, b x a and both quotients have the unordered pair
{a, b} as their group, so that no product is in the relearn set while its quotient is in the test
set. With `problems` the same facts also come as word problems, a story and a question each. Every
operation has ten stories and six questions. Rows that are trained on come from the first five
stories and the first four questions (20 templates), rows that are scored from the other five and
two (10 templates): neither a story nor a question is on both sides, but every word of a scored
template is in trained ones of its operation. Names, things and places are chosen by hash.

Source: UNDO (arXiv 2506.06278), section on arithmetic, made small; it has 20 and 10 templates per
operation too, the paraphrases here are our own. This module imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, TypeVar

from pydantic import Field

from excise.core.errors import counted
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.spec import DomainSpec
from excise.data.split import hashed_order, portions
from excise.models.tiny import word_tokenizer

SYMBOLS: Final = (*"0123456789", "+", "-", "x", "/", "=")
"""Vocabulary, after the special tokens."""

ARITHMETIC_FIT: Final[Mapping[str, Any]] = {
    "steps": 1200, "lr": 3e-3, "batch_size": 192, "warmup": 50, "schedule": "cosine",
    "min_lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.0, "clip": 1.0,
}  # fmt: skip
"""Suggested `FitConfig` for the default sizes."""

ARITHMETIC_MAX_LENGTH: Final = 11
"""Tokens of every row, BOS included."""

ARITHMETIC_PROBLEM_LENGTH: Final = 48
"""Tokens that hold every row where there are word problems."""

T = TypeVar("T")
SplitSide = Literal["train", "test"]
Operands = tuple[int, int]
Equations = Callable[[Operands], Iterable[tuple[int, str, int, int]]]
"""From a pair of operands to (left, operation, right, result) of its facts."""

NAMES: Final = ("ana", "ben", "carla", "dan", "eva", "finn", "gita", "hugo")
THINGS: Final = (
    "apples", "beads", "books", "coins", "cups", "eggs", "lemons", "nuts", "pens", "shells",
    "stamps", "stones",
)  # fmt: skip
PLACES: Final = ("garden", "kitchen", "market", "school", "shop", "yard")
HOLDERS: Final = (("bag", "bags"), ("basket", "baskets"), ("box", "boxes"), ("shelf", "shelves"))

STORIES: Final[Mapping[str, tuple[str, ...]]] = {
    "+": (
        "{name} has {a} {things} and finds {b} more in the {place} .",
        "there are {a} {things} in the {place} and {name} brings {b} .",
        "{name} buys {a} {things} today and {b} the next day .",
        "{name} keeps {a} {things} at home and {b} in the {place} .",
        "a {holder} has {a} {things} and {name} puts {b} more into it .",
        "{name} finds {a} {things} at home and {b} more in the {place} .",
        "today {name} buys {a} {things} and the next day {b} more .",
        "there are {a} {things} at home and {name} finds {b} .",
        "{name} puts {a} {things} into a {holder} and brings {b} more .",
        "in the {place} {name} has {a} {things} and buys {b} more .",
    ),
    "-": (
        "{name} has {a} {things} and loses {b} in the {place} .",
        "there are {a} {things} in the {place} and {name} takes {b} away .",
        "{name} buys {a} {things} and gives {b} to a friend .",
        "of {a} {things} in a {holder} {name} sells {b} .",
        "{name} keeps {a} {things} at home and uses {b} .",
        "{name} buys {a} {things} and loses {b} at home .",
        "of {a} {things} in the {place} {name} uses {b} .",
        "there are {a} {things} in a {holder} and {name} gives {b} away .",
        "{name} keeps {a} {things} in the {place} and sells {b} .",
        "at home {name} has {a} {things} and takes {b} to a friend .",
    ),
    "x": (
        "{name} has {a} {holders} with {b} {things} in each .",
        "there are {a} rows of {b} {things} in the {place} .",
        "{name} buys {b} {things} on each of {a} days .",
        "{name} fills {a} {holders} , each with {b} {things} .",
        "{a} children bring {b} {things} each to the {place} .",
        "there are {a} {holders} in the {place} , each with {b} {things} .",
        "{name} has {a} rows of {b} {things} each .",
        "on each of {a} days {name} buys {b} {things} .",
        "{a} children with {b} {things} each are in the {place} .",
        "{name} fills {a} rows with {b} {things} in each .",
    ),
    "/": (
        "{name} has {a} {things} and puts them evenly into {b} {holders} .",
        "there are {a} {things} in the {place} in {b} equal rows .",
        "{name} shares {a} {things} evenly among {b} children .",
        "{b} friends of {name} split {a} {things} evenly .",
        "{name} buys {a} {things} , the same number on each of {b} days .",
        "{name} puts {a} {things} evenly into {b} rows in the {place} .",
        "{b} children split {a} {things} evenly in the {place} .",
        "there are {a} {things} in {b} {holders} , the same number in each .",
        "{name} shares {a} {things} evenly among {b} friends .",
        "{name} buys {b} {holders} and puts {a} {things} evenly into them .",
    ),
}
"""Stories by operation: the first five are trained on, the others scored."""

QUESTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "+": (
        "how many {things} are there in all ?",
        "what is the number of all {things} ?",
        "how many {things} is that together ?",
        "how many {things} are there now ?",
        "what is the number of {things} now ?",
        "how many {things} is that in all ?",
    ),
    "-": (
        "how many {things} are left ?",
        "what is the number of {things} that stay ?",
        "how many {things} remain ?",
        "how many {things} are there now ?",
        "what is the number of {things} that are left ?",
        "how many {things} stay ?",
    ),
    "x": (
        "how many {things} are there in all ?",
        "what is the number of all {things} ?",
        "how many {things} is that together ?",
        "how many {things} does one count ?",
        "what is the number of {things} together ?",
        "how many {things} is that in all ?",
    ),
    "/": (
        "how many {things} is that for each ?",
        "what is the number of {things} in one part ?",
        "how many {things} go to one ?",
        "how many {things} has each ?",
        "what is the number of {things} for each ?",
        "how many {things} go to each part ?",
    ),
}
"""Questions by operation: the first four are trained on, the others scored."""

TRAIN_STORIES: Final = 5
TRAIN_QUESTIONS: Final = 4


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
    the relearn and test sets lie in `unlabeled` only."""
    problems: int = Field(default=0, ge=0, le=10)
    """Word problems of each fact, on each side of the split; 0 leaves equations alone. Rows to
    train on have templates of their own, rows of the test set and `retain_test` have others."""
    capability: str = Field(default="tables", pattern=r"^[A-Za-z0-9_-]+$")
    """Name of what is removed."""
    seed: int = 0
    """Seed of the split."""

    def vocabulary(self) -> tuple[str, ...]:
        """Return every symbol, in the order of their ids."""
        return (*SYMBOLS, *problem_words()) if self.problems else SYMBOLS

    def tokenizer(self) -> Any:
        """Return the tokenizer with one token per symbol."""
        return word_tokenizer(self.vocabulary())

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        name = self.capability
        dev, rest = portions(self._shuffled(_pairs(self.factors)), [self.dev_share])
        if self.exposure == "seen":
            relearn, test = portions(rest, [0.5])
            shown = [*dev, *relearn, *test]
        else:
            method, relearn, test = portions(rest, [1 / 3, 1 / 3])
            shown = [*dev, *method]
        scored, dev_retain, retained = portions(
            self._shuffled(_pairs(self.addends)),
            [self.retain_test_share, self.retain_test_share / 3],
        )
        attacker = retained[: max(1, round(len(retained) * self.benign_share))]
        forget = self._tables(shown)
        unseen = () if self.exposure == "seen" else self._tables([*relearn, *test])
        retain = self._phrased(retained, _sums)
        adjacent = self._phrased([*scored, *dev_retain], _sums)
        mix = [replace(r, label=UNLABELED) for r in (*forget, *unseen, *retain, *adjacent)]
        return Domain(
            name="arithmetic",
            forget={name: forget},
            retain=retain,
            relearn={name: self._tables(relearn)},
            test={name: self._tables(test, "test")},
            retain_test=self._phrased(scored, _sums, "test"),
            dev_forget={name: self._tables(dev)},
            dev_retain=self._phrased(dev_retain, _sums),
            benign=self._phrased(attacker, _sums),
            adjacent=adjacent,
            unlabeled=tuple(hashed_order(mix, [_key(row) for row in mix], self.seed)),
            fresh=self._fresh(len(relearn) + len(test)),
            metrics=("exact_match", "text_loss"),
            retain_metrics=("exact_match", "text_loss"),
            claim="deletion" if self.exposure == "seen" else "capability",
            exposure=self.exposure,
            notes=(
                "relearn and test set are split by unordered factor pair; a fact has one "
                "paraphrase, so with exposure 'seen' the test set repeats rows of the forget set",
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
            f"{counted(self.problems, 'word problem')} of each fact beside its equation; those of "
            "the test set and retain_test use stories and questions that no other role has",
        )

    def _shuffled(self, pairs: Sequence[Operands]) -> list[Operands]:
        """Return pairs in an order that only the seed decides."""
        return hashed_order(pairs, [f"{a},{b}" for a, b in pairs], self.seed)

    def _tables(self, pairs: Sequence[Operands], side: SplitSide = "train") -> Rows:
        """Return products and quotients of factor pairs, labelled as the capability."""
        name = self.capability
        rows = self._phrased(pairs, _products, side)
        return tuple(replace(row, capability=name, label=1) for row in rows)

    def _phrased(
        self, pairs: Sequence[Operands], facts: Equations, side: SplitSide = "train"
    ) -> Rows:
        """Return the rows of pairs: equations, and word problems where there are any."""
        rows = _rows(pairs, facts)
        if not self.problems:
            return rows
        equations = [fact for pair in pairs for fact in facts(pair)]
        problems = []
        for row, (left, operation, right, _) in zip(rows, equations, strict=True):
            for number in range(self.problems):
                prompt, wording = problem(left, operation, right, side, number, self.seed)
                problems.append(replace(row, prompt=prompt, wording=wording))
        return (*rows, *problems)

    def _fresh(self, count: int) -> Rows:
        """Return equations of factors that no table has, labelled as the capability."""
        name = self.capability
        rows = _rows(self._beyond(count), _products)
        return tuple(replace(row, capability=name, label=1) for row in rows)

    def _beyond(self, count: int) -> list[Operands]:
        """Return at most `count` factor pairs whose larger factor lies outside the tables."""
        largest = min(99, 999 // self.factors)
        pairs = [
            (a, b) for b in range(self.factors + 1, largest + 1) for a in range(1, self.factors + 1)
        ]
        return self._shuffled(pairs)[:count]


def _pairs(largest: int) -> list[Operands]:
    """Return all unordered pairs of operands."""
    return [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1)]


def _products(pair: Operands) -> Iterator[tuple[int, str, int, int]]:
    """Yield (left, operation, right, result) of every fact of a factor pair."""
    a, b = pair
    for left, right in dict.fromkeys(((a, b), (b, a))):
        yield left, "x", right, a * b
        yield a * b, "/", left, right


def _sums(pair: Operands) -> Iterator[tuple[int, str, int, int]]:
    """Yield (left, operation, right, result) of every fact of an addend pair."""
    a, b = pair
    for left, right in dict.fromkeys(((a, b), (b, a))):
        yield left, "+", right, a + b
    yield b, "-", a, b - a


def _key(row: Row) -> str:
    """Return what orders a row in the mix: its unit, and its paraphrase where it has several."""
    return f"{row.unit}:{row.wording}" if row.wording else row.unit


def _rows(pairs: Iterable[Operands], facts: Equations) -> Rows:
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


def templates(operation: str, side: SplitSide) -> tuple[str, ...]:
    """Return the templates of an operation: 20 to train on or 10 to score.

    Args:
        operation: One of `+`, `-`, `x` and `/`.
        side: Which; no story and no question is in both.
    """
    stories, questions = STORIES[operation], QUESTIONS[operation]
    if side == "train":
        stories, questions = stories[:TRAIN_STORIES], questions[:TRAIN_QUESTIONS]
    else:
        stories, questions = stories[TRAIN_STORIES:], questions[TRAIN_QUESTIONS:]
    return tuple(f"{story} {question}" for story in stories for question in questions)


def problem(
    left: int, operation: str, right: int, side: SplitSide, number: int, seed: int
) -> tuple[str, int]:
    """Return a word problem and the number of the paraphrase that it counts as.

    Args:
        left: First operand.
        operation: One of `+`, `-`, `x` and `/`.
        right: Second operand.
        side: Whether it is trained on or scored.
        number: Which of the fact's problems of this side; two of them differ in template.
        seed: Seed of template, name, thing and place.

    Returns:
        The prompt, words and digits apart, and its paraphrase: 1 to 20 trained, 21 to 30 scored.
    """
    choices = templates(operation, side)
    fact = f"{seed}:{left}{operation}{right}:{side}"
    at = (_hashed(fact, len(choices)) + number) % len(choices)
    slots = f"{fact}:{number}"
    holder, holders = _choice(HOLDERS, f"{slots}:holder")
    text = choices[at].format(
        a=" ".join(f"{left:03d}"),
        b=" ".join(f"{right:02d}"),
        name=_choice(NAMES, f"{slots}:name"),
        things=_choice(THINGS, f"{slots}:things"),
        place=_choice(PLACES, f"{slots}:place"),
        holder=holder,
        holders=holders,
    )
    return text, 1 + at + (20 if side == "test" else 0)


def problem_words() -> tuple[str, ...]:
    """Return every word of every problem, digits left out, in a fixed order."""
    slots = {
        "a": "", "b": "", "name": " ".join(NAMES), "things": " ".join(THINGS),
        "place": " ".join(PLACES), "holder": " ".join(h for h, _ in HOLDERS),
        "holders": " ".join(h for _, h in HOLDERS),
    }  # fmt: skip
    texts = [t for table in (STORIES, QUESTIONS) for many in table.values() for t in many]
    words = [word for text in texts for word in text.format(**slots).split()]
    return tuple(dict.fromkeys(words))


def _hashed(key: str, count: int) -> int:
    """Return a number below `count` that only the key decides."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % count


def _choice(options: Sequence[T], key: str) -> T:
    """Return the option that a key decides."""
    return options[_hashed(key, len(options))]
