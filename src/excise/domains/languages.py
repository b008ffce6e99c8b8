"""Two real languages: one stays, the other is to be forgotten, over the same verses.

What ships are 5,778 verses of five books in English and Spanish, both in the public domain
(`data/LICENSE-verses.txt`); `excise fetch languages` gets both books whole. Chapters are cut into
roles once for both languages, so that V and `retain_test` say the same things: what differs
between their losses is the language alone. This module imports no torch.
"""

from __future__ import annotations

import lzma
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Final, Literal

from pydantic import Field

from excise.core.errors import UserError
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.spec import DomainSpec
from excise.domains.passages import hashed_order, portions
from excise.fetch import known, require

Language = Literal["en", "es"]

Verse = tuple[str, str, str]
"""Book, chapter and verse; its English; its Spanish."""

COLUMN: Final[Mapping[Language, int]] = {"en": 1, "es": 2}
"""Where a language stands in a `Verse`."""

SHARES: Final = {"relearn": 0.15, "test": 0.15, "dev": 0.06, "spare": 0.08}
"""Shares of the chapters; the rest are the method's."""

LANGUAGES_MODEL: Final[Mapping[str, Any]] = {"family": "llama", "width": 96, "blocks": 2}
"""Suggested `Scratch` for the shipped verses."""

LANGUAGES_FIT: Final[Mapping[str, Any]] = {
    "steps": 800, "lr": 3e-3, "batch_size": 32, "warmup": 40, "schedule": "cosine",
    "min_lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.05, "clip": 1.0,
}  # fmt: skip
"""Suggested `FitConfig` for the shipped verses."""

LANGUAGES_MAX_LENGTH: Final = 64
"""Suggested tokens per row: most verses are whole."""


@cache
def shipped_verses() -> tuple[Verse, ...]:
    """Return the verses that ship, in the order of the books."""
    packed = files("excise").joinpath("domains/shipped/verses.tsv.xz").read_bytes()
    lines = lzma.decompress(packed).decode().splitlines()
    parts = [line.split("\t") for line in lines]
    return tuple((key, english, spanish) for key, english, spanish in parts)


@cache
def fetched_verses() -> tuple[Verse, ...]:
    """Return the verses that both whole books have, in the order of the English one.

    Raises:
        UserError: If they were not fetched.
    """
    from excise.domains.sword import read_verses

    folder = require("languages")
    english, spanish = read_verses(folder, "en"), read_verses(folder, "es")
    return tuple((key, text, spanish[key]) for key, text in english.items() if key in spanish)


class Languages(DomainSpec):
    """English stays, Spanish is to be forgotten (or the other way round), by the loss on text."""

    name: Literal["languages"] = "languages"
    """Name in recipes and on the command line."""
    forget: Language = "es"
    """The language to remove; the other is retained."""
    source: Literal["shipped", "fetched"] = "shipped"
    """`shipped`: five books; `fetched`: all that both have (`excise fetch languages`)."""
    verses: int = Field(default=0, ge=0)
    """Verses at most, whole chapters drawn by hash; 0 for all."""
    vocabulary: int = Field(default=1024, ge=300, le=16384)
    """Tokens of the tokenizer, which is trained on the rows the method sees, both languages."""
    exposure: Literal["seen", "held_out"] = "held_out"
    """`held_out`: T and V are taught to no model and the claim is the language; `seen`: the method
    sees their verses too and the claim is these texts."""
    seed: int = 0
    """Seed of the split."""

    @property
    def retain(self) -> Language:
        """The language that stays."""
        return "en" if self.forget == "es" else "es"

    def tokenizer(self) -> Any:
        """Return a byte-level BPE of both languages, trained on what the method sees."""
        domain = self.build(None)
        rows = (*domain.forget[self.forget], *domain.retain)
        return _tokenizer(tuple(row.text for row in rows), self.vocabulary)

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return the pinned SHA-256 of the fetched files."""
        if self.source == "shipped":
            return {}
        members = [m for p in known()["languages"].packages for m in p.members]
        return {f"forget.{self.forget}": {m.to: m.sha256 for m in members}}

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        name, kept = self.forget, self.retain
        parts = self._parts()
        seen = self.exposure == "seen"
        shown = [*parts["method"]]
        if seen:
            shown += [*parts["dev"], *parts["relearn"], *parts["test"]]
        forget = _rows(shown, name, name)
        retain = _rows(parts["method"], kept)
        mix = [replace(row, label=UNLABELED) for row in (*forget, *retain)]
        return Domain(
            name="languages",
            forget={name: forget},
            retain=retain,
            relearn={name: _rows(parts["relearn"], name, name)},
            test={name: _rows(parts["test"], name, name)},
            retain_test=_rows(parts["test"], kept),
            dev_forget={name: _rows(parts["dev"], name, name)},
            dev_retain=_rows(parts["dev"], kept),
            benign=_rows(parts["relearn"], kept),
            unlabeled=tuple(hashed_order(mix, [row.unit for row in mix], self.seed)),
            fresh=_fresh(parts["spare"], name, self.seed),
            metrics=("text_loss",),
            retain_metrics=("text_loss",),
            claim="deletion" if seen else "capability",
            exposure=self.exposure,
            notes=(
                f"forget: {_NAMES[name]}; retain: {_NAMES[kept]}; a verse is the unit, and no "
                "chapter is in two roles",
                "V and the scored retained rows are the same verses in two languages; the "
                "attacker's harmless rows are T in the retained one",
                "fresh units are verses in a language nobody speaks: letters exchanged, vowels "
                "among vowels, one way for all",
            ),
        )

    def _parts(self) -> dict[str, list[Verse]]:
        """Return verses by role; a chapter lies in one."""
        chapters: dict[str, list[Verse]] = {}
        for verse in shipped_verses() if self.source == "shipped" else fetched_verses():
            chapters.setdefault(verse[0].rpartition(".")[0], []).append(verse)
        order = hashed_order(list(chapters), list(chapters), self.seed)
        if self.verses:
            order = _cut(order, chapters, self.verses)
        least = -(-1 // min(SHARES.values()))
        if len(order) < least:
            raise UserError(
                f"verses: {self.verses} verses are {len(order)} chapter(s), too few to cut T, V "
                f"and dev from; take at least {int(least)} chapters, about 1000 verses"
            )
        found = portions(order, list(SHARES.values()))
        names = (*SHARES, "method")
        return {
            n: [v for key in part for v in chapters[key]]
            for n, part in zip(names, found, strict=True)
        }


_NAMES: Final[Mapping[Language, str]] = {
    "en": "English (the World English Bible's words)",
    "es": "Spanish (Reina-Valera 1909)",
}


def _cut(order: list[str], chapters: Mapping[str, list[Verse]], verses: int) -> list[str]:
    """Return the first chapters that together have at most so many verses."""
    kept, total = [], 0
    for key in order:
        total += len(chapters[key])
        if total > verses:
            break
        kept.append(key)
    return kept


def _rows(verses: Iterable[Verse], language: Language, capability: str = "") -> Rows:
    """Return verses in one language, told and named as the capability where there is one."""
    return tuple(
        Row(
            unit=f"{language}/{verse[0]}",
            group=f"{language}/{verse[0].rpartition('.')[0]}",
            text=verse[COLUMN[language]],
            capability=capability,
            label=1 if capability else CORE,
        )
        for verse in verses
    )


def _fresh(verses: Iterable[Verse], language: Language, seed: int) -> Rows:
    """Return verses whose letters were exchanged, vowels among vowels; chapters stay whole."""
    draw = random.Random(f"languages:{seed}")
    table: dict[int, str] = {}
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz"):
        # A cycle moves every letter, so that no word stays what it was.
        cycle = draw.sample(letters, len(letters))
        for one, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            table |= {ord(one): other, ord(one.upper()): other.upper()}
    return tuple(
        replace(row, unit=f"fresh/{row.unit}", group=f"fresh/{row.group}", text=_say(row, table))
        for row in _rows(verses, language, language)
    )


def _say(row: Row, table: Mapping[int, str]) -> str:
    """Return a row's text with its letters exchanged."""
    return row.text.translate(table)


@lru_cache(maxsize=8)
def _tokenizer(texts: tuple[str, ...], vocabulary: int) -> Any:
    """Return the tokenizer of these texts, trained once a process."""
    from excise.models.tiny import train_bpe

    return train_bpe(texts, vocabulary)
