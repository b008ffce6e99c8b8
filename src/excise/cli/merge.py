"""`excise merge OUT`: make one output folder of those that the shards of a run left."""

from __future__ import annotations

from pathlib import Path

from excise.cli.options import MergeOptions
from excise.core.errors import UserError
from excise.report.terminal import finish
from excise.run.merge import merge, shards_of


def main(options: MergeOptions) -> int:
    """Merge the shards of an output folder, or those that are named."""
    folders = [Path(name) for name in options.folders]
    if options.out is None:
        if len(folders) > 1:
            raise UserError("several folders are named; say with --out where their run shall lie")
        out = folders[0]
        folders = shards_of(out)
    else:
        out = options.out
    for note in merge(folders, out):
        print(f"note: {note}")
    return finish(out)
