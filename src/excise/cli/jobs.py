"""Who does the jobs of `run`, `remove`, `audit` and `study`, as their options say."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

from excise.cli.options import AuditOptions, RemoveOptions, StudyOptions
from excise.core.errors import UserError
from excise.core.events import Emit
from excise.report.terminal import finish
from excise.run.estimate import Plan
from excise.run.output import check_out
from excise.run.pools import Jobs, cluster_of, note_done, shard_of


def jobs_of(options: StudyOptions | AuditOptions | RemoveOptions, out: Path) -> Jobs:
    """Read who does the jobs.

    Args:
        options: Those of a verb.
        out: The output folder that the user means.

    Raises:
        UserError: If a flag is wrong, excludes another, or the folder cannot be one.
    """
    shard = cluster = None
    if not isinstance(options, RemoveOptions):
        shard, cluster = shard_of(options.shard, out), cluster_of(options.pool)
    for flag, given in (("--shard", shard is not None), ("--workers", options.workers > 0)):
        if given and cluster is not None:
            raise UserError(
                f"{flag} is given beside --pool, which hands jobs to all machines itself; leave "
                "one out"
            )
    folder = out if shard is None else shard.folder
    check_out(folder)
    return Jobs(folder, options.workers, shard, cluster, options.torchrun)


def admitted(jobs: Jobs, estimate: Plan, emit: Emit, *, force: bool) -> Jobs:
    """Plan as many workers of this machine as fit into its memory.

    The processes of torchrun and of a cluster have memory that is not looked at from here.

    Args:
        jobs: As `jobs_of` read them.
        estimate: What the run needs.
        emit: Gets a note where fewer start than there are cores or devices.
        force: Whether the user insists.

    Raises:
        UserError: If memory or disk is too small by the estimate.
    """
    if jobs.torchrun is not None or jobs.cluster is not None:
        estimate.check_disk(force=force)
        return jobs
    return replace(jobs, workers=estimate.admit(jobs.workers, emit, force=force))


def whole_command(command: str) -> str:
    """Return the command line that makes a run again in one piece, as the record has it."""
    return re.sub(r" --shard[ =]\S+", "", command)


def leave(jobs: Jobs) -> int:
    """Print what a run ended with, as a verb's last step, and return the exit code.

    A shard that is done is no verdict: what the run requires is held against the merged record.
    """
    if jobs.shard is None:
        return finish(jobs.out)
    note_done(jobs.shard)
    merging = f"excise merge {shlex.quote(str(jobs.shard.out))}"
    print(f"shard {jobs.shard} is done; once all {jobs.shard.of} are: {merging}")
    return 0
