"""`excise inspect`: what one edit did inside a model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from excise.cli.flags import flag_names, flags, override, overrides, progress
from excise.cli.pair import edited_models, files_domain, recipe_of
from excise.core.errors import UserError, nearest


@dataclass
class InspectOptions:
    """Measure what one edit did inside a model: residual stream, outputs, weights.

    From an output folder everything is read from its record and only --out is written.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = ""
    """Output folder of run, demo, remove or audit."""
    arm: str = ""
    """Which removal of the folder, where it holds several."""
    model: str = ""
    """The edited model, when there is no output folder."""
    original: str = ""
    """The model before the edit."""
    forget: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """File of what was removed, as FILE or NAME=FILE."""
    retain: str = ""
    """File of what was to stay."""
    out: Path | None = None
    """Output folder, a new one."""
    split: str = ""
    """The split.json of the removal, when there is one."""
    rows: int = 256
    """Rows of each side at most."""
    max_length: int = 128
    """Tokens per row."""
    samples: int = 4
    """Rows of each side that are shown token by token and continued."""
    seed: int = 0
    """Seed of the split, where the data is cut here."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    device: str = "auto"
    """Device; auto takes an accelerator where there is one."""
    sensitive: bool = False
    """Keep texts out of record and report."""
    quiet: bool = False
    """Show no progress."""
    allow_code: bool = False
    """Run code of one's own that the record names."""


def main(args: list[str]) -> int:
    """Run the verb."""
    options, rest = flags(InspectOptions, args, "excise inspect")
    changes = overrides(rest, flag_names(InspectOptions))
    data = from_folder(options) if options.folder else from_flags(options)
    out = options.out or Path(data["name"])
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    from excise.report.terminal import finish
    from excise.requests.inspection import InspectRun
    from excise.requests.registry import parse_named
    from excise.run.inspection import inspect

    request = parse_named(
        InspectRun,
        override(data, changes),
        allow_code=options.allow_code,
        source="excise inspect",
    )
    command = "excise inspect " + shlex.join(args)
    with progress(out / "events.jsonl", quiet=options.quiet) as emit:
        inspect(request, out, emit=emit, command=command)
    return finish(out)


def from_flags(options: InspectOptions) -> dict[str, Any]:
    """Return the request that the flags stand for.

    Raises:
        UserError: If a needed flag is missing.
    """
    domain = files_domain(options)
    name = Path(options.model).name
    return _request(options, f"inspect-{name}", domain) | {
        "title": f"Inside {name}",
        "model": options.model,
        "arm": options.arm or "edited",
        "original": {"path": options.original},
    }


def from_folder(options: InspectOptions) -> dict[str, Any]:
    """Return the request that an output folder stands for: its models, data and split.

    Raises:
        UserError: If the folder holds no run, the removal is not named, or its models are gone.
    """
    from excise import record

    folder = Path(options.folder)
    made = record.load(folder)
    recipe = recipe_of(folder)
    models = edited_models(folder, made, recipe)
    if not models:
        raise UserError(f"{folder} holds no edited model; name the output folder of a removal")
    if not options.arm and len(models) > 1:
        raise UserError(f"{folder} holds {len(models)} edits; give --arm, {nearest('', models)}")
    arm = options.arm or next(iter(models))
    if arm not in models:
        raise UserError(f"--arm: {folder} has no edit '{arm}'; {nearest(arm, models)}")
    original = options.original or next((m.path for m in made.models if m.name == "original"), "")
    domain = dict(recipe["domain"])
    if domain.get("name") == "files" and (folder / "split.json").is_file():
        domain["split"] = str(folder / "split.json")
    return _request(options, f"inspect-{folder.resolve().name}-{arm}", domain) | {
        "title": f"{made.title}: inside {arm}",
        "model": models[arm],
        "arm": arm,
        "original": {"path": original},
        "code": dict(recipe.get("code") or {}),
    }


def _request(options: InspectOptions, name: str, domain: dict[str, Any]) -> dict[str, Any]:
    fields = ("sensitive", "rows", "max_length", "samples", "seed", "dtype", "device")
    return {"name": name, "domain": domain, **{f: getattr(options, f) for f in fields}}
