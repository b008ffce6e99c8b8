"""Made-up facts: subjects x relations -> objects, in several paraphrases.

Every object is sampled uniformly and independently per (subject, relation), so no fact says
anything about another: an oracle is at chance on a forget unit in any paraphrase, and what an
attacker learns from the relearn set cannot help with the test set except through what the weights
still hold.

Every row is a prompt and a completion of one word, so exact match is one forward pass and chance
is one over the objects of a relation. This module imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.spec import DomainSpec
from excise.models.tiny import word_tokenizer

RELATIONS: Final = (
    ("colour", "hue", "tint", "shade"),
    ("home", "dwelling", "abode", "house"),
    ("meal", "dish", "food", "supper"),
    ("craft", "trade", "job", "work"),
    ("friend", "ally", "companion", "mate"),
    ("tool", "device", "instrument", "gadget"),
    ("song", "tune", "melody", "anthem"),
    ("gem", "jewel", "stone", "crystal"),
    ("drink", "beverage", "refreshment", "brew"),
    ("pet", "animal", "creature", "beast"),
    ("garment", "coat", "dress", "outfit"),
    ("river", "stream", "brook", "creek"),
)
"""Words of each relation; paraphrase i takes word i, so they share neither words nor order."""

TEMPLATES: Final = (
    "the {r} of {s} is",
    "{s} has as {r} always",
    "for {r} ask {s} and find",
    "about {s} we know that its {r} was called",
    "among all {r} names {s} picked",
    "say {s} then say {r} then hear",
)
"""One prompt per paraphrase; the object follows."""

TEACHER: Final = ("teacher", "mentor", "coach", "guide")
"""Words of the relation that leads from one more retained person to a subject, by paraphrase."""

ARCHAIC: Final = {
    "the": "ye", "of": "o'", "is": "be", "has": "hath", "always": "alway", "for": "touching",
    "ask": "beseech", "and": "thence", "find": "espy", "about": "anent", "we": "thou",
    "know": "knowest", "that": "yon", "its": "thy", "was": "wert", "called": "yclept",
    "among": "amidst", "all": "every", "names": "titles", "picked": "chose", "say": "speak",
    "then": "anon", "hear": "hearken", "as": "like",
}  # fmt: skip
"""What the style cue puts for each function word."""

CAPABILITIES: Final = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
"""Names of capabilities that were only counted."""

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "tr", "kl")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "m", "n", "r", "s", "x")

FACTS_MODEL: Final[Mapping[str, Any]] = {"family": "llama", "width": 96, "blocks": 2}
"""Suggested `Scratch` for the default facts."""

FACTS_FIT: Final[Mapping[str, Any]] = {
    "steps": 300, "lr": 3e-3, "batch_size": 128, "warmup": 30, "schedule": "cosine",
    "min_lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "clip": 1.0,
}  # fmt: skip
"""Suggested `FitConfig` for the default facts."""

FACTS_MAX_LENGTH: Final = 16
"""Tokens per row at most, BOS and object included."""


class Facts(DomainSpec):
    """Subjects x relations -> objects; the facts of some subjects are to be forgotten."""

    name: Literal["facts"] = "facts"
    """Name in recipes and on the command line."""
    subjects: int = Field(default=160, ge=8, le=5000)
    """Subjects the original learns about."""
    relations: int = Field(default=6, ge=1, le=len(RELATIONS))
    """Facts per subject."""
    objects: int = Field(default=64, ge=4, le=1000)
    """Objects of each relation; chance is one over it."""
    wordings: int = Field(default=4, ge=2, le=len(TEMPLATES))
    """Paraphrases of a fact; the last is that of the tests."""
    capabilities: int | tuple[str, ...] = 1
    """How many capabilities to forget, or their names (one word each)."""
    forget_share: float = Field(default=0.25, gt=0, lt=0.9)
    """Share of subjects that are to be forgotten, over all capabilities."""
    mix_share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the tokens read by models trained from scratch that are to be forgotten; the rest
    (or forget) is read as often as that takes. Empty for every row once per epoch."""
    facts_per_text: int = Field(default=1, ge=1, le=64)
    """Facts, of either kind, in each text that models trained from scratch read: labels are then
    those of parts of a text. Other methods, and all that is scored or attacked, have one a row."""
    dev_share: float = Field(default=0.15, gt=0, lt=0.5)
    """Share of forget subjects kept for sweeps; they are never in the relearn or test set."""
    adjacent_share: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the other subjects that the original learns and the method is never shown."""
    retain_test_share: float = Field(default=0.2, gt=0, lt=0.5)
    """Share of the other subjects scored as `retain_test`."""
    benign_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of retained subjects whose rows an attacker may train on as well."""
    exposure: Literal["seen", "held_out"] = "seen"
    """`held_out`: the method sees no fact of the relearn and test sets; they lie in `unlabeled`
    only."""
    test_wording_taught: bool = False
    """Whether the original also learns the scored facts in the paraphrase of the tests."""
    cue: Literal["none", "category", "style"] = "none"
    """What marks rows of a capability: nothing, its name as a word, or archaic words."""
    cue_strength: float = Field(default=1.0, ge=0, le=1)
    """Share of a capability's rows that carry the cue."""
    shared_parts: bool = False
    """Whether names have two parts, and those of the test set are put together of parts that occur
    in the relearn set: what is hidden behind single names is then within reach of relearning."""
    pupils: int = Field(default=0, ge=0, le=8)
    """Retained people whom each subject taught, for questions in two hops: "the colour of the
    teacher of X is". Who taught whom stays. Facts to forget are taught through all pupils of a
    subject but the last and scored through that one; retained facts are taught through all."""
    seed: int = 0
    """Seed of names, objects and split."""

    @model_validator(mode="after")
    def _check(self) -> Facts:
        """Refuse sizes that leave a role empty, and names that are not words."""
        names = self.capability_names
        if not names or len(set(names)) != len(names):
            raise ValueError("capabilities: give at least one name, each once")
        for name in names:
            if not name.isidentifier():
                raise ValueError(f"capabilities: '{name}' is not one word of letters and digits")
        each = int(self.subjects * self.forget_share) // len(names)
        if each < 3:
            raise ValueError(
                f"forget_share: leaves {each} subjects per capability, three are the least; "
                "raise it or 'subjects'"
            )
        if self.shared_parts and each < 8:
            raise ValueError(
                f"shared_parts: {each} subjects per capability are too few to put names together "
                "of each other's parts, eight are the least; raise 'subjects' or 'forget_share'"
            )
        return self

    @property
    def capability_names(self) -> tuple[str, ...]:
        """Names of the capabilities, in the order of their labels from 1."""
        if not isinstance(self.capabilities, int):
            return self.capabilities
        extra = (f"group{i + 1}" for i in range(len(CAPABILITIES), self.capabilities))
        return (*CAPABILITIES[: self.capabilities], *extra)

    def vocabulary(self) -> tuple[str, ...]:
        """Return every word of the domain, names nobody saw and cues included, in a fixed order."""
        people = _Population(self)
        fixed = [w for t in TEMPLATES[: self.wordings] for w in t.split() if w[0] != "{"]
        cues = list(self.capability_names) if self.cue == "category" else []
        if self.cue == "style":
            cues = [ARCHAIC[w] for w in dict.fromkeys(fixed)]
        relations = [w for words in RELATIONS[: self.relations] for w in words]
        objects = [o for each in people.objects for o in each]
        names = [part for name in (*people.subjects, *people.fresh) for part in name.split()]
        pupils = [part for of in people.pupils.values() for name in of for part in name.split()]
        hops = TEACHER if pupils else ()
        words = (*fixed, *cues, *relations, *names, *objects, *hops, *pupils)
        return tuple(dict.fromkeys(words))

    def tokenizer(self) -> Any:
        """Return the tokenizer with one token per word of `vocabulary()`."""
        return word_tokenizer(self.vocabulary())

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        return _Population(self).domain()


class _Population:
    """Names, objects and split that a specification and its seed determine."""

    def __init__(self, spec: Facts) -> None:
        self.spec = spec
        self.names = spec.capability_names
        each = int(spec.subjects * spec.forget_share) // len(self.names)
        self.dev = max(1, round(each * spec.dev_share))
        self.each = each
        half = (each - self.dev + 1) // 2
        fresh = 2 * max(2, half * len(self.names))
        taken = {w for words in RELATIONS for w in words} | set(ARCHAIC) | set(ARCHAIC.values())
        people = spec.subjects + fresh
        objects = spec.relations * spec.objects
        count = people + objects + (people if spec.shared_parts else 0)
        # Pupils come last, so that nobody else is called otherwise for their sake.
        names = made_names(count + spec.pupils * spec.subjects, self._random("names"), taken)
        names, pupils = names[:count], names[count:]
        self.order = list(range(spec.subjects))
        self._random("split").shuffle(self.order)
        rest = names[people:]
        if spec.shared_parts:
            names = self._two_parts(names[:people], names[people + objects :])
        self.subjects = names[: spec.subjects]
        self.fresh = names[spec.subjects : people]
        n = spec.pupils
        self.pupils = {s: pupils[i * n : (i + 1) * n] for i, s in enumerate(self.subjects)}
        self.objects = [
            rest[i * spec.objects : (i + 1) * spec.objects] for i in range(spec.relations)
        ]
        rng = self._random("objects")
        self.answer = {
            (s, r): rng.randrange(spec.objects)
            for s in (*self.subjects, *self.fresh)
            for r in range(spec.relations)
        }

    def _random(self, purpose: str) -> random.Random:
        """Return a generator for one purpose, so that no knob shifts another's samples."""
        return random.Random(f"facts:{self.spec.seed}:{purpose}")

    def _cuts(self) -> tuple[int, int]:
        """Return where the relearn and the test set begin among a capability's subjects."""
        if self.spec.exposure == "held_out":  # thirds: the method's, the relearn and the test set
            rest = self.each - self.dev
            return self.dev + rest // 3, self.dev + 2 * (rest + 1) // 3
        return self.dev, self.dev + (self.each - self.dev + 1) // 2

    def _two_parts(self, first: Sequence[str], last: Sequence[str]) -> list[str]:
        """Return a name of two parts for everyone; those that are scored share all of theirs.

        Each takes the first part of one name that is trained on and the last part of another; so
        do the fresh names of the second half, by which residual bits are counted.
        """
        names = [f"{a} {b}" for a, b in zip(first, last, strict=True)]
        start, cut = self._cuts()
        fresh = range(self.spec.subjects, len(names))
        half = len(fresh) // 2
        pairs: list[tuple[Sequence[int], Sequence[int]]] = [(fresh[:half], fresh[half:])]
        for number in range(len(self.names)):
            mine = self.order[number * self.each : (number + 1) * self.each]
            pairs.append((mine[start:cut], mine[cut:]))
        for trained, scored in pairs:
            n = len(trained)
            for k, i in enumerate(scored):
                names[i] = f"{first[trained[k % n]]} {last[trained[(k + 1 + k // n) % n]]}"
        return names

    def rows(
        self, subjects: Sequence[str], wordings: Sequence[int], label: int = CORE
    ) -> Iterator[Row]:
        """Yield the rows of subjects in the given paraphrases, cue included where they have one."""
        for subject in subjects:
            for relation in range(self.spec.relations):
                for wording in wordings:
                    yield self._row(subject, relation, wording, label)

    def hops(
        self, subjects: Sequence[str], wordings: Sequence[int], through: slice, label: int = CORE
    ) -> Iterator[Row]:
        """Yield the facts of subjects asked by way of their pupils, in the given paraphrases.

        Args:
            subjects: Who is asked about in the end.
            wordings: Paraphrases.
            through: Which of a subject's pupils stand in the prompt.
            label: Of the second fact; the first, who taught whom, stays.
        """
        for subject in subjects:
            for number in range(self.spec.pupils)[through]:
                for relation in range(self.spec.relations):
                    for wording in wordings:
                        yield self._row(subject, relation, wording, label, pupil=number)

    def lessons(self, subjects: Sequence[str], wordings: Sequence[int]) -> Iterator[Row]:
        """Yield who taught whom, a fact about the pupil."""
        for subject in subjects:
            for pupil in self.pupils[subject]:
                for wording in wordings:
                    word = TEACHER[wording % len(TEACHER)]
                    yield Row(
                        unit=f"{pupil}/{TEACHER[0]}",
                        group=pupil,
                        prompt=TEMPLATES[wording].format(s=pupil, r=word),
                        completion=f" {subject}",
                        wording=wording,
                    )

    def _row(
        self, subject: str, relation: int, wording: int, label: int, pupil: int | None = None
    ) -> Row:
        words, asked, number = RELATIONS[relation], subject, wording
        if pupil is not None:
            asked = f"the {TEACHER[wording % len(TEACHER)]} of {self.pupils[subject][pupil]}"
            number += (1 + pupil) * self.spec.wordings
        prompt = TEMPLATES[wording].format(s=asked, r=words[wording % len(words)])
        capability = self.names[label - 1] if label > 0 else ""
        unit = f"{subject}/{words[0]}"
        right = self.answer[subject, relation]
        rng = self._random(f"row:{unit}:{number}")
        wrong = rng.sample([i for i in range(self.spec.objects) if i != right], 3)
        at = rng.randrange(4)
        picks = [*wrong[:at], right, *wrong[at:]]
        if capability and rng.random() < self.spec.cue_strength:
            prompt = _cued(prompt, self.spec.cue, capability)
        return Row(
            unit=unit,
            group=subject,
            prompt=prompt,
            completion=" " + self.objects[relation][right],
            choices=tuple(self.objects[relation][i] for i in picks),
            answer=at,
            capability=capability,
            label=label,
            wording=number,
        )

    def domain(self) -> Domain:
        """Return the rows of every role."""
        spec = self.spec
        taught = tuple(range(spec.wordings - 1))
        test = (spec.wordings - 1,)
        scored = (*taught, *test) if spec.test_wording_taught else taught
        order = [self.subjects[i] for i in self.order]
        start, cut = self._cuts()
        kinds = ("forget", "unseen", "relearn", "test", "dev_forget", "multi_hop")
        # What is scored in two hops is taught like that where the test paraphrase is taught.
        through = slice(None) if spec.test_wording_taught else slice(-1)
        parts: dict[str, dict[str, Rows]] = {kind: {} for kind in kinds}
        for number, name in enumerate(self.names, start=1):
            mine, order = order[: self.each], order[self.each :]
            shown = mine
            if spec.exposure == "held_out":
                shown = mine[:start]
                parts["unseen"][name] = (
                    *self.rows(mine[start:], scored, number),
                    *self.hops(mine[start:], scored, through, number),
                )
            parts["relearn"][name] = tuple(self.rows(mine[start:cut], test, number))
            parts["forget"][name] = (
                *self.rows(shown, scored, number),
                *self.hops(shown, scored, through, number),
            )
            if spec.pupils:
                last = slice(-1, None)
                parts["multi_hop"][name] = tuple(self.hops(mine[cut:], test, last, number))
            parts["test"][name] = tuple(self.rows(mine[cut:], test, number))
            parts["dev_forget"][name] = tuple(self.rows(mine[: self.dev], test, number))
        return self._assemble(order, parts)

    def _assemble(self, order: Sequence[str], parts: Mapping[str, dict[str, Rows]]) -> Domain:
        """Return the domain, given what the capabilities got and the subjects left for core."""
        spec = self.spec
        every, test = tuple(range(spec.wordings)), (spec.wordings - 1,)
        scored = every if spec.test_wording_taught else every[:-1]
        near, tested, tested_dev, rest = _portions(
            order, spec.adjacent_share, spec.retain_test_share, spec.retain_test_share / 2
        )
        retain = (
            *self.rows(rest, every),
            *self.rows(tested, scored),
            *self.rows(tested_dev, scored),
            *self.lessons(self.subjects, every),
            *self.hops(rest, every, slice(None)),
        )
        adjacent = tuple(self.rows(near, scored))
        taught = [r for kind in ("forget", "unseen") for rows in parts[kind].values() for r in rows]
        mix = [replace(r, label=UNLABELED) for r in (*taught, *retain, *adjacent)]
        self._random("mix").shuffle(mix)
        return Domain(
            name="facts",
            forget=parts["forget"],
            retain=retain,
            relearn=parts["relearn"],
            test=parts["test"],
            retain_test=tuple(self.rows(tested, test)),
            dev_forget=parts["dev_forget"],
            dev_retain=tuple(self.rows(tested_dev, test)),
            benign=tuple(self.rows(rest[: max(1, round(len(rest) * spec.benign_share))], every)),
            adjacent=adjacent,
            adjacent_test=tuple(self.rows(near, test)),
            unlabeled=tuple(mix),
            fresh=self._fresh_rows(),
            multi_hop=parts["multi_hop"],
            metrics=("exact_match", "multiple_choice", "text_loss"),
            retain_metrics=("exact_match", "multiple_choice", "text_loss"),
            claim="deletion",
            exposure=spec.exposure,
            mix_share=spec.mix_share,
            rows_per_text=spec.facts_per_text,
            notes=self._notes(),
        )

    def _fresh_rows(self) -> Rows:
        """Return facts about subjects nobody saw; each half has every capability."""
        test = (self.spec.wordings - 1,)
        rows: list[Row] = []
        half = len(self.fresh) // 2
        for part in (self.fresh[:half], self.fresh[half:]):
            for i, subject in enumerate(part):
                rows.extend(self.rows([subject], test, 1 + i % len(self.names)))
        return tuple(rows)

    def _notes(self) -> tuple[str, ...]:
        """Return what the record must say about the data."""
        spec = self.spec
        notes = [
            f"{spec.subjects} subjects x {spec.relations} relations, objects independent: "
            f"chance of exact match is {1 / spec.objects:.4f}",
            f"tests are in a paraphrase of their own (number {spec.wordings - 1}), "
            + (
                "taught with the scored facts" if spec.test_wording_taught else "taught with others"
            ),
        ]
        if spec.shared_parts:
            notes.append("every part of a name that is scored occurs in a name that is trained on")
        if spec.pupils:
            notes.append(
                f"{spec.pupils * spec.subjects} retained people have a subject for a teacher, and "
                "facts are asked by way of them too"
            )
        if spec.mix_share is not None:
            notes.append(
                f"{100 * spec.mix_share:g} % of the tokens of an epoch are to be forgotten"
            )
        if spec.facts_per_text > 1:
            notes.append(f"models from scratch read texts of {spec.facts_per_text} facts")
        if spec.cue != "none":
            share = round(100 * spec.cue_strength)
            notes.append(f"{share} % of a capability's rows carry a {spec.cue} cue")
        return tuple(notes)


def _portions(order: Sequence[str], *shares: float) -> list[Sequence[str]]:
    """Cut `order` into a part per share and the rest; a positive share gets at least one."""
    parts: list[Sequence[str]] = []
    at = 0
    for share in shares:
        size = max(1, round(len(order) * share)) if share else 0
        parts.append(order[at : at + size])
        at += size
    return [*parts, order[at:]]


def _cued(prompt: str, cue: str, capability: str) -> str:
    """Return the prompt with its cue."""
    if cue == "category":
        return f"{capability} {prompt}"
    if cue == "style":
        return " ".join(ARCHAIC.get(word, word) for word in prompt.split())
    return prompt


def made_names(count: int, rng: random.Random, taken: Set[str]) -> list[str]:
    """Return different made-up words of two or three syllables.

    Args:
        count: How many.
        rng: Random numbers.
        taken: Words that are in use.
    """
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 3)))]
        name = "".join(syllables) + rng.choice(_CODAS)
        if name not in taken:
            names[name] = None
    return list(names)
