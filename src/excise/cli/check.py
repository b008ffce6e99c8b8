"""`excise check NAME`: validate, estimate, and show a row as the model will see it."""

from __future__ import annotations

from pathlib import Path

import yaml

from excise.cli.options import CheckOptions
from excise.cli.progress import show_plan
from excise.cli.run import recipe_data, recipe_of
from excise.cli.settings import override
from excise.cli.study import is_study, statement, study_of
from excise.data.stream import encode, show
from excise.methods.pretraining.pretrain import corpus
from excise.requests.audit import AuditRun
from excise.requests.recipe import Recipe
from excise.requests.registry import parse_audit, registry
from excise.run.estimate import Plan


def main(options: CheckOptions) -> int:
    """Print what a recipe, an audit or a study would do."""
    if is_study(options.name):
        study = study_of(
            options.name, options.settings, full=options.full, allow_code=options.allow_code
        )
        settings = study.model_dump(mode="json", exclude={"name"})
        print(f"{statement(study)}\n\nsettings")
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
        return 0
    request = request_of(options)
    out = options.out or Path("runs") / request.name
    estimate = show_plan(request, out, measure=options.measure, quiet=options.quiet)
    estimate.refuse(force=options.force)
    print_rows(estimate)
    if isinstance(request, Recipe) and request.pretrain is not None:
        print_text(estimate, request.pretrain.max_length)
    return 0


def request_of(options: CheckOptions) -> Recipe | AuditRun:
    """Return the recipe that is named, or the request of an audit where a file holds one."""
    if Path(options.name).is_file():
        data = recipe_data(options.name, allow_code=options.allow_code)
        if "candidates" in data:
            changed = override(data, options.settings, AuditRun, registry())
            return parse_audit(changed, allow_code=options.allow_code, source=options.name)
    return recipe_of(options)


def print_rows(estimate: Plan) -> None:
    """Print how many rows each role has, and a forget row with its scored tokens marked."""
    domain = estimate.domain
    assert domain is not None
    print("\nrows by role")
    for role, rows in domain.roles():
        if rows:
            units = len({row.unit for row in rows})
            print(f"  {role:<22} {len(rows):>7,} rows  {units:>7,} units")
    for note in domain.notes:
        print(f"  note: {note}")
    if estimate.tokenizer is None:
        return
    first = next(iter(domain.forget.values()))[0]
    print("\na forget row; scored tokens are marked")
    shown = show(first, estimate.tokenizer, only_spans=True)
    print(shown if not domain.sensitive else "(kept out: the data is sensitive)")


def print_text(estimate: Plan, max_length: int) -> None:
    """Print a text of several rows that models from scratch read, what is to be forgotten marked.

    Args:
        estimate: Has domain and tokenizer.
        max_length: Tokens that the schedule reads of a text.

    Raises:
        UserError: If a text is longer.
    """
    domain, tokenizer = estimate.domain, estimate.tokenizer
    assert domain is not None
    if domain.rows_per_text == 1 or tokenizer is None:
        return
    texts = corpus(domain)
    encode(texts, tokenizer, max_length=max_length)
    mixed = [row for row in texts if row.spans and len(row.spans) < len(row.targets)]
    print("\na text that models from scratch read; scored tokens to be forgotten are marked")
    shown = show((mixed or texts)[0], tokenizer, only_spans=True)
    print(shown if not domain.sensitive else "(kept out: the data is sensitive)")
