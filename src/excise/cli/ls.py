"""`excise ls`: what there is. Reads the static index and imports no torch."""

from __future__ import annotations

import importlib.metadata

from excise.cli.index import FAMILIES, load_index
from excise.core.errors import UserError, nearest

HOW = {
    "recipes": "excise run NAME",
    "studies": "excise study NAME, or excise run NAME",
    "domains": "excise fetch lists what some of them need",
}
"""How members of a family are used."""


def main(args: list[str]) -> int:
    """List one family or all of them."""
    if args and args[0] in ("-h", "--help"):
        print(f"usage: excise ls [{'|'.join(FAMILIES)}]\n\nList what there is.")
        return 0
    for word in args:
        if word not in FAMILIES:
            raise UserError(f"unknown list '{word}'; {nearest(word, FAMILIES)}")
    index = load_index()
    for i, family in enumerate(args or FAMILIES):
        entries = index[family]
        width = max((len(e["name"]) for e in entries), default=0)
        how = HOW.get(family, "")
        print(("\n" if i else "") + family + (f"  ({how})" if how else ""))
        for entry in entries:
            print(f"  {entry['name']:<{width}}  {entry['what']}")
            for key, value in entry.items():
                if args and key not in ("name", "what") and value:
                    print(f"  {'':<{width}}    {key}: {value}")
        for point in importlib.metadata.entry_points(group=f"excise.{family}"):
            print(f"  {point.name:<{width}}  from {point.value}")
    return 0
