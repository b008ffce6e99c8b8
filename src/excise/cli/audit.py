"""`excise audit`: attack a model, whoever edited it, and measure how much comes back."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from excise.cli.jobs import admitted, jobs_of, leave, whole_command
from excise.cli.options import AuditOptions
from excise.cli.pair import pair_of
from excise.cli.progress import progress, show_plan
from excise.cli.settings import override
from excise.core.errors import UserError
from excise.record import load
from excise.requests.audit import AuditRun
from excise.requests.registry import parse_audit, registry
from excise.run.estimate import plan
from excise.run.hosted import count_questions, hosted_of
from excise.run.run import audit


def main(options: AuditOptions) -> int:
    """Attack every edited model of the pair."""
    data = request_data(options)
    out = options.out or Path(f"{data['name']}-{options.budget}")
    jobs = jobs_of(options, out)
    request = parse_audit(
        override(data, options.settings, AuditRun, registry()),
        allow_code=options.allow_code,
        source="excise audit",
    )
    if request.endpoint is not None and (options.dry_run or options.measure):
        for name, count in count_questions(hosted_of(request), request.endpoint, out).items():
            print(f"{name:<22} {count:>7,} questions to {request.endpoint.host}")
        return 0
    if options.dry_run or options.measure:
        show_plan(request, jobs.out, measure=options.measure, quiet=options.quiet)
        return 0
    estimate = None if request.endpoint else plan(request, jobs.out, rows=False)
    with progress(jobs.out / "events.jsonl", quiet=options.quiet, tracker=options.track) as emit:
        if estimate is not None:
            jobs = admitted(jobs, estimate, emit, force=options.force)
        pool = jobs.pool(request.device, emit)
        audit(request, jobs.out, pool, command=whole_command(options.command))
    code = leave(jobs)
    if (
        jobs.shard is None
        and options.folder
        and not options.canary
        and load(Path(options.folder)).kind in ("run", "remove")
    ):
        folder, there = shlex.quote(options.folder), shlex.quote(str(out))
        print(f"card    excise card {folder} --audit {there}")
    return code


def request_data(options: AuditOptions) -> dict[str, Any]:
    """Return the request that a command line stands for, as plain data."""
    check_endpoint(options)
    canary = {"canary": {"arms": canary_arms(options)}} if options.canary else {}
    pair = pair_of(options, "candidate", check=not options.dry_run)
    models: dict[str, Any] = canary
    if not options.canary:
        candidates = candidates_of(options, pair.models)
        models = {"candidates": candidates, "oracles": [*pair.oracles, *options.oracle]}
        models["proxies"] = [*pair.proxies, *options.proxy_oracle]
    return {
        **models,
        "name": f"{'canary' if options.canary else 'audit'}-{pair.name}",
        "title": pair.title,
        "domain": {**pair.domain, **({"sensitive": True} if options.sensitive else {})},
        "endpoint": {"url": options.endpoint, "chat": options.chat} if options.endpoint else None,
        "original": pair.original_spec,
        "audit": {
            "budget": options.budget,
            "attacks": [*pair.attacks],
            "require": options.require,
        },
        "evaluate": dict(pair.evaluate),
        "seed": options.seed,
        "dtype": options.dtype,
        "device": options.device,
        "code": dict(pair.code),
    }


def check_endpoint(options: AuditOptions) -> None:
    """Refuse flags that an audit over an endpoint cannot follow, and --chat without one.

    Raises:
        UserError: Naming the flag.
    """
    if options.chat and not options.endpoint:
        raise UserError(
            "--chat says how an endpoint is asked; give --endpoint URL, or leave it out"
        )
    if not options.endpoint:
        return
    if options.folder:
        raise UserError(
            f"--endpoint is given beside {options.folder}, whose record names folders of models; "
            "give --model, --original and the data in its place"
        )
    for flag in ("shard", "pool"):
        if getattr(options, flag):
            raise UserError(
                f"--{flag} is given beside --endpoint, which is asked by one process; leave it out"
            )
    if options.canary:
        raise UserError(
            "--canary changes weights, which no --endpoint shows; leave one of them out"
        )


def canary_arms(options: AuditOptions) -> dict[str, Any]:
    """Return the methods of an output folder that edit a model, as plain data by name.

    Raises:
        UserError: If there is none, or a flag names a model beside them.
    """
    if not options.folder:
        raise UserError(
            "--canary needs the output folder of excise run or remove, whose record names the "
            "method and its settings; give it in the place of --model"
        )
    for flag in ("oracle", "proxy_oracle", "candidate"):
        if getattr(options, flag):
            raise UserError(
                f"--{flag.replace('_', '-')} is given beside --canary, which makes its models "
                "itself; leave it out"
            )
    runs = load(Path(options.folder)).method_runs
    arms = {run.name: run.method for run in runs if run.method}
    if not arms:
        raise UserError(
            f"{options.folder} names no method, as somebody else made its models; --canary needs "
            "the output folder of excise run or remove"
        )
    edits = {name: arm for name, arm in arms.items() if not _from_scratch(arm)}
    return edits or arms  # none edits a model: the request says so


def _from_scratch(arm: Mapping[str, Any]) -> bool:
    """Return whether a method, or the first of a chain, trains from scratch."""
    first = (arm.get("methods") or [arm])[0]
    cls = registry()["method"].get(str(first.get("name")))
    return getattr(cls, "starts_from", "original") == "scratch"


def candidates_of(options: AuditOptions, models: Mapping[str, str]) -> dict[str, str]:
    """Return the edited models by name: those of the pair, and those of --candidate.

    Raises:
        UserError: If one has no name, or a name is given twice.
    """
    candidates = dict(models)
    for value in options.candidate:
        name, equals, path = value.partition("=")
        if not (name and equals and path) or "/" in name:
            raise UserError(f"--candidate {value}: write NAME=DIR, so that the report can name it")
        if name in candidates:
            raise UserError(f"--candidate: '{name}' is given twice; name each model differently")
        candidates[name] = path
    return candidates
