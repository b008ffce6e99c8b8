"""Two real languages: one stays, the other is to be forgotten, over the same verses.

What ships are 5,778 verses of five books in English and Spanish, both in the public domain
(`shipped/LICENSE-verses.txt`); `excise fetch languages` gets both books whole, as the modules that
SWORD programs read. Chapters are cut into roles once for both languages, so that the test set and
`retain_test` say the same things: what differs between their losses is the language alone. This
module imports no torch.
"""

from __future__ import annotations

import html
import lzma
import random
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from excise.core.errors import UserError, counted
from excise.data.domain import CORE, UNLABELED, Domain, Row, Rows
from excise.data.spec import DomainSpec
from excise.data.split import hashed_order, portions
from excise.domains.corpus import text_tokenizer
from excise.fetch import known, require

Language = Literal["en", "es"]

Verse = tuple[str, str, str]
"""Book, chapter and verse; its English; its Spanish."""

COLUMN: Final[Mapping[Language, int]] = {"en": 1, "es": 2}
"""Where a language stands in a `Verse`."""

SHARES: Final = {"relearn": 0.15, "test": 0.15, "dev": 0.06, "spare": 0.08}
"""Shares of the chapters; the rest are the method's."""

LANGUAGES_FIT: Final[Mapping[str, Any]] = {
    "steps": 800, "lr": 3e-3, "batch_size": 32, "warmup": 40, "schedule": "cosine",
    "min_lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.05, "clip": 1.0,
}  # fmt: skip
"""Suggested `FitConfig` for the shipped verses."""

TESTAMENTS: Final = ("ot", "nt")
"""Parts of a SWORD module, in order."""

LARGEST_BLOCK: Final = 1 << 24
"""Bytes that a block may unpack to."""

_NOTES = re.compile(r"<(note|title)\b.*?</\1>", re.DOTALL)
_CHAPTER = re.compile(r'<chapter [^>]*osisID="([A-Za-z0-9]+\.\d+)"[^>]*\ssID=')
_BOOK = re.compile(r'<div(?=\s)[^>]*\ssID="[^"]*"[^>]*type="book"')


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
    """Verses at most, whole chapters chosen by hash; 0 for all."""
    vocabulary: int = Field(default=1024, ge=300, le=16384)
    """Tokens of the tokenizer, which is trained on the rows the method sees, both languages."""
    exposure: Literal["seen", "held_out"] = "held_out"
    """`held_out`: relearn and test set are taught to no model and the claim is the language;
    `seen`: the method sees their verses too and the claim is these texts."""
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
        return text_tokenizer(tuple(row.text for row in rows), self.vocabulary)

    def hashes(self) -> Mapping[str, Mapping[str, str]]:
        """Return the pinned SHA-256 of the fetched files."""
        if self.source == "shipped":
            return {}
        members = [m for p in known()["languages"].packages for m in p.members]
        return {f"forget.{self.forget}": {m.to: m.sha256 for m in members}}

    def build(self, model: object = None) -> Domain:
        """Return the domain; see `DomainSpec.build`. The rows do not depend on the model."""
        name, other = self.forget, self.retain
        parts = self._parts()
        seen = self.exposure == "seen"
        shown = [*parts["method"]]
        if seen:
            shown += [*parts["dev"], *parts["relearn"], *parts["test"]]
        forget = _rows(shown, name, name)
        retain = _rows(parts["method"], other)
        mix = [replace(row, label=UNLABELED) for row in (*forget, *retain)]
        return Domain(
            name="languages",
            forget={name: forget},
            retain=retain,
            relearn={name: _rows(parts["relearn"], name, name)},
            test={name: _rows(parts["test"], name, name)},
            retain_test=_rows(parts["test"], other),
            dev_forget={name: _rows(parts["dev"], name, name)},
            dev_retain=_rows(parts["dev"], other),
            benign=_rows(parts["relearn"], other),
            unlabeled=tuple(hashed_order(mix, [row.unit for row in mix], self.seed)),
            fresh=_fresh(parts["spare"], name, self.seed),
            metrics=("text_loss",),
            retain_metrics=("text_loss",),
            claim="deletion" if seen else "capability",
            exposure=self.exposure,
            notes=(
                f"forget: {_NAMES[name]}; retain: {_NAMES[other]}; a verse is the unit, and no "
                "chapter is in two roles",
                "the held-out test set and the scored retained rows are the same verses in two "
                "languages; the attacker's harmless rows are the relearn set in the retained one",
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
                f"verses: {self.verses} verses are {counted(len(order), 'chapter')}, too few to "
                f"cut relearn, test and dev sets from; take {int(least)} chapters or more (1000 "
                "verses)"
            )
        parts = portions(order, list(SHARES.values()))
        return {
            name: [verse for key in part for verse in chapters[key]]
            for name, part in zip((*SHARES, "method"), parts, strict=True)
        }


_NAMES: Final[Mapping[Language, str]] = {
    "en": "English (the World English Bible's words)",
    "es": "Spanish (Reina-Valera 1909)",
}


def _cut(order: list[str], chapters: Mapping[str, list[Verse]], verses: int) -> list[str]:
    """Return the first chapters that together have at most so many verses."""
    first, total = [], 0
    for key in order:
        total += len(chapters[key])
        if total > verses:
            break
        first.append(key)
    return first


def _rows(verses: Iterable[Verse], language: Language, capability: str = "") -> Rows:
    """Return verses in one language, labelled as the capability where there is one."""
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
    rng = random.Random(f"languages:{seed}")
    table: dict[int, str] = {}
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz"):
        # A cycle moves every letter, so that no word stays what it was.
        cycle = rng.sample(letters, len(letters))
        for letter, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            table |= {ord(letter): other, ord(letter.upper()): other.upper()}
    return tuple(
        replace(
            row,
            unit=f"fresh/{row.unit}",
            group=f"fresh/{row.group}",
            text=row.text.translate(table),
        )
        for row in _rows(verses, language, language)
    )


def read_verses(folder: Path, prefix: str) -> dict[str, str]:
    """Return the verses of a SWORD module by `Book.chapter.verse`, markup and notes left out.

    Verses are counted inside the chapter whose heading precedes them, so that two modules are
    aligned whatever numbering each was made with.

    Args:
        folder: Folder of three files a testament: `PREFIX-ot.bzs` says where its zlib blocks lie,
            `PREFIX-ot.bzv` where in which block a verse lies, `PREFIX-ot.bzz` holds the blocks.
        prefix: Which module.

    Raises:
        UserError: If a file is missing or broken.
    """
    out: dict[str, str] = {}
    for part in TESTAMENTS:
        chapter, number = "", 0
        for entry in _entries(folder / f"{prefix}-{part}"):
            begun = _CHAPTER.findall(entry)
            if begun or _BOOK.search(entry):
                chapter, number = (begun[-1] if begun else ""), 0
            elif chapter:
                number += 1
                text = plain_verse(entry)
                if text:
                    out[f"{chapter}.{number}"] = text
    return out


def plain_verse(entry: str) -> str:
    """Return the words of an OSIS entry: no notes, titles or tags, white space evened out."""
    bare = re.sub(r"<[^>]*>", "", _NOTES.sub(" ", entry))
    return " ".join(html.unescape(bare).split())


def _entries(stem: Path) -> Iterator[str]:
    """Yield the text of every entry of one testament, headings included."""
    try:
        index, places, packed = (stem.with_suffix(s).read_bytes() for s in (".bzs", ".bzv", ".bzz"))
    except OSError:
        raise UserError(f"{stem}.* is not there; run: excise fetch languages") from None
    try:
        blocks = [
            _unpack(packed[at : at + size]) for at, size, _ in struct.iter_unpack("<III", index)
        ]
        for block, start, length in struct.iter_unpack("<IIH", places):
            yield blocks[block][start : start + length].decode("utf-8") if length else ""
    except (struct.error, zlib.error, IndexError, UnicodeDecodeError):
        raise UserError(f"{stem}.* is not a readable module; run: excise fetch languages") from None


def _unpack(data: bytes) -> bytes:
    """Return a block, which may not unpack to more than `LARGEST_BLOCK`."""
    if not data:
        return b""
    stream = zlib.decompressobj()
    out = stream.decompress(data, LARGEST_BLOCK)
    if not stream.eof:
        raise zlib.error("block too large or cut")
    return out
