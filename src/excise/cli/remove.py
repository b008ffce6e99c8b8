"""`excise remove METHOD`: the everyday case, a model and two files in, an edited model out."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from excise.cli.flags import flag_names, flags, override, overrides, progress
from excise.core.config import ConfigError
from excise.core.errors import UserError
from excise.core.plugins import is_code


@dataclass
class RemoveOptions:
    """Remove a capability with one method.

    Settings of the method: --layer 6, --fit.lr 1e-4, --lora.rank 8; excise show METHOD lists them.
    """

    method: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD")]
    """Name of a method, or ./mine.py:Class with --allow-code."""
    model: str
    """Folder, hub id, GGUF file, or a name that excise fetch knows."""
    forget: tyro.conf.UseAppendAction[tuple[str, ...]]
    """File of what to remove, as FILE or NAME=FILE; repeat it for several capabilities."""
    retain: str
    """File of what to keep."""
    out: Path
    """Output folder; the edited model is OUT/model."""
    adjacent: str = ""
    """File of entangled neighbours, scored apart."""
    relearn: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File the attacker trains on, as FILE or NAME=FILE; cut from forget when missing."""
    test: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File that is scored, as FILE or NAME=FILE; cut from forget when missing."""
    audit: Literal["none", "smoke", "standard", "strong"] = "none"
    """Attack the result at this budget."""
    revision: str | None = None
    """Revision of a hub id."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """Device; auto takes an accelerator where there is one."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    refit: bool = False
    """After the split has been audited, repeat the method on all forget rows."""
    workers: int = 0
    """Worker processes; 0 takes one for each core."""
    dry_run: bool = False
    """Print what would be done and what it would cost, and stop."""
    force: bool = False
    """Start even if the estimate says it cannot fit."""
    quiet: bool = False
    """Show no progress."""
    allow_code: bool = False
    """Run code of one's own named as ./file.py:Class."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(RemoveOptions, args, "excise remove")
    settings = override({"name": options.method}, overrides(rest, flag_names(RemoveOptions)))
    from excise.report.terminal import finish
    from excise.requests.registry import parse_recipe
    from excise.run.estimate import plan
    from excise.run.run import run

    for flag, what in (("model", "model"), ("forget", "file of what to remove")):
        if not getattr(options, flag):
            raise UserError(f"--{flag} is missing; name the {what}")
    data = recipe_of(options, settings)
    try:
        recipe = parse_recipe(data, allow_code=options.allow_code)
    except ConfigError as error:
        raise ConfigError([as_flag(p) for p in error.problems]) from None
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; name a folder")
    estimate = plan(recipe, options.out)
    if options.dry_run:
        print(estimate.text())
        return 0
    estimate.refuse(force=options.force)
    command = "excise remove " + shlex.join(args)
    with progress(options.out / "events.jsonl", quiet=options.quiet) as emit:
        run(recipe, options.out, workers=options.workers, emit=emit, command=command, kind="remove")
    return finish(options.out)


def as_flag(problem: str) -> str:
    """Name a problem as the command line does: `arms.rmu.fit.lr` is `--fit.lr`."""
    problem = re.sub(r"^arms\.[^.:]+\.name: ", "", problem)
    problem = re.sub(r"^arms\.([^.:]+): ", r"\1 ", problem)
    problem = re.sub(r"^arms\.[^.:]+\.", "--", problem)
    return re.sub(r"^(domain|model|audit)\.(path|budget)?\.?", r"--", problem)


def recipe_of(options: RemoveOptions, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe that a `remove` command line stands for, as plain data."""
    name = options.method.rpartition(":")[2].lower() if is_code(options.method) else options.method
    domain: dict[str, Any] = {
        "name": "files",
        "forget": named(options.forget, "--forget"),
        "retain": options.retain,
        "seed": options.seed,
        "sensitive": options.sensitive,
    }
    if options.adjacent:
        domain["adjacent"] = options.adjacent
    for role in ("relearn", "test"):
        if getattr(options, role):
            domain[role] = named(getattr(options, role), f"--{role}")
    return {
        "name": f"remove-{name}",
        "title": f"{name} on {Path(options.model).name}",
        "domain": domain,
        "model": {"path": options.model, "revision": options.revision},
        "arms": {name: settings},
        "audit": {"budget": options.audit},
        "refit": options.refit,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device,
    }


def named(values: tuple[str, ...], flag: str) -> dict[str, str]:
    """Turn FILE and NAME=FILE into a mapping; a lone FILE is called `forget`.

    Raises:
        UserError: If a name is given twice or is no word.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or "/" in name or "." in name:
            name, file = "forget", value
        if name in found:
            raise UserError(f"{flag}: '{name}' is given twice; write NAME=FILE for each capability")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{flag}: '{name}' is no name; use letters, digits, '-' and '_'")
        found[name] = file
    return found
