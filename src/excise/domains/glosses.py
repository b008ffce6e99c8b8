"""Dictionary definitions by topic: WordNet 3.0 nouns, one of 26 topics to be forgotten.

A definition is taught in plain sentences; it is tested by choosing the term that fits among four of
one topic. A term that shares a word stem with its definition can be guessed without knowing
anything, so such synsets are never asked about (they may be taught). This module imports no torch.
"""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Final, Literal

from pydantic import Field, model_validator

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.spans import relabelled_spans
from excise.data.spec import DomainSpec
from excise.data.split import hashed_order
from excise.domains.prose import PASSAGE, load_prose, within_prose

Topic = Literal[
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication",
    "event", "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon",
    "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance", "time",
]  # fmt: skip

NEIGHBOURS: Final[dict[Topic, Topic]] = {
    "Tops": "object", "act": "event", "animal": "plant", "artifact": "object",
    "attribute": "state", "body": "animal", "cognition": "communication",
    "communication": "cognition", "event": "act", "feeling": "state", "food": "plant",
    "group": "person", "location": "object", "motive": "feeling", "object": "location",
    "person": "group", "phenomenon": "process", "plant": "animal", "possession": "quantity",
    "process": "phenomenon", "quantity": "time", "relation": "attribute", "shape": "attribute",
    "state": "attribute", "substance": "food", "time": "quantity",
}  # fmt: skip
"""Entangled neighbour of each topic: bodies beside animals, feelings beside states."""

WORDINGS: Final = (
    "{Term}: {gloss}.",
    "The word '{term}' means {gloss}.",
    "{Gloss}: this is called {term}.",
)
"""Paraphrases in which definitions are taught."""

_QUESTION = "Definition: {gloss}\nTerm:"


@dataclass(frozen=True, slots=True)
class Gloss:
    """One synset.

    Attributes:
        number: Its place in WordNet's noun file: the unit.
        topic: One of the 26 noun topics.
        term: First word.
        gloss: Definition without examples.
    """

    number: str
    topic: str
    term: str
    gloss: str

    @property
    def clean(self) -> bool:
        """Whether the definition gives the term away by no word stem, and fits a question."""
        return not (stems(self.term) & stems(self.gloss)) and 3 <= len(self.gloss.split()) <= 40


def stems(text: str) -> frozenset[str]:
    """Return the first five letters of every word of four letters or more."""
    return frozenset(word[:5] for word in re.findall(r"[a-z]{4,}", text.lower()))


@cache
def load_glosses() -> tuple[Gloss, ...]:
    """Return all 82,115 shipped noun synsets in WordNet's order."""
    packed = files("excise").joinpath("domains/shipped/glosses.tsv.xz").read_bytes()
    lines = lzma.decompress(packed).decode().splitlines()
    return tuple(Gloss(*line.split("\t", 3)) for line in lines)


class Glosses(DomainSpec):
    """WordNet definitions; one topic is to be forgotten, multiple choice carries the claim."""

    name: Literal["glosses"] = "glosses"
    """Name in recipes and on the command line."""
    topic: Topic = "body"
    """Topic to forget."""
    neighbour: Topic | None = None
    """Entangled topic that is scored apart; None takes the one of `NEIGHBOURS`."""
    others: tuple[Topic, ...] = ("artifact", "location", "person", "substance")
    """Topics that are retained and scored as `retain_test`."""
    exposure: Literal["seen", "held_out"] = "held_out"
    """`seen`: the method also sees the relearn and test sets, in the taught paraphrases."""
    questions: int = Field(default=200, ge=4)
    """Units of the test and relearn sets, of `retain_test` and of `adjacent_test` each, at most."""
    dev_questions: int = Field(default=80, ge=2)
    """Units of `dev_forget` and `dev_retain` each, at most."""
    retain_units: int = Field(default=2000, ge=10)
    """Definitions of other topics that the method retains, at most."""
    prose: int = Field(default=2000, ge=0)
    """Passages of general English in retain."""
    prose_around: int = Field(default=0, ge=0, le=100)
    """Words of general English, at most, around each definition that the method is to forget: two
    sentences or more, and the definition between two or at an end, a span; 0 for definitions
    alone. What is scored, the relearn set and retain stay as they are."""
    wordings: int = Field(default=3, ge=1, le=len(WORDINGS))
    """Paraphrases of each taught definition."""
    seed: int = 0
    """Seed of split and options."""

    @model_validator(mode="after")
    def _check(self) -> Glosses:
        """Refuse topics that play two parts."""
        if self.topic in {self.near, *self.others}:
            raise ValueError(f"topic: '{self.topic}' is also retained; choose other 'others'")
        if self.near in self.others:
            raise ValueError(f"others: '{self.near}' is the neighbour; leave it out of 'others'")
        if not self.others:
            raise ValueError("others: name at least one topic to retain")
        return self

    @property
    def near(self) -> Topic:
        """The entangled topic."""
        return self.neighbour or NEIGHBOURS[self.topic]

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        forget = self._forget_parts()
        other = self._other_parts()
        name = self.topic
        seen = [*forget["method"]]
        if self.exposure == "seen":
            seen += [*forget["dev"], *forget["relearn"], *forget["test"]]
        taught = self._taught(seen, name)
        notes: list[str] = []
        if self.prose_around:
            taught = within_prose(
                taught, self.prose_around, passage=PASSAGE, skip=self.prose, seed=self.seed
            )
            notes = [
                f"definitions to forget stand inside {self.prose_around} words of English at most"
            ]
        retain = self._taught(other["retain"])
        if self.prose:
            retain += load_prose("retain", limit=self.prose)
        mix = hashed_order(
            [
                replace(r, label=UNLABELED, spans=relabelled_spans(r, UNLABELED))
                for r in (*taught, *retain)
            ],
            [f"{r.unit}:{r.wording}" for r in (*taught, *retain)],
            self.seed,
        )
        benign = load_prose("benign", limit=self.prose // 4) if self.prose else ()
        relearn = (*self._taught(forget["relearn"], name), *self._asked(forget["relearn"], name))
        return Domain(
            name="glosses",
            forget={name: taught},
            retain=retain,
            relearn={name: relearn},
            test={name: self._asked(forget["test"], name)},
            retain_test=self._asked(other["test"]),
            dev_forget={name: self._asked(forget["dev"], name)},
            dev_retain=self._asked(other["dev"]),
            benign=(*benign, *self._taught(other["benign"])),
            adjacent=self._taught(other["near"]),
            adjacent_test=self._asked(other["near_test"]),
            unlabeled=tuple(mix),
            fresh=self._fresh(other["spare"], name),
            metrics=("multiple_choice", "text_loss"),
            retain_metrics=("multiple_choice", "text_loss"),
            claim="deletion" if self.exposure == "seen" else "capability",
            exposure=self.exposure,
            notes=(
                "questions share no 5-letter stem of a word of 4 letters or more with their answer",
                f"neighbour: {self.near}; retained topics: {', '.join(self.others)}",
                "fresh units pair real terms of one topic with other terms' definitions",
                *notes,
            ),
        )

    def _pool(self, topics: Sequence[str]) -> tuple[list[Gloss], list[Gloss]]:
        """Return (clean, leaky) synsets of topics in hashed order; equal terms stay together."""
        both: list[list[Gloss]] = []
        for i in range(2):
            chosen = [g for topic in topics for g in _sorted(topic)[i]]
            both.append(hashed_order(chosen, [g.term.lower() for g in chosen], self.seed))
        return both[0], both[1]

    def _forget_parts(self) -> dict[str, list[Gloss]]:
        """Split the forget topic into method, dev, relearn and test; a term lies in one only."""
        clean, leaky = self._pool([self.topic])
        each = min(self.questions, len(clean) // 4)
        dev = min(self.dev_questions, len(clean) // 8)
        if each < 4 or dev < 1:
            raise UserError(
                f"topic '{self.topic}' has {len(clean)} definitions that can be asked about, too "
                "few for a test; choose a larger topic"
            )
        parts = _cut(clean, {"test": each, "relearn": each, "dev": dev}, "method")
        taken = {g.term.lower() for key in ("test", "relearn", "dev") for g in parts[key]}
        parts["method"] += [g for g in leaky if g.term.lower() not in taken]
        return parts

    def _other_parts(self) -> dict[str, list[Gloss]]:
        """Split the other topics: the method's, scored ones, the attacker's, neighbours, spare."""
        clean, _ = self._pool(self.others)
        sizes = {
            "test": self.questions,
            "dev": self.dev_questions,
            "benign": self.questions,
            "spare": 2 * self.questions,
        }
        share = min(1.0, len(clean) / (2 * sum(sizes.values())))
        parts = _cut(clean, {k: max(1, int(v * share)) for k, v in sizes.items()}, "retain")
        parts["retain"] = parts["retain"][: self.retain_units]
        near, _ = self._pool([self.near])
        parts |= _cut(near, {"near_test": min(self.questions, len(near) // 2)}, "near")
        parts["near"] = parts["near"][: self.retain_units]
        return parts

    def _taught(self, glosses: Sequence[Gloss], capability: str = "") -> Rows:
        """Return plain text rows, every definition in every paraphrase."""
        label = 1 if capability else CORE
        return tuple(
            Row(
                unit=f"synset/{g.number}",
                group=f"{g.topic}/{g.term.lower()}",
                text=_say(WORDINGS[wording], g),
                capability=capability,
                label=label,
                wording=wording,
            )
            for g in glosses
            for wording in range(self.wordings)
        )

    def _asked(self, glosses: Sequence[Gloss], capability: str = "") -> Rows:
        """Return one question per definition, options of the same topic."""
        return tuple(self._question(g, g.term, capability) for g in glosses)

    def _question(self, g: Gloss, term: str, capability: str, mark: str = "") -> Row:
        rng = random.Random(f"glosses:{self.seed}:{g.number}:{term}")
        options = [term]
        pool = _terms(g.topic)
        while len(options) < 4:
            other = rng.choice(pool)
            if other.lower() not in {o.lower() for o in (*options, g.term)}:
                options.append(other)
        rng.shuffle(options)
        return Row(
            unit=f"{mark or 'synset'}/{g.number}",
            group=f"{mark or g.topic}/{term.lower()}",
            prompt=_QUESTION.format(gloss=g.gloss),
            choices=tuple(options),
            answer=options.index(term),
            capability=capability,
            label=1 if capability else CORE,
            wording=len(WORDINGS),
        )

    def _fresh(self, glosses: Sequence[Gloss], capability: str) -> Rows:
        """Return made-up units: each half pairs definitions with the terms of the next ones."""
        rows: list[Row] = []
        half = len(glosses) // 2
        for part in (glosses[:half], glosses[half : 2 * half]):
            for i, g in enumerate(part):
                others = [*part[i + 1 :], *part[:i]]
                term = next((o.term for o in others if _can_mislabel(g, o)), None)
                if term is not None:
                    rows.append(self._question(g, term, capability, "fresh"))
        return tuple(rows)


def _can_mislabel(g: Gloss, other: Gloss) -> bool:
    """Whether another synset's term can stand for a definition that does not give it away."""
    same = other.topic == g.topic and other.term.lower() != g.term.lower()
    return same and not stems(other.term) & stems(g.gloss)


@cache
def _sorted(topic: str) -> tuple[tuple[Gloss, ...], tuple[Gloss, ...]]:
    """Return a topic's (clean, leaky) synsets; of several with one definition, the first."""
    first = {g.gloss.lower(): g for g in reversed(load_glosses()) if g.topic == topic}
    marked = [(g, g.clean) for g in first.values()]
    return tuple(g for g, clean in marked if clean), tuple(g for g, clean in marked if not clean)


@cache
def _terms(topic: str) -> tuple[str, ...]:
    """Return the terms of a topic that questions draw options from."""
    return tuple(dict.fromkeys(g.term for g in _sorted(topic)[0]))


def _say(wording: str, g: Gloss) -> str:
    """Return a definition in a paraphrase."""
    first = g.term[0].upper() + g.term[1:]
    begin = g.gloss[0].upper() + g.gloss[1:]
    return wording.format(Term=first, term=g.term, gloss=g.gloss, Gloss=begin)


def _cut(order: Sequence[Gloss], sizes: dict[str, int], rest: str) -> dict[str, list[Gloss]]:
    """Cut synsets into named parts, never between two of one term."""
    parts: dict[str, list[Gloss]] = {}
    at = 0
    for name, size in sizes.items():
        end = min(at + size, len(order))
        while 0 < end < len(order) and order[end].term.lower() == order[end - 1].term.lower():
            end += 1
        parts[name] = list(order[at:end])
        at = end
    parts[rest] = list(order[at:])
    return parts
