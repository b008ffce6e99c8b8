"""Verses out of the modules that SWORD programs read, by chapter and verse.

A module is three files a testament: `.bzs` says where its zlib blocks lie, `.bzv` where in which
block a verse lies, `.bzz` holds the blocks. This module imports no torch.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from excise.core.errors import UserError

TESTAMENTS: Final = ("ot", "nt")
"""Parts of a module, in order."""

LARGEST: Final = 1 << 24
"""Bytes that a block may unpack to."""

_NOTES = re.compile(r"<(note|title)\b.*?</\1>", re.DOTALL)
_CHAPTER = re.compile(r'<chapter [^>]*osisID="([A-Za-z0-9]+\.\d+)"[^>]*\ssID=')
_BOOK = re.compile(r'<div(?=\s)[^>]*\ssID="[^"]*"[^>]*type="book"')


def read_verses(folder: Path, prefix: str) -> dict[str, str]:
    """Return the verses of a module by `Book.chapter.verse`, markup and notes left out.

    Verses are counted inside the chapter whose heading precedes them, so that two modules are
    aligned whatever numbering each was made with.

    Args:
        folder: Folder of the files `PREFIX-ot.bzs`, `PREFIX-ot.bzv` and so on.
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
    """Return a block, which may not unpack to more than `LARGEST`."""
    if not data:
        return b""
    stream = zlib.decompressobj()
    out = stream.decompress(data, LARGEST)
    if not stream.eof:
        raise zlib.error("block too large or cut")
    return out
