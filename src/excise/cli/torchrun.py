"""A verb in several processes that torchrun started: process 0 runs it, the others help."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from excise.cli.flags import read
from excise.cli.options import VERBS, Options
from excise.core.errors import UserError

Say = Callable[[str, int], int]
"""Prints a sentence and returns an exit code."""


def several() -> bool:
    """Return whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def in_words(args: Sequence[str]) -> str:
    """Return the whole command, as it is written on one machine or on each of several."""
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    words = ["torchrun", *(["--nnodes", nodes] if nodes != "1" else []), "--nproc-per-node"]
    return shlex.join([*words, os.environ.get("LOCAL_WORLD_SIZE", "N"), "-m", "excise", *args])


def main(args: Sequence[str], guarded: Callable[[Callable[[], int], Say], int], say: Say) -> int:
    """Run a verb as one of several processes and return the exit code of all.

    Args:
        args: The verb and its words.
        guarded: Runs what it is given and turns what goes wrong into a sentence.
        say: Prints one.
    """
    pool: Any = None

    def once(sentence: str, code: int) -> int:
        rank = os.environ.get("RANK", "0")
        speaks = rank == "0" if pool is None else pool.first_to_speak()
        return say(sentence, code) if speaks else code

    def work() -> int:
        nonlocal pool
        options = options_of(args[0], args[1:])
        pool = importlib.import_module("excise.train.torchrun_pool").join()
        if pool.rank:
            return int(pool.follow())
        verb: Callable[[Options], int] = importlib.import_module(f"excise.cli.{args[0]}").main
        return verb(replace(options, torchrun=pool))

    code = guarded(work, once)
    if pool is not None and not pool.rank:
        pool.end(code)
    return code


def options_of(verb: str, words: Sequence[str]) -> Options:
    """Return the options of a verb that several processes can run.

    Raises:
        UserError: If the verb is for one process, or is told beside who does its jobs.
    """
    cls = VERBS.get(verb, Options)
    if not hasattr(cls, "workers") or {"-h", "--help"} & set(words):
        raise UserError(f"excise {verb} needs one process; start it without torchrun")
    options = read(cls, words, f"excise {verb}")
    for flag in ("workers", "shard", "pool"):
        if getattr(options, flag, None):
            raise UserError(
                f"--{flag} says who does the jobs, and so does torchrun; leave one of them out"
            )
    if getattr(options, "endpoint", None):
        raise UserError("an --endpoint is asked by one process; start without torchrun")
    return replace(options, command=in_words([verb, *words]))
