"""`excise audit`: attack a model, whoever edited it, and say how much comes back."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from excise.cli.flags import flag_names, flags, override, overrides, progress
from excise.cli.pair import edited_models, files_domain, recipe_of
from excise.core.errors import UserError


@dataclass
class AuditOptions:
    """Attack an output folder of excise, or any edited model beside its original.

    From an output folder everything is read from its record and only --out is written.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = ""
    """Output folder of run, demo or remove."""
    model: str = ""
    """The edited model, when there is no output folder."""
    original: str = ""
    """The model before removal."""
    oracle: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A model never taught what was removed; repeat it."""
    forget: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File of what was removed, as FILE or NAME=FILE."""
    retain: str = ""
    """File of what was to stay."""
    budget: Literal["smoke", "standard", "strong"] = "smoke"
    """How hard to try."""
    out: Path | None = None
    """Output folder, a new one."""
    split: str = ""
    """The split.json of the removal, when there is one."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """Device; auto takes an accelerator where there is one."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    workers: int = 0
    """Worker processes; 0 takes one for each core."""
    quiet: bool = False
    """Show no progress."""
    allow_code: bool = False
    """Run code of one's own that the record names."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(AuditOptions, args, "excise audit")
    changes = overrides(rest, flag_names(AuditOptions))
    data = from_folder(options) if options.folder else from_flags(options)
    out = options.out or Path(f"{data['name']}-{options.budget}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    from excise.report.terminal import finish
    from excise.requests.registry import parse_audit
    from excise.run.run import audit

    request = parse_audit(
        override(data, changes), allow_code=options.allow_code, source="excise audit"
    )
    command = "excise audit " + shlex.join(args)
    with progress(out / "events.jsonl", quiet=options.quiet) as emit:
        audit(request, out, workers=options.workers, emit=emit, command=command)
    return finish(out)


def from_flags(options: AuditOptions) -> dict[str, Any]:
    """Return the request that the flags stand for.

    Raises:
        UserError: If a needed flag is missing.
    """
    domain = files_domain(options) | {"sensitive": options.sensitive}
    return _request(options, f"audit-{Path(options.model).name}", domain) | {
        "candidates": {"candidate": options.model},
        "original": {"path": options.original},
        "oracles": list(options.oracle),
    }


def from_folder(options: AuditOptions) -> dict[str, Any]:
    """Return the request that an output folder stands for: its models, rails, data and split.

    Raises:
        UserError: If the folder holds no run, or its models are gone.
    """
    from excise import record

    folder = Path(options.folder)
    made = record.load(folder)
    recipe = recipe_of(folder)
    rails = {model.name: model.path for model in made.models}
    candidates = edited_models(folder, made, recipe)
    domain = dict(recipe["domain"])
    if domain.get("name") == "files" and (folder / "split.json").is_file():
        domain["split"] = str(folder / "split.json")
    return _request(options, f"audit-{folder.resolve().name}", domain) | {
        "title": made.title,
        "candidates": candidates,
        "original": {"path": options.original or rails.get("original", "")},
        "oracles": [path for name, path in rails.items() if name.startswith("oracle")]
        + list(options.oracle),
        "evaluate": recipe.get("evaluate", {}),
        "code": dict(recipe.get("code") or {}),
    }


def _request(options: AuditOptions, name: str, domain: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "domain": domain,
        "audit": {"budget": options.budget},
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device,
    }
