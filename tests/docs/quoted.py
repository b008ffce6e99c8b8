"""Numbers in the docs: where they stand, and which have a record."""

from __future__ import annotations

import re
from pathlib import Path

from excise_studies.publish import MARKS

ROOT = Path(__file__).parents[2]

NUMBER = re.compile(r"(?<![\w.-])-?(?:\d[\d,]*)?\.?\d+(?:e-\d+)?(?![\w^])")
"""A number that begins a word: not that of `D4`, `int8` or `Apache-2.0`."""

ASIDE = re.compile(
    r"^```.*?^```|`[^`]*`|!?\[[^\]]*\]\([^)]*\)|<!--.*?-->", re.DOTALL | re.MULTILINE
)
"""What quotes no measurement: code, links."""

LINK = re.compile(r"\]\(([\w-]+\.md)#([\w-]+)\)")


def in_order(text: str) -> list[str]:
    """Return the numbers in a text as they are written."""
    return NUMBER.findall(ASIDE.sub(" ", text))


def numbers(text: str) -> set[float]:
    """Return the numbers in a text, without sign."""
    return {abs(float(number.replace(",", ""))) for number in in_order(text)}


def without_blocks(page: str) -> str:
    """Return a page without what was rendered from records."""
    return MARKS.sub("", page)


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def section(page: str, anchor: str) -> str:
    """Return the section of a page with an anchor, its own sections included; empty if none."""
    parts = re.split(r"^(#+) (.*)$", page, flags=re.MULTILINE)
    for i in range(1, len(parts), 3):
        if slug(parts[i + 1]) == anchor:
            text, j = parts[i + 2], i + 3
            while j < len(parts) and len(parts[j]) > len(parts[i]):
                text += parts[j + 2]
                j += 3
            return text
    return ""


def entries(page: str) -> list[str]:
    """Return the paragraphs, tables and items of lists of a page, blocks and code left out."""
    prose = re.sub(
        r"^```.*?^```|^#+ .*?$", "", without_blocks(page), flags=re.DOTALL | re.MULTILINE
    )
    return [part.strip() for part in re.split(r"\n(?=- )|\n\n", prose)]


def foreign(entry: str, pages: dict[str, str]) -> set[float]:
    """Return the numbers of an entry that stand in none of the sections it links to."""
    there = " ".join(section(pages[page], anchor) for page, anchor in LINK.findall(entry))
    return numbers(entry) - numbers(there)
