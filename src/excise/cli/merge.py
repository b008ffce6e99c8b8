"""`excise merge OUT`: make one output folder of those that the shards of a run left."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from excise.cli.options import AuditOptions, MergeOptions, StudyOptions
from excise.core.errors import UserError
from excise.report.terminal import finish
from excise.run.merge import merge, shards_of
from excise.run.output import check_out
from excise.run.pools import Shard, cluster_of, note_done, shard_of


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


def share_of(
    options: StudyOptions | AuditOptions, out: Path
) -> tuple[Path, Shard | None, str | None]:
    """Read who does the jobs.

    Args:
        options: Has `--shard` and `--pool`.
        out: The output folder that the user means.

    Returns:
        The output folder of this process, its share, and the address of a Ray cluster.

    Raises:
        UserError: If a flag is wrong, or the folder cannot be one.
    """
    shard, cluster = shard_of(options.shard, out), cluster_of(options.pool)
    if shard is not None and cluster is not None:
        raise UserError(
            "--shard is given beside --pool, which hands jobs to all machines itself; leave one out"
        )
    folder = out if shard is None else shard.folder
    check_out(folder)
    return folder, shard, cluster


def whole_command(command: str) -> str:
    """Return the command line that makes a run again in one piece, as the record has it."""
    return re.sub(r" --shard[ =]\S+", "", command)


def leave(folder: Path, shard: Shard | None) -> int:
    """Print what a run ended with, as a verb's last step, and return the exit code.

    A shard that is done is no verdict: what the run requires is held against the merged record.
    """
    if shard is None:
        return finish(folder)
    note_done(shard)
    merging = f"excise merge {shlex.quote(str(shard.out))}"
    print(f"shard {shard} is done; once all {shard.of} are: {merging}")
    return 0
