"""Word problems for `arithmetic`: a story and a question, digits as in equations.

Every operation has ten stories and six questions. Rows that are trained on come from the first
five stories and the first four questions (20 templates), rows that are scored from the other five
and two (10 templates): neither a story nor a question is on both sides, but every word of a scored
template is in trained ones of its operation. Names, things and places are drawn by hash. This
module imports no torch.

Source: the arithmetic setting of UNDO (arXiv 2506.06278) has 20 and 10 templates per operation;
the wordings here are our own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeVar

T = TypeVar("T")
Side = Literal["train", "test"]

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


def templates(operation: str, side: Side) -> tuple[str, ...]:
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
    left: int, operation: str, right: int, side: Side, number: int, seed: int
) -> tuple[str, int]:
    """Return a word problem and the wording it counts as.

    Args:
        left: First operand.
        operation: One of `+`, `-`, `x` and `/`.
        right: Second operand.
        side: Whether it is trained on or scored.
        number: Which of the fact's problems of this side; two of them differ in template.
        seed: Seed of template, name, thing and place.

    Returns:
        The prompt, words and digits apart, and its wording: 1 to 20 trained, 21 to 30 scored.
    """
    found = templates(operation, side)
    fact = f"{seed}:{left}{operation}{right}:{side}"
    at = (_draw(fact, len(found)) + number) % len(found)
    slots = f"{fact}:{number}"
    holder, holders = _one(HOLDERS, f"{slots}:holder")
    text = found[at].format(
        a=" ".join(f"{left:03d}"),
        b=" ".join(f"{right:02d}"),
        name=_one(NAMES, f"{slots}:name"),
        things=_one(THINGS, f"{slots}:things"),
        place=_one(PLACES, f"{slots}:place"),
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
    texts = [t for table in (STORIES, QUESTIONS) for found in table.values() for t in found]
    words = [word for text in texts for word in text.format(**slots).split()]
    return tuple(dict.fromkeys(words))


def _draw(key: str, count: int) -> int:
    """Return a number below `count` that only the key decides."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % count


def _one(options: Sequence[T], key: str) -> T:
    """Return the option that a key decides."""
    return options[_draw(key, len(options))]
