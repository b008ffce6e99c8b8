"""`excise inspect`: what one edit did inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise.cli.options import InspectOptions
from excise.cli.pair import pair_of
from excise.cli.progress import progress
from excise.cli.settings import override
from excise.core.errors import UserError, nearest
from excise.report.terminal import finish
from excise.requests.inspection import InspectRun
from excise.requests.registry import parse_named, registry
from excise.run.inspection import inspect
from excise.run.output import check_out


def main(options: InspectOptions) -> int:
    """Measure one edited model of the pair."""
    data = request_data(options)
    out = options.out or Path(data["name"])
    check_out(out)
    request = parse_named(
        InspectRun,
        override(data, options.settings, InspectRun, registry()),
        allow_code=options.allow_code,
        source="excise inspect",
    )
    with progress(out / "events.jsonl", quiet=options.quiet) as emit:
        inspect(request, out, emit=emit, command=options.command)
    return finish(out)


def request_data(options: InspectOptions) -> dict[str, Any]:
    """Return the request that a command line stands for, as plain data.

    Raises:
        UserError: If it does not say which edited model, or none is called so.
    """
    pair = pair_of(options, options.arm or "edited")
    if not pair.models:
        raise UserError(
            f"{options.folder} holds no edited model; name the output folder of a removal"
        )
    if not options.arm and len(pair.models) > 1:
        known = nearest("", pair.models)
        raise UserError(
            f"{options.folder} holds {len(pair.models)} edited models; choose one by --arm; {known}"
        )
    arm = options.arm or next(iter(pair.models))
    if arm not in pair.models:
        known = nearest(arm, pair.models)
        raise UserError(f"--arm: {options.folder} has no edited model '{arm}'; {known}")
    name, title = f"inspect-{pair.name}", f"Inside {pair.name}"
    if options.folder:
        name, title = f"{name}-{arm}", f"{pair.title}: inside {arm}"
    fields = ["sensitive", "rows", "samples", "seed", "dtype", "device"]
    if options.max_length != type(options).max_length:  # what nobody asked for may be cut
        fields.append("max_length")
    return {
        "name": name,
        "title": title,
        "domain": dict(pair.domain),
        "model": pair.models[arm],
        "arm": arm,
        "original": pair.original_spec,
        "code": dict(pair.code),
        **{field: getattr(options, field) for field in fields},
    }
