"""The command: reads a verb's flags, then imports what the verb needs and runs it.

`excise --help`, `excise VERB --help` and `excise ls` import no torch. An error that a user can
cause is one sentence on stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import errno
import importlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

from excise.cli import torchrun
from excise.cli.flags import help_text, read
from excise.cli.ls import load_index
from excise.cli.options import VERBS, Options
from excise.core.errors import DiskFull, Diverged, ProcessLost, UserError, nearest

DONE, FAILED, USAGE = 0, 1, 2
"""Exit codes: done, failed, bad usage or input."""
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of a run that was stopped and resumes with the same command."""

LIMITS = {
    errno.EMFILE: "too many files are open; allow more (ulimit -n)",
    errno.EFBIG: "a file may not grow as large as it must; allow more (ulimit -f)",
}
"""Limits of the system, as libraries report them in errors of their own kinds."""

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
        print(overview())
        return DONE
    if args[0] == "--version":
        try:
            print(f"excise {version('excise')}")
        except PackageNotFoundError:
            print("excise from source")
        return DONE
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        if torchrun.several():
            again = torchrun.in_words(args)
            return torchrun.main(args, lambda work, say: _guarded(work, again, say), _say)
        return _guarded(lambda: run_verb(args[0], args[1:]), "excise " + shlex.join(args), _say)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _guarded(work: Callable[[], int], again: str, say: torchrun.Say) -> int:
    """Do some work and turn what went wrong into one sentence and an exit code.

    Args:
        work: Runs a verb.
        again: The command line, which resumes what was stopped.
        say: Prints a sentence and returns the code.
    """
    try:
        return work()
    except (Diverged, DiskFull, ProcessLost) as error:
        return say(str(error), FAILED)
    except UserError as error:
        return say(str(error), USAGE)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        why = str(error).lower()
        if isinstance(error, OSError) and not error.filename and _unwritten():
            return say(f"standard output cannot be written: {error.strerror}", FAILED)
        if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in why:
            return say(f"the disk is full; free some space, then: {again}", FAILED)
        for number, sentence in LIMITS.items():
            if getattr(error, "errno", 0) == number or os.strerror(number).lower() in why:
                return say(f"{sentence}, then: {again}", FAILED)
        if isinstance(error, MemoryError) or "out of memory" in why or "allocate memory" in why:
            return say(
                f"out of memory; use a smaller fit.micro_size or --lora.rank 8, then: {again}",
                FAILED,
            )
        if not isinstance(error, OSError):
            raise
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        named = error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
        why = (error.strerror or str(error)).lower()
        return say(where + why + "; name another" * named, USAGE if named else FAILED)
    except KeyboardInterrupt:
        return say(f"interrupted; to resume: {again}", INTERRUPTED)
    except Terminated:
        return say(f"terminated; to resume: {again}", TERMINATED)


def run_verb(name: str, args: Sequence[str]) -> int:
    """Read the flags of a verb, or print its help, before anything heavy is imported.

    Raises:
        UserError: If there is no such verb, or its flags are wrong.
    """
    if name not in VERBS:
        raise UserError(f"unknown command '{name}'; {nearest(name, VERBS)}")
    if "-h" in args or "--help" in args:
        print(help_text(VERBS[name], f"excise {name}") + method_help(name, args), end="")
        return DONE
    options = read(VERBS[name], args, f"excise {name}")
    main: Callable[[Options], int] = importlib.import_module(
        f"excise.cli.{MODULES.get(name, name)}"
    ).main
    return main(options)


def method_help(name: str, args: Sequence[str]) -> str:
    """Return the settings of the method that the words after `remove` name, if they name one."""
    if name != "remove":
        return ""
    methods = {entry["name"]: entry["settings"] for entry in load_index()["methods"]}
    method = next((word for word in args if methods.get(word)), None)
    return "\n".join([f"\nsettings of {method}:", *methods[method], ""]) if method else ""


def _say(sentence: str, code: int) -> int:
    with suppress(OSError):
        print(f"excise: {sentence}", file=sys.stderr, flush=True)
    return code


def overview() -> str:
    """Return what `excise --help` prints."""
    width = max(map(len, VERBS))
    lines = "\n".join(
        f"  {name:<{width}}  {(cls.__doc__ or '').splitlines()[0].rstrip('.')}"
        for name, cls in VERBS.items()
    )
    return (
        "excise: cut a capability out of a neural network, and measure how deep the cut went.\n\n"
        f"usage: excise VERB [options]        excise VERB --help\n\n{lines}\n\n"
        "exit codes: 0 done, 1 failed, 2 bad usage or input, 3 below what was required,\n"
        "            4 undecided: too little was tested to say,\n"
        "            130/143 interrupted (the same command resumes)"
    )


def entry() -> None:
    """Entry point of the `excise` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:  # what a library has to say is not said before the sentence
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"  # of the workers
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    code = main()
    if _unwritten():
        code = _say("standard output cannot be written; files that were asked for are", FAILED)
    sys.exit(code)


def _unwritten() -> bool:
    """Return whether what was printed could not be, and let go of it then."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False


if __name__ == "__main__":
    entry()
