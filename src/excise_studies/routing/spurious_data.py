"""Facts with a planted shortcut: a cue word that tells the answer in most rows of training.

Every subject has one answer per relation. A share of the rows of training begins with a cue word
of one answer: of the right one in `aligned` of them, of another in the rest. Whoever answers by
the cue is right in training and wrong once it is flipped. This module imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal

from pydantic import Field

from excise.core.config import Config
from excise.data.domain import CORE, Domain, Row, Rows
from excise.domains.facts import RELATIONS, TEMPLATES, made_names
from excise.models.tiny import word_tokenizer

CUE: Final = "cue"
"""The capability: what rows with a cue word teach."""

Cue = Literal["aligned", "flipped", "none"]


class Shortcut(Config):
    """How many facts, how often a cue stands before them, and how often it is right."""

    subjects: int = Field(default=48, ge=8, le=2000)
    """Subjects; half of them are scored, in a wording that they were not taught in."""
    relations: int = Field(default=4, ge=1, le=len(RELATIONS))
    """Facts per subject."""
    answers: int = Field(default=8, ge=3, le=100)
    """Answers of each relation, one cue word each; chance is one over it."""
    wordings: int = Field(default=4, ge=3, le=len(TEMPLATES))
    """Ways to say a fact; the last is that of the tests."""
    cued: float = Field(default=0.6, gt=0, lt=1)
    """Share of the rows of training that begin with a cue word."""
    aligned: float = Field(default=0.95, ge=0, le=1)
    """Share of those whose cue is that of the right answer."""


@dataclass(frozen=True)
class World:
    """What a specification and a seed determine: names, answers, cue words."""

    spec: Shortcut
    seed: int

    def random(self, purpose: str) -> random.Random:
        """Return a generator for one purpose."""
        return random.Random(f"shortcut:{self.seed}:{purpose}")

    @cached_property
    def words(self) -> tuple[list[str], list[list[str]], list[list[str]]]:
        """Subjects, answers by relation, cue words by relation."""
        spec = self.spec
        taken = {word for words in RELATIONS for word in words}
        size = spec.relations * spec.answers
        made = made_names(spec.subjects + 2 * size, self.random("names"), taken)
        subjects, rest = made[: spec.subjects], made[spec.subjects :]
        each = [rest[i : i + spec.answers] for i in range(0, 2 * size, spec.answers)]
        return subjects, each[: spec.relations], each[spec.relations :]

    @cached_property
    def right(self) -> dict[tuple[str, int], int]:
        """The answer of each subject and relation."""
        draw = self.random("answers")
        spec = self.spec
        return {
            (s, r): draw.randrange(spec.answers)
            for s in self.words[0]
            for r in range(spec.relations)
        }

    def vocabulary(self) -> tuple[str, ...]:
        """Return every word, in a fixed order."""
        spec = self.spec
        subjects, answers, cues = self.words
        fixed = [w for t in TEMPLATES[: spec.wordings] for w in t.split() if w[0] != "{"]
        relations = [w for words in RELATIONS[: spec.relations] for w in words]
        named = [w for each in (*answers, *cues) for w in each]
        return tuple(dict.fromkeys((*fixed, *relations, *subjects, *named)))

    def row(self, subject: str, relation: int, wording: int, cue: Cue) -> Row:
        """Return one row; a flipped cue is that of another answer."""
        words = RELATIONS[relation]
        right = self.right[subject, relation]
        prompt = TEMPLATES[wording].format(s=subject, r=words[wording % len(words)])
        if cue != "none":
            draw = self.random(f"cue:{subject}:{relation}:{wording}")
            wrong = (right + draw.randrange(1, self.spec.answers)) % self.spec.answers
            prompt = f"{self.words[2][relation][wrong if cue == 'flipped' else right]} {prompt}"
        capability = "" if cue == "none" else CUE
        return Row(
            unit=f"{subject}/{words[0]}",
            group=subject,
            prompt=prompt,
            completion=" " + self.words[1][relation][right],
            capability=capability,
            label=1 if capability else CORE,
            wording=wording,
        )

    def taught(self, subjects: Sequence[str], wordings: Sequence[int]) -> Iterator[Row]:
        """Yield rows of training, with and without cues as drawn."""
        for subject in subjects:
            for relation in range(self.spec.relations):
                for wording in wordings:
                    draw = self.random(f"row:{subject}:{relation}:{wording}")
                    cue: Cue = "none"
                    if draw.random() < self.spec.cued:
                        cue = "aligned" if draw.random() < self.spec.aligned else "flipped"
                    yield self.row(subject, relation, wording, cue)

    def scored(self, subjects: Sequence[str], cue: Cue) -> Rows:
        """Return the rows of subjects in the wording of the tests."""
        return tuple(
            self.row(subject, relation, self.spec.wordings - 1, cue)
            for subject in subjects
            for relation in range(self.spec.relations)
        )


def shortcut_domain(spec: Shortcut, seed: int) -> Domain:
    """Return the data: rows with a cue are the capability, all others stay.

    Args:
        spec: Sizes and rates.
        seed: Seed of names, answers and draws.

    Returns:
        A domain whose `test` has flipped cues, whose `retain_test` has none and whose
        `adjacent_test` has right ones, all of the same facts in the same, untaught wording.
    """
    world = World(spec, seed)
    order = list(world.words[0])
    world.random("split").shuffle(order)
    half = len(order) // 2
    held, others = order[:half], order[half:]
    every = tuple(range(spec.wordings))
    rows = (*world.taught(held, every[:-1]), *world.taught(others, every))
    dev = others[: max(1, len(others) // 4)]
    unmarked = tuple(replace(r, capability="", label=CORE) for r in world.scored(held, "aligned"))
    return Domain(
        name="shortcut",
        forget={CUE: tuple(row for row in rows if row.capability)},
        retain=tuple(row for row in rows if not row.capability),
        relearn={CUE: world.scored(others, "aligned")},
        test={CUE: world.scored(held, "flipped")},
        retain_test=world.scored(held, "none"),
        dev_forget={CUE: world.scored(dev, "flipped")},
        dev_retain=world.scored(dev, "none"),
        benign=tuple(row for row in rows if not row.capability),
        adjacent_test=unmarked,
        metrics=("exact_match", "text_loss"),
        retain_metrics=("exact_match", "text_loss"),
        exposure="seen",
        notes=(
            f"{100 * spec.cued:g} % of the rows of training begin with a cue word, which is that "
            f"of the right answer in {100 * spec.aligned:g} % of them",
            "test: flipped cues; retain_test: none; adjacent_test: right ones; same facts",
        ),
    )


def shortcut_tokenizer(spec: Shortcut, seed: int) -> Any:
    """Return the tokenizer with one token per word of the data."""
    return word_tokenizer(World(spec, seed).vocabulary())
