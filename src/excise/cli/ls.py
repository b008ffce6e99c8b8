"""`excise ls`: what there is. Reads a generated index and imports no torch."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from excise.cli.options import LsOptions
from excise.core.errors import UserError, nearest

INDEX = Path(__file__).with_name("index.json")
"""What there is, by family; `python -m excise.cli.index` writes it."""

FAMILIES = ("methods", "attacks", "domains", "scores", "recipes", "studies")
"""What can be listed; packages add to each by entry points of the group `excise.FAMILY`."""

USED_BY = {
    "methods": "excise remove NAME",
    "domains": "excise fetch lists what some of them need",
    "scores": "evaluate.scores of a recipe",
    "recipes": "excise run NAME",
    "studies": "excise study NAME, or excise run NAME",
}
"""How members of a family are used."""


def load_index() -> dict[str, list[dict[str, Any]]]:
    """Return the index: one entry per member, by family."""
    index: dict[str, list[dict[str, Any]]] = json.loads(INDEX.read_text(encoding="utf-8"))
    return index


def main(options: LsOptions) -> int:
    """List some families, with all that the index says of each member, or all in short.

    Raises:
        UserError: If there is no such family.
    """
    for word in options.family:
        if word not in FAMILIES:
            raise UserError(f"unknown list '{word}'; {nearest(word, FAMILIES)}")
    index = load_index()
    for i, family in enumerate(options.family or FAMILIES):
        entries = index[family]
        width = max(len(entry["name"]) for entry in entries)
        usage = f"  ({USED_BY[family]})" if family in USED_BY else ""
        print(("\n" if i else "") + family + usage)
        for entry in entries:
            print(f"  {entry['name']:<{width}}  {entry['what']}")
            for key, value in entry.items() if options.family else ():
                if key not in ("name", "what", "settings") and value:
                    print(f"  {'':<{width}}    {key}: {value}")
        indexed = {entry["name"] for entry in entries}
        for point in importlib.metadata.entry_points(group=f"excise.{family}"):
            if point.name not in indexed:
                print(f"  {point.name:<{width}}  from {point.value}")
    return 0
