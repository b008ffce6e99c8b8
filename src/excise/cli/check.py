"""`excise check NAME`: validate, estimate, and show a row as the model will see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from excise.cli.options import CheckOptions
from excise.cli.progress import show_plan
from excise.cli.run import recipe_data, recipe_of
from excise.cli.settings import override
from excise.cli.study import is_study, statement, study_of
from excise.core.events import silent
from excise.data.domain import CORE, Row, Rows, all_rows, labelled_text
from excise.data.stream import encode, encode_row, show
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
    estimate.admit(1, silent, force=options.force)
    scratch = request.pretrain if isinstance(request, Recipe) else None
    read = 0 if scratch is None else scratch.max_length
    print_rows(estimate, read)
    if read:
        print_text(estimate, read)
    return 0


def request_of(options: CheckOptions) -> Recipe | AuditRun:
    """Return the recipe that is named, or the request of an audit where a file holds one."""
    if Path(options.name).is_file():
        data = recipe_data(options.name, allow_code=options.allow_code)
        if "candidates" in data:
            changed = override(data, options.settings, AuditRun, registry())
            return parse_audit(changed, allow_code=options.allow_code, source=options.name)
    return recipe_of(options)


def print_rows(estimate: Plan, read: int = 0) -> None:
    """Print how many rows each role has, and a forget row with its scored tokens marked.

    Args:
        estimate: Has domain and tokenizer.
        read: Tokens of a row that models from scratch read at most; 0 where none is trained.
    """
    domain = estimate.domain
    assert domain is not None
    print("\nrows by role")
    for role, rows in domain.roles():
        if rows:
            units = len({row.unit for row in rows})
            print(f"  {role:<22} {len(rows):>7,} rows  {units:>7,} units{_spans_of(rows)}")
    for note in domain.notes:
        print(f"  note: {note}")
    if estimate.tokenizer is None:
        return
    first = next(iter(domain.forget.values()))[0]
    print("\na forget row; scored tokens are marked")
    print_row(first, estimate.tokenizer, sensitive=domain.sensitive, only_spans=True)
    if read and (lost := _behind(all_rows(domain.forget), estimate.tokenizer, read)):
        print(
            f"  note: {lost:,} labelled tokens of forget rows lie behind 'pretrain.max_length' "
            f"({read}) and are never read; cut the texts (?pieces=), or read more of them"
        )


def print_text(estimate: Plan, max_length: int) -> None:
    """Print a text of several rows that models from scratch read, one of both kinds if there is.

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
    print(f"\none of {len(texts):,} texts that models from scratch read; scored tokens are marked")
    print_row((mixed or texts)[0], tokenizer, sensitive=domain.sensitive)


def _behind(rows: Rows, tokenizer: Any, read: int) -> int:
    """Return how many labelled tokens of rows with spans are cut off."""
    whole = encode([row for row in rows if row.spans], tokenizer, max_length=1 << 20)
    return sum(n > CORE for e in whole if isinstance(e.label, tuple) for n in e.label[read:])


def print_row(row: Row, tokenizer: Any, *, sensitive: bool, only_spans: bool = False) -> None:
    """Print a row with its scored tokens marked, and the parts that have labels of their own."""
    shown = show(row, tokenizer, only_spans=only_spans)
    print(shown if not sensitive else "(kept out: the data is sensitive)")
    if row.spans:
        print_spans(row, tokenizer, sensitive=sensitive)


def _spans_of(rows: Rows) -> str:
    """Return how many spans rows have, and the share of their characters; nothing for none."""
    spans = [span for row in rows for span in row.spans if span.capability]
    if not spans:
        return ""
    total = sum(len(labelled_text(row)) for row in rows)
    share = sum(span.end - span.start for span in spans) / total
    return f"  {len(spans):>7,} spans, {100 * share:.0f} % of the text"


def print_spans(row: Row, tokenizer: Any, *, sensitive: bool) -> None:
    """Print the parts of a row that have labels of their own, and the tokens they come to."""
    example = encode_row(row, tokenizer, max_length=1 << 20)
    assert isinstance(example.label, tuple)
    inside = sum(label > CORE for label in example.label)
    cut = f"; {example.cut} of them hold other characters too" if example.cut else ""
    print(f"\nits spans: {inside} of {len(example.label)} tokens are of a capability{cut}")
    text = labelled_text(row)
    for span in row.spans:
        words = "" if sensitive else f"  {text[span.start : span.end]!r}"
        name = span.capability or "core"
        print(f"  characters {span.start}-{span.end}  {name}  {span.confidence:g}{words}")
